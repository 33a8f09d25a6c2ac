"""Two accuracies that count the paper's two confusions, on any data set and in any task.

*Instance accuracy* (entity instance confusion) counts over the ground-truth relations for which the
same subject could as well have had another object of the same class (and the same for the subjects
of an object) how often the true one gets strictly the highest score for the predicate.

*Pairing accuracy* (proximal relationship ambiguity) counts over the ground-truth relations that
have another pair of the same predicate and subject class near by how often the true pairing scores
strictly above all swapped ones.

Precisely, in one image with ground-truth entities and relations (s, p, o):

- *Entities*: an entity that is annotated twice (same class and coordinates) is one entity, a
  relation annotated twice is one relation.
- *Score of a pair (s, o) for p*: the best of the image's best ``limit`` triplets that has the
  predicate p and whose boxes belong to s and o. A predicted box belongs to the ground-truth entity
  of its class that it overlaps best, if that IoU is >= 0.5 (of equal ones, the first). Pairs that
  are not predicted score minus infinity. With boxes given (PRDCLS) each box belongs to itself.
- *Instance accuracy, object side*: the rivals of (s, p, o) are the entities o' of o's class,
  o' != s, o' != o, for which (s, p, o') is not annotated. Relations with at least one rival are the
  cases; a case is right if score_p(s, o) > score_p(s, o') for all rivals. *Subject side*: the same
  with the roles exchanged. *Combined*: the cases of both sides together, so that a relation may
  give two.
- *Pairing accuracy*: another relation (s', p, o') is near by (s, p, o) if all four entities are
  distinct, s and s' have one class, and the boxes that enclose the two pairs overlap. The rivals
  are the swapped pairs (s, o') and (s', o) of all relations near by, as far as they are not
  annotated with p themselves; o and o' may differ in class. Relations with at least one rival are
  the cases; a case is right if score_p(s, o) is above the score of every rival.
- Equal scores are wrong, and so is a true pair that is not predicted. An accuracy without cases is
  NaN.
"""

from collections import OrderedDict
from typing import Dict, Iterable, Tuple

import numpy as np

from .matching import best_overlap, pairwise_iou, phrase_boxes
from .records import GroundTruth, ImagePair, Prediction

__all__ = [
    "assign_boxes",
    "confusion_report",
    "instance_cases",
    "merge_repeated",
    "pair_scores",
    "pairing_cases",
]

SIDES = ("object", "subject")


def merge_repeated(ground_truth: GroundTruth) -> GroundTruth:
    """The same ground truth with every entity and every relation once, in the order given."""
    if len(ground_truth.boxes) == 0:
        return ground_truth
    keys = np.column_stack([ground_truth.classes, ground_truth.boxes])
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    kept = np.sort(first)
    new_index = np.searchsorted(kept, first[inverse.reshape(-1)])
    relations = ground_truth.relations.copy()
    relations[:, :2] = new_index[relations[:, :2]]
    relations = relations[relations[:, 0] != relations[:, 1]]
    _, first_relation = np.unique(relations, axis=0, return_index=True)
    return GroundTruth(
        ground_truth.boxes[kept], ground_truth.classes[kept], relations[np.sort(first_relation)]
    )


def assign_boxes(ground_truth: GroundTruth, prediction: Prediction) -> np.ndarray:
    """(R,) index of the ground-truth entity that each predicted box belongs to, or -1."""
    same_class = prediction.classes[:, None] == ground_truth.classes[None, :]
    return best_overlap(pairwise_iou(prediction.boxes, ground_truth.boxes), same_class)


def pair_scores(
    owner: np.ndarray, num_entities: int, prediction: Prediction, predicate: int
) -> np.ndarray:
    """(N, N) score of each ordered pair of ground-truth entities for one predicate.

    Args:
        owner: (R,) entity of each predicted box, or -1, from :func:`assign_boxes`.
        num_entities: N.
        prediction: triplets of the image.
        predicate: the predicate whose scores are wanted.
    """
    table = np.full((num_entities, num_entities), -np.inf)
    pairs = owner[prediction.pairs]
    used = (prediction.predicates == predicate) & (pairs >= 0).all(axis=1)
    np.maximum.at(table, (pairs[used, 0], pairs[used, 1]), prediction.scores[used])
    return table


