"""Matching of predicted triplets with ground truth: pure functions on numpy arrays.

Shapes: R predicted boxes, N ground-truth boxes, K predicted triplets, M ground-truth triplets.
Boxes are XYXY in continuous coordinates (a width is ``x2 - x1``). Predicted triplets are always in
the order of :func:`rank_by_score`. Nothing here knows a protocol; the protocols are built of these.
"""

import numpy as np

__all__ = [
    "best_overlap",
    "limit_predicates_per_pair",
    "match_one_to_one",
    "pairwise_iou",
    "phrase_boxes",
    "phrase_overlaps",
    "rank_by_score",
    "relationship_overlaps",
    "same_labels",
    "voc_average_precision",
]


def rank_by_score(scores: np.ndarray) -> np.ndarray:
    """Indices that sort ``scores`` in descending order; equal scores keep their given order."""
    return np.argsort(-scores, kind="stable")


def limit_predicates_per_pair(pairs: np.ndarray, limit: int) -> np.ndarray:
    """The first ``limit`` rows of every pair.

    Args:
        pairs: (K, 2) subject and object indices, in descending order of their triplets' scores.
        limit: predicates that a pair may have (k); 0 means no limit.

    Returns:
        (K,) bool, True for the rows that stay.
    """
    if limit == 0 or len(pairs) == 0:
        return np.ones(len(pairs), dtype=bool)
    codes = pairs[:, 0].astype(np.int64) * (int(pairs.max()) + 1) + pairs[:, 1]
    order = np.argsort(codes, kind="stable")
    _, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    rank_in_pair = np.arange(len(codes)) - np.repeat(starts, counts)
    keep = np.empty(len(codes), dtype=bool)
    keep[order] = rank_in_pair < limit
    return keep


def pairwise_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """Intersection over union of (A, 4) and (B, 4) boxes as (A, B) float64; 0 for empty unions."""
    first = np.asarray(boxes1, dtype=np.float64).reshape(-1, 1, 4)
    second = np.asarray(boxes2, dtype=np.float64).reshape(1, -1, 4)
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(
        first[..., :2], second[..., :2]
    )
    intersection = sides.clip(min=0).prod(axis=-1)
    area1 = (first[..., 2:] - first[..., :2]).clip(min=0).prod(axis=-1)
    area2 = (second[..., 2:] - second[..., :2]).clip(min=0).prod(axis=-1)
    union = area1 + area2 - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def phrase_boxes(boxes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The tightest box around subject and object of each pair: (R, 4), (K, 2) -> (K, 4)."""
    subjects, objects = boxes[pairs[:, 0]], boxes[pairs[:, 1]]
    low = np.minimum(subjects[:, :2], objects[:, :2])
    return np.concatenate([low, np.maximum(subjects[:, 2:], objects[:, 2:])], axis=1)


def relationship_overlaps(iou: np.ndarray, pairs: np.ndarray, gt_pairs: np.ndarray) -> np.ndarray:
    """The smaller of the subjects' and the objects' IoU.

    Args:
        iou: (R, N) of predicted and ground-truth boxes.
        pairs: (K, 2) indices into the R boxes.
        gt_pairs: (M, 2) indices into the N boxes.

    Returns:
        (K, M) overlaps.
    """
    subjects = iou[pairs[:, 0]][:, gt_pairs[:, 0]]
    objects = iou[pairs[:, 1]][:, gt_pairs[:, 1]]
    return np.minimum(subjects, objects)


def phrase_overlaps(
    boxes: np.ndarray, pairs: np.ndarray, gt_boxes: np.ndarray, gt_pairs: np.ndarray
) -> np.ndarray:
    """(K, M) IoU of the boxes that enclose predicted and ground-truth pairs."""
    return pairwise_iou(phrase_boxes(boxes, pairs), phrase_boxes(gt_boxes, gt_pairs))


def same_labels(labels: np.ndarray, gt_labels: np.ndarray) -> np.ndarray:
    """(K, M) bool: whether all columns of (K, L) and (M, L) labels are equal."""
    return (labels[:, None, :] == gt_labels[None, :, :]).all(axis=-1)


def match_one_to_one(
    overlaps: np.ndarray, candidates: np.ndarray, threshold: float = 0.5
) -> np.ndarray:
    """Greedy matching: in rank order each prediction takes its best *unmatched* ground truth.

    Args:
        overlaps: (K, M), predictions in descending score.
        candidates: (K, M) bool, the combinations that may match (equal labels).
        threshold: a match needs ``overlap >= threshold`` (> 0).

    Returns:
        (K,) index of the matched ground truth, or -1. Of equal overlaps the first ground truth is
        taken. The match of a prediction depends on those before it only, so that the result for
        the best n predictions is the result's first n rows.
    """
    matched = np.full(len(overlaps), -1, dtype=np.int64)
    free = np.where(candidates & (overlaps >= threshold), overlaps, -1.0)
    for row in np.flatnonzero((free >= 0).any(axis=1)):
        best = free[row].argmax()
        if free[row, best] >= 0:
            matched[row] = best
            free[:, best] = -1.0
    return matched


def best_overlap(
    overlaps: np.ndarray, candidates: np.ndarray, threshold: float = 0.5
) -> np.ndarray:
    """Each prediction's best-overlapping ground truth, taken or not.

    Args:
        overlaps: (K, M).
        candidates: (K, M) bool, the combinations that may match (equal labels).
        threshold: a match needs ``overlap >= threshold`` (> 0).

    Returns:
        (K,) index of the ground truth, or -1. Of equal overlaps the first ground truth is taken.
    """
    if overlaps.shape[1] == 0:
        return np.full(len(overlaps), -1, dtype=np.int64)
    allowed = np.where(candidates & (overlaps >= threshold), overlaps, -1.0)
    return np.where(allowed.max(axis=1) >= 0, allowed.argmax(axis=1), -1)


def voc_average_precision(is_match: np.ndarray, num_ground_truth: int) -> float:
    """Area under the precision envelope over all recall points (VOC 2010 and later).

    Args:
        is_match: (D,) bool of all detections in descending score: true or false positive.
        num_ground_truth: number of ground truths; the result is NaN if it is 0.

    Returns:
        AP in [0, 1].
    """
    if num_ground_truth == 0:
        return float("nan")
    hits = np.cumsum(is_match)
    precision = hits / np.arange(1, len(is_match) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall grows by 1 / num_ground_truth at each true positive and nowhere else.
    return float(envelope[np.asarray(is_match, dtype=bool)].sum() / num_ground_truth)
