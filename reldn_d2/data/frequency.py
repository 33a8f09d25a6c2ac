"""Count how often each predicate relates two classes in the training annotations.

Shape shorthand: C entity classes, P predicates; the last of the P + 1 columns is "no relationship".
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..structures.box_ops import boxes_overlap
from ..structures.scene_graph import boxes_xyxy
from .dataset_dict import check_annotations

__all__ = [
    "PairCounts",
    "count_pairs",
    "count_predicates",
    "count_related_pairs",
    "log_frequencies",
]

_PAIRS_AT_ONCE = 1 << 20  # bounds the memory


class PairCounts(NamedTuple):
    """Counts of the annotations of a dataset, by the classes of subject and object."""

    relations: np.ndarray  # (C, C, P) int64: relations per predicate, every copy counts
    pairs: np.ndarray  # (C, C) int64: ordered pairs of distinct boxes, related or not
    overlapping: np.ndarray  # (C, C) int64: those whose boxes overlap (IoU > 0)

    def table(self, overlap_filter: bool) -> Tensor:
        """Return (C, C, P + 1) int64; see :func:`count_predicates`."""
        unrelated = (self.overlapping if overlap_filter else self.pairs) + 1
        return torch.from_numpy(np.concatenate([self.relations, unrelated[..., None]], axis=2))


class _CellCounts:
    """Counts how often each cell index occurs.

    Small arrays are collected, because one bincount for many images saves a pass over all cells
    per image.
    """

    def __init__(self, num_cells: int) -> None:
        self._counts = np.zeros(num_cells, dtype=np.int64)
        self._collected: list[np.ndarray] = []
        self._size = 0

    def add(self, indices: np.ndarray) -> None:
        """Count an array of cell indices."""
        self._collected.append(indices)
        self._size += len(indices)
        if self._size >= _PAIRS_AT_ONCE:
            self.total()

    def total(self) -> np.ndarray:
        """Return the (cells,) int64 counts so far."""
        if self._collected:
            indices = np.concatenate(self._collected)
            self._counts += np.bincount(indices, minlength=len(self._counts))
            self._collected, self._size = [], 0
        return self._counts


def count_pairs(
    dataset_dicts: Iterable[dict[str, Any]], num_classes: int, num_predicates: int
) -> PairCounts:
    """Count relations and pairs of boxes given the classes of subject and object.

    Crowd annotations and their relations are skipped, as in training. The memory does not depend
    on the number of images or of boxes per image.

    Args:
        dataset_dicts: Detectron2's dicts with ``"annotations"`` and ``"relations"``.
        num_classes: C.
        num_predicates: P.

    Raises:
        ValueError: if a category, predicate or index is out of range; names file and record.
    """
    relation_counts = _CellCounts(num_classes * num_classes * num_predicates)
    overlap_counts = _CellCounts(num_classes * num_classes)
    pairs = np.zeros((num_classes, num_classes), dtype=np.int64)
    class_counts: list[np.ndarray] = []
    for record in dataset_dicts:
        check_annotations(record, num_classes, num_predicates)
        annotations = record["annotations"]
        classes = np.array([annotation["category_id"] for annotation in annotations], np.int64)
        not_crowd = np.array([not annotation.get("iscrowd", 0) for annotation in annotations], bool)
        boxes = boxes_xyxy(annotations)

        relations = np.array(list(record.get("relations", ())), dtype=np.int64).reshape(-1, 3)
        if not not_crowd.all():
            relations = relations[not_crowd[relations[:, :2]].all(axis=1)]
        subjects, objects, predicates = relations.T
        cells = classes[subjects] * num_classes + classes[objects]
        relation_counts.add(cells * num_predicates + predicates)
        boxes, classes = boxes[not_crowd], classes[not_crowd]
        class_counts.append(np.bincount(classes, minlength=num_classes))
        if len(class_counts) * num_classes >= _PAIRS_AT_ONCE:
            pairs += _ordered_pairs(class_counts)
            class_counts.clear()
        for first, second in _overlapping_pairs(boxes):
            overlap_counts.add(classes[first] * num_classes + classes[second])
    if class_counts:
        pairs += _ordered_pairs(class_counts)
    shape = (num_classes, num_classes)
    overlapping = overlap_counts.total().reshape(shape)
    return PairCounts(
        relation_counts.total().reshape(*shape, num_predicates),
        pairs,
        overlapping + overlapping.T,  # of each pair only one order was counted
    )


def count_related_pairs(dataset_dicts: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Count the ordered pairs with at least one relation, and those whose boxes do not overlap.

    Crowd annotations are skipped, as in :func:`count_pairs`.

    Args:
        dataset_dicts: valid dicts with ``"annotations"`` and ``"relations"``.

    Returns:
        Number of related pairs, and how many of these do not overlap.
    """
    related = apart = 0
    for record in dataset_dicts:
        annotations = record["annotations"]
        pairs = {
            (subject, object_)
            for subject, object_, _ in record.get("relations", ())
            if not (
                annotations[subject].get("iscrowd", 0) or annotations[object_].get("iscrowd", 0)
            )
        }
        if pairs:
            boxes = boxes_xyxy(annotations)
            first, second = boxes[np.array(list(pairs))].transpose(1, 0, 2)
            related += len(pairs)
            apart += int((~boxes_overlap(first, second)).sum())
    return related, apart


def _ordered_pairs(class_counts: list[np.ndarray]) -> np.ndarray:
    """Return (C, C) int64 ordered pairs of distinct boxes, from the (C,) boxes of each image."""
    per_image = np.array(class_counts, dtype=np.float64)  # fast, and exact below 2**53
    return (per_image.T @ per_image - np.diag(per_image.sum(axis=0))).astype(np.int64)


def _overlapping_pairs(boxes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the indices ``first < second`` of overlapping boxes, a bounded number at a time."""
    rows_at_once = max(_PAIRS_AT_ONCE // max(len(boxes), 1), 1)
    for start in range(0, len(boxes), rows_at_once):
        rows = boxes[start : start + rows_at_once]
        # Columns before `start` have met these rows already.
        first, second = np.nonzero(boxes_overlap(rows[:, None], boxes[start:]))
        upper = first < second
        yield first[upper] + start, second[upper] + start


def count_predicates(
    dataset_dicts: Iterable[dict[str, Any]],
    num_classes: int,
    num_predicates: int,
    overlap_filter: bool,
) -> Tensor:
    """Count predicates given the classes of subject and object.

    A relation counts in its predicate's column; every copy counts. The "no relationship" count of
    (s, o) is the number of ordered pairs of distinct ground-truth boxes of these classes, related
    or not, plus 1. Crowd annotations and their relations are skipped, as in training.

    Args:
        dataset_dicts: Detectron2's dicts with ``"annotations"`` and ``"relations"``.
        num_classes: C.
        num_predicates: P.
        overlap_filter: count only the pairs whose boxes overlap (IoU > 0) as "no relationship".
            Relations count in either case.

    Returns:
        (C, C, P + 1) int64.

    Raises:
        ValueError: if a category, predicate or index is out of range; names file and record.
    """
    return count_pairs(dataset_dicts, num_classes, num_predicates).table(overlap_filter)


def log_frequencies(counts: Tensor) -> Tensor:
    """Return the logits of the semantic module.

    Args:
        counts: (C, C, P + 1), from :func:`count_predicates`; each (s, o) has a positive sum.

    Returns:
        (C, C, P + 1) float32, ``log(count / sum + 1e-3)``.
    """
    counts = counts.double()
    return (counts / counts.sum(dim=-1, keepdim=True) + 1e-3).log().float()
