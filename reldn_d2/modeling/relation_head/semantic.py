"""Semantic module: what the classes of a pair say about its predicate (section 4).

Shapes: P pairs, K entity classes, C predicates; the last of C + 1 logits is "no relationship".
"""

import torch
from torch import Tensor, nn

__all__ = ["SemanticModule"]


class SemanticModule(nn.Module):
    """Log-frequencies of predicates given subject and object class, as an embedding.

    The table is counted from the training annotations once (:meth:`set_log_frequencies`) and then
    lives in the checkpoint; ``counted`` tells whether that has happened.
    """

    def __init__(self, num_classes: int, num_predicates: int, freeze: bool = False):
        """
        Args:
            num_classes: K.
            num_predicates: C.
            freeze: keep the table as counted instead of training it on.
        """
        super().__init__()
        self.num_classes = num_classes
        self.num_predicates = num_predicates
        self.table = nn.Embedding(num_classes * num_classes, num_predicates + 1)
        nn.init.zeros_(self.table.weight)
        self.table.weight.requires_grad_(not freeze)
        self.register_buffer("counted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def set_log_frequencies(self, log_frequencies: Tensor) -> None:
        """Fill the table.

        Args:
            log_frequencies: (K, K, C + 1), see :func:`reldn_d2.data.frequency.log_frequencies`.

        Raises:
            ValueError: the shape is another.
        """
        expected = (self.num_classes, self.num_classes, self.num_predicates + 1)
        if tuple(log_frequencies.shape) != expected:
            raise ValueError(
                f"The frequency table has shape {tuple(log_frequencies.shape)}, but the model, "
                f"with {self.num_classes} classes and {self.num_predicates} predicates, needs "
                f"{expected}. Count it on the data set that the config names."
            )
        self.table.weight.copy_(log_frequencies.flatten(0, 1))
        self.counted.fill_(True)

    def forward(self, subject_classes: Tensor, object_classes: Tensor) -> Tensor:
        """
        Args:
            subject_classes, object_classes: (P,) int64 in ``[0, K)``.

        Returns:
            (P, C + 1) logits.
        """
        return self.table(subject_classes * self.num_classes + object_classes)
