"""What can be watched while the relation head trains."""

import torch
from torch import Tensor

from ..losses.contrastive import LOSS_NAMES, ContrastiveGroups, affinity
from .pair_sampling import SampledPairs

__all__ = ["training_statistics"]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask``; 0 over nothing."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def training_statistics(
    logits: Tensor,
    targets: Tensor,
    pairs: SampledPairs,
    groups: ContrastiveGroups | None,
    alphas: tuple[float, float, float],
) -> dict[str, float]:
    """Scalars for the event storage, fetched from the device in one transfer.

    Args:
        logits: (P, C + 1) of all sampled pairs.
        targets: (P,) class that L0 asked for; C is "no relationship".
        pairs: the sampled pairs.
        groups: of L1 to L3, both sides; None where these losses are off or there is no pair.
        alphas: margins that L1 to L3 ask for.

    Returns:
        Under ``reldn/``: ``num_positive_pairs`` and ``num_negative_pairs`` of L0,
        ``predicate_accuracy`` on its positives, the mean affinities ``affinity_positive`` and
        ``affinity_negative`` of L0's pairs and ``affinity_hardest_negative`` of those that set the
        margins of L1, and for each contrastive loss its number of margins ``NAME_groups``, their
        mean ``NAME_margin`` and the share ``NAME_violated`` of them below alpha.
    """
    positive = pairs.for_predicate & pairs.labels.any(dim=1)
    negative = pairs.for_predicate & ~positive
    phi = affinity(logits)
    right = logits[:, :-1].argmax(dim=1) == targets if len(logits) else targets.bool()
    values = {
        "num_positive_pairs": positive.sum(),
        "num_negative_pairs": negative.sum(),
        "predicate_accuracy": _mean(right.float(), positive),
        "affinity_positive": _mean(phi, positive),
        "affinity_negative": _mean(phi, negative),
    }
    if groups is not None:
        values["affinity_hardest_negative"] = _mean(phi.expand_as(groups.valid[0]), groups.valid[0])
        for name, alpha, margin, valid in zip(
            LOSS_NAMES, alphas, groups.margins(phi), groups.valid
        ):
            values[f"{name}_groups"] = valid.sum()
            values[f"{name}_margin"] = _mean(margin, valid)
            values[f"{name}_violated"] = _mean((margin < alpha).float(), valid)
    numbers = torch.stack([value.float() for value in values.values()]).tolist()
    return {f"reldn/{name}": number for name, number in zip(values, numbers)}
