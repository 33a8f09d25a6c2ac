"""Plain formulations, which the benchmarks compare with: written for clearness, not for speed."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reldn_d2.modeling.losses import AnchorSides, draw_predicate_targets
from reldn_d2.modeling.losses.contrastive import LOSS_NAMES
from reldn_d2.modeling.relation_head.pair_sampling import sample_pairs
from reldn_d2.modeling.relation_head.pairs import match_pairs
from reldn_d2.modeling.relation_head.predictors import spatial_features
from reldn_d2.structures.box_ops import union_boxes

from detectron2.structures import Boxes

__all__ = ["losses_in_loops", "plain_head_losses"]


def _ranking_loss(
    logits: Tensor,
    labels: Tensor,
    anchor_of: Tensor,
    sampled: Tensor,
    alpha: float,
    groups_of: Callable[[Tensor, Tensor], list[tuple[Tensor, Tensor]]],
) -> Tensor:
    """One loss of one side: anchor by anchor, group by group, the pairs found are appended."""
    phi = 1 - logits.float().softmax(dim=1)[:, -1]
    is_positive = labels.any(dim=1)
    # One margin that asks for nothing, lest the mean be over nothing.
    low, high = phi.new_ones(1), phi.new_zeros(1)
    for anchor in anchor_of[sampled].unique():
        mine = sampled & (anchor_of == anchor)
        positive = torch.where(mine & is_positive)[0]
        negative = torch.where(mine & ~is_positive)[0]
        if len(positive) == 0 or len(negative) == 0:
            continue
        for of_positive, of_negative in groups_of(positive, negative):
            if len(of_negative):
                low = torch.cat([low, phi[of_positive].min()[None]])
                high = torch.cat([high, phi[of_negative].max()[None]])
    return F.margin_ranking_loss(low, high, torch.ones_like(low), margin=alpha)


def losses_in_loops(
    logits: Tensor,
    labels: Tensor,
    sides: AnchorSides,
    *,
    alphas: tuple[float, float, float] = (0.2, 0.2, 0.2),
    **_: Any,
) -> list[Tensor]:
    """L1, L2, L3 of one image in the manner of the released code, with its normalisation."""
    predicted = logits[:, :-1].argmax(dim=1)
    losses = [logits.new_zeros((), dtype=torch.float32) for _ in alphas]
    for sampled, anchor, other in zip(sides.sampled, sides.anchor, sides.other_class):

        def alone(positive, negative):
            return [(positive, negative)]

        def by_class(positive, negative, classes=other):
            return [
                (positive[classes[positive] == c], negative[classes[negative] == c])
                for c in classes[positive].unique()
            ]

        def by_predicate(positive, negative):
            return [
                (positive[labels[positive, e]], negative[predicted[negative] == e])
                for e in torch.where(labels[positive].any(dim=0))[0]
            ]

        for i, groups_of in enumerate((alone, by_class, by_predicate)):
            losses[i] = losses[i] + _ranking_loss(
                logits, labels, anchor, sampled, alphas[i], groups_of
            )
    return losses


def _plain_logits(head, features, predicate_features, entities, subjects, objects) -> Tensor:
    """Eq 12 pair by pair: each pair's three boxes are pooled and encoded for itself."""
    boxes, classes = entities.proposal_boxes.tensor, entities.gt_classes
    subject_boxes, object_boxes = boxes[subjects], boxes[objects]
    unions = union_boxes(subject_boxes, object_boxes)

    def encode(pooler, box_head, maps, these):
        return box_head(pooler([maps[name] for name in head.in_features], [Boxes(these)]))

    as_subject = encode(head.entity_pooler, head.subject_box_head, features, subject_boxes)
    as_object = encode(head.entity_pooler, head.object_box_head, features, object_boxes)
    of_union = encode(head.predicate_pooler, head.predicate_box_head, predicate_features, unions)
    sizes = boxes.new_tensor([entities.image_size]).expand(len(subjects), -1)
    visual = head.visual
    return (
        head.semantic(classes[subjects], classes[objects])
        + head.spatial(spatial_features(subject_boxes, object_boxes, sizes))
        + visual.rest(visual.first(torch.cat([as_subject, of_union, as_object], dim=1)))
        + visual.subject_skip(as_subject)
        + visual.object_skip(as_object)
    )


def plain_head_losses(head, features, predicate_features, proposals, targets) -> dict[str, Tensor]:
    """The losses of a RelDNHead on one image in three passes: for L0 and for each side of L1-L3.

    Sampling draws the same pairs as the head's own step with the same seed.
    """
    (entities,), ((instances, relations),) = proposals, targets
    grid = match_pairs(
        (entities.proposal_boxes, entities.gt_classes),
        (instances.gt_boxes, instances.gt_classes),
        relations.gt_pairs,
        relations.gt_predicates,
        num_predicates=head.num_predicates,
        overlap_filter=head.overlap_filter,
        iou_threshold=head.pair_iou_threshold,
    )
    pairs = sample_pairs(grid, **head.sampling)

    def score(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        subjects, objects = pairs.subjects[mask], pairs.objects[mask]
        logits = _plain_logits(head, features, predicate_features, entities, subjects, objects)
        return logits, pairs.labels[mask], subjects, objects

    logits, labels, _, _ = score(pairs.for_predicate)
    losses = {"loss_predicate": F.cross_entropy(logits.float(), draw_predicate_targets(labels))}
    for mask, is_subject in ((pairs.for_subjects, True), (pairs.for_objects, False)):
        logits, labels, subjects, objects = score(mask)
        anchor, other = (subjects, objects) if is_subject else (objects, subjects)
        side = AnchorSides(
            torch.ones_like(anchor[None], dtype=torch.bool),
            anchor[None],
            entities.gt_classes[other][None],
        )
        parts = losses_in_loops(logits, labels, side, alphas=head.alphas)
        for name, weight, loss in zip(LOSS_NAMES, head.lambdas, parts):
            losses[f"loss_{name}"] = losses.get(f"loss_{name}", 0.0) + weight * loss
    return losses
