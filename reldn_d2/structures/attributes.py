"""Attributes of the entities of one image: the only place that defines their fields.

Shapes: R entities, A attributes, L attributes that are listed for some entity.

=======================  ========  =================================================================
field of ``instances``   shape     meaning
=======================  ========  =================================================================
``gt_attributes``        (R, A)    bool, True if the entity has the attribute
``gt_attributes_known``  (R,)      bool, False if nothing is known about the entity's attributes;
                                   its row of ``gt_attributes`` is then False
``pred_attributes``      (R, A)    score of each attribute in [0, 1]
=======================  ========  =================================================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detectron2.structures import Instances

from .prediction_checks import check_attributes

__all__ = ["ATTRIBUTE_FIELDS", "EntityAttributes", "ground_truth_attributes"]

ATTRIBUTE_FIELDS = ("gt_attributes", "pred_attributes")  # with a column per attribute

# A prediction keeps the best attributes of each entity; the others have scores close to 0.
_MOST_PER_ENTITY = 10
_MIN_SCORE = 0.01


def ground_truth_attributes(
    annotations: Sequence[Mapping[str, Any]], num_attributes: int
) -> tuple[Tensor, Tensor]:
    """Return ``gt_attributes`` and ``gt_attributes_known`` of a dataset dict's annotations.

    Args:
        annotations: R annotations; those without ``"attributes"`` are unknown.
        num_attributes: A.
    """
    known = torch.tensor(["attributes" in x for x in annotations], dtype=torch.bool)
    table = torch.zeros((len(annotations), num_attributes), dtype=torch.bool)
    for row, annotation in enumerate(annotations):
        table[row, list(annotation.get("attributes", ()))] = True
    return table, known


@dataclass(frozen=True, eq=False)
class EntityAttributes:
    """The attributes of the entities of one image, as a list that leaves out all others.

    Attributes:
        entities: (L,) integers, index of the entity.
        ids: (L,) integers, the attribute.
        scores: (L,) float64 in descending order for each entity; None in ground truth.
        known: (R,) bool, the entities whose attributes are annotated; None in predictions.
    """

    entities: np.ndarray
    ids: np.ndarray
    scores: np.ndarray | None = None
    known: np.ndarray | None = None

    @classmethod
    def from_annotations(
        cls, annotations: Sequence[Mapping[str, Any]]
    ) -> "EntityAttributes | None":
        """Return the attributes of a dataset dict's annotations; None if none has any."""
        known = np.array(["attributes" in x for x in annotations], dtype=bool)
        if not known.any():
            return None
        rows = [
            (entity, attribute)
            for entity, annotation in enumerate(annotations)
            for attribute in dict.fromkeys(annotation.get("attributes", ()))
        ]
        table = np.array(rows, dtype=np.int64).reshape(-1, 2)
        return cls(table[:, 0], table[:, 1], known=known)

    @classmethod
    def from_instances(cls, instances: Instances) -> "EntityAttributes | None":
        """Return the best attributes of a model's ``instances``; None without ``pred_attributes``.

        Each entity keeps its 10 best ones with a score of at least 0.01.

        Raises:
            ValueError: a score is not finite.
        """
        if not instances.has("pred_attributes"):
            return None
        scores = instances.pred_attributes.detach().cpu().double().numpy()
        if not np.isfinite(scores).all():
            raise ValueError(
                "NaN or infinite pred_attributes. The model has diverged (lower the learning rate, "
                "check the losses) or its checkpoint is broken."
            )
        order = np.argsort(-scores, axis=1, kind="stable")[:, :_MOST_PER_ENTITY]
        best = np.take_along_axis(scores, order, axis=1)
        entities, places = np.nonzero(best >= _MIN_SCORE)
        return cls(entities, order[entities, places], best[entities, places])

    @classmethod
    def from_lists(cls, ids: Any, scores: Any, num_entities: int, where: str) -> "EntityAttributes":
        """Check predicted attributes and return them by entity, the best first.

        Arguments and errors are those of :func:`.prediction_checks.check_attributes`.
        """
        entities, ids, scores = check_attributes(ids, scores, num_entities, where)
        order = np.lexsort((-scores, entities))
        return cls(entities[order], ids[order], scores[order])

    def rows(self) -> list[tuple[int, int, float | None]]:
        """Return (entity, attribute, score or None) of each of the L attributes, in order."""
        scores = [None] * len(self.ids) if self.scores is None else self.scores.tolist()
        return list(zip(self.entities.tolist(), self.ids.tolist(), scores))

    def lists(self, values: np.ndarray, num_entities: int) -> list[list[Any]]:
        """Return values of the L attributes as one list per entity."""
        result: list[list[Any]] = [[] for _ in range(num_entities)]
        for entity, value in zip(self.entities.tolist(), values.tolist()):
            result[entity].append(value)
        return result

    def renumbered(self, ids: Sequence[int]) -> "EntityAttributes":
        """Return the same attributes with new ids, by old id."""
        return replace(self, ids=np.array(ids, dtype=np.int64)[self.ids])

    def table(self, num_entities: int, num_attributes: int) -> np.ndarray:
        """Return (R, A) float64 scores; 0 for attributes that are not listed, 1 in ground truth."""
        table = np.zeros((num_entities, num_attributes))
        table[self.entities, self.ids] = 1.0 if self.scores is None else self.scores
        return table
