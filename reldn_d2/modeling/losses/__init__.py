from .contrastive import AnchorSides, affinity, contrastive_losses
from .predicate import draw_predicate_targets, predicate_loss

__all__ = [
    "AnchorSides",
    "affinity",
    "contrastive_losses",
    "draw_predicate_targets",
    "predicate_loss",
]
