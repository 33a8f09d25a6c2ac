"""What can be watched while the relation head trains."""

from typing import Dict, List, Tuple

import torch
from torch import Tensor

from ..losses.contrastive import GroupMargins, affinity
from .sampling import SampledPairs

__all__ = ["training_statistics"]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask``; 0 over nothing."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def training_statistics(
    logits: Tensor,
    targets: Tensor,
    pairs: SampledPairs,
    margins: List[Dict[str, GroupMargins]],
    alphas: Tuple[float, float, float],
) -> Dict[str, float]:
    """Scalars for the event storage, fetched from the device in one transfer.

    Args:
        logits: (P, C + 1) of all sampled pairs.
        targets: (P,) class that L0 asked for; C is "no relationship".
        pairs: the sampled pairs.
        margins: of L1 to L3 by name, one dict a side; empty where these losses are off.
        alphas: margins that L1 to L3 ask for.

    Returns:
        ``reldn/num_positive_pairs`` and ``num_negative_pairs`` of L0, ``reldn/predicate_accuracy``
        on its positives, ``reldn/affinity_positive`` and ``affinity_negative``, and for each
        contrastive loss the mean ``margin`` and the share ``violated`` of margins below alpha.
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
    for i, name in enumerate(margins[0] if margins else []):
        margin = torch.cat([side[name].margin for side in margins])
        valid = torch.cat([side[name].valid for side in margins])
        values[f"{name}_margin"] = _mean(margin, valid)
        values[f"{name}_violated"] = _mean((margin < alphas[i]).float(), valid)
    numbers = torch.stack([value.float() for value in values.values()]).tolist()
    return {f"reldn/{name}": number for name, number in zip(values, numbers)}
