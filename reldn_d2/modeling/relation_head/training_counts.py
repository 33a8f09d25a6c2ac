"""Counts of the training set that a model keeps for test time, as buffers of its checkpoints."""

from torch import Tensor

__all__ = ["require_counts"]


def require_counts(key: str, strength: float, counts: Tensor, owner: str, what: str) -> None:
    """Raise a ValueError if a key is on and the counts that it needs are unknown.

    Args:
        key: config key, which 0.0 switches off.
        strength: its value.
        counts: all zeros if they are unknown; read on the host if the key is on.
        owner: the model or its file, for the message.
        what: what the counts say, for the message.
    """
    if strength and not counts.any():
        raise ValueError(
            f"{key} is {strength:g}, but {owner} does not say {what}: it was written before "
            f"checkpoints said so, or not by RelDNTrainer. Train it again, or set {key} to 0.0."
        )
