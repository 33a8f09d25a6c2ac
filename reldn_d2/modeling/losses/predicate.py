"""The predicate loss L0: cross entropy over predicates.

L3, the predicate class aware contrastive loss, is in :mod:`.contrastive`.

Shapes: P pairs, C predicates; the last of C + 1 logits is "no relationship".
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["class_balanced_weights", "draw_predicate_targets", "predicate_loss"]


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


def class_balanced_weights(predicate_counts: Tensor, beta: float) -> Tensor:
    """Compute a weight per class from the effective number of its relations.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (2019): n relations of
    one predicate count as ``(1 - beta^n) / (1 - beta)``, and its weight is the inverse of that.

    The weights are scaled to a mean of 1 over the relations of the training set, so that positive
    pairs together keep their share of the loss. "No relationship" has weight 1.

    Args:
        predicate_counts: (C,) relations of each predicate in the training set; a predicate without
            any gets the weight of one with a single relation.
        beta: in [0, 1); 0 gives equal weights.

    Returns:
        (C + 1,) float32.
    """
    counts = predicate_counts.double()
    effective = (1.0 - beta ** counts.clamp(min=1.0)) / (1.0 - beta)
    weights = 1.0 / effective
    mean = (weights * counts).sum() / counts.sum().clamp(min=1.0)
    weights = weights / torch.where(mean > 0, mean, 1.0)
    return torch.cat([weights, weights.new_ones(1)]).float()


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
