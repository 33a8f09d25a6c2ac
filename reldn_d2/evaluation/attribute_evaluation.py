"""Score attributes: as relations ``<entity, is, attribute>``, or entity by entity.

The OpenImages challenge counts attributes among the relationships: both boxes of such a triplet are
the entity's, ``is`` is its predicate, and the attribute is the class of its object. As triplets of
that form they are scored by the protocol's own code (:func:`attribute_relations`). Any dataset has
the second kind of score, where boxes are given (:func:`score_entities`).

Shapes: R entities of an image, A attributes, C entity classes, P predicates.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..structures.boxes_np import aligned_iou
from ..structures.ranking import rank_by_score
from ..structures.scene_graph import SceneGraph
from ..utils.protocols import Protocol
from .batches import ImagePair
from .metrics import mean_of_defined, voc_average_precision
from .protocol_metrics import Settings, block_name
from .scoring import Scores, score

__all__ = ["IS", "add_attribute_scores", "attribute_relations", "score_entities"]

IS = "is"  # the predicate between an entity and its attribute
_GIVEN_BOXES = ("sgcls", "prdcls", "preddet")


def add_attribute_scores(
    scores: Scores,
    images: Sequence[ImagePair],
    protocol: Protocol,
    settings: Settings,
    num_classes: int,
    attribute_names: Sequence[str],
) -> None:
    """Add the blocks of results that count attributes.

    With a protocol that counts them as relations there is ``<block>_full`` for each of its blocks:
    the same metrics of the relations between boxes and ``is`` together. Where boxes are given,
    there is ``attributes_<task>``.

    Args:
        scores: of the relations between boxes; changed in place.
        images: ground truth and prediction of every image.
        protocol: the rules.
        settings: what is scored.
        num_classes: C.
        attribute_names: A names.
    """
    # A dataset that has its attributes as relations has nothing to add.
    if protocol.attribute_relations and IS not in settings.predicate_names:
        with_is = replace(
            settings,
            predicate_names=(*settings.predicate_names, IS),
            seen_triplets=None,
            training_counts=None,
        )
        pairs = [
            tuple(attribute_relations(x, num_classes, settings.num_predicates) for x in pair)
            for pair in images
        ]
        full = score(pairs, protocol, with_is)
        for k in settings.predicates_per_pair:
            name = block_name(protocol.name, settings.task, k)
            scores.results[f"{name}_full"] = full.results[name]
            scores.predicates[f"{name}_full"] = full.predicates[name]
    if settings.task in _GIVEN_BOXES:
        scores.results[f"attributes_{settings.task}"] = score_entities(images, attribute_names)


def attribute_relations(graph: SceneGraph, num_classes: int, num_predicates: int) -> SceneGraph:
    """Return a scene graph whose attributes are relations as well.

    Each attribute of an entity becomes another entity: of class C + attribute, with the same box.
    Its relation, with predicate P, has the score of the entity times that of the attribute.

    Args:
        graph: ground truth or prediction.
        num_classes: C.
        num_predicates: P.
    """
    found = graph.attributes
    if found is None or not len(found.ids):
        return graph
    entities, count = found.entities, len(found.ids)
    objects = len(graph.boxes) + np.arange(count)
    pairs = np.concatenate([graph.pairs, np.stack([entities, objects], axis=1)])
    predicates = np.concatenate([graph.predicates, np.full(count, num_predicates)])
    scores = box_scores = None
    order: np.ndarray | slice = slice(None)
    if graph.scores is not None:
        scores = np.concatenate([graph.scores, graph.box_scores[entities] * found.scores])
        box_scores = np.concatenate([graph.box_scores, np.ones(count)])
        order = rank_by_score(scores)
        scores = scores[order]
    return replace(
        graph,
        boxes=np.concatenate([graph.boxes, graph.boxes[entities]]),
        classes=np.concatenate([graph.classes, num_classes + found.ids]),
        box_scores=box_scores,
        pairs=pairs[order],
        predicates=predicates[order],
        scores=scores,
        predicate_scores=None,
        attributes=None,
        output=None,
    )


def score_entities(
    images: Sequence[ImagePair], attribute_names: Sequence[str]
) -> "OrderedDict[str, float]":
    """Score the attributes of given boxes, over the entities whose attributes are annotated.

    ``mAP``: the entities of all images are ranked by the score of an attribute; AP by the rule of
    :mod:`.metrics`, averaged over the attributes of the ground truth. ``R@n``: each entity may give
    as many attributes as it has; pooled. ``mR@n``: the same for each attribute, averaged over the
    attributes of the ground truth.

    Args:
        images: ground truth and prediction of every image; the boxes of both are the same.
        attribute_names: A names.

    Returns:
        Metrics in percent; NaN if no entity has an attribute.
    """
    num_attributes = len(attribute_names)
    truths, scores = [np.zeros((0, num_attributes), bool)], [np.zeros((0, num_attributes))]
    for truth, predicted in images:
        known = () if truth.attributes is None else np.flatnonzero(truth.attributes.known)
        if not len(known):
            continue
        truths.append(truth.attributes.table(len(truth.boxes), num_attributes)[known] > 0)
        table = np.zeros((len(known), num_attributes))
        if predicted.attributes is not None:
            rows = predicted.attributes.table(len(predicted.boxes), num_attributes)
            match = _match_boxes(truth.boxes, predicted.boxes)[known]
            table[match >= 0] = rows[match[match >= 0]]
        scores.append(table)
    is_true, table = np.concatenate(truths), np.concatenate(scores)
    counts = is_true.sum(axis=0)

    precision = np.full(num_attributes, np.nan)
    for attribute in range(num_attributes):
        listed = np.flatnonzero(table[:, attribute] > 0)  # others were not predicted at all
        order = listed[rank_by_score(table[listed, attribute])]
        precision[attribute] = voc_average_precision(
            is_true[order, attribute], int(counts[attribute])
        )
    # ranks[i, a]: how many attributes of entity i come before a
    ranks = np.argsort(np.argsort(-table, axis=1, kind="stable"), axis=1, kind="stable")
    found = is_true & (table > 0) & (ranks < is_true.sum(axis=1)[:, None])
    hits = found.sum(axis=0)
    recall = np.divide(hits, counts, out=np.full(num_attributes, np.nan), where=counts > 0)
    metrics: OrderedDict[str, float] = OrderedDict()
    metrics["mAP"] = 100.0 * mean_of_defined(precision)
    metrics["R@n"] = 100.0 * hits.sum() / counts.sum() if counts.sum() else float("nan")
    metrics["mR@n"] = 100.0 * mean_of_defined(recall)
    for name, value in zip(attribute_names, precision.tolist()):
        metrics[f"AP-{name}"] = 100.0 * value
    return metrics


def _match_boxes(gt_boxes: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return for each box of the ground truth the predicted one that is the same; -1: none.

    Several entities may have one box, so each predicted box is taken once, in order.
    """
    match = np.full(len(gt_boxes), -1)
    free = np.ones(len(boxes), dtype=bool)
    for index, box in enumerate(gt_boxes):
        if not free.any():
            break
        overlap = np.where(free, aligned_iou(np.broadcast_to(box, boxes.shape), boxes), -1.0)
        best = int(overlap.argmax())
        if overlap[best] >= 0.5:
            match[index] = best
            free[best] = False
    return match
