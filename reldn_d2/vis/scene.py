"""What a picture of relations shows, and how two such scenes compare.

Shapes: E entities, K predicted relations, M ground-truth relations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from detectron2.structures import Instances

from ..data.dataset_dict import boxes_xyxy
from ..evaluation.matching import pairwise_iou, relationship_overlaps, same_labels
from ..structures.relations import check_relation_triplets

__all__ = ["Scene", "Triplet", "find_hits", "same_entities"]

Triplet = tuple[int, int, int, float | None]  # subject, object, predicate, score


class Scene(NamedTuple):
    """What can be drawn of one image: E entities and K relations among them."""

    boxes: np.ndarray  # (E, 4) x0, y0, x1, y1
    classes: list[int]  # (E,)
    triplets: list[Triplet]  # (K,)

    @property
    def drawn(self) -> list[int]:
        """The entities that take part in a relation, in order of index."""
        return sorted({index for triplet in self.triplets for index in triplet[:2]})

    @property
    def pairs(self) -> np.ndarray:
        """(K, 2) subject and object of each relation."""
        return np.array([t[:2] for t in self.triplets], dtype=np.int64).reshape(-1, 2)

    @property
    def labels(self) -> np.ndarray:
        """(K, 3) subject class, predicate, object class of each relation."""
        rows = [(self.classes[s], p, self.classes[o]) for s, o, p, _ in self.triplets]
        return np.array(rows, dtype=np.int64).reshape(-1, 3)

    def by_pair(self) -> dict[tuple[int, int], list[int]]:
        """Numbers of the relations of each (subject, object), in order."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, (subject, object_, _, _) in enumerate(self.triplets):
            groups.setdefault((subject, object_), []).append(number)
        return groups

    @classmethod
    def from_dataset_dict(cls, dataset_dict: dict[str, Any]) -> "Scene":
        """Ground truth of a dataset dict with ``annotations`` and ``relations``."""
        annotations = dataset_dict.get("annotations", [])
        relations = [tuple(int(v) for v in r) for r in dataset_dict.get("relations", [])]
        where = str(dataset_dict.get("file_name", "dataset dict"))
        check_relation_triplets(relations, len(annotations), where=where)
        return cls(
            boxes_xyxy(annotations),
            [int(a["category_id"]) for a in annotations],
            [(*relation, None) for relation in relations],
        )

    @classmethod
    def from_outputs(
        cls, instances: Instances, relations: Instances, topk: int, min_score: float = 0.0
    ) -> "Scene":
        """The first ``topk`` predicted relations of one image that score ``min_score`` or more."""
        instances, relations = instances.to("cpu"), relations.to("cpu")
        scores = relations.scores.tolist()
        rows = zip(relations.pairs.tolist(), relations.predicates.tolist(), scores)
        triplets = [(s, o, p, score) for (s, o), p, score in rows if score >= min_score]
        return cls(
            instances.pred_boxes.tensor.detach().double().numpy().reshape(-1, 4),
            instances.pred_classes.tolist(),
            triplets[:topk],
        )


def find_hits(
    predicted: Scene, truth: Scene, iou_threshold: float = 0.5
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


def same_entities(truth: Scene, others: Sequence[Scene]) -> tuple[Scene, list[dict[int, int]]]:
    """Find out which entities of several scenes are the same, to name and colour them alike.

    They are the same if their classes are equal and their boxes overlap by a half or more; in one
    scene no two are the same.

    Returns:
        all entities, those of the ground truth first, without relations; and for each of
        ``others`` the map from its drawn entities to them.
    """
    everything = Scene(truth.boxes.copy(), list(truth.classes), [])
    maps = []
    for scene in others:
        iou = pairwise_iou(scene.boxes, everything.boxes)
        iou *= np.equal.outer(np.asarray(scene.classes), np.asarray(everything.classes))
        known: dict[int, int] = {}
        drawn = scene.drawn
        candidates = [
            (-iou[e, same], e, same) for e in drawn for same in np.flatnonzero(iou[e] >= 0.5)
        ]
        for _, entity, same in sorted(candidates):
            if entity not in known and same not in known.values():
                known[entity] = same
        for entity in drawn:
            if entity not in known:
                known[entity] = len(everything.classes)
                boxes = np.concatenate([everything.boxes, scene.boxes[entity][None]])
                everything = Scene(boxes, everything.classes + [scene.classes[entity]], [])
        maps.append(known)
    return everything, maps
