"""Matching of predicted triplets with ground truth: pure functions on numpy arrays.

Shapes: R predicted boxes, N ground-truth boxes, K predicted triplets, M ground-truth triplets, Q
candidates, which are pairs of a predicted and a ground-truth triplet of equal image and labels.
Boxes are XYXY in continuous coordinates (a width is ``x2 - x1``). Predicted triplets of an image
are always in the order of :func:`rank_by_score`. Nothing here knows a protocol; the protocols are
built of these.
"""

import numpy as np

from ..structures.ranking import rank_in_group
from ..structures.scene_graph import SceneGraph

__all__ = [
    "NEVER",
    "aligned_iou",
    "best_candidates",
    "best_overlap",
    "equal_codes",
    "find_hits",
    "first_ranks",
    "match_one_to_one",
    "pairwise_iou",
    "phrase_boxes",
    "relationship_overlaps",
    "same_labels",
    "voc_average_precision",
]

NEVER = np.iinfo(np.int64).max  # the rank of what was not found


def aligned_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes that broadcast, (..., 4), in float64; 0 for empty unions."""
    first = np.asarray(boxes1, dtype=np.float64)
    second = np.asarray(boxes2, dtype=np.float64)

    def sides(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        low = np.maximum(a[..., axis], b[..., axis])
        return (np.minimum(a[..., axis + 2], b[..., axis + 2]) - low).clip(min=0)

    intersection = sides(first, second, 0) * sides(first, second, 1)
    union = sides(first, first, 0) * sides(first, first, 1)
    union = union + sides(second, second, 0) * sides(second, second, 1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def pairwise_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """Intersection over union of (A, 4) and (B, 4) boxes as (A, B) float64; 0 for empty unions."""
    return aligned_iou(np.reshape(boxes1, (-1, 1, 4)), np.reshape(boxes2, (1, -1, 4)))


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


def same_labels(labels: np.ndarray, gt_labels: np.ndarray) -> np.ndarray:
    """(K, M) bool: whether all columns of (K, L) and (M, L) labels are equal."""
    return (labels[:, None, :] == gt_labels[None, :, :]).all(axis=-1)


def best_overlap(
    overlaps: np.ndarray, candidates: np.ndarray, threshold: float = 0.5
) -> np.ndarray:
    """Each row's best-overlapping column.

    Args:
        overlaps: (K, M).
        candidates: (K, M) bool, the combinations that may match (equal labels).
        threshold: a match needs ``overlap >= threshold`` (> 0).

    Returns:
        (K,) index of the column, or -1. Of equal overlaps the first column is taken.
    """
    if overlaps.shape[1] == 0:
        return np.full(len(overlaps), -1, dtype=np.int64)
    allowed = np.where(candidates & (overlaps >= threshold), overlaps, -1.0)
    return np.where(allowed.max(axis=1) >= 0, allowed.argmax(axis=1), -1)


def equal_codes(codes: np.ndarray, gt_codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The candidates: all combinations of a prediction and a ground truth of one code.

    Args:
        codes: (K,) integers that stand for image and labels.
        gt_codes: (M,) likewise.

    Returns:
        (Q,) prediction and (Q,) ground truth, sorted by the prediction, then by the ground truth.
    """
    order = np.argsort(gt_codes, kind="stable")
    ordered = gt_codes[order]
    first = np.searchsorted(ordered, codes, side="left")
    counts = np.searchsorted(ordered, codes, side="right") - first
    predictions = np.repeat(np.arange(len(codes)), counts)
    offset = np.arange(len(predictions)) - np.repeat(np.cumsum(counts) - counts, counts)
    return predictions, order[np.repeat(first, counts) + offset]


def first_ranks(
    predictions: np.ndarray, ground_truths: np.ndarray, ranks: np.ndarray, num_ground_truth: int
) -> np.ndarray:
    """Many-to-many: the best rank of all predictions that match a ground truth.

    Args:
        predictions: (Q,) of the candidates that overlap enough.
        ground_truths: (Q,) likewise.
        ranks: (K,) rank of each prediction in its image, from 0.
        num_ground_truth: M.

    Returns:
        (M,) ranks, :data:`NEVER` where nothing matches.
    """
    found = np.full(num_ground_truth, NEVER, dtype=np.int64)
    np.minimum.at(found, ground_truths, ranks[predictions])
    return found


