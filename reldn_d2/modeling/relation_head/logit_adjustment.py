"""Logit adjustment at test time (Menon et al., "Long-tail learning via logit adjustment", 2021).

A model that is trained on frequent and rare predicates alike predicts the frequent ones too often.
Subtracting ``tau * log(prior)`` from the logits takes that back: ``tau = 1`` gives what a model
would predict if all predicates were equally frequent.

Shapes: P pairs, C predicates; the last of C + 1 logits is "no relationship".
"""

from typing import Any

import torch
from torch import Tensor, nn

from .training_counts import require_counts

__all__ = ["PredicatePrior", "adjust_logits", "log_prior"]

KEY = "TEST.RELATIONS.LOGIT_ADJUSTMENT"


class PredicatePrior(nn.Module):
    """Turns logits into probabilities, adjusted by how often predicates occur in training.

    The buffer ``predicate_counts``, (C,) int64, has the relations of each predicate in the training
    set. Training fills it (:meth:`set_counts`), and checkpoints have it; all zeros mean that it is
    unknown, as in checkpoints written before.
    """

    def __init__(self, num_predicates: int, tau: float = 0.0):
        """
        Args:
            num_predicates: C.
            tau: strength of the adjustment at test time; 0 switches it off.

        Raises:
            ValueError: if tau is negative.
        """
        super().__init__()
        if not 0 <= tau < float("inf"):
            raise ValueError(f"{KEY} is {tau}; expected 0 (off) or more, such as 0.5.")
        self.tau = tau
        self.register_buffer("predicate_counts", torch.zeros(num_predicates, dtype=torch.int64))

    @property
    def known(self) -> bool:
        """Whether the counts are known; reads one value on the host."""
        return bool(self.predicate_counts.any())

    def set_counts(self, predicate_counts: Tensor) -> None:
        """Take the (C,) relations of each predicate in the training set.

        Raises:
            ValueError: if the shape differs.
        """
        if predicate_counts.shape != self.predicate_counts.shape:
            raise ValueError(
                f"There are counts of {len(predicate_counts)} predicates, but the model has "
                f"{len(self.predicate_counts)}."
            )
        self.predicate_counts.copy_(predicate_counts)

    def check(self, owner: str = "this model") -> None:
        """Raise a ValueError if logits are to be adjusted by unknown counts.

        Args:
            owner: the model or its file, for the message.
        """
        what = "how often each predicate occurs in training"
        require_counts(KEY, self.tau, self.predicate_counts, owner, what)

    def adjust(self, logits: Tensor) -> Tensor:
        """Return (P, C + 1) logits in float32, adjusted if ``tau`` is not 0."""
        logits = logits.float()
        if self.tau == 0:
            return logits
        return adjust_logits(logits, log_prior(self.predicate_counts), self.tau)

    def forward(self, logits: Tensor) -> Tensor:
        """Compute probabilities at test time.

        Args:
            logits: (P, C + 1).

        Returns:
            (P, C + 1) float32; each row sums to 1. So no triplet scores more than the product of
            its entities' scores, the bound that the search for the best triplets relies on.
        """
        return self.adjust(logits).softmax(dim=1)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        unknown = torch.zeros_like(self.predicate_counts)
        state_dict.setdefault(f"{prefix}predicate_counts", unknown)
        super()._load_from_state_dict(state_dict, prefix, *args)


def log_prior(predicate_counts: Tensor) -> Tensor:
    """Return (C,) float32 log shares of the predicates in training.

    One relation is added to each predicate, so that one that training lacks is not raised without
    limit.

    Args:
        predicate_counts: (C,) relations of each predicate in the training set.
    """
    counts = predicate_counts.double() + 1.0
    return (counts / counts.sum()).log().float()


def adjust_logits(logits: Tensor, prior: Tensor, tau: float) -> Tensor:
    """Subtract ``tau * prior`` from the logits of the predicates.

    "No relationship" has no frequency of its own: how many unrelated pairs there are depends on how
    training pairs are sampled. So its probability stays as it is. A constant per pair is added to
    the logits of the predicates, which keeps their sum of exponentials; the adjustment only divides
    the affinity ``1 - p(no relationship)`` among the predicates in another way.

    Args:
        logits: (P, C + 1).
        prior: (C,), see :func:`log_prior`.
        tau: strength.

    Returns:
        (P, C + 1) logits.
    """
    predicates = logits[:, :-1]
    adjusted = predicates - tau * prior
    constant = predicates.logsumexp(dim=1, keepdim=True) - adjusted.logsumexp(dim=1, keepdim=True)
    return torch.cat([adjusted + constant, logits[:, -1:]], dim=1)
