"""Spatial module: what the boxes of a pair say about its predicate (section 4, Eq 9-11).

Shapes: P pairs, C predicates. Boxes are XYXY; boxes and image sizes share one coordinate frame.
"""

import torch
from torch import Tensor, nn

from .pairs import union_boxes

__all__ = ["SPATIAL_FEATURE_SIZE", "SpatialModule", "spatial_features"]

SPATIAL_FEATURE_SIZE = 28
_SMALLEST_SIDE = 1.0  # pixels; a box is taken as at least so wide and high where it divides


def _box_delta(first: Tensor, second: Tensor) -> Tensor:
    """Eq 9 between box centres, and the two offsets seen from the other box: (P, 6)."""
    size1 = (first[:, 2:] - first[:, :2]).clamp(min=_SMALLEST_SIDE)
    size2 = (second[:, 2:] - second[:, :2]).clamp(min=_SMALLEST_SIDE)
    offset = (first[:, :2] + first[:, 2:] - second[:, :2] - second[:, 2:]) / 2
    return torch.cat([offset / size2, torch.log(size1 / size2), -offset / size1], dim=1)


def _box_position(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Eq 10: corners and area as shares of the image: (P, 5)."""
    relative = boxes / image_sizes.flip(1).repeat(1, 2)
    area = (relative[:, 2:] - relative[:, :2]).prod(dim=1, keepdim=True)
    return torch.cat([relative, area], dim=1)


def spatial_features(subject_boxes: Tensor, object_boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Eq 11 in its 28-d form ``[D(s, o), D(s, u), D(u, o), c(s), c(o)]``.

    ``D`` are the four numbers of Eq 9, its offsets taken between box centres, followed by the two
    offsets in units of the first box's size; ``u`` is the union box.

    Args:
        subject_boxes, object_boxes: (P, 4).
        image_sizes: (P, 2) height and width of the pair's image.

    Returns:
        (P, 28).
    """
    union = union_boxes(subject_boxes, object_boxes)
    return torch.cat(
        [
            _box_delta(subject_boxes, object_boxes),
            _box_delta(subject_boxes, union),
            _box_delta(union, object_boxes),
            _box_position(subject_boxes, image_sizes),
            _box_position(object_boxes, image_sizes),
        ],
        dim=1,
    )


class SpatialModule(nn.Sequential):
    """MLP 28-64-64-(C + 1) with LeakyReLU(0.1) on :func:`spatial_features`."""

    def __init__(self, num_predicates: int, hidden_dim: int = 64):
        super().__init__(
            nn.Linear(SPATIAL_FEATURE_SIZE, hidden_dim),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden_dim, hidden_dim),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden_dim, num_predicates + 1),
        )
