"""Match classes, predicates and attributes by name: the only place that compares lists of names.

Checkpoints, detectors, datasets and predictions files each list the names of their classes,
predicates and attributes, and an id is a position in such a list. Wherever two of them meet,
:func:`match_names` compares the lists: another order is mapped, other names are an error.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from detectron2.structures import Instances

from .attributes import ATTRIBUTE_FIELDS
from .scene_graph import SceneGraph

__all__ = [
    "NAME_FIELDS",
    "NameMismatchError",
    "Renumbering",
    "match_names",
    "require_unique_names",
]

logger = logging.getLogger(__name__)

# In metadata and in checkpoints. A list of attributes that is missing or empty: there are none.
NAME_FIELDS = ("thing_classes", "predicate_classes", "attribute_classes")
_KINDS = {"predicate_classes": "predicates", "attribute_classes": "attributes"}
_SHOWN = 5  # names per side in an error


class NameMismatchError(ValueError):
    """Two lists of names differ by more than their order."""


def require_unique_names(names: Sequence[str], field: str, owner: str) -> None:
    """Raise if two names are equal without the whitespace around them.

    Args:
        names: by id.
        field: such as ``thing_classes``, for the message.
        owner: whose names these are, for the message.

    Raises:
        ValueError: with both ids and the name.
    """
    first: dict[str, int] = {}
    kind = _KINDS.get(field, "classes")
    for index, name in enumerate(names):
        stripped = str(name).strip()
        if stripped in first:
            raise ValueError(
                f"{field} of {owner}: {kind} {first[stripped]} and {index} are both "
                f'"{stripped}". Rename one of them, or merge the two.'
            )
        first[stripped] = index


def match_names(
    source: Sequence[str],
    target: Sequence[str],
    field: str,
    source_owner: str,
    target_owner: str,
    *,
    allow_more: bool = False,
    hint: str = "",
) -> list[int] | None:
    """Map the ids of one list of names to those of another.

    Names are compared without the whitespace around them; case matters.

    Args:
        source, target: names by id.
        field: such as ``thing_classes``, for messages.
        source_owner, target_owner: whose names these are, for messages.
        allow_more: accept a target with more names than the source.
        hint: how to fix a mismatch, appended to the error.

    Returns:
        For each id of the source the id of the same name in the target; None if all ids are equal.

    Raises:
        ValueError: if a list names something twice.
        NameMismatchError: if the names differ by more than their order.
    """
    require_unique_names(source, field, source_owner)
    require_unique_names(target, field, target_owner)
    source, target = ([str(name).strip() for name in names] for names in (source, target))
    if source == target:
        return None
    index = {name: i for i, name in enumerate(target)}
    only_source = [name for name in source if name not in index]
    only_target = [name for name in target if name not in set(source)]
    if only_source or (only_target and not allow_more):
        sides = ((source_owner, source, only_source), (target_owner, target, only_target))
        raise NameMismatchError(
            f"{field} of {source_owner} and of {target_owner} differ. "
            + "; ".join(
                f"Only in {owner}: {_first_names(only)} ({len(only)} of {len(names)})"
                for owner, names, only in sides
                if only
            )
            + f". Names are compared exactly, except for whitespace around them. {hint}".rstrip()
        )
    return [index[name] for name in source]


def _first_names(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown


@dataclass(frozen=True)
class Renumbering:
    """New ids of classes, predicates and attributes, by old id; None keeps the ids.

    Attributes:
        classes: for each old class id the new one.
        predicates: for each old predicate id the new one.
        attributes: for each old attribute id the new one.
    """

    classes: list[int] | None = None
    predicates: list[int] | None = None
    attributes: list[int] | None = None

    def __bool__(self) -> bool:
        """Tell whether any id changes."""
        return any(x is not None for x in (self.classes, self.predicates, self.attributes))

    @classmethod
    def between(
        cls,
        source: Mapping[str, Sequence[str] | None],
        target: Mapping[str, Sequence[str] | None],
        source_owner: str,
        target_owner: str,
        hint: str = "",
    ) -> "Renumbering":
        """Match the names of two owners; log a line for each field that has another order.

        Args:
            source, target: names by field (:data:`NAME_FIELDS`); a missing or empty list is not
                compared.
            source_owner, target_owner, hint: see :func:`match_names`.
        """
        maps: dict[str, list[int] | None] = {}
        for field in NAME_FIELDS:
            ours, theirs = source.get(field), target.get(field)
            if not ours or not theirs:
                continue
            maps[field] = match_names(ours, theirs, field, source_owner, target_owner, hint=hint)
            if maps[field] is not None:
                logger.info(
                    f"{field}: {source_owner} lists the {len(ours)} names of {target_owner} in "
                    "another order; ids are mapped by name."
                )
        return cls(*(maps.get(field) for field in NAME_FIELDS))

    def inverse(self) -> "Renumbering":
        """Return the mapping from new ids to old ones."""
        maps = (self.classes, self.predicates, self.attributes)
        return Renumbering(*map(_inverse, maps))

    def dataset_dict(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return a dataset dict with new ids; the given one is not modified."""
        record = dict(record)
        if self.classes is not None and "annotations" in record:
            record["annotations"] = [
                {**x, "category_id": self.classes[x["category_id"]]} for x in record["annotations"]
            ]
        if self.attributes is not None and "annotations" in record:
            record["annotations"] = [
                (
                    {**x, "attributes": [self.attributes[a] for a in x["attributes"]]}
                    if "attributes" in x
                    else x
                )
                for x in record["annotations"]
            ]
        if self.predicates is not None and "relations" in record:
            record["relations"] = [(s, o, self.predicates[p]) for s, o, p in record["relations"]]
        if self.classes is not None and "detections" in record:
            old = record["detections"]["classes"]
            new = np.array(self.classes, dtype=old.dtype)[old]
            record["detections"] = {**record["detections"], "classes": new}
        if self.classes is not None and "verified_labels" in record:
            labels = record["verified_labels"]
            record["verified_labels"] = {self.classes[c]: value for c, value in labels.items()}
        return record

    def scene_graph(self, graph: SceneGraph) -> SceneGraph:
        """Return a scene graph with new ids, without the model's own output.

        Its names, if it has any, are not changed: they must be those of the new ids.
        """
        classes, predicates = graph.classes, graph.predicates
        verified = graph.verified
        if self.classes is not None:
            table = np.array(self.classes, dtype=np.int64)
            classes = table[classes]
            verified = np.stack([table[verified[:, 0]], verified[:, 1]], axis=1)
        if self.predicates is not None:
            predicates = np.array(self.predicates, dtype=np.int64)[predicates]
        attributes = graph.attributes
        if self.attributes is not None and attributes is not None:
            attributes = attributes.renumbered(self.attributes)
        return replace(
            graph,
            classes=classes,
            predicates=predicates,
            attributes=attributes,
            verified=verified,
            output=None,
        )

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model's input or output of one image with new ids.

        Args:
            values: ``instances``, ``detections`` and ``relations`` are renumbered; the others are
                passed through.
        """
        result = dict(values)
        for key, names, ids in (
            ("instances", ("gt_classes", "pred_classes"), self.classes),
            ("detections", ("gt_classes", "pred_classes"), self.classes),
            ("relations", ("gt_predicates", "predicates"), self.predicates),
        ):
            if ids is not None and isinstance(result.get(key), Instances):
                result[key] = _renumber(result[key], names, ids)
        if self.attributes is not None and isinstance(result.get("instances"), Instances):
            result["instances"] = _reorder_attributes(result["instances"], self.attributes)
        return result


def _inverse(ids: list[int] | None) -> list[int] | None:
    if ids is None:
        return None
    inverse = [0] * len(ids)
    for old, new in enumerate(ids):
        inverse[new] = old
    return inverse


def _renumber(instances: Instances, names: Sequence[str], ids: list[int]) -> Instances:
    """Return a copy with new ids in those fields of ``names`` that exist."""
    fields = dict(instances.get_fields())
    for name in names:
        if name in fields:
            old = fields[name]
            fields[name] = torch.tensor(ids, dtype=old.dtype, device=old.device)[old.long()]
    return Instances(instances.image_size, **fields)


def _reorder_attributes(instances: Instances, ids: list[int]) -> Instances:
    """Return a copy whose columns of attributes, if there are any, have new ids."""
    fields = dict(instances.get_fields())
    old_ids = _inverse(ids)
    for name in ATTRIBUTE_FIELDS:
        if name in fields:
            fields[name] = fields[name][:, old_ids]
    return Instances(instances.image_size, **fields)
