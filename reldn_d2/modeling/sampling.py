"""Uniform sampling without replacement, on the device of the input."""

import torch
from torch import Tensor

__all__ = ["random_keys", "sample_mask", "true_indices"]


def sample_mask(
    candidates: Tensor,
    count: int | Tensor,
    max_count: int,
    preferred: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Draw candidates uniformly without replacement, without a transfer to the host.

    Each candidate gets a random key, and the ``count`` largest keys are drawn.

    Args:
        candidates: bool tensor of any shape.
        count: how many to draw (all, if there are fewer); may be a tensor on the device.
        max_count: upper bound of ``count`` known on the host.
        preferred: bool tensor of the same shape; these candidates are drawn before any other.
        keys: float tensor of the same shape, uniform in ``[0, 1)``; None draws new ones.

    Returns:
        Bool tensor of the same shape, True for the drawn candidates.
    """
    if max_count == 0 and keys is not None:  # a loss that is switched off
        return torch.zeros_like(candidates)
    flat = candidates.flatten()
    keys = random_keys(flat) if keys is None else keys.flatten()
    if preferred is not None:
        keys = keys + preferred.flatten()
    largest, index = keys.masked_fill(~flat, -1.0).topk(min(max_count, len(keys)))
    drawn = (largest >= 0) & (torch.arange(len(largest), device=flat.device) < count)
    return torch.zeros_like(flat).scatter(0, index, drawn).view_as(candidates)


def random_keys(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw uniform float64 values in ``[0, 1)``, in the shape of ``like`` and on its device."""
    return torch.rand(like.shape, device=like.device, generator=generator, dtype=torch.float64)


def true_indices(masks: list[Tensor]) -> list[Tensor]:
    """Return what ``nonzero`` returns of each 1-d mask, with one transfer to the host for all."""
    if not masks:
        return []
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    # True comes first, in the order of the indices.
    return [
        mask.byte().argsort(descending=True, stable=True)[:count]
        for mask, count in zip(masks, counts)
    ]
