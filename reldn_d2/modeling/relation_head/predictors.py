"""The three modules that score the predicates of pairs: visual, semantic, spatial (section 4).

Shapes: R entities, U union boxes, P pairs, d values per ROI vector, K entity classes, C predicates.
Boxes are XYXY in pixels of the network's input.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...structures.box_ops import union_boxes

__all__ = [
    "SPATIAL_FEATURE_SIZE",
    "SemanticModule",
    "SpatialModule",
    "VisualModule",
    "box_position",
    "spatial_features",
    "without_last_relu",
]


class VisualModule(nn.Module):
    """MLP 3d - 3d/2 - d - (C + 1) on <subject, predicate, object>, and two linear skips.

    The first layer is linear in its three parts, so each part is applied once per entity or union
    box instead of once per pair; the same holds for the skips.
    """

    def __init__(
        self,
        vector_size: int,
        num_predicates: int,
        *,
        spo: bool = True,
        subject_skip: bool = True,
        object_skip: bool = True,
    ):
        """
        Args:
            vector_size: d.
            num_predicates: C.
            spo, subject_skip, object_skip: which of the three summands to use.
        """
        super().__init__()
        num_logits = num_predicates + 1
        self.vector_size = vector_size
        self.first = nn.Linear(3 * vector_size, 3 * vector_size // 2) if spo else None
        self.rest = (
            nn.Sequential(
                nn.LeakyReLU(0.1),
                nn.Linear(3 * vector_size // 2, vector_size),
                nn.LeakyReLU(0.1),
                nn.Linear(vector_size, num_logits),
            )
            if spo
            else None
        )
        self.subject_skip = nn.Linear(vector_size, num_logits) if subject_skip else None
        self.object_skip = nn.Linear(vector_size, num_logits) if object_skip else None

    def forward(
        self,
        subject_vectors: Tensor | None,
        object_vectors: Tensor | None,
        union_vectors: Tensor | None,
        subjects: Tensor,
        objects: Tensor,
        union: Tensor | None,
    ) -> Tensor:
        """Score the pairs.

        Args:
            subject_vectors, object_vectors: (R, d), each entity in that role; None if no enabled
                part reads it.
            union_vectors: (U, d), of the distinct union boxes; None without SPO.
            subjects, objects: (P,) int64 indices into the R entities.
            union: (P,) int64, each pair's union box; None without SPO, or if U = P and the union
                boxes are in the order of the pairs.

        Returns:
            (P, C + 1) logits.
        """
        logits = 0
        if self.first is not None:
            from_subject, from_predicate, from_object = self.first.weight.split(
                self.vector_size, dim=1
            )
            # first(cat([s, u, o])) = W_u u + b + W_s s + W_o o
            hidden = F.linear(union_vectors, from_predicate, self.first.bias)
            hidden = hidden if union is None else hidden[union]
            hidden = hidden + F.linear(subject_vectors, from_subject)[subjects]
            hidden = hidden + F.linear(object_vectors, from_object)[objects]
            logits = logits + self.rest(hidden)
        if self.subject_skip is not None:
            logits = logits + self.subject_skip(subject_vectors)[subjects]
        if self.object_skip is not None:
            logits = logits + self.object_skip(object_vectors)[objects]
        return logits


def without_last_relu(box_head: nn.Sequential) -> nn.Sequential:
    """Replace the ReLU at the end of a box head by the identity (the released ``NO_FC7_RELU``).

    Raises:
        ValueError: if the head does not end in a ReLU.
    """
    name, last = list(box_head.named_children())[-1]
    if not isinstance(last, nn.ReLU):
        raise ValueError(
            f"MODEL.ROI_RELATION_HEAD.NO_FC7_RELU is on, but {type(box_head).__name__} ends in "
            f"{type(last).__name__}, not in a ReLU. Set the key to False for this box head."
        )
    setattr(box_head, name, nn.Identity())
    return box_head


class SemanticModule(nn.Module):
    """Log-frequencies of predicates given subject and object class, as an embedding.

    The table is counted from the training annotations once (:meth:`set_log_frequencies`) and then
    saved in the checkpoint; the buffer ``counted`` is True from then on.
    """

    def __init__(self, num_classes: int, num_predicates: int, freeze: bool = False):
        """
        Args:
            num_classes: K.
            num_predicates: C.
            freeze: keep the table as counted instead of training it further.
        """
        super().__init__()
        self.num_classes = num_classes
        self.num_predicates = num_predicates
        self.table = nn.Embedding(num_classes * num_classes, num_predicates + 1)
        nn.init.zeros_(self.table.weight)
        self.table.weight.requires_grad_(not freeze)
        self.register_buffer("counted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def set_log_frequencies(self, log_frequencies: Tensor) -> None:
        """Fill the table.

        Args:
            log_frequencies: (K, K, C + 1), see :func:`reldn_d2.data.frequency.log_frequencies`.

        Raises:
            ValueError: if the shape differs.
        """
        expected = (self.num_classes, self.num_classes, self.num_predicates + 1)
        if tuple(log_frequencies.shape) != expected:
            raise ValueError(
                f"The frequency table has shape {tuple(log_frequencies.shape)}, but the model, "
                f"with {self.num_classes} classes and {self.num_predicates} predicates, needs "
                f"{expected}. Count it on the dataset that the config names."
            )
        self.table.weight.copy_(log_frequencies.flatten(0, 1))
        self.counted.fill_(True)

    def forward(self, subject_classes: Tensor, object_classes: Tensor) -> Tensor:
        """Look up the logits of the pairs' classes.

        Args:
            subject_classes, object_classes: (P,) int64 in ``[0, K)``.

        Returns:
            (P, C + 1) logits.
        """
        return self.table(subject_classes * self.num_classes + object_classes)


logger = logging.getLogger(__name__)

SPATIAL_FEATURE_SIZE = 28
_SMALLEST_SIDE = 1.0  # pixels; minimum width and height of a box in a denominator


def _box_delta(first: Tensor, second: Tensor) -> Tensor:
    """Compute the released code's form of Eq 9 between box centres: (P, 6).

    The offset from the first to the second box in units of the first, the logarithms of the ratios
    of their sides, and the offset back in units of the second box.
    """
    size1 = (first[:, 2:] - first[:, :2]).clamp(min=_SMALLEST_SIDE)
    size2 = (second[:, 2:] - second[:, :2]).clamp(min=_SMALLEST_SIDE)
    offset = (second[:, :2] + second[:, 2:] - first[:, :2] - first[:, 2:]) / 2
    return torch.cat([offset / size1, torch.log(size2 / size1), -offset / size2], dim=1)


def box_position(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Compute Eq 10, corners and area as shares of the image: (P, 5) from (P, 4) and (P, 2)."""
    relative = boxes / image_sizes.flip(1).repeat(1, 2)
    area = (relative[:, 2:] - relative[:, :2]).prod(dim=1, keepdim=True)
    return torch.cat([relative, area], dim=1)


