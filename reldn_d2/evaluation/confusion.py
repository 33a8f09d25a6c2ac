"""Two accuracies for the paper's two confusions, on any dataset and in any task.

*Instance accuracy* (entity instance confusion): among the annotated relations whose subject could
have had another object of the same class (and likewise for the subjects of an object), how often
does the true entity get strictly the highest score for the predicate?

*Pairing accuracy* (proximal relationship ambiguity): among the annotated relations with another
pair of the same predicate and subject class nearby, how often does the true pairing score strictly
higher than all swapped ones?

The definitions, in one image with annotated entities and relations (s, p, o):

- *Entities*: an entity that is annotated twice (same class and coordinates) is one entity, a
  relation annotated twice is one relation.
- *Score of a pair (s, o) for p*: the highest score among the image's ``topk`` best triplets with
  the predicate p whose boxes belong to s and o. A predicted box belongs to the annotated entity of
  its class that it overlaps best, if that IoU is >= 0.5 (of equal ones, the first). Pairs that are
  not predicted score minus infinity. With boxes given (PRDCLS) each box belongs to itself.
- *Instance accuracy, object side*: the rivals of (s, p, o) are the entities o' of o's class,
  o' != s, o' != o, for which (s, p, o') is not annotated. Relations with at least one rival are
  the cases; a case is right if score_p(s, o) > score_p(s, o') for all rivals. *Subject side*: the
  same with the roles exchanged. *Combined*: the cases of both sides together, so a relation may
  give two.
- *Pairing accuracy*: another relation (s', p, o') is near (s, p, o) if all four entities are
  distinct, s and s' have one class, and the boxes that enclose the two pairs overlap. The rivals
  are the swapped pairs (s, o') and (s', o) of all such relations, except those annotated with p
  themselves; o and o' may differ in class. Relations with at least one rival are the cases; a case
  is right if score_p(s, o) is higher than the score of every rival.
- Equal scores are wrong, and so is a true pair that is not predicted. An accuracy without cases is
  NaN.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ..structures.boxes_np import aligned_iou, phrase_boxes
from .batches import NEVER, Batch, equal_codes
from .matching import best_candidates

__all__ = ["ConfusionCounter", "DistinctEntities"]

SIDES = ("object", "subject")


class ConfusionCounter:
    """Counts the cases, and the right ones, of both accuracies batch by batch."""

    def __init__(self, predicates_per_pair: Iterable[int | None], topk: int | None = 100):
        """
        Args:
            predicates_per_pair: values of k, each with counts of its own; None means no limit.
            topk: triplets per image that count, after k was applied; None means all.
        """
        self.topk = topk
        names = (*SIDES, "pairing")
        self._counts = {
            k: {name: np.zeros(2, dtype=np.int64) for name in names} for k in predicates_per_pair
        }

    def add(self, batch: Batch) -> None:
        """Count the relations of a batch."""
        entities = DistinctEntities(batch)
        owners = entities.owners(batch)
        cases = {side: _cases(entities, *_instance_rivals(entities, side)) for side in SIDES}
        cases["pairing"] = _cases(entities, *_pairing_rivals(entities))
        for k, counts in self._counts.items():
            used = batch.ranks(k) < (NEVER if self.topk is None else self.topk)
            scores = _PairScores(entities, owners, batch, used)
            own = scores.get(entities.codes(*entities.relations.T))
            for name, (is_case, relations, rivals) in cases.items():
                best_rival = np.full(len(entities.relations), -np.inf)
                np.maximum.at(best_rival, relations, scores.get(rivals))
                right = is_case & (own > best_rival)
                counts[name] += (right.sum(), is_case.sum())

    def report(self, predicates_per_pair: int | None) -> "OrderedDict[str, float]":
        """Return both accuracies for one k in percent, each followed by its number of cases.

        Returns:
            ``instance_accuracy``, ``instance_cases``, the same two for each side
            (``instance_accuracy_object``, ...), ``pairing_accuracy`` and ``pairing_cases``.
        """
        counts = self._counts[predicates_per_pair]
        report: OrderedDict[str, float] = OrderedDict()

        def add(prefix: str, suffix: str, right_and_cases: np.ndarray) -> None:
            right, cases = right_and_cases.tolist()
            report[f"{prefix}_accuracy{suffix}"] = 100.0 * right / cases if cases else float("nan")
            report[f"{prefix}_cases{suffix}"] = float(cases)

        add("instance", "", counts["object"] + counts["subject"])
        for side in SIDES:
            add("instance", f"_{side}", counts[side])
        add("pairing", "", counts["pairing"])
        return report


class DistinctEntities:
    """The distinct entities and relations of a batch. Shapes: E entities, M relations."""

    def __init__(self, batch: Batch):
        classes, boxes = batch.gt_classes, batch.gt_boxes
        kept, index_of = _distinct_rows((batch.gt_box_image, classes, *boxes.T))
        self.boxes, self.classes, self.image = boxes[kept], classes[kept], batch.gt_box_image[kept]
        subjects, objects = index_of[batch.gt_pairs].T
        predicates = batch.truth.predicates
        self.num_predicates = int(predicates[subjects != objects].max(initial=0)) + 1
        codes = self.codes(subjects, objects, predicates)[subjects != objects]
        rows = np.column_stack([subjects, objects, predicates])[subjects != objects]
        self.annotated, first = np.unique(codes, return_index=True)
        self.relations = rows[np.sort(first)]  # (M, 3) subject, object, predicate
        self.subjects, self.objects, self.predicates = self.relations.T
        self.class_codes = self.image * (int(classes.max(initial=0)) + 1) + self.classes

    def codes(
        self, subjects: np.ndarray, objects: np.ndarray, predicates: np.ndarray
    ) -> np.ndarray:
        """Return one integer for each subject, object and predicate."""
        return (subjects * len(self.boxes) + objects) * self.num_predicates + predicates

    def owners(self, batch: Batch) -> np.ndarray:
        """Return (R,) the entity that each predicted box belongs to, or -1."""
        highest = max(int(x.max(initial=0)) for x in (batch.gt_classes, batch.classes)) + 1
        boxes, entities = equal_codes(
            batch.box_image * highest + batch.classes, self.image * highest + self.classes
        )
        overlaps = aligned_iou(batch.boxes[boxes], self.boxes[entities])
        enough = overlaps >= 0.5
        return best_candidates(boxes[enough], entities[enough], overlaps[enough], len(batch.boxes))


def _distinct_rows(columns: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each group of equal rows, and each row's index into these.

    Like ``np.unique(axis=0)``, which is several times slower, with the groups in order of their
    first rows.
    """
    order = np.lexsort(columns)
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
    first = order[is_new]  # the sort is stable: the smallest index of each group
    kept = np.sort(first)
    index_of = np.empty(len(order), dtype=np.int64)
    index_of[order] = np.searchsorted(kept, first)[np.cumsum(is_new) - 1]
    return kept, index_of


