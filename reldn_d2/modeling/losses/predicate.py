"""The predicate loss L0: cross entropy over predicates.

L3, the predicate class aware contrastive loss, is in :mod:`.contrastive`.

Shapes: P pairs, C predicates; the last of C + 1 logits is "no relationship".
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["draw_predicate_targets", "predicate_loss"]


def draw_predicate_targets(labels: Tensor) -> Tensor:
    """Draw one target class per pair: one of its predicates at random, or "no relationship".

    Args:
        labels: (P, C) bool, the label set of each pair.

    Returns:
        (P,) int64 in ``[0, C]``; C is "no relationship".
    """
    num_predicates = labels.shape[1]
    # The label with the largest random key is a uniform choice among the labels.
    keys = torch.rand(labels.shape, device=labels.device).masked_fill(~labels, -1.0)
    return torch.where(labels.any(dim=1), keys.argmax(dim=1), num_predicates)


def predicate_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Compute the weighted sum of cross entropies, in float32.

    Args:
        logits: (P, C + 1).
        targets: (P,) int64 in ``[0, C]``.
        weights: (P,); the head gives each image with pairs the same total weight.

    Returns:
        Scalar; zero (with a gradient of zero) if there is no pair.
    """
    if logits.shape[0] == 0:
        return logits.float().sum() * 0.0
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum()