def spatial_features(subject_boxes: Tensor, object_boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Compute Eq 11 in its 28-d form ``[D(s, o), D(s, u), D(u, o), c(s), c(o)]``.

    The order and the signs are those of the released code: ``D(1, 2)`` is ``[(x2 - x1) / w1,
    (y2 - y1) / h1, log(w2 / w1), log(h2 / h1), (x1 - x2) / w2, (y1 - y2) / h2]`` with the centres
    (x, y) of the boxes; ``c`` is Eq 10 and ``u`` the union box.

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
            box_position(subject_boxes, image_sizes),
            box_position(object_boxes, image_sizes),
        ],
        dim=1,
    )


class SpatialModule(nn.Sequential):
    """MLP 28-64-64-(C + 1) with LeakyReLU(0.1) on :func:`spatial_features`.

    The buffer ``feature_version`` says which order and signs of the features the weights expect.
    State dicts of version 1 lack it; their weights are converted when they are loaded.
    """

    FEATURE_VERSION = 2

    def __init__(self, num_predicates: int, hidden_dim: int = 64):
        super().__init__(
            nn.Linear(SPATIAL_FEATURE_SIZE, hidden_dim),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden_dim, hidden_dim),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden_dim, num_predicates + 1),
        )
        self.register_buffer("feature_version", torch.tensor(self.FEATURE_VERSION))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        version, weight = f"{prefix}feature_version", f"{prefix}0.weight"
        if version not in state_dict:
            state_dict[version] = torch.tensor(self.FEATURE_VERSION)
            if weight in state_dict:
                state_dict[weight] = _convert_first_layer(state_dict[weight])
                logger.info(
                    f"Converted {weight} to the current order and signs of the spatial features; "
                    "the predictions stay the same."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _convert_first_layer(weight: Tensor) -> Tensor:
    """Convert the first layer from version 1 of the spatial features to version 2.

    Version 1 of ``D(1, 2)`` had its two offsets exchanged and the logarithms negated.

    Args:
        weight: (h, 28) for version 1; unchanged.

    Returns:
        (h, 28), which gives the same values on features of version 2.
    """
    deltas, positions = weight[:, :18].unflatten(1, (3, 3, 2)), weight[:, 18:]
    offset2, logarithm, offset1 = deltas.unbind(2)  # by the size of the second, of the first box
    converted = torch.stack([offset1, -logarithm, offset2], dim=2)
    return torch.cat([converted.flatten(1), positions], dim=1)
