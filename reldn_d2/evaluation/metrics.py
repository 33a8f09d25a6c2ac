"""Recall and average precision from matches: pure functions on arrays.

Shapes: K triplets, M relations, P predicates. All values are in percent; a metric is NaN where the
ground truth has nothing to find.

Average precision (AP): all images' triplets of one predicate are pooled and sorted by score (equal
scores: in the dataset's order of images, then in their order in the image). A triplet is tested
against the best-overlapping relation with exactly its subject class, predicate and object class in
its image (of equal overlaps, the first relation). It is a true positive if that overlap is large
enough and no earlier triplet has matched this relation, and otherwise a false positive. AP is the
area under the precision envelope over all recall points (VOC 2010 and later).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..structures.ranking import rank_by_score
from .batches import RelationTable

__all__ = [
    "ScoredTriplets",
    "harmonic_mean",
    "image_recall",
    "information",
    "mean_of_defined",
    "pooled_recall",
    "predicate_image_recall",
    "predicate_pooled_recall",
    "voc_average_precision",
    "within_own_number",
]


def pooled_recall(
    ranks: np.ndarray, truth: RelationTable, recall_at: Sequence[int | str]
) -> list[float]:
    """Return the recall over the relations of all images together, for each n.

    Args:
        ranks: (M,) rank in its image at which each relation is found, from 0.
        truth: M relations.
        recall_at: numbers n of triplets that count per image; ``"n"`` stands for the image's number
            of relations.
    """
    if len(ranks) == 0:
        return [float("nan")] * len(recall_at)
    hits = [
        int((within_own_number(ranks, truth.image) if n == "n" else ranks < int(n)).sum())
        for n in recall_at
    ]
    return [100.0 * hit / len(ranks) for hit in hits]


def predicate_pooled_recall(
    found: np.ndarray, truth: RelationTable, num_predicates: int
) -> np.ndarray:
    """Return (P,) the share of each predicate's relations in (M,) bool ``found``."""
    total = np.bincount(truth.predicates, minlength=num_predicates)
    hits = np.bincount(truth.predicates[found], minlength=num_predicates)
    return 100.0 * np.divide(hits, total, out=np.full(len(total), np.nan), where=total > 0)


def image_recall(found: np.ndarray, image: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the recall per image, averaged over the images that have a relation.

    Args:
        found: (M,) bool.
        image: (M,) index of the relation's image.
        weights: (M,) how much each relation counts in its image, at least 0; images without any
            weight are left out. By default all count the same.
    """
    if len(found) == 0:
        return float("nan")
    total = np.bincount(image, weights=weights)
    hits = np.bincount(image, weights=found if weights is None else found * weights)
    has_relation = total > 0
    if not has_relation.any():
        return float("nan")
    return float(100.0 * np.mean(hits[has_relation] / total[has_relation]))


def within_own_number(ranks: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return (M,) bool, the relations found if an image gives as many triplets as it has relations.

    Args:
        ranks: (M,) rank in its image at which each relation is found, from 0.
        image: (M,) index of the relation's image.
    """
    return ranks < np.bincount(image)[image]


def information(training_counts: np.ndarray) -> np.ndarray:
    """Return (P,) bits that each predicate tells: ``-log2`` of its share in the training set.

    One relation is added to each predicate, so that one that training lacks has finite bits.

    Args:
        training_counts: (P,) relations of the training set.
    """
    counts = training_counts.astype(np.float64) + 1.0
    return -np.log2(counts / counts.sum())


def harmonic_mean(first: float, second: float) -> float:
    """Return the harmonic mean of two values of at least 0; 0 if both are, NaN if one is NaN."""
    return 2.0 * first * second / (first + second) if first + second != 0 else 0.0


def predicate_image_recall(
    found: np.ndarray, truth: RelationTable, num_predicates: int
) -> np.ndarray:
    """Return (P,) :func:`image_recall` of each predicate alone."""
    if len(found) == 0:
        return np.full(num_predicates, np.nan)
    codes = truth.predicates * truth.num_images + truth.image
    groups, of_group = np.unique(codes, return_inverse=True)
    of_group = of_group.reshape(-1)
    share = np.bincount(of_group, weights=found) / np.bincount(of_group)
    predicate = groups // truth.num_images
    total = np.bincount(predicate, minlength=num_predicates)
    sums = np.bincount(predicate, weights=share, minlength=num_predicates)
    return 100.0 * np.divide(sums, total, out=np.full(num_predicates, np.nan), where=total > 0)


@dataclass(frozen=True)
class ScoredTriplets:
    """The triplets of all images that average precision counts, in the order of the dataset."""

    scores: np.ndarray  # (K,) float64
    predicates: np.ndarray  # (K,)
    matches: np.ndarray  # (K,) the best-overlapping relation (its index in the dataset), or -1

    @cached_property
    def _by_score(self) -> tuple[np.ndarray, np.ndarray]:
        """(K,) indices by descending score, and in that order (K,) bool: a true positive."""
        order = rank_by_score(self.scores)
        matched = self.matches[order]
        is_match = np.zeros(len(matched), dtype=bool)
        with_match = np.flatnonzero(matched >= 0)
        _, first = np.unique(matched[with_match], return_index=True)
        is_match[with_match[first]] = True
        return order, is_match

    def average_precision(self, truth: RelationTable, num_predicates: int) -> np.ndarray:
        """Return (P,) AP of each predicate; NaN if the ground truth lacks the predicate."""
        order, is_match = self._by_score
        counts = np.bincount(truth.predicates, minlength=num_predicates)
        predicate = self.predicates[order]
        by_predicate = np.argsort(predicate, kind="stable")
        bounds = np.searchsorted(predicate[by_predicate], np.arange(num_predicates + 1))
        precision = [
            voc_average_precision(is_match[by_predicate[bounds[p] : bounds[p + 1]]], int(counts[p]))
            for p in range(num_predicates)
        ]
        return 100.0 * np.asarray(precision)

    def pooled_average_precision(self, truth: RelationTable) -> float:
        """Return the AP of all predicates' triplets in one list."""
        return 100.0 * voc_average_precision(self._by_score[1], len(truth.image))


def voc_average_precision(is_match: np.ndarray, num_relations: int) -> float:
    """Return the area under the precision envelope over all recall points, in [0, 1].

    Args:
        is_match: (K,) bool in descending order of the score: true or false positive.
        num_relations: relations that could be found.
    """
    if num_relations == 0:
        return float("nan")
    hits = np.cumsum(is_match)
    precision = hits / np.arange(1, len(is_match) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall grows by 1 / num_relations at each true positive and nowhere else.
    return float(envelope[np.asarray(is_match, dtype=bool)].sum() / num_relations)


def mean_of_defined(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if all are."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
