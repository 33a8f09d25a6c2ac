from .contrastive import affinity, contrastive_losses
from .predicate import draw_predicate_targets, predicate_loss

__all__ = ["affinity", "contrastive_losses", "draw_predicate_targets", "predicate_loss"]