def _best_first(predictions: np.ndarray, overlaps: np.ndarray) -> np.ndarray:
    """Order of the candidates: by prediction, the best overlap first, ties as given."""
    return np.lexsort((-overlaps, predictions))


def best_candidates(
    predictions: np.ndarray, ground_truths: np.ndarray, overlaps: np.ndarray, num_predictions: int
) -> np.ndarray:
    """Each prediction's best-overlapping ground truth, taken or not.

    Args:
        predictions: (Q,) of the candidates that overlap enough, in the order of
            :func:`equal_codes`.
        ground_truths: (Q,) likewise.
        overlaps: (Q,) their overlaps.
        num_predictions: K.

    Returns:
        (K,) index of the ground truth, or -1. Of equal overlaps the first ground truth is taken.
    """
    matches = np.full(num_predictions, -1, dtype=np.int64)
    worst_first = _best_first(predictions, overlaps)[::-1]
    matches[predictions[worst_first]] = ground_truths[worst_first]  # the last assignment stays
    return matches


def match_one_to_one(
    predictions: np.ndarray,
    ground_truths: np.ndarray,
    overlaps: np.ndarray,
    codes: np.ndarray,
    num_ground_truth: int,
) -> np.ndarray:
    """Greedy matching: in rank order each prediction takes its best *unmatched* ground truth.

    Predictions of different codes never want the same ground truth, so that the first predictions
    of all codes are matched at once, then all second ones, and so on.

    Args:
        predictions: (Q,) of the candidates that overlap enough, in the order of
            :func:`equal_codes`; in one image, a lower number is a better rank.
        ground_truths: (Q,) likewise.
        overlaps: (Q,) their overlaps.
        codes: (K,) the codes of :func:`equal_codes`.
        num_ground_truth: M.

    Returns:
        (K,) index of the matched ground truth, or -1. Of equal overlaps the first ground truth is
        taken. The match of a prediction depends on those before it only, so that the result for
        the best n predictions is the result's first n rows.
    """
    matches = np.full(len(codes), -1, dtype=np.int64)
    involved, own = np.unique(predictions, return_inverse=True)
    turn = rank_in_group(codes[involved])[own.reshape(-1)]
    order = np.lexsort((-overlaps, predictions, turn))
    predictions, ground_truths, turn = predictions[order], ground_truths[order], turn[order]
    taken = np.zeros(num_ground_truth, dtype=bool)
    bounds = np.searchsorted(turn, np.arange(turn[-1] + 2 if len(turn) else 1))
    for start, end in zip(bounds[:-1], bounds[1:]):
        free = start + np.flatnonzero(~taken[ground_truths[start:end]])
        rows, columns = predictions[free], ground_truths[free]
        is_best = np.ones(len(rows), dtype=bool)
        is_best[1:] = rows[1:] != rows[:-1]
        matches[rows[is_best]] = columns[is_best]
        taken[columns[is_best]] = True
    return matches


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


def find_hits(
    predicted: SceneGraph, truth: SceneGraph, iou_threshold: float = 0.5
) -> tuple[list[bool], list[bool]]:
    """Which predictions are hits, and which ground-truth relations they find.

    A prediction hits a ground-truth relation if subject class, predicate and object class are
    equal and both boxes overlap by ``iou_threshold`` or more. Several may hit the same one.

    Returns:
        hits: (K,) one per predicted relation.
        found: (M,) one per ground-truth relation.
    """
    overlaps = relationship_overlaps(
        pairwise_iou(predicted.boxes, truth.boxes), predicted.pairs, truth.pairs
    )
    hit = (overlaps >= iou_threshold) & same_labels(predicted.labels, truth.labels)
    return hit.any(axis=1).tolist(), hit.any(axis=0).tolist()
