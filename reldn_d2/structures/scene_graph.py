"""The entities and relations of one image, predicted or true: the package's one container for them.

Models return Detectron2's ``Instances`` (:mod:`.relations`); whatever happens to their output
afterwards (evaluation, files, pictures, graphs) works on a :class:`SceneGraph`.

Shapes: R entities, K relations, V verified labels. Boxes are XYXY in absolute pixels of the image
as it was read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from detectron2.structures import Boxes, BoxMode, Instances

from .attributes import EntityAttributes
from .graph_formats import to_networkx, to_output, to_record
from .names import class_name
from .prediction_checks import check_entities, check_relations
from .ranking import limit_predicates_per_pair, rank_by_score
from .relations import check_relation_triplets

__all__ = ["ImageId", "RelationRow", "SceneGraph", "Triplet", "boxes_xyxy"]

ImageId = int | str
_PLAIN_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
RelationRow = tuple[int, int, int, float | None]  # subject, object, predicate, score


class Triplet(NamedTuple):
    """One relation in words."""

    subject: str
    predicate: str
    object: str
    score: float | None  # None in ground truth
    subject_index: int  # into the entities
    object_index: int


def boxes_xyxy(annotations: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the (R, 4) float64 XYXY boxes of a dataset dict's annotations, in absolute pixels."""
    boxes = [
        (
            annotation["bbox"]
            if annotation["bbox_mode"] in _PLAIN_MODES
            else BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        )
        for annotation in annotations
    ]
    result = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    # Detectron2 converts boxes one by one, too slow for the millions in large COCO files.
    xywh = [annotation["bbox_mode"] == BoxMode.XYWH_ABS for annotation in annotations]
    if any(xywh):
        result[xywh, 2:] += result[xywh, :2]
    return result


