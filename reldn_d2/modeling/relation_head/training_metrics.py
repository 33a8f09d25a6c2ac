"""Metrics that show how the relation head trains.

Shapes: P sampled pairs of the batch, C predicates; the last of C + 1 logits is "no relationship".
"""

import torch
from torch import Tensor

from ..losses.contrastive import LOSS_NAMES, ContrastiveGroups, affinity
from .pair_sampling import SampledPairs

__all__ = ["contrastive_metrics", "to_scalars", "training_metrics"]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean of ``values`` where ``mask``; 0 if ``mask`` is False everywhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def training_metrics(logits: Tensor, targets: Tensor, pairs: SampledPairs) -> dict[str, Tensor]:
    """Compute metrics of the pairs of L0.

    Args:
        logits: (P, C + 1) of all sampled pairs.
        targets: (P,) class that L0 asks for; C is "no relationship".
        pairs: the sampled pairs.

    Returns:
        ``num_positive_pairs`` and ``num_negative_pairs`` of L0; ``predicate_accuracy`` on its
        positives; the mean affinities ``affinity_positive`` and ``affinity_negative`` of its pairs.
    """
    positive = pairs.for_predicate & pairs.labels.any(dim=1)
    negative = pairs.for_predicate & ~positive
    phi = affinity(logits)
    is_correct = logits[:, :-1].argmax(dim=1) == targets if len(logits) else targets.bool()
    return {
        "num_positive_pairs": positive.sum(),
        "num_negative_pairs": negative.sum(),
        "predicate_accuracy": _mean(is_correct.float(), positive),
        "affinity_positive": _mean(phi, positive),
        "affinity_negative": _mean(phi, negative),
    }


@torch.no_grad()
def contrastive_metrics(
    logits: Tensor, groups: ContrastiveGroups, alphas: tuple[float, float, float]
) -> dict[str, Tensor]:
    """Compute metrics of L1 to L3.

    Args:
        logits: (P, C + 1) of all sampled pairs.
        groups: of L1 to L3, both sides.
        alphas: required margins of L1 to L3.

    Returns:
        ``affinity_hardest_negative``, the mean affinity of the pairs that set the margins of L1;
        for each loss the number of margins ``NAME_groups``, their mean ``NAME_margin`` and the
        share ``NAME_violated`` of margins below alpha.
    """
    phi, is_hardest = affinity(logits), groups.is_hardest_negative
    metrics = {
        "affinity_hardest_negative": _mean(phi.expand_as(is_hardest[0]), is_hardest[0]),
    }
    for name, alpha, margin, has_margin in zip(LOSS_NAMES, alphas, groups.margins(phi), is_hardest):
        metrics[f"{name}_groups"] = has_margin.sum()
        metrics[f"{name}_margin"] = _mean(margin, has_margin)
        metrics[f"{name}_violated"] = _mean((margin < alpha).float(), has_margin)
    return metrics


def to_scalars(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Bring metrics to the host in one transfer, under ``reldn/`` for the event storage."""
    values = torch.stack([value.float() for value in metrics.values()]).tolist()
    return {f"reldn/{name}": value for name, value in zip(metrics, values)}
