"""Recall by the rule of Lu et al., "Visual Relationship Detection with Language Priors" (2016).

Of an image's triplets, first every ordered pair of boxes keeps its k best predicates, then the n
best triplets are kept. In descending score (equal scores in the order given) each takes the
best-overlapping *unmatched* ground truth with the same three labels and an overlap >= 0.5; of equal
overlaps the first ground truth. Recall is pooled: the hits of all images over the ground-truth
relations of all images; an image without predictions has no hits. The overlap is

- ``relationship``: the smaller of the subject boxes' and the object boxes' IoU;
- ``phrase``: the IoU of the boxes that enclose subject and object.

A ground truth that is annotated twice must be predicted twice to be found twice.
"""

from typing import Iterable, List, Sequence, Union

import numpy as np

from .matching import (
    limit_predicates_per_pair,
    match_one_to_one,
    pairwise_iou,
    phrase_overlaps,
    relationship_overlaps,
    same_labels,
)
from .records import GroundTruth, ImagePair, Prediction

__all__ = ["keep_best", "match_triplets", "pooled_recall", "triplet_overlaps"]

KINDS = ("relationship", "phrase")


def keep_best(prediction: Prediction, predicates_per_pair: int = 0, limit: int = 0) -> Prediction:
    """The ``limit`` best triplets after each pair kept ``predicates_per_pair``; 0: no limit."""
    kept = np.flatnonzero(limit_predicates_per_pair(prediction.pairs, predicates_per_pair))
    return prediction.select(kept[:limit] if limit else kept)


def triplet_overlaps(
    ground_truth: GroundTruth, prediction: Prediction, kind: str = "relationship"
) -> np.ndarray:
    """(K, M) overlaps of predicted and ground-truth triplets, whatever their labels."""
    if kind == "relationship":
        iou = pairwise_iou(prediction.boxes, ground_truth.boxes)
        return relationship_overlaps(iou, prediction.pairs, ground_truth.pairs)
    if kind == "phrase":
        return phrase_overlaps(
            prediction.boxes, prediction.pairs, ground_truth.boxes, ground_truth.pairs
        )
    raise ValueError(f"Unknown kind of overlap {kind!r}; known are {', '.join(KINDS)}.")


def match_triplets(
    ground_truth: GroundTruth, prediction: Prediction, kind: str = "relationship"
) -> np.ndarray:
    """(K,) index of the ground-truth relation that each predicted triplet found, or -1."""
    overlaps = triplet_overlaps(ground_truth, prediction, kind)
    return match_one_to_one(overlaps, same_labels(prediction.labels, ground_truth.labels))


def pooled_recall(
    images: Iterable[ImagePair],
    topk: Sequence[Union[int, str]],
    predicates_per_pair: int = 0,
    kind: str = "relationship",
) -> List[float]:
    """Recall in percent over all images together.

    Args:
        images: ground truth and prediction of every image of the data set.
        topk: numbers n of triplets that count in an image; ``"n"`` stands for the image's own
            number of ground-truth relations.
        predicates_per_pair: k; 0 means all.
        kind: ``relationship`` or ``phrase``.

    Returns:
        One value for each of ``topk``; NaN if there is no ground-truth relation at all.
    """
    hits = np.zeros(len(topk), dtype=np.int64)
    total = 0
    for ground_truth, prediction in images:
        num_relations = len(ground_truth.relations)
        total += num_relations
        limits = [num_relations if n == "n" else int(n) for n in topk]
        best = keep_best(prediction, predicates_per_pair, max(limits, default=0))
        found = np.cumsum(match_triplets(ground_truth, best, kind) >= 0)
        for column, limit in enumerate(limits):
            if limit and len(found):
                hits[column] += found[min(limit, len(found)) - 1]
    return [100.0 * hit / total if total else float("nan") for hit in hits.tolist()]
