"""Uniform sampling without replacement, on the device of its input."""

import torch
from torch import Tensor

__all__ = ["random_keys", "sample_mask"]


def sample_mask(
    candidates: Tensor,
    number: int | Tensor,
    most: int,
    preferred: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Draw candidates uniformly without replacement, without a transfer to the host.

    Args:
        candidates: bool tensor of any shape.
        number: how many to draw (all, if there are fewer); may be a tensor on the device.
        most: upper bound of ``number`` known on the host.
        preferred: bool tensor of the same shape; these candidates are drawn before any other.
        keys: float tensor of the same shape, uniform in ``[0, 1)``; the candidates with the largest
            are drawn. By default fresh ones.

    Returns:
        Bool tensor of the same shape, True for what was drawn.
    """
    flat = candidates.flatten()
    keys = random_keys(flat) if keys is None else keys.flatten()
    if preferred is not None:
        keys = keys + preferred.flatten()
    best, index = keys.masked_fill(~flat, -1.0).topk(min(most, len(keys)))
    drawn = (best >= 0) & (torch.arange(len(best), device=flat.device) < number)
    return torch.zeros_like(flat).scatter(0, index, drawn).view_as(candidates)


def random_keys(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform float64 numbers in ``[0, 1)``, as many as ``like`` has entries, on its device."""
    return torch.rand(like.shape, device=like.device, generator=generator, dtype=torch.float64)