class _PairScores:
    """The highest score of every pair of entities for every predicate."""

    def __init__(
        self, entities: DistinctEntities, owners: np.ndarray, batch: Batch, used: np.ndarray
    ):
        pairs = owners[batch.pairs]
        predicates = batch.labels[:, 1]
        used = used & (pairs >= 0).all(axis=1)
        used &= predicates < entities.num_predicates  # nobody asks for the others
        codes = entities.codes(pairs[used, 0], pairs[used, 1], predicates[used])
        # An image's triplets are in descending order of their scores: the first is the best.
        self._codes, best = np.unique(codes, return_index=True)
        self._scores = batch.scores[used][best]

    def get(self, codes: np.ndarray) -> np.ndarray:
        """Return scores by code of subject, object and predicate; minus infinity by default."""
        place, is_known = _find(self._codes, codes)
        result = np.full(len(codes), -np.inf)
        result[is_known] = self._scores[place[is_known]]
        return result


def _find(sorted_codes: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each code in a sorted array, and whether it is there at all."""
    place = np.minimum(np.searchsorted(sorted_codes, codes), max(len(sorted_codes) - 1, 0))
    if len(sorted_codes) == 0:
        return place, np.zeros(len(codes), dtype=bool)
    return place, sorted_codes[place] == codes


class _Cases(NamedTuple):
    is_case: np.ndarray  # (M,) bool: the relation has a rival
    relations: np.ndarray  # (Q,) indices of relations
    rivals: np.ndarray  # (Q,) code of the rival that each is compared with


def _cases(entities: DistinctEntities, relations: np.ndarray, rivals: np.ndarray) -> _Cases:
    """Leave out rivals that are annotated themselves."""
    wrong = ~_find(entities.annotated, rivals)[1]
    is_case = np.zeros(len(entities.relations), dtype=bool)
    is_case[relations[wrong]] = True
    return _Cases(is_case, relations[wrong], rivals[wrong])


def _instance_rivals(entities: DistinctEntities, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Return relations, and codes of each with another entity of the same class on one side."""
    partners = entities.objects if side == "object" else entities.subjects
    relations, others = equal_codes(entities.class_codes[partners], entities.class_codes)
    subjects, objects = entities.subjects[relations], entities.objects[relations]
    distinct = (others != subjects) & (others != objects)
    relations, others = relations[distinct], others[distinct]
    predicates = entities.predicates[relations]
    if side == "object":
        return relations, entities.codes(entities.subjects[relations], others, predicates)
    return relations, entities.codes(others, entities.objects[relations], predicates)


def _pairing_rivals(entities: DistinctEntities) -> tuple[np.ndarray, np.ndarray]:
    """Return relations, and codes of the pairs that each swaps with another relation nearby."""
    codes = entities.class_codes[entities.subjects] * entities.num_predicates + entities.predicates
    one, other = equal_codes(codes, codes)
    ends = [entities.relations[x, side] for x in (one, other) for side in (0, 1)]
    subject, object_, other_subject, other_object = ends
    near = (subject != other_subject) & (object_ != other_object)
    near &= (subject != other_object) & (object_ != other_subject)
    enclosing = phrase_boxes(entities.boxes, entities.relations)
    near &= aligned_iou(enclosing[one], enclosing[other]) > 0
    one, other = one[near], other[near]
    predicates = entities.predicates[one]
    swapped = (
        entities.codes(entities.subjects[one], entities.objects[other], predicates),
        entities.codes(entities.subjects[other], entities.objects[one], predicates),
    )
    return np.concatenate([one, one]), np.concatenate(swapped)
