"""Overlap of boxes as numpy arrays, in float64.

Boxes are XYXY in continuous coordinates (a width is ``x2 - x1``). Shapes: R boxes, K pairs.
"""

import numpy as np

from .box_ops import union_boxes

__all__ = ["aligned_iou", "pairwise_iou", "phrase_boxes"]


def aligned_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """Return the IoU of two (..., 4) arrays of boxes that broadcast; 0 where the union is empty."""
    first = np.asarray(boxes1, dtype=np.float64)
    second = np.asarray(boxes2, dtype=np.float64)

    def sides(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        low = np.maximum(a[..., axis], b[..., axis])
        return (np.minimum(a[..., axis + 2], b[..., axis + 2]) - low).clip(min=0)

    intersection = sides(first, second, 0) * sides(first, second, 1)
    union = sides(first, first, 0) * sides(first, first, 1)
    union = union + sides(second, second, 0) * sides(second, second, 1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def pairwise_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """Return the (A, B) IoU of (A, 4) and (B, 4) boxes; 0 where the union is empty."""
    return aligned_iou(np.reshape(boxes1, (-1, 1, 4)), np.reshape(boxes2, (1, -1, 4)))


def phrase_boxes(boxes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the tightest box around subject and object of each pair: (R, 4), (K, 2) -> (K, 4)."""
    return union_boxes(boxes[pairs[:, 0]], boxes[pairs[:, 1]])
