"""How often each predicate relates each two classes, counted on the training annotations.

Shorthand: C entity classes, P predicates; the last of the P + 1 columns is "no relationship".
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .annotations import boxes_xyxy, check_annotations

__all__ = ["count_predicates", "log_frequencies"]

_IMAGES_PER_CHUNK = 1000


def count_predicates(
    dataset_dicts: Iterable[dict[str, Any]],
    num_classes: int,
    num_predicates: int,
    overlap_filter: bool,
) -> Tensor:
    """Count predicates given the classes of subject and object.

    A relation counts in its predicate's column, as often as it is listed. The "no relationship"
    count of (s, o) is the number of ordered pairs of different ground-truth boxes of these classes,
    related or not, plus 1. Crowd annotations and their relations are left out, as in training.

    Args:
        dataset_dicts: Detectron2's dicts with ``"annotations"`` and ``"relations"``.
        num_classes: C.
        num_predicates: P.
        overlap_filter: count only the pairs whose boxes overlap (IoU > 0) as "no relationship".
            Relations count in either case.

    Returns:
        (C, C, P + 1) int64.

    Raises:
        ValueError: if a category, predicate or index is out of range, with file and record.
    """
    pair_counts = np.ones(num_classes * num_classes, dtype=np.int64)
    relation_counts = np.zeros(num_classes * num_classes * num_predicates, dtype=np.int64)
    pair_cells: list[np.ndarray] = []
    relation_cells: list[np.ndarray] = []

    def flush() -> None:
        for cells, counts in ((pair_cells, pair_counts), (relation_cells, relation_counts)):
            if cells:
                counts += np.bincount(np.concatenate(cells), minlength=len(counts))
                cells.clear()

    for record in dataset_dicts:
        check_annotations(record, num_classes, num_predicates)
        annotations = record["annotations"]
        relations = record.get("relations", ())
        classes = np.array([annotation["category_id"] for annotation in annotations], np.int64)
        solid = np.array([not annotation.get("iscrowd", 0) for annotation in annotations], bool)

        pair_class = classes[:, None] * num_classes + classes
        counted = solid[:, None] & solid
        if len(relations):
            subjects, objects, predicates = np.asarray(relations, dtype=np.int64).T
            cells = pair_class[subjects, objects] * num_predicates + predicates
            relation_cells.append(cells[counted[subjects, objects]])
        np.fill_diagonal(counted, False)
        if overlap_filter:
            counted &= _overlaps(boxes_xyxy(annotations))
        pair_cells.append(pair_class[counted])
        if len(pair_cells) == _IMAGES_PER_CHUNK:
            flush()
    flush()

    counts = np.concatenate(
        [relation_counts.reshape(-1, num_predicates), pair_counts[:, None]], axis=1
    )
    return torch.from_numpy(counts).reshape(num_classes, num_classes, num_predicates + 1)


def log_frequencies(counts: Tensor) -> Tensor:
    """Logits of the semantic module.

    Args:
        counts: (C, C, P + 1), of :func:`count_predicates`; each (s, o) has a positive sum.

    Returns:
        (C, C, P + 1) float32, ``log(count / sum + 1e-3)``.
    """
    counts = counts.double()
    return (counts / counts.sum(dim=-1, keepdim=True) + 1e-3).log().float()


def _overlaps(boxes: np.ndarray) -> np.ndarray:
    """(R, R) bool, True where two boxes have an area in common."""
    low, high = boxes[:, :2], boxes[:, 2:]
    width_height = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    return (width_height > 0).all(axis=2)
