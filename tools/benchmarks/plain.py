"""Plain formulations that the benchmarks compare with: written to be clear, not fast.

Shapes: R entities of one image, P pairs, C predicates, K kept triplets.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reldn_d2.modeling.losses import AnchorSides, draw_predicate_targets
from reldn_d2.modeling.losses.contrastive import LOSS_NAMES
from reldn_d2.modeling.relation_head.pairs import match_pairs
from reldn_d2.modeling.relation_head.predictors import spatial_features
from reldn_d2.structures.box_ops import union_boxes

from detectron2.structures import Boxes

__all__ = [
    *("Ranking", "losses_in_loops", "pair_logits", "plain_head_losses", "rank_all_pairs"),
    "recalls_in_loops",
]


def _ranking_loss(
    logits: Tensor,
    labels: Tensor,
    anchor_of: Tensor,
    sampled: Tensor,
    alpha: float,
    groups_of: Callable[[Tensor, Tensor], list[tuple[Tensor, Tensor]]],
) -> Tensor:
    """Compute one loss of one side, appending a margin per anchor and group."""
    phi = 1 - logits.float().softmax(dim=1)[:, -1]
    is_positive = labels.any(dim=1)
    # A margin that is satisfied, so that the mean is never over nothing.
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
    """Compute L1, L2, L3 of one image as the released code does, with its normalization."""
    predicted = logits[:, :-1].argmax(dim=1)
    losses = [logits.new_zeros((), dtype=torch.float32) for _ in alphas]
    for sampled, anchor, other in zip(sides.sampled, sides.anchor, sides.other_class):

        def all_pairs(positive, negative):
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

        for i, groups_of in enumerate((all_pairs, by_class, by_predicate)):
            losses[i] = losses[i] + _ranking_loss(
                logits, labels, anchor, sampled, alphas[i], groups_of
            )
    return losses


def pair_logits(
    head: Any,
    predicate_features: dict[str, Tensor],
    entities: tuple[Tensor, Tensor, tuple[int, int]],
    subjects: Tensor,
    objects: Tensor,
    visual: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute Eq 12 before the softmax, pooling a union box for each ordered pair.

    Args:
        head: a RelDNHead.
        predicate_features: feature maps of one image.
        entities: (R, 4) boxes, (R,) classes and the image's (height, width).
        subjects, objects: (P,) int64 indices into the entities.
        visual: computes the visual module's logits from the (P, d) vectors of the union boxes.
    """
    boxes, classes, image_size = entities
    sizes = boxes.new_tensor([image_size]).expand(len(subjects), -1)
    unions = [Boxes(union_boxes(boxes[subjects], boxes[objects]))]
    pooled = head.predicate_pooler([predicate_features[x] for x in head.in_features], unions)
    return (
        head.semantic(classes[subjects], classes[objects])
        + head.spatial(spatial_features(boxes[subjects], boxes[objects], sizes))
        + visual(head.predicate_box_head(pooled))
    )


