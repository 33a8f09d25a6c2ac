"""Visual module: what the pair looks like (section 4).

Shapes: R entities, U union boxes, P pairs, d numbers an ROI vector, C predicates.
"""

from typing import Optional

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VisualModule", "without_last_relu"]


class VisualModule(nn.Module):
    """MLP 3d - 3d/2 - d - (C + 1) on <subject, predicate, object>, and two linear skips.

    The first layer is linear in its three parts, so these are applied once an entity and once a
    union box rather than once a pair; the same holds for the skips.
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
            spo, subject_skip, object_skip: which of the three summands there are.
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
        subject_vectors: Optional[Tensor],
        object_vectors: Optional[Tensor],
        union_vectors: Optional[Tensor],
        subjects: Tensor,
        objects: Tensor,
        union: Optional[Tensor],
    ) -> Tensor:
        """
        Args:
            subject_vectors, object_vectors: (R, d), each entity in that role; None where no
                enabled part reads it.
            union_vectors: (U, d), of the distinct union boxes; None without SPO.
            subjects, objects: (P,) int64, the pairs, as indices into the R entities.
            union: (P,) int64, each pair's union box; None where U = P and they are in the order of
                the pairs, and without SPO.

        Returns:
            (P, C + 1) logits.
        """
        logits = 0
        if self.first is not None:
            from_subject, from_predicate, from_object = self.first.weight.split(
                self.vector_size, dim=1
            )
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
    """Replace the ReLU that ends a box head by the identity (the released ``NO_FC7_RELU``).

    Raises:
        ValueError: the head does not end in a ReLU.
    """
    name, last = list(box_head.named_children())[-1]
    if not isinstance(last, nn.ReLU):
        raise ValueError(
            f"MODEL.ROI_RELATION_HEAD.NO_FC7_RELU is on, but {type(box_head).__name__} ends in "
            f"{type(last).__name__}, not in a ReLU. Set the key to False for this box head."
        )
    setattr(box_head, name, nn.Identity())
    return box_head
