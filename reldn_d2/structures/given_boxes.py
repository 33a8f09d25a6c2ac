"""Checks of the boxes, classes and scores that a user gives in place of a detector's.

Shapes: R boxes of one image.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Union

import numpy as np
import torch

from detectron2.structures import Boxes

from ..utils.image_io import ImageError
from .box_frames import expected_box, outside_problem
from .class_matching import find_class, similar_names

__all__ = [
    "ENTITY_KEYS",
    "GivenBoxes",
    "GivenEntities",
    "ModelClasses",
    "check_detections",
    "check_inside",
    "check_keys",
    "check_size",
    "to_array",
]

logger = logging.getLogger(__name__)

GivenBoxes = Union[np.ndarray, torch.Tensor, Sequence[Sequence[float]]]
ENTITY_KEYS = ("boxes", "classes", "scores")
MIN_SIDE = 0.01  # pixels; a thinner box may vanish when it is scaled in float32
# float32, in which the model computes, has every whole pixel up to here and overflows far beyond.
MAX_SIDE = 2**24
_ROUNDING = 1.0  # pixels that a box may extend beyond its image without a warning


class ModelClasses(NamedTuple):
    """The entity classes of a model."""

    count: int
    names: Sequence[str]  # by id; may be empty


class GivenEntities(NamedTuple):
    """Checked entities of one image, in pixels of the image."""

    boxes: np.ndarray  # (R, 4) float64 XYXY as given, which may extend beyond the image
    clipped: np.ndarray  # (R, 4), the part within the image
    classes: np.ndarray | None  # (R,) int64; None if the model has to classify them
    scores: np.ndarray | None  # (R,) float32 in [0, 1]; None if they were not given

    @classmethod
    def from_user(
        cls,
        boxes: GivenBoxes,
        classes: Any,
        scores: Any,
        image_size: tuple[int, int],
        known: ModelClasses,
        name: str,
    ) -> "GivenEntities":
        """Check boxes that replace detections.

        Args:
            boxes: (R, 4) XYXY in pixels of the image.
            classes: (R,) ids or names; None if the model has to classify the boxes.
            scores: (R,) in [0, 1]; None if they are unknown.
            image_size: (height, width).
            known: the model's classes.
            name: image, for messages.

        Raises:
            ImageError: other shapes, types or lengths, an unknown class, values that are not
                finite, a score outside [0, 1], scores without classes, a box without area in the
                image, or boxes most of which lie mostly outside it.
        """
        if scores is not None and classes is None:
            raise ImageError(
                f"{name}: scores were given without classes; give both, or neither to classify and "
                "score the boxes with the model's detector"
            )
        boxes = to_array(boxes, name)
        height, width = image_size
        if len(boxes) and boxes.min() >= 0 and boxes.max() <= 1:
            raise ImageError(
                f"{name}: all {len(boxes)} boxes lie within [0, 1]: they look divided by the "
                "image's size; multiply x by its width and y by its height in pixels"
            )
        clipped = boxes.clip(0, [width, height, width, height])
        too_thin = (clipped[:, 2:] - clipped[:, :2] < MIN_SIDE).any(axis=1)
        bad = np.flatnonzero(too_thin)
        if len(bad):
            raise ImageError(
                f"{name}: box {bad[0]}, {boxes[bad[0]].tolist()}, has no area within the image of "
                f"{width} x {height} pixels. {expected_box()}."
            )
        check_inside(boxes, image_size, name)
        beyond = np.flatnonzero((np.abs(boxes - clipped) > _ROUNDING).any(axis=1))
        if len(beyond):
            logger.warning(
                f"{name}: {len(beyond)} of {len(boxes)} given boxes extend beyond the image of "
                f"{width} x {height} pixels, e.g. {boxes[beyond[0]].tolist()}. Expected x0, y0, "
                "x1, y1 in pixels of the image; the model sees the part within the image."
            )
        return cls(
            boxes,
            clipped,
            None if classes is None else _class_ids(classes, len(boxes), known, name),
            None if scores is None else _check_scores(scores, len(boxes), name),
        )


def check_detections(
    detections: Mapping[str, Any], known: ModelClasses, name: str
) -> dict[str, np.ndarray]:
    """Check a detector's output as :func:`reldn_d2.data.detection_files.load_detections` gives it.

    Args:
        detections: ``boxes``, ``classes`` and ``scores`` as for :meth:`GivenEntities.from_user`.
            Boxes may lie anywhere; the part within the image is used.
        known: the model's classes.
        name: image, for messages.

    Returns:
        ``boxes`` (R, 4) float32, ``classes`` (R,) int64, ``scores`` (R,) float32.

    Raises:
        ImageError: not exactly these keys, or unusable values.
    """
    check_keys(detections, ENTITY_KEYS, ENTITY_KEYS, f"{name}: detections")
    boxes = to_array(detections["boxes"], name)
    swapped = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(axis=1))
    if len(swapped):
        raise ImageError(
            f"{name}: the corners of box {swapped[0]}, {boxes[swapped[0]].tolist()}, are swapped; "
            "expected x0, y0, x1, y1"
        )
    return {
        "boxes": boxes.astype(np.float32),
        "classes": _class_ids(detections["classes"], len(boxes), known, name),
        "scores": _check_scores(detections["scores"], len(boxes), name),
    }


def check_inside(boxes: np.ndarray, image_size: tuple[int, int], name: str) -> None:
    """Raise ImageError if most boxes lie mostly outside the image of (height, width) pixels."""
    problem = outside_problem(boxes, np.tile(image_size, (len(boxes), 1)))
    if problem is not None:
        raise ImageError(f"{name}: {problem[1]}")


def check_keys(
    values: Any, allowed: Collection[str], required: Collection[str], where: str
) -> None:
    """Raise ImageError if ``values`` is not a mapping, has unknown keys or lacks a required one."""
    if not isinstance(values, Mapping):
        raise ImageError(
            f"{where}: expected an object with {', '.join(allowed)}, found a "
            f"{type(values).__name__}"
        )
    unknown = [repr(key) for key in values if key not in allowed]
    if unknown:
        raise ImageError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(allowed)}")
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise ImageError(f"{where}: {', '.join(missing)} missing")


def check_size(size: Any, name: str) -> tuple[int, int] | None:
    """Return (height, width) of an image as the user gave it; None if it was not given.

    Raises:
        ImageError: not two numbers between 1 and ``MAX_SIDE``.
    """
    if size is None:
        return None
    try:
        height, width = (0 if isinstance(value, str) else int(value) for value in size)
    except (OverflowError, TypeError, ValueError):
        height = width = 0
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise ImageError(
            f"{name}: size is {size!r}; expected height and width in pixels, at most {MAX_SIDE}"
        )
    return height, width


def to_array(boxes: GivenBoxes, name: str) -> np.ndarray:
    """Return (R, 4) float64 boxes.

    Raises:
        ImageError: another shape or type, or coordinates that are not finite or beyond
            ``MAX_SIDE``.
    """
    if isinstance(boxes, Boxes):
        boxes = boxes.tensor
    if isinstance(boxes, torch.Tensor):
        boxes = boxes.detach().cpu().numpy()
    try:
        boxes = np.array(boxes, dtype=np.float64)
    except (OverflowError, TypeError, ValueError):
        raise ImageError(f"{name}: expected boxes as lists of numbers x0, y0, x1, y1") from None
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ImageError(f"{name}: boxes of shape {boxes.shape}; expected (R, 4): x0, y0, x1, y1")
    infinite = np.flatnonzero(~np.isfinite(boxes).all(axis=1))
    if len(infinite):
        raise ImageError(
            f"{name}: box {infinite[0]}, {boxes[infinite[0]].tolist()}, is not finite; expected "
            "x0, y0, x1, y1"
        )
    huge = np.flatnonzero((np.abs(boxes) > MAX_SIDE).any(axis=1))
    if len(huge):
        raise ImageError(
            f"{name}: box {huge[0]}, {boxes[huge[0]].tolist()}, has coordinates beyond {MAX_SIDE}; "
            "expected x0, y0, x1, y1 in pixels"
        )
    return boxes


def _class_ids(classes: Any, num_boxes: int, known: ModelClasses, name: str) -> np.ndarray:
    """Return the (R,) class ids of given boxes, from ids or names (see :func:`.find_class`)."""
    classes = _to_list(classes, "classes", "ids or names", name)
    ids = []
    for value in classes:
        class_id = find_class(value, known.names) if isinstance(value, str) else value
        is_integer = isinstance(class_id, (int, float, np.number)) and class_id == class_id // 1
        if not is_integer or not 0 <= class_id < known.count:
            raise ImageError(f"{name}: the model has no class {value!r}; {_hint(value, known)}")
        ids.append(int(class_id))
    if len(ids) != num_boxes:
        raise ImageError(f"{name}: got {len(ids)} classes for {num_boxes} boxes")
    return np.array(ids, dtype=np.int64)


def _hint(value: Any, known: ModelClasses) -> str:
    """Say which class may be meant, or which classes there are."""
    if isinstance(value, str) and known.names:
        similar = similar_names(value, known.names)
        if similar:
            return f"did you mean {similar}?"
        shown = ", ".join(known.names[:8])
        return f"its {known.count} classes are {shown}" + (", ..." if known.count > 8 else "")
    return f"its ids are 0 to {known.count - 1}"


def _check_scores(scores: Any, num_boxes: int, name: str) -> np.ndarray:
    """Return the (R,) float32 scores of given boxes."""
    scores = _to_list(scores, "scores", "numbers between 0 and 1", name)
    for value in scores:
        if not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
            raise ImageError(f"{name}: the score {value!r} is not a number between 0 and 1")
    if len(scores) != num_boxes:
        raise ImageError(f"{name}: got {len(scores)} scores for {num_boxes} boxes")
    return np.array(scores, dtype=np.float32)


def _to_list(values: Any, what: str, expected: str, name: str) -> list[Any] | tuple[Any, ...]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        raise ImageError(f"{name}: {what} is {values!r}; expected a list of {expected}")
    return values
