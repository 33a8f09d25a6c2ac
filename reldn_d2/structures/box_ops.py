"""Rules for boxes that several parts of the package share, for torch tensors and numpy arrays.

Boxes are XYXY in continuous coordinates (a width is ``x2 - x1``); both arguments of a function
share one coordinate frame and one type, and their leading dimensions broadcast.
"""

from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["boxes_overlap", "union_boxes"]

Array = TypeVar("Array", Tensor, np.ndarray)


def _library(array: Array) -> ModuleType:
    """Return the library whose functions work on the array."""
    return torch if isinstance(array, Tensor) else np


def union_boxes(boxes1: Array, boxes2: Array) -> Array:
    """Compute the tightest box around both boxes: (..., 4) from two (..., 4)."""
    library = _library(boxes1)
    low = library.minimum(boxes1[..., :2], boxes2[..., :2])
    high = library.maximum(boxes1[..., 2:], boxes2[..., 2:])
    return library.concatenate([low, high], -1)


def boxes_overlap(boxes1: Array, boxes2: Array) -> Array:
    """Tell which boxes have an area in common (IoU > 0): (...) bool from two (..., 4).

    Boxes that only touch do not overlap, and neither does a box without an area.
    """
    library = _library(boxes1)
    # One axis at a time: half the memory of (..., 2) arrays, for all pairs of an image.
    x_overlaps, y_overlaps = (
        library.minimum(boxes1[..., axis + 2], boxes2[..., axis + 2])
        > library.maximum(boxes1[..., axis], boxes2[..., axis])
        for axis in (0, 1)
    )
    return x_overlaps & y_overlaps
