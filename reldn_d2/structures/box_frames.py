"""Recognize boxes that were read in the wrong frame: in another form, scale or unit than declared.

One such box is a mistake of its own; a share of all boxes of a file tells what the file holds.
Shapes: N boxes.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["BOX_FORMS", "BoxDiagnosis", "diagnose_boxes", "expected_box", "outside_problem"]

# The order decides between forms that fit equally well.
BOX_FORMS = {
    "xyxy": "[x0, y0, x1, y1]",
    "xywh": "[x, y, width, height]",
    "yxyx": "[y0, x0, y1, x1]",
    "yyxx": "[y0, y1, x0, x1]",
    "cxcywh": "[center x, center y, width, height]",
}

_MOST = 0.99  # share of boxes that makes a property one of the file
_SUSPICIOUS = 0.05  # share of boxes that do not fit their image
_FEWEST_SUSPICIOUS = 3
_FEWEST_FOR_SCALE = 100  # boxes needed to see how far they reach in their images
_ROUNDING = 0.001
_OUTLIERS = 0.5  # percent


@dataclass(frozen=True)
class BoxDiagnosis:
    """What all boxes of a file look like.

    Attributes:
        message: one line with the shares of boxes and how to fix them.
        form: key of ``BOX_FORMS`` that would be right, in pixels; None if declaring another form
            does not help.
        certain: the boxes cannot be meant as declared. Otherwise they are only suspicious: real
            ones may look the same.
    """

    message: str
    form: str | None
    certain: bool


def diagnose_boxes(
    boxes: np.ndarray, image_sizes: np.ndarray, form: str = "xyxy"
) -> BoxDiagnosis | None:
    """Tell whether the boxes of a file look as if they have another form, unit or scale.

    Recognized are fractions of the image size, another order or meaning of the four numbers, and
    boxes annotated on images of another size. A constant shift by one pixel and swapped axes in
    square images look like valid boxes.

    Args:
        boxes: (N, 4) numbers as they are stored, finite.
        image_sizes: (N, 2) height and width in pixels of each box's image.
        form: declared meaning of the numbers, a key of ``BOX_FORMS``, in pixels.

    Returns:
        None if nothing is suspicious.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    height, width = np.asarray(image_sizes, dtype=np.float64).reshape(-1, 2).T
    sides = np.stack([width, height], axis=1)  # (N, 2) in the order of x and y
    if not len(boxes):
        return None
    return (
        _diagnose_fractions(boxes, sides, form)
        or _diagnose_form(boxes, sides, form)
        or _diagnose_scale(_corners(boxes, form), sides)
    )


def expected_box(form: str = "xyxy") -> str:
    """Return the frame of boxes and how to get there, for messages about boxes outside images."""
    return (
        f"Expected {BOX_FORMS[form]} in pixels of the original image: scale boxes of a resized "
        "image back, and convert boxes of another form"
    )


def outside_problem(
    boxes: np.ndarray, image_sizes: np.ndarray, form: str = "xyxy"
) -> tuple[int, str] | None:
    """Say that most boxes lie mostly outside their images, as boxes in a wrong frame do.

    Args:
        boxes: (N, 4) XYXY.
        image_sizes: (N, 2) height and width of each box's image.
        form: key of ``BOX_FORMS``, what the user's file has, for the message.

    Returns:
        None if at least half of the boxes have at least half of their area within their image;
        otherwise the index of the first that does not, and the message.
    """
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    sizes = np.asarray(image_sizes, dtype=np.float64).reshape(-1, 2)
    inside = corners.clip(0, sizes[:, [1, 0, 1, 0]])
    areas = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (inside, corners)]
    outside = np.flatnonzero(areas[0] < 0.5 * areas[1])
    if len(outside) <= 0.5 * len(corners):
        return None
    first = int(outside[0])
    height, width = sizes[first]
    return first, (
        f"{len(outside)} of {len(corners)} boxes lie mostly outside their image, e.g. "
        f"{corners[first].tolist()} (corners) in one of {width:g} x {height:g} pixels. "
        f"{expected_box(form)}."
    )


def _corners(boxes: np.ndarray, form: str) -> np.ndarray:
    """Convert (N, 4) numbers of a form to XYXY."""
    if form == "yxyx":
        return boxes[:, [1, 0, 3, 2]]
    if form == "yyxx":
        return boxes[:, [2, 0, 3, 1]]
    if form == "xywh":
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    if form == "cxcywh":
        half = boxes[:, 2:] / 2
        return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)
    return boxes


