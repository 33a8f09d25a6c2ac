"""Losses of the relation head on the sampled pairs of a batch.

Shapes: N images, R entities of the batch, P sampled pairs of the batch, C predicates; the last of
C + 1 logits is "no relationship".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from detectron2.utils import comm

from ..losses import AnchorSides, contrastive_losses, draw_predicate_targets, predicate_loss
from ..losses.contrastive import LOSS_NAMES, ContrastiveGroups
from .pair_sampling import SampledPairs
from .pairs import EntityBatch

__all__ = ["L0_MEANS", "RelationLosses", "relation_losses"]

# What L0 is a mean over: "images" (of the mean over each image's pairs) or "pairs" (of all images)
L0_MEANS = ("images", "pairs")


class RelationLosses(NamedTuple):
    """Losses of a batch, and the intermediate results that the training metrics read."""

    losses: dict[str, Tensor]  # by name, weighted by their lambdas
    targets: Tensor  # (P,) int64, the class that L0 asks for; C is "no relationship"
    groups: ContrastiveGroups | None  # None if L1-L3 are off or there is no pair


def relation_losses(
    logits: Tensor,
    pairs: SampledPairs,
    entities: EntityBatch,
    *,
    num_classes: int,
    lambdas: tuple[float, float, float],
    alphas: Tensor,
    normalization: str,
    l0_mean: str = "images",
) -> RelationLosses:
    """Compute L0 and, for each lambda that is not zero, L1 to L3 of both sides.

    Args:
        logits: (P, C + 1).
        pairs: the sampled pairs.
        entities: the R entities.
        num_classes: number of entity classes.
        lambdas: weights of L1 to L3.
        alphas: (3,) margins of L1 to L3, on the device of the logits.
        normalization: see :func:`..losses.contrastive.group_weights`.
        l0_mean: one of :data:`L0_MEANS`.
    """
    num_images = len(entities.sizes)
    targets = draw_predicate_targets(pairs.labels)
    if l0_mean == "pairs":
        weights = _pair_weights(pairs.for_predicate)
    else:
        weights = _mean_weights(pairs.for_predicate, entities.image[pairs.subjects], num_images)
    losses = {"loss_predicate": predicate_loss(logits, targets, weights)}
    if not any(lambdas):
        return RelationLosses(losses, targets, None)

    ends = torch.stack([pairs.subjects, pairs.objects])
    sides = AnchorSides(
        sampled=torch.stack([pairs.for_subjects, pairs.for_objects]),
        anchor=ends,
        other_class=entities.classes[ends.flip(0)],
    )
    contrastive, groups = contrastive_losses(
        logits,
        pairs.labels,
        sides,
        entities.image,
        num_images=num_images,
        num_classes=num_classes,
        alphas=alphas,
        normalization=normalization,
    )
    for name, loss, weight in zip(LOSS_NAMES, contrastive, lambdas):
        if weight:
            losses[f"loss_{name}"] = weight * loss
    return RelationLosses(losses, targets, groups)


def _mean_weights(chosen: Tensor, image: Tensor, num_images: int) -> Tensor:
    """Compute weights that average over the chosen pairs of each image, then over the images.

    Args:
        chosen: (P,) bool.
        image: (P,) int64 in ``[0, num_images)``, the image of each pair.
        num_images: N, images with or without pairs.

    Returns:
        (P,) float; 0 where a pair is not chosen.
    """
    chosen = chosen.float()
    num_chosen = chosen.new_zeros(num_images).index_add(0, image, chosen)
    return chosen / num_chosen.clamp(min=1.0)[image] / num_images


def _pair_weights(chosen: Tensor) -> Tensor:
    """Compute weights that average over the chosen pairs of all images.

    Processes have different numbers of pairs, and their gradients are averaged. Therefore the mean
    is over the pairs of all processes.

    Args:
        chosen: (P,) bool.

    Returns:
        (P,) float; 0 where a pair is not chosen.
    """
    chosen = chosen.float()
    total, num_processes = chosen.sum(), comm.get_world_size()
    if num_processes > 1:
        torch.distributed.all_reduce(total)
    return chosen * num_processes / total.clamp(min=1.0)