def plain_head_losses(head, features, predicate_features, proposals, targets) -> dict[str, Tensor]:
    """Compute a RelDNHead's losses on one image in three passes: for L0 and each side of L1-L3.

    Every pair's three boxes are pooled and encoded again. With the same seed, the same pairs are
    sampled as in the head's own step.
    """
    (entities,), ((instances, relations),) = proposals, targets
    boxes, classes = entities.proposal_boxes.tensor, entities.gt_classes
    grid = match_pairs(
        (entities.proposal_boxes, classes),
        (instances.gt_boxes, instances.gt_classes),
        relations.gt_pairs,
        relations.gt_predicates,
        num_predicates=head.num_predicates,
        gt_index=entities.gt_index,
        overlap_filter=head.overlap_filter,
        iou_threshold=head.pair_iou_threshold,
    )
    pairs = head.sampler.sample(grid)
    contrastive = head.losses["ContrastiveLosses"]

    def score(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        subjects, objects = pairs.subjects[mask], pairs.objects[mask]

        def visual(of_union: Tensor) -> Tensor:
            maps = [features[name] for name in head.in_features]
            as_subject = head.subject_box_head(head.entity_pooler(maps, [Boxes(boxes[subjects])]))
            as_object = head.object_box_head(head.entity_pooler(maps, [Boxes(boxes[objects])]))
            joined = torch.cat([as_subject, of_union, as_object], dim=1)
            return (
                head.visual.rest(head.visual.first(joined))
                + head.visual.subject_skip(as_subject)
                + head.visual.object_skip(as_object)
            )

        data = (boxes, classes, entities.image_size)
        logits = pair_logits(head, predicate_features, data, subjects, objects, visual)
        return logits, pairs.labels[mask], subjects, objects

    logits, labels, _, _ = score(pairs.for_predicate)
    losses = {"loss_predicate": F.cross_entropy(logits.float(), draw_predicate_targets(labels))}
    for mask, is_subject in ((pairs.for_subjects, True), (pairs.for_objects, False)):
        logits, labels, subjects, objects = score(mask)
        anchor, other = (subjects, objects) if is_subject else (objects, subjects)
        sampled = torch.ones_like(anchor[None], dtype=torch.bool)
        side = AnchorSides(sampled, anchor[None], classes[other][None])
        parts = losses_in_loops(logits, labels, side, alphas=contrastive.alphas)
        for name, weight, loss in zip(LOSS_NAMES, contrastive.lambdas, parts):
            losses[f"loss_{name}"] = losses.get(f"loss_{name}", 0.0) + weight * loss
    return losses


class Ranking(NamedTuple):
    """The K best triplets in descending order of score."""

    pairs: Tensor  # (K, 2) int64, subject and object
    predicates: Tensor  # (K,) int64
    scores: Tensor  # (K,)
    num_scored: int  # pairs whose predicates were computed


def rank_all_pairs(
    score_pairs: Callable[[Tensor, Tensor], Tensor],
    scores: Tensor,
    k: int,
    topk: int,
    chunk: int,
    both_orders_together: bool = False,
) -> Ranking:
    """Score every ordered pair, keep the k best predicates per pair, sort, and keep the best K.

    Equal scores are ordered by subject, object and predicate.

    Args:
        score_pairs: from (P,) subjects and (P,) objects to (P, C) probabilities.
        scores: (R,) of the entities.
        k: predicates per pair; None means all.
        topk: K.
        chunk: pairs scored at once; an even number.
        both_orders_together: score (i, j) and (j, i) in one chunk, so that they can share a union
            box.
    """
    ordered = (1 - torch.eye(len(scores), device=scores.device)).nonzero()
    pairs = ordered
    if both_orders_together:
        one_order = ordered[ordered[:, 0] < ordered[:, 1]]
        pairs = torch.stack([one_order, one_order.flip(1)], dim=1).reshape(-1, 2)
    probabilities = torch.cat([score_pairs(*part.unbind(1)) for part in pairs.split(chunk)])
    # Back into the order by subject and object, which stable sorting keeps for equal scores.
    probabilities = probabilities[(pairs[:, 0] * len(scores) + pairs[:, 1]).argsort()]
    of_triplet = probabilities * (scores[ordered[:, 0]] * scores[ordered[:, 1]])[:, None]
    if k:
        by_probability = probabilities.argsort(dim=1, descending=True, stable=True)
        of_triplet.scatter_(1, by_probability[:, k:], -1.0)
    best = of_triplet.flatten().argsort(descending=True, stable=True)
    best = best[of_triplet.flatten()[best] >= 0][:topk]
    row = torch.div(best, probabilities.shape[1], rounding_mode="floor")
    predicates = best % probabilities.shape[1]
    return Ranking(ordered[row], predicates, of_triplet.flatten()[best], len(pairs))


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Compute the IoU of a (4,) box with each of (N, 4) boxes."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    intersection = sides.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return intersection / (areas - intersection)


def recalls_in_loops(
    images: Sequence[tuple[Any, Any]],
    seen: np.ndarray,
    ks: Sequence[int | None],
    topk: Sequence[int],
) -> dict[tuple[int, str], float]:
    """Compute R@n, mR@n and zR@n in percent, image by image, as the code of papers does.

    Args:
        images: ground truth and prediction of each image.
        seen: (T, 3) labels of the training set's triplets.
        ks: numbers of predicates per pair; None means all.
        topk: values of n.
    """
    known = set(map(tuple, seen.tolist()))
    # By k, name and predicate (None except for mR@n): the recall of each image.
    recalls: dict[tuple, list[float]] = defaultdict(list)
    for truth, prediction in images:
        labels = list(map(tuple, truth.labels.tolist()))
        for k in ks if labels else ():
            kept, times = [], defaultdict(int)
            for rank, pair in enumerate(map(tuple, prediction.pairs.tolist())):
                times[pair] += 1
                if k is None or times[pair] <= k:
                    kept.append(rank)
            best = prediction.select(np.array(kept, dtype=np.int64)[: max(topk)])
            equal = (truth.labels[:, None] == best.labels[None]).all(-1)
            first_rank = np.full(len(labels), np.inf)
            for index in np.flatnonzero(equal.any(1)):
                ranks = np.flatnonzero(equal[index])
                subject, object_ = truth.boxes[truth.pairs[index]]
                hit = _iou(subject, best.boxes[best.pairs[ranks, 0]]) >= 0.5
                hit &= _iou(object_, best.boxes[best.pairs[ranks, 1]]) >= 0.5
                first_rank[index] = ranks[hit][0] if hit.any() else np.inf
            for n in topk:
                found = (first_rank < n).tolist()
                recalls[k, f"R@{n}", None].append(np.mean(found))
                for predicate in {label[1] for label in labels}:
                    own = [x for x, label in zip(found, labels) if label[1] == predicate]
                    recalls[k, f"mR@{n}", predicate].append(np.mean(own))
                unseen = [x for x, label in zip(found, labels) if label not in known]
                if unseen:
                    recalls[k, f"zR@{n}", None].append(np.mean(unseen))
    means = defaultdict(list)
    for (k, name, _), values in recalls.items():
        means[k, name].append(100 * np.mean(values))
    return {key: float(np.mean(values)) for key, values in means.items()}