def _misfits(boxes: np.ndarray, sides: np.ndarray, form: str, slack: float) -> np.ndarray:
    """Return (N,) bool: boxes without an area, or beyond their image by more than rounding.

    Args:
        boxes: (N, 4) in the form ``form``.
        sides: (N, 2) width and height of the images.
        slack: allowed beyond the image in addition to 2 % of its sides.
    """
    corners = _corners(boxes, form)
    low, high = corners[:, :2], corners[:, 2:]
    beyond = (low < -0.02 * sides - slack) | (high > 1.02 * sides + slack)
    return ((high <= low) | beyond).any(axis=1)


def _best_form(
    boxes: np.ndarray, sides: np.ndarray, form: str, slack: float
) -> tuple[str, float, float]:
    """Return the form that fits, the share of misfits as declared and the share in that form.

    The declared form is returned unless another one fits much better.
    """
    shares = {
        name: float(_misfits(boxes, sides, name, slack).mean()) for name in (form, *BOX_FORMS)
    }
    best = min(BOX_FORMS, key=shares.__getitem__)
    if (
        shares[form] < _SUSPICIOUS
        or shares[form] * len(boxes) < _FEWEST_SUSPICIOUS
        or shares[best] > shares[form] / 10
    ):
        best = form
    return best, shares[form], shares[best]


def _diagnose_fractions(boxes: np.ndarray, sides: np.ndarray, form: str) -> BoxDiagnosis | None:
    within = ((boxes >= -_ROUNDING) & (boxes <= 1 + _ROUNDING)).all(axis=1)
    large_images = (sides > 2).all(axis=1)
    with_area = ~_misfits(boxes, np.ones_like(sides), form, _ROUNDING)
    if (within & large_images).mean() < _MOST or not with_area.any():
        return None
    actual, _, _ = _best_form(boxes, np.ones_like(sides), form, _ROUNDING)
    kind = "" if actual == form else f" in the form {BOX_FORMS[actual]}"
    return BoxDiagnosis(
        f"{within.mean():.1%} of the {len(boxes)} boxes lie within [0, 1]: they look like "
        f"fractions of the image size{kind}. Multiply x by the width and y by the height of the "
        f"image, and store {BOX_FORMS[form]} in pixels.",
        form=None,
        certain=True,
    )


def _diagnose_form(boxes: np.ndarray, sides: np.ndarray, form: str) -> BoxDiagnosis | None:
    actual, declared_share, actual_share = _best_form(boxes, sides, form, slack=1.0)
    if actual == form:
        return None
    return BoxDiagnosis(
        f"{declared_share:.1%} of the {len(boxes)} boxes do not fit into their images as "
        f"{BOX_FORMS[form]}, but only {actual_share:.1%} as {BOX_FORMS[actual]}: they look like "
        f"{BOX_FORMS[actual]}. Convert them to {BOX_FORMS[form]}.",
        form=actual,
        certain=True,
    )


def _diagnose_scale(corners: np.ndarray, sides: np.ndarray) -> BoxDiagnosis | None:
    if len(corners) < _FEWEST_FOR_SCALE:
        return None
    start = np.percentile(corners[:, :2] / sides, _OUTLIERS, axis=0)  # left, top
    reach = np.percentile(corners[:, 2:] / sides, 100 - _OUTLIERS, axis=0)  # right, bottom
    beyond = (corners[:, 2:] > 1.02 * sides + 1).any(axis=1).mean()
    extent = f"{reach[0]:.2f} times the width and {reach[1]:.2f} times the height of their images"
    if (reach > 1.05).all() and beyond > _SUSPICIOUS and (start > -0.02).all():
        return BoxDiagnosis(
            f"{beyond:.1%} of the {len(corners)} boxes extend beyond their images, up to {extent}: "
            "they look as if they were annotated on larger images. Scale them by image size / "
            "annotated size.",
            form=None,
            certain=False,
        )
    # Images are framed alike on all sides, so boxes that touch the left and the top but never come
    # near the right and the bottom were shrunk.
    if (reach < 0.9).all() and (start < (1 - reach) / 5).all():
        return BoxDiagnosis(
            f"the {len(corners)} boxes touch the left and the top of their images, but reach only "
            f"{extent}: they look like percentages, or as if they were annotated on smaller "
            "images. Scale them by image size / annotated size.",
            form=None,
            certain=False,
        )
    return None