def _no_labels() -> np.ndarray:
    return np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class SceneGraph:
    """Entities and relations of one image.

    Attributes:
        image_id: as in the dataset; None if the image belongs to none.
        boxes: (R, 4) float64.
        classes: (R,) integers.
        pairs: (K, 2) integers, subject and object index into the entities.
        predicates: (K,) integers.
        box_scores: (R,) float64 scores of the entities; None in ground truth.
        scores: (K,) float64 triplet scores in descending order; None in ground truth.
        predicate_scores: (K,) float64 ``p(pred | s, o)``; None where unknown.
        attributes: those of the entities; None where the dataset or the model has none.
        verified: (V, 2) int64, a class and whether a human verified its presence (1) or absence
            (0) in the image; OpenImages' ground truth only.
        image_size: (height, width); None where unknown.
        file_name: of the image, if it came from a file.
        thing_classes, predicate_classes, attribute_classes: names by id; empty where unknown.
        output: the model's own ``instances`` and ``relations``, which may have further fields
            such as masks; None if the graph did not come from a model.
        left_out: class names of given boxes that are no entities, because the model does not have
            these classes; by the index of the given box.
    """

    image_id: ImageId | None
    boxes: np.ndarray
    classes: np.ndarray
    pairs: np.ndarray
    predicates: np.ndarray
    box_scores: np.ndarray | None = None
    scores: np.ndarray | None = None
    predicate_scores: np.ndarray | None = None
    attributes: EntityAttributes | None = None
    verified: np.ndarray = field(default_factory=_no_labels)
    image_size: tuple[int, int] | None = None
    file_name: str | None = None
    thing_classes: Sequence[str] = ()
    predicate_classes: Sequence[str] = ()
    attribute_classes: Sequence[str] = ()
    output: Mapping[str, Instances] | None = None
    left_out: Mapping[int, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        image = self.file_name or self.image_id
        of_image = "" if image is None else f" of {image}"
        return f"<SceneGraph{of_image}: {len(self.boxes)} entities, {len(self.pairs)} relations>"

    # ---- making one ----

    @classmethod
    def empty(cls, image_id: ImageId | None = None) -> "SceneGraph":
        """Return a prediction without entities and relations."""
        return cls.from_arrays(image_id, [], [], [], [], [], [])

    @classmethod
    def from_dataset_dict(
        cls, dataset_dict: Mapping[str, Any], where: str | None = None
    ) -> "SceneGraph":
        """Return the ground truth of a dataset dict; annotations and relations may be missing.

        Args:
            dataset_dict: Detectron2's standard dict with ``relations``.
            where: dataset and image, for messages; default: the dict's ``file_name``.

        Raises:
            ValueError: a relation points outside the annotations or to itself.
        """
        annotations = dataset_dict.get("annotations", [])
        relations = dataset_dict.get("relations", [])
        file_name = dataset_dict.get("file_name")
        where = where or str(file_name or "dataset dict")
        check_relation_triplets(relations, len(annotations), where=where)
        table = np.asarray(relations, dtype=np.int64).reshape(-1, 3)
        verified = dataset_dict.get("verified_labels") or {}
        known_size = "height" in dataset_dict and "width" in dataset_dict
        return cls(
            image_id=dataset_dict.get("image_id"),
            boxes=boxes_xyxy(annotations),
            classes=np.asarray([a["category_id"] for a in annotations], dtype=np.int64),
            pairs=table[:, :2],
            predicates=table[:, 2],
            attributes=EntityAttributes.from_annotations(annotations),
            verified=np.asarray([(c, int(v)) for c, v in verified.items()], np.int64).reshape(
                -1, 2
            ),
            image_size=(dataset_dict["height"], dataset_dict["width"]) if known_size else None,
            file_name=file_name,
        )

    @classmethod
    def from_triplets(
        cls, boxes: Any, classes: Sequence[int], triplets: Sequence[RelationRow]
    ) -> "SceneGraph":
        """Return the scene graph of loose boxes, classes and relations, in the order given.

        Args:
            boxes: (R, 4) array, tensor or ``Boxes``.
            classes: (R,) class ids.
            triplets: K tuples (subject index, object index, predicate, score or None).

        Raises:
            ValueError: a relation points outside the boxes or to itself.
        """
        boxes = boxes.tensor if isinstance(boxes, Boxes) else torch.as_tensor(np.asarray(boxes))
        boxes = boxes.detach().cpu().double().numpy().reshape(-1, 4)
        check_relation_triplets([t[:3] for t in triplets], len(boxes), where="triplets")
        table = np.array([t[:3] for t in triplets], dtype=np.int64).reshape(-1, 3)
        has_scores = all(t[3] is not None for t in triplets)
        return cls(
            image_id=None,
            boxes=boxes,
            classes=np.array([int(c) for c in classes], dtype=np.int64),
            pairs=table[:, :2],
            predicates=table[:, 2],
            scores=np.array([t[3] for t in triplets], dtype=np.float64) if has_scores else None,
        )

    @classmethod
    def from_output(
        cls,
        image_id: ImageId | None,
        output: Mapping[str, Instances],
        keep_output: bool = False,
        **fields: Any,
    ) -> "SceneGraph":
        """Return a model's output for one image, in the frame of the original image.

        Args:
            image_id: as in the dataset, or None.
            output: ``"instances"`` (``pred_boxes``, ``pred_classes``, ``scores`` and, from models
                that predict attributes, ``pred_attributes``) and
                ``"relations"`` (``pairs``, ``predicates``, ``scores``, ``predicate_scores``).
            keep_output: keep the output, on the CPU, with further fields that it may have.
            fields: further attributes, such as ``file_name`` and the names of the classes.

        Raises:
            ValueError: one of the two is missing, or as for :meth:`from_arrays`.
        """
        image = "one image" if image_id is None else f"image {image_id!r}"
        for key in ("instances", "relations"):
            if key not in output:
                raise ValueError(
                    f"The model's output for {image} has no {key!r}, only {sorted(output)}. "
                    'Relations are evaluated for models that return both "instances" and '
                    '"relations" (MODEL.META_ARCHITECTURE "RelDN").'
                )
        instances, relations = output["instances"].to("cpu"), output["relations"].to("cpu")
        known = relations.has("predicate_scores")
        return cls.from_arrays(
            image_id,
            instances.pred_boxes.tensor.detach().numpy(),
            instances.pred_classes.numpy(),
            instances.scores.detach().numpy(),
            relations.pairs.numpy(),
            relations.predicates.numpy(),
            relations.scores.detach().numpy(),
            relations.predicate_scores.detach().numpy() if known else None,
            image_size=instances.image_size,
            attributes=EntityAttributes.from_instances(instances),
            output={"instances": instances, "relations": relations} if keep_output else None,
            **fields,
        )

    @classmethod
    def from_arrays(
        cls,
        image_id: ImageId | None,
        boxes: Any,
        classes: Any,
        box_scores: Any,
        pairs: Any,
        predicates: Any,
        scores: Any,
        predicate_scores: Any = None,
        **fields: Any,
    ) -> "SceneGraph":
        """Check arrays or lists of a prediction, sort its triplets by score and compact the types.

        Raises:
            ValueError: shapes, types or lengths that do not fit, an index outside the boxes, a box
                with x2 < x1 or y2 < y1, or a value that is not finite; the message names the
                image.
        """
        where = f"Prediction of image {image_id!r}"
        boxes, classes, box_scores = check_entities(boxes, classes, box_scores, where)
        pairs, predicates, scores, predicate_scores = check_relations(
            pairs, predicates, scores, predicate_scores, len(boxes), where
        )
        order = rank_by_score(scores)
        return cls(
            image_id=image_id,
            boxes=boxes,
            classes=classes,
            box_scores=box_scores,
            pairs=pairs[order],
            predicates=predicates[order],
            scores=scores[order],
            predicate_scores=None if predicate_scores is None else predicate_scores[order],
            **fields,
        )

    # ---- views ----

    @property
    def labels(self) -> np.ndarray:
        """(K, 3) subject class, predicate, object class."""
        subjects, objects = self.classes[self.pairs].T
        return np.stack([subjects, self.predicates, objects], axis=1)

    @property
    def relations(self) -> np.ndarray:
        """(K, 3) subject index, object index, predicate."""
        return np.column_stack([self.pairs, self.predicates])

    @property
    def related_entities(self) -> list[int]:
        """Indices of the entities that take part in a relation, in ascending order."""
        return np.unique(self.pairs).tolist()

    def rows(self) -> list[RelationRow]:
        """Return (subject index, object index, predicate, score or None) of each relation."""
        scores = [None] * len(self.pairs) if self.scores is None else self.scores.tolist()
        return [
            (s, o, predicate, score)
            for (s, o), predicate, score in zip(
                self.pairs.tolist(), self.predicates.tolist(), scores
            )
        ]

    def rows_by_pair(self) -> dict[tuple[int, int], list[int]]:
        """Return the row indices of each (subject, object), in order."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, pair in enumerate(map(tuple, self.pairs.tolist())):
            groups.setdefault(pair, []).append(row)
        return groups

    def class_name(self, index: int) -> str:
        """Return the name of an entity class."""
        return class_name(index, self.thing_classes)

    def predicate_name(self, index: int) -> str:
        """Return the name of a predicate."""
        return class_name(index, self.predicate_classes, "predicate")

    def attribute_name(self, index: int) -> str:
        """Return the name of an attribute."""
        return class_name(index, self.attribute_classes, "attribute")

    def attribute_words(self, min_score: float = 0.5) -> list[list[str]]:
        """Return the names of the attributes of each entity, best first.

        Args:
            min_score: predicted attributes with a lower score are left out.
        """
        words: list[list[str]] = [[] for _ in range(len(self.boxes))]
        if self.attributes is not None:
            for entity, index, score in self.attributes.rows():
                if score is None or score >= min_score:
                    words[entity].append(self.attribute_name(index))
        return words

    def triplets(self) -> list[Triplet]:
        """Return all relations in words, in order."""
        classes = self.classes.tolist()
        return [
            Triplet(
                self.class_name(classes[s]),
                self.predicate_name(predicate),
                self.class_name(classes[o]),
                score,
                s,
                o,
            )
            for s, o, predicate, score in self.rows()
        ]

    def __getitem__(self, key: str) -> Instances:
        """Return ``instances`` or ``relations`` as in a model's output for the image."""
        return (self.output or self.to_output())[key]

    # ---- subsets ----

    def select(self, rows: np.ndarray | slice) -> "SceneGraph":
        """Return the same entities with some of the relations."""
        output = self.output
        if output is not None:
            index = rows if isinstance(rows, slice) else torch.as_tensor(np.asarray(rows))
            output = {**output, "relations": output["relations"][index]}

        def part(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[rows]

        return replace(
            self,
            pairs=self.pairs[rows],
            predicates=self.predicates[rows],
            scores=part(self.scores),
            predicate_scores=part(self.predicate_scores),
            output=output,
        )

    def best(self, topk: int | None = None, min_score: float = 0.0) -> "SceneGraph":
        """Return the same entities with the best relations only.

        Args:
            topk: most relations kept; None keeps all.
            min_score: relations with a lower score are left out.
        """
        return self.select(np.flatnonzero(self.scores >= min_score)[:topk])

    def reduced(
        self, predicates_per_pair: Sequence[int | None], topk: int | None = None
    ) -> "SceneGraph":
        """Return the union, over the values of k, of the ``topk`` best triplets.

        Args:
            predicates_per_pair: values of k; each pair keeps its k best predicates, all if None.
            topk: most triplets for each k; None means all.
        """
        kept = np.zeros(len(self.pairs), dtype=bool)
        for k in predicates_per_pair:
            rows = np.flatnonzero(limit_predicates_per_pair(self.pairs, k))
            kept[rows[:topk]] = True
        return self if kept.all() else self.select(np.flatnonzero(kept))

    # ---- other forms ----

    def to_output(self) -> dict[str, Instances]:
        """Return the prediction as a model's output, see :func:`.graph_formats.to_output`."""
        return to_output(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the record of a predictions file, see :func:`.graph_formats.to_record`."""
        return to_record(self)

    def to_json(self, indent: int | None = None) -> str:
        """Return :meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def graph(self, related_only: bool = False):
        """Return the scene graph as a :class:`networkx.MultiDiGraph`.

        See :func:`reldn_d2.structures.graph_formats.to_networkx`.
        """
        return to_networkx(self, related_only)
