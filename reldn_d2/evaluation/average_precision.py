"""Average precision of relations, predicate by predicate.

All images' triplets of one predicate are pooled and sorted by score (equal scores: in the data
set's order of images, then as ranked in the image). A triplet is tested against the
best-overlapping ground truth of exactly its subject class, predicate and object class in its image,
the overlap being the smaller of the two IoUs. It is a true positive if that overlap is >= 0.5 and
no earlier triplet has matched this ground truth, and else a false positive. AP is the area under
the precision envelope over all recall points. mAP is the mean over the predicates that the ground
truth contains; a predicate that it does not contain has no AP (NaN).
"""

from typing import Sequence, Tuple

import numpy as np

from .lu2016 import keep_best, triplet_overlaps
from .matching import best_overlap, rank_by_score, same_labels, voc_average_precision
from .records import ImagePair

__all__ = ["mean_average_precision", "relation_average_precision"]


def relation_average_precision(
    images: Sequence[ImagePair],
    num_predicates: int,
    predicates_per_pair: int = 0,
    limit: int = 100,
) -> Tuple[np.ndarray, np.ndarray]:
    """AP of each predicate over a data set.

    Args:
        images: ground truth and prediction of every image, in the data set's order.
        num_predicates: P.
        predicates_per_pair: k; 0 means all.
        limit: triplets that count in an image, after k was applied; 0 means all.

    Returns:
        (P,) AP in percent, NaN where the ground truth lacks the predicate; and (P,) its number of
        ground-truth relations.
    """
    scores, predicates, matches = [], [], []
    gt_predicates = []
    offset = 0
    for ground_truth, prediction in images:
        best = keep_best(prediction, predicates_per_pair, limit)
        match = best_overlap(
            triplet_overlaps(ground_truth, best), same_labels(best.labels, ground_truth.labels)
        )
        scores.append(best.scores)
        predicates.append(best.predicates)
        matches.append(np.where(match >= 0, match + offset, -1))
        gt_predicates.append(ground_truth.relations[:, 2])
        offset += len(ground_truth.relations)
    counts = np.bincount(
        np.concatenate(gt_predicates + [np.zeros(0, dtype=np.int64)]), minlength=num_predicates
    )
    if not scores:
        return np.full(num_predicates, np.nan), counts
    order = rank_by_score(np.concatenate(scores))
    matched = np.concatenate(matches)[order]
    predicate = np.concatenate(predicates)[order]
    is_match = np.zeros(len(matched), dtype=bool)
    found, first = np.unique(matched, return_index=True)
    is_match[first[found >= 0]] = True
    precision = [
        voc_average_precision(is_match[predicate == p], int(counts[p]))
        for p in range(num_predicates)
    ]
    return 100.0 * np.asarray(precision), counts


def mean_average_precision(average_precision: np.ndarray) -> float:
    """Mean over the predicates that have an AP; NaN if none has."""
    known = average_precision[~np.isnan(average_precision)]
    return float(known.mean()) if len(known) else float("nan")
