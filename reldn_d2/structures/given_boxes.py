"""Checks of the boxes and classes that a user gives in place of detections.

Shapes: R boxes of one image.
"""

from collections.abc import Sequence
from typing import Any, Union

import numpy as np
import torch

from detectron2.structures import Boxes

from ..utils.image_io import ImageError

__all__ = ["GivenBoxes", "check_boxes", "class_ids"]

GivenBoxes = Union[np.ndarray, torch.Tensor, Sequence[Sequence[float]]]
MIN_SIDE = 0.01  # pixels; a thinner box may vanish when it is scaled in float32


def check_boxes(boxes: GivenBoxes, image_size: tuple[int, int], name: str) -> np.ndarray:
    """Return (R, 4) float64 XYXY boxes, clipped to the image.

    Args:
        boxes: XYXY in pixels of the image.
        image_size: (height, width).
        name: image, for messages.

    Raises:
        ImageError: another shape, values that are not finite, or a box without area in the image.
    """
    if isinstance(boxes, Boxes):
        boxes = boxes.tensor
    if isinstance(boxes, torch.Tensor):
        boxes = boxes.detach().cpu().numpy()
    try:
        boxes = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError):
        raise ImageError(f"{name}: expected boxes as lists of numbers x0, y0, x1, y1") from None
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ImageError(f"{name}: boxes of shape {boxes.shape}; expected (R, 4): x0, y0, x1, y1")
    height, width = image_size
    clipped = boxes.clip(0, [width, height, width, height])
    too_thin = (clipped[:, 2:] - clipped[:, :2] < MIN_SIDE).any(axis=1)
    bad = np.flatnonzero(~np.isfinite(boxes).all(axis=1) | too_thin)
    if len(bad):
        raise ImageError(
            f"{name}: box {bad[0]}, {boxes[bad[0]].tolist()}, has no area within the image of "
            f"{width} x {height} pixels; expected x0, y0, x1, y1"
        )
    return clipped


def class_ids(
    classes: Any, num_boxes: int, thing_classes: Sequence[str], num_classes: int, name: str
) -> list[int]:
    """Return the class id of each given box.

    Args:
        classes: (R,) ids or names.
        num_boxes: R.
        thing_classes: names by id.
        num_classes: number of classes of the model.
        name: image, for messages.

    Raises:
        ImageError: not a list, an unknown class, or not one class per box.
    """
    classes = classes.tolist() if hasattr(classes, "tolist") else classes
    if not isinstance(classes, (list, tuple)):
        raise ImageError(f"{name}: classes is {classes!r}; expected a list of ids or names")
    id_of = {class_name: class_id for class_id, class_name in enumerate(thing_classes)}
    ids = []
    for value in classes:
        class_id = id_of.get(value) if isinstance(value, str) else value
        is_integer = isinstance(class_id, (int, float, np.number)) and class_id == class_id // 1
        if not is_integer or not 0 <= class_id < num_classes:
            known = ", ".join(thing_classes[:8]) or f"0 to {num_classes - 1}"
            raise ImageError(f"{name}: the model has no class {value!r}; it has {known}, ...")
        ids.append(int(class_id))
    if len(ids) != num_boxes:
        raise ImageError(f"{name}: got {len(ids)} classes for {num_boxes} boxes")
    return ids
