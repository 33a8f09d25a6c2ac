"""Plain formulations, which the benchmarks compare with: written for clearness, not for speed."""

from typing import Any, Callable, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reldn_d2.modeling.losses import AnchorSides

__all__ = ["losses_in_loops"]


def _ranking_loss(
    logits: Tensor,
    labels: Tensor,
    anchor_of: Tensor,
    sampled: Tensor,
    alpha: float,
    groups_of: Callable[[Tensor, Tensor], List[Tuple[Tensor, Tensor]]],
) -> Tensor:
    """One loss of one side: anchor by anchor, group by group, the pairs found are appended."""
    phi = 1 - logits.float().softmax(dim=1)[:, -1]
    is_positive = labels.any(dim=1)
    # One margin that asks for nothing, lest the mean be over nothing.
    low, high = phi.new_ones(1), phi.new_zeros(1)
    for anchor in anchor_of[sampled].unique():
        mine = sampled & (anchor_of == anchor)
        positive = torch.where(mine & is_positive)[0]
        negative = torch.where(mine & ~is_positive)[0]
        if len(positive) == 0 or len(negative) == 0:
            continue
        for of_positive, of_negative in groups_of(positive, negative):
            if len(of_negative):
                low = torch.cat([low, phi[of_positive].min()[None]])
                high = torch.cat([high, phi[of_negative].max()[None]])
    return F.margin_ranking_loss(low, high, torch.ones_like(low), margin=alpha)


def losses_in_loops(
    logits: Tensor,
    labels: Tensor,
    sides: AnchorSides,
    *,
    alphas: Tuple[float, float, float] = (0.2, 0.2, 0.2),
    **_: Any,
) -> List[Tensor]:
    """L1, L2, L3 of one image in the manner of the released code, with its normalisation."""
    predicted = logits[:, :-1].argmax(dim=1)
    losses = [logits.new_zeros((), dtype=torch.float32) for _ in alphas]
    for sampled, anchor, other in zip(sides.sampled, sides.anchor, sides.other_class):

        def alone(positive, negative):
            return [(positive, negative)]

        def by_class(positive, negative, classes=other):
            return [
                (positive[classes[positive] == c], negative[classes[negative] == c])
                for c in classes[positive].unique()
            ]

        def by_predicate(positive, negative):
            return [
                (positive[labels[positive, e]], negative[predicted[negative] == e])
                for e in torch.where(labels[positive].any(dim=0))[0]
            ]

        for i, groups_of in enumerate((alone, by_class, by_predicate)):
            losses[i] = losses[i] + _ranking_loss(
                logits, labels, anchor, sampled, alphas[i], groups_of
            )
    return losses
