"""The OpenImages challenge's official rule, and the rule of RelDN's released code.

Both use average precision (:mod:`.average_precision`) with relationship overlaps (``rel``) and
phrase overlaps (``phr``), and ``score = 0.2 R@50 + 0.4 mAP_rel + 0.4 mAP_phr``.

``openimages`` (the challenge): an overlap >= 0.5 matches. A triplet whose subject or object class
is neither verified nor annotated in its image is ignored, unless one of the two is verified absent
(and not annotated): then it is a false positive. ``R@n``: of the true positives for relationships,
those among the n best triplets of their image that are not ignored, over all ground truth. mAP: the
mean over the predicates that occur in the ground truth. ``pooled_AP``: AP of all predicates'
triplets in one list (the challenge's code names it weightedAP). All triplets given count.

``released`` (the authors' code): each pair keeps 2 predicates, each image 100 triplets. AP needs an
overlap > 0.5; mAP is the mean over all predicates of the data set, one that the ground truth lacks
counting 0; ``wmAP`` weights each predicate's AP with its share of the ground truth; ``score_wtd``
is the score with wmAP in place of mAP. ``R@n``: many-to-many matching at >= 0.5, pooled over the
data set. Verified labels are not used.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from .average_precision import (
    mean_average_precision,
    pooled_average_precision,
    precision_of_predicates,
    true_positives,
)
from .batches import KINDS, Detections, RelationTable, detections, found_ranks
from .ground_truth import ImagePair
from .lu2016 import pooled, recall_of_predicates
from .matching import NEVER
from .scores import Scores, Settings, task_name

__all__ = ["score_openimages", "score_released"]

_SUFFIXES = dict(zip(KINDS, ("rel", "phr")))


def _weighted_sum(recall: float, of_relations: float, of_phrases: float) -> float:
    return 0.2 * recall + 0.4 * of_relations + 0.4 * of_phrases


def _hit_ranks(found: Detections, num_truth: int) -> np.ndarray:
    """(M,) rank in its image of the true positive of each ground truth, :data:`NEVER` without."""
    order, is_match = true_positives(found)
    hits = order[is_match]
    ranks = np.full(num_truth, NEVER, dtype=np.int64)
    ranks[found.matches[hits]] = found.ranks[hits]
    return ranks


def score_openimages(images: Sequence[ImagePair], settings: Settings) -> Scores:
    """Results: for each k ``{"openimages_<task>[_k<k>]": metrics}``."""
    truth = RelationTable.from_images(images)
    found = detections(
        images,
        settings.predicates_per_pair,
        KINDS,
        limit=settings.max_triplets,
        verified_labels=True,
    )
    scores = Scores()
    for k in settings.predicates_per_pair:
        task = task_name("openimages", settings.task, k)
        metrics: dict[str, float] = OrderedDict()
        ranks = _hit_ranks(found[k, "relationship"], len(truth.image))
        for n, recall in zip(settings.topk, pooled(ranks, truth, settings.topk)):
            metrics[f"R@{n}"] = recall
        precision = {
            kind: precision_of_predicates(found[k, kind], truth, settings.num_predicates)
            for kind in KINDS
        }
        for kind, suffix in _SUFFIXES.items():
            metrics[f"mAP_{suffix}"] = mean_average_precision(precision[kind])
        for kind, suffix in _SUFFIXES.items():
            metrics[f"pooled_AP_{suffix}"] = pooled_average_precision(found[k, kind], truth)
        (recall,) = pooled(ranks, truth, [50])
        metrics["score"] = _weighted_sum(recall, metrics["mAP_rel"], metrics["mAP_phr"])
        _add_precision(metrics, precision, settings)
        scores.results[task] = metrics
        recalls = recall_of_predicates(ranks, truth, settings)
        scores.add_predicates(task, truth, settings, recalls, precision["relationship"])
    return scores


def score_released(images: Sequence[ImagePair], settings: Settings) -> Scores:
    """Results: for each k ``{"released_<task>_k<k>": metrics}``; the authors use k = 2."""
    truth = RelationTable.from_images(images)
    ks, limit = settings.predicates_per_pair, settings.max_triplets
    found = detections(images, ks, KINDS, limit=limit, strict=True)
    all_ranks = found_ranks(images, ks)
    share = np.bincount(truth.predicates, minlength=settings.num_predicates)
    share = share / share.sum() if len(truth.image) else np.full(len(share), np.nan)
    scores = Scores()
    for k in ks:
        task = task_name("released", settings.task, k)
        metrics: dict[str, float] = OrderedDict()
        ranks = all_ranks[k, "relationship"]
        for n, recall in zip(settings.topk, pooled(ranks, truth, settings.topk)):
            metrics[f"R@{n}"] = recall
        precision = {}
        for kind, suffix in _SUFFIXES.items():
            values = precision_of_predicates(found[k, kind], truth, settings.num_predicates)
            precision[kind] = np.nan_to_num(values) if len(truth.image) else values
            metrics[f"mAP_{suffix}"] = float(precision[kind].mean())
            metrics[f"wmAP_{suffix}"] = float((share * precision[kind]).sum())
        (recall,) = pooled(ranks, truth, [50])
        for name, mean in (("score", "mAP"), ("score_wtd", "wmAP")):
            metrics[name] = _weighted_sum(recall, metrics[f"{mean}_rel"], metrics[f"{mean}_phr"])
        _add_precision(metrics, precision, settings)
        scores.results[task] = metrics
        recalls = recall_of_predicates(ranks, truth, settings)
        scores.add_predicates(task, truth, settings, recalls, precision["relationship"])
    return scores


def _add_precision(
    metrics: dict[str, float], precision: dict[str, np.ndarray], settings: Settings
) -> None:
    """AP of each predicate, named as Detectron2 names per-category results."""
    for kind, suffix in _SUFFIXES.items():
        for name, value in zip(settings.predicate_names, precision[kind].tolist()):
            metrics[f"AP_{suffix}-{name}"] = value
