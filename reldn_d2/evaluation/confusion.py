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
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..structures.scene_graph import SceneGraph
from .batches import Batch, batches
from .ground_truth import ImagePair
from .matching import NEVER, aligned_iou, best_candidates, equal_codes, phrase_boxes

__all__ = ["confusion_report", "merge_repeated"]

SIDES = ("object", "subject")


class _Entities:
    """The distinct entities and relations of a batch. Shapes: E entities, M relations."""

    def __init__(self, batch: Batch):
        image, classes, boxes = batch.gt_box_image, batch.gt_classes, batch.gt_boxes
        keys = np.column_stack([image, classes, boxes])
        _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        kept = np.sort(first)
        number = np.searchsorted(kept, first[inverse.reshape(-1)])
        self.boxes, self.classes, self.image = boxes[kept], classes[kept], image[kept]
        rows = np.column_stack([number[batch.gt_pairs], batch.truth.predicates])
        rows = rows[rows[:, 0] != rows[:, 1]]
        _, first = np.unique(rows, axis=0, return_index=True)
        self.relations = rows[np.sort(first)]  # (M, 3) subject, object, predicate
        self.subjects, self.objects, self.predicates = self.relations.T
        self.num_predicates = int(rows[:, 2].max(initial=0)) + 1
        self.annotated = np.sort(self.codes(*self.relations.T))
        self.class_codes = self.image * (int(classes.max(initial=0)) + 1) + self.classes

    def codes(
        self, subjects: np.ndarray, objects: np.ndarray, predicates: np.ndarray
    ) -> np.ndarray:
        """One integer for subject, object and predicate."""
        return (subjects * len(self.boxes) + objects) * self.num_predicates + predicates

    def owners(self, batch: Batch) -> np.ndarray:
        """(R,) entity that each predicted box belongs to, or -1."""
        highest = max(int(x.max(initial=0)) for x in (batch.gt_classes, batch.classes)) + 1
        boxes, entities = equal_codes(
            batch.box_image * highest + batch.classes, self.image * highest + self.classes
        )
        overlaps = aligned_iou(batch.boxes[boxes], self.boxes[entities])
        enough = overlaps >= 0.5
        return best_candidates(boxes[enough], entities[enough], overlaps[enough], len(batch.boxes))


class _PairScores:
    """The best score of every pair of entities for every predicate."""

    def __init__(self, entities: _Entities, batch: Batch, ranks: np.ndarray, limit: int):
        pairs = entities.owners(batch)[batch.pairs]
        predicates = batch.labels[:, 1]
        used = (ranks < (limit or NEVER)) & (pairs >= 0).all(axis=1)
        used &= predicates < entities.num_predicates  # nobody asks for the others
        codes = entities.codes(pairs[used, 0], pairs[used, 1], predicates[used])
        order = np.lexsort((-batch.scores[used], codes))
        self._codes, best = np.unique(codes[order], return_index=True)
        self._scores = batch.scores[used][order][best]

    def get(self, codes: np.ndarray) -> np.ndarray:
        """Scores by code of subject, object and predicate; minus infinity if not predicted."""
        place = np.searchsorted(self._codes, codes)
        inside = np.minimum(place, max(len(self._codes) - 1, 0))
        found = np.zeros(len(codes), dtype=bool)
        if len(self._codes):
            found = self._codes[inside] == codes
        result = np.full(len(codes), -np.inf)
        result[found] = self._scores[inside[found]]
        return result


def _count(
    entities: _Entities, scores: _PairScores, relations: np.ndarray, rivals: np.ndarray
) -> np.ndarray:
    """(2,) right cases, and relations that have a rival which is not annotated.

    Args:
        entities: with the relations.
        scores: of all pairs.
        relations: (Q,) numbers of relations.
        rivals: (Q,) the codes that each is compared with.
    """
    place = np.searchsorted(entities.annotated, rivals)
    place = np.minimum(place, max(len(entities.annotated) - 1, 0))
    wrong = entities.annotated[place] != rivals if len(rivals) else np.zeros(0, dtype=bool)
    relations, rivals = relations[wrong], rivals[wrong]
    is_case = np.zeros(len(entities.relations), dtype=bool)
    is_case[relations] = True
    best_rival = np.full(len(entities.relations), -np.inf)
    np.maximum.at(best_rival, relations, scores.get(rivals))
    own = scores.get(entities.codes(*entities.relations.T))
    return np.array([(is_case & (own > best_rival)).sum(), is_case.sum()])


def _instance_rivals(entities: _Entities, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Relations, and codes of the same with another entity of the same class on one side."""
    partners = entities.objects if side == "object" else entities.subjects
    relations, others = equal_codes(entities.class_codes[partners], entities.class_codes)
    subjects, objects = entities.subjects[relations], entities.objects[relations]
    distinct = (others != subjects) & (others != objects)
    relations, others = relations[distinct], others[distinct]
    predicates = entities.predicates[relations]
    if side == "object":
        return relations, entities.codes(entities.subjects[relations], others, predicates)
    return relations, entities.codes(others, entities.objects[relations], predicates)


def _pairing_rivals(entities: _Entities) -> tuple[np.ndarray, np.ndarray]:
    """Relations, and codes of the pairs swapped with another relation near by."""
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


def merge_repeated(ground_truth: SceneGraph) -> SceneGraph:
    """The same ground truth with every entity and every relation once, in the order given."""
    entities = _Entities(Batch([(ground_truth, SceneGraph.empty(""))]))
    return replace(
        ground_truth,
        boxes=entities.boxes,
        classes=entities.classes,
        pairs=entities.relations[:, :2],
        predicates=entities.relations[:, 2],
    )


def confusion_report(
    images: Sequence[ImagePair], predicates_per_pair: int = 0, limit: int = 100
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
    for batch in batches(images):
        entities = _Entities(batch)
        scores = _PairScores(entities, batch, batch.ranks(predicates_per_pair), limit)
        for side in SIDES:
            total[side] += _count(entities, scores, *_instance_rivals(entities, side))
        total["pairing"] += _count(entities, scores, *_pairing_rivals(entities))
    report: OrderedDict[str, float] = OrderedDict()

    def add(prefix: str, suffix: str, counts: np.ndarray) -> None:
        right, cases = counts.tolist()
        report[f"{prefix}_accuracy{suffix}"] = 100.0 * right / cases if cases else float("nan")
        report[f"{prefix}_cases{suffix}"] = float(cases)

    add("instance", "", total["object"] + total["subject"])
    for side in SIDES:
        add("instance", f"_{side}", total[side])
    add("pairing", "", total["pairing"])
    return report
