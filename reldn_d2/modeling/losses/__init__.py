from .contrastive import AnchorSides, affinity, contrastive_losses
from .predicate import class_balanced_weights, draw_predicate_targets, predicate_loss

__all__ = [
    "AnchorSides",
    "affinity",
    "class_balanced_weights",
    "contrastive_losses",
    "draw_predicate_targets",
    "predicate_loss",
]
