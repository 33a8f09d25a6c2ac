"""Average precision of relations, predicate by predicate.

All images' triplets of one predicate are pooled and sorted by score (equal scores: in the data
set's order of images, then as ranked in the image). A triplet is tested against the
best-overlapping ground truth of exactly its subject class, predicate and object class in its image,
the overlap being the smaller of the two IoUs or, for phrases, the enclosing boxes' IoU; of equal
overlaps the first ground truth. It is a true positive if that overlap is >= 0.5 (``released``:
> 0.5) and no earlier triplet has matched this ground truth, and else a false positive. AP is the
area under the precision envelope over all recall points. mAP is the mean over the predicates that
the ground truth contains; a predicate that it does not contain has no AP (NaN).
"""

from collections.abc import Sequence

import numpy as np

from ..structures.ranking import rank_by_score
from .batches import Detections, RelationTable, detections
from .ground_truth import ImagePair
from .matching import voc_average_precision

__all__ = [
    "mean_average_precision",
    "pooled_average_precision",
    "precision_of_predicates",
    "relation_average_precision",
    "true_positives",
]


def true_positives(found: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Order of the triplets by score, and in that order (K,) bool: true or false positive."""
    order = rank_by_score(found.scores)
    matched = found.matches[order]
    is_match = np.zeros(len(matched), dtype=bool)
    with_match = np.flatnonzero(matched >= 0)
    _, first = np.unique(matched[with_match], return_index=True)
    is_match[with_match[first]] = True
    return order, is_match


def precision_of_predicates(found: Detections, truth: RelationTable, num_predicates: int):
    """(P,) AP of each predicate in percent, NaN where the ground truth lacks the predicate."""
    order, is_match = true_positives(found)
    counts = np.bincount(truth.predicates, minlength=num_predicates)
    predicate = found.predicates[order]
    by_predicate = np.argsort(predicate, kind="stable")
    bounds = np.searchsorted(predicate[by_predicate], np.arange(num_predicates + 1))
    precision = [
        voc_average_precision(is_match[by_predicate[bounds[p] : bounds[p + 1]]], int(counts[p]))
        for p in range(num_predicates)
    ]
    return 100.0 * np.asarray(precision)


def pooled_average_precision(found: Detections, truth: RelationTable) -> float:
    """AP in percent of all predicates' triplets in one list; NaN without ground truth."""
    _, is_match = true_positives(found)
    return 100.0 * voc_average_precision(is_match, len(truth.image))


def relation_average_precision(
    images: Sequence[ImagePair],
    num_predicates: int,
    predicates_per_pair: int = 0,
    limit: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """AP of each predicate over a data set, both boxes overlapping by >= 0.5.

    Args:
        images: ground truth and prediction of every image, in the data set's order.
        num_predicates: P.
        predicates_per_pair: k; 0 means all.
        limit: triplets that count in an image, after k was applied; 0 means all.

    Returns:
        (P,) AP in percent, NaN where the ground truth lacks the predicate; and (P,) its number of
        ground-truth relations.
    """
    k = predicates_per_pair
    truth = RelationTable.from_images(images)
    found = detections(images, [k], limit=limit)[k, "relationship"]
    counts = np.bincount(truth.predicates, minlength=num_predicates)
    return precision_of_predicates(found, truth, num_predicates), counts


def mean_average_precision(average_precision: np.ndarray) -> float:
    """Mean over the predicates that have an AP; NaN if none has."""
    known = average_precision[~np.isnan(average_precision)]
    return float(known.mean()) if len(known) else float("nan")
