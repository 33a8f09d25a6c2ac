"""Count how often each predicate relates two classes in the training annotations.

Shape shorthand: C entity classes, P predicates; the last of the P + 1 columns is "no relationship".
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..structures.box_ops import boxes_overlap
from ..structures.scene_graph import boxes_xyxy
from .dataset_dict import check_annotations

__all__ = ["PairCounts", "count_pairs", "count_predicates", "log_frequencies"]

_IMAGES_PER_CHUNK = 1000


class PairCounts(NamedTuple):
    """Counts of the annotations of a data set, by the classes of subject and object."""

    relations: np.ndarray  # (C, C, P) int64: relations per predicate, every copy counts
    pairs: np.ndarray  # (C, C) int64: ordered pairs of distinct boxes, related or not
    overlapping: np.ndarray  # (C, C) int64: those whose boxes overlap (IoU > 0)

    def table(self, overlap_filter: bool) -> Tensor:
        """Return (C, C, P + 1) int64; see :func:`count_predicates`."""
        unrelated = (self.overlapping if overlap_filter else self.pairs) + 1
        return torch.from_numpy(np.concatenate([self.relations, unrelated[..., None]], axis=2))


def count_pairs(
    dataset_dicts: Iterable[dict[str, Any]], num_classes: int, num_predicates: int
) -> PairCounts:
    """Count relations and pairs of boxes given the classes of subject and object.

    Crowd annotations and their relations are skipped, as in training.

    Args:
        dataset_dicts: Detectron2's dicts with ``"annotations"`` and ``"relations"``.
        num_classes: C.
        num_predicates: P.

    Raises:
        ValueError: if a category, predicate or index is out of range; names file and record.
    """
    cells = num_classes * num_classes
    counts = [np.zeros(length, dtype=np.int64) for length in (cells * num_predicates, cells, cells)]
    chunks: list[list[np.ndarray]] = [[], [], []]

    def flush() -> None:
        for chunk, count in zip(chunks, counts, strict=True):
            if chunk:
                count += np.bincount(np.concatenate(chunk), minlength=len(count))
                chunk.clear()

    # Counting many images with one bincount saves a pass over the C * C * P counts per image.
    for record in dataset_dicts:
        check_annotations(record, num_classes, num_predicates)
        annotations = record["annotations"]
        relations = record.get("relations", ())
        classes = np.array([annotation["category_id"] for annotation in annotations], np.int64)
        not_crowd = np.array([not annotation.get("iscrowd", 0) for annotation in annotations], bool)

        boxes = boxes_xyxy(annotations)
        pair_class = classes[:, None] * num_classes + classes
        counted = not_crowd[:, None] & not_crowd
        if len(relations):
            subjects, objects, predicates = np.asarray(relations, dtype=np.int64).T
            related = pair_class[subjects, objects] * num_predicates + predicates
            chunks[0].append(related[counted[subjects, objects]])
        np.fill_diagonal(counted, False)
        chunks[1].append(pair_class[counted])
        chunks[2].append(pair_class[counted & boxes_overlap(boxes[:, None], boxes)])
        if len(chunks[1]) == _IMAGES_PER_CHUNK:
            flush()
    flush()
    return PairCounts(
        counts[0].reshape(num_classes, num_classes, num_predicates),
        counts[1].reshape(num_classes, num_classes),
        counts[2].reshape(num_classes, num_classes),
    )


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