def instance_cases(
    scores: np.ndarray, annotated: np.ndarray, classes: np.ndarray
) -> Tuple[int, int]:
    """Right cases and cases of one predicate, for columns as the confused side.

    Args:
        scores: (N, N) scores of the pairs; transpose both tables for the subject side.
        annotated: (N, N) bool, the pairs that are annotated with the predicate.
        classes: (N,) classes of the entities.
    """
    anchor, partner = np.nonzero(annotated)
    rivals = (classes[None, :] == classes[partner][:, None]) & ~annotated[anchor]
    rivals[np.arange(len(anchor)), anchor] = False
    best_rival = np.where(rivals, scores[anchor], -np.inf).max(axis=1, initial=-np.inf)
    is_case = rivals.any(axis=1)
    right = is_case & (scores[anchor, partner] > best_rival)
    return int(right.sum()), int(is_case.sum())


def pairing_cases(
    scores: np.ndarray, annotated: np.ndarray, classes: np.ndarray, boxes: np.ndarray
) -> Tuple[int, int]:
    """Right cases and cases of one predicate.

    Args:
        scores: (N, N) scores of the pairs.
        annotated: (N, N) bool, the pairs that are annotated with the predicate.
        classes: (N,) classes of the entities.
        boxes: (N, 4) their boxes.
    """
    pairs = np.stack(np.nonzero(annotated), axis=1)
    subject, object_ = pairs[:, 0], pairs[:, 1]
    enclosing = phrase_boxes(boxes, pairs)
    near = (
        (subject[:, None] != subject[None, :])
        & (object_[:, None] != object_[None, :])
        & (subject[:, None] != object_[None, :])
        & (object_[:, None] != subject[None, :])
        & (classes[subject][:, None] == classes[subject][None, :])
        & (pairwise_iou(enclosing, enclosing) > 0)
    )
    # swapped[i, j] is (subject of i, object of j); its transpose is (subject of j, object of i).
    swapped = scores[subject[:, None], object_[None, :]]
    wrong = ~annotated[subject[:, None], object_[None, :]]
    own_subject, own_object = near & wrong, near & wrong.T
    best_rival = np.maximum(
        np.where(own_subject, swapped, -np.inf).max(axis=1, initial=-np.inf),
        np.where(own_object, swapped.T, -np.inf).max(axis=1, initial=-np.inf),
    )
    is_case = (own_subject | own_object).any(axis=1)
    right = is_case & (scores[subject, object_] > best_rival)
    return int(right.sum()), int(is_case.sum())


def _count_image(ground_truth: GroundTruth, prediction: Prediction) -> Dict[str, np.ndarray]:
    """(2,) right cases and cases of each side and of the pairings in one image."""
    counts = {name: np.zeros(2, dtype=np.int64) for name in SIDES + ("pairing",)}
    ground_truth = merge_repeated(ground_truth)
    owner = assign_boxes(ground_truth, prediction)
    num_entities = len(ground_truth.boxes)
    for predicate in np.unique(ground_truth.relations[:, 2]).tolist():
        pairs = ground_truth.pairs[ground_truth.relations[:, 2] == predicate]
        annotated = np.zeros((num_entities, num_entities), dtype=bool)
        annotated[pairs[:, 0], pairs[:, 1]] = True
        scores = pair_scores(owner, num_entities, prediction, predicate)
        classes, boxes = ground_truth.classes, ground_truth.boxes
        counts["object"] += instance_cases(scores, annotated, classes)
        counts["subject"] += instance_cases(scores.T, annotated.T, classes)
        counts["pairing"] += pairing_cases(scores, annotated, classes, boxes)
    return counts


def confusion_report(
    images: Iterable[ImagePair], predicates_per_pair: int = 0, limit: int = 100
) -> "OrderedDict[str, float]":
    """Both accuracies in percent, each followed by its number of cases.

    Args:
        images: ground truth and prediction of every image of the data set.
        predicates_per_pair: k; 0 means all.
        limit: triplets that count in an image, after k was applied; 0 means all.

    Returns:
        ``instance_accuracy``, ``instance_cases``, the same two for each side
        (``instance_accuracy_object``, ...), ``pairing_accuracy`` and ``pairing_cases``.
    """
    total = {name: np.zeros(2, dtype=np.int64) for name in SIDES + ("pairing",)}
    for ground_truth, prediction in images:
        best = prediction.best(predicates_per_pair, limit)
        for name, counts in _count_image(ground_truth, best).items():
            total[name] += counts
    report: "OrderedDict[str, float]" = OrderedDict()

    def add(prefix: str, suffix: str, counts: np.ndarray) -> None:
        right, cases = counts.tolist()
        report[f"{prefix}_accuracy{suffix}"] = 100.0 * right / cases if cases else float("nan")
        report[f"{prefix}_cases{suffix}"] = float(cases)

    add("instance", "", total["object"] + total["subject"])
    for side in SIDES:
        add("instance", f"_{side}", total[side])
    add("pairing", "", total["pairing"])
    return report
