"""What the evaluators keep of an image, as small numpy arrays.

Shapes: N ground-truth entities, M ground-truth relations, R predicted boxes, K predicted triplets.
All boxes are XYXY, absolute pixels, in the frame of the data set's dicts (the original image).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np
import torch

from detectron2.structures import Boxes, Instances

from ..data.dataset_dict import boxes_xyxy, dicts_without_images
from ..structures.relations import check_relation_triplets, predicted_relations
from .matching import limit_predicates_per_pair, rank_by_score

__all__ = [
    "GroundTruth",
    "ImageId",
    "ImagePair",
    "Prediction",
    "load_ground_truth",
]

ImageId = Union[int, str]


def _no_labels() -> np.ndarray:
    return np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class GroundTruth:
    """Annotations of one image."""

    boxes: np.ndarray  # (N, 4) float64
    classes: np.ndarray  # (N,) int64
    relations: np.ndarray  # (M, 3) int64: subject index, object index, predicate
    # (V, 2) int64: class, and whether a human verified its presence (1) or absence (0)
    verified: np.ndarray = field(default_factory=_no_labels)

    @property
    def pairs(self) -> np.ndarray:
        """(M, 2) subject and object indices."""
        return self.relations[:, :2]

    @property
    def labels(self) -> np.ndarray:
        """(M, 3) subject class, predicate, object class."""
        return _labels(self.classes, self.pairs, self.relations[:, 2])

    @classmethod
    def from_dict(cls, record: dict[str, Any], where: str = "data set") -> "GroundTruth":
        """From a dict of the data set; one without annotations or relations is in order."""
        annotations = record.get("annotations", [])
        relations = record.get("relations", [])
        check_relation_triplets(relations, len(annotations), where=where)
        verified = record.get("verified_labels") or {}
        return cls(
            boxes_xyxy(annotations),
            np.asarray([a["category_id"] for a in annotations], dtype=np.int64),
            np.asarray(relations, dtype=np.int64).reshape(-1, 3),
            np.asarray([(c, int(v)) for c, v in verified.items()], dtype=np.int64).reshape(-1, 2),
        )


@dataclass(frozen=True)
class Prediction:
    """Predictions of one image, triplets in descending score (ties in the order given)."""

    image_id: ImageId
    boxes: np.ndarray  # (R, 4) float64
    classes: np.ndarray  # (R,) int32
    box_scores: np.ndarray  # (R,) float64
    pairs: np.ndarray  # (K, 2) int32
    predicates: np.ndarray  # (K,) int32
    scores: np.ndarray  # (K,) float64, triplet scores

    @property
    def labels(self) -> np.ndarray:
        """(K, 3) subject class, predicate, object class."""
        return _labels(self.classes, self.pairs, self.predicates)

    def select(self, triplets: np.ndarray | slice) -> "Prediction":
        """The same boxes with some of the triplets."""
        return Prediction(
            self.image_id,
            self.boxes,
            self.classes,
            self.box_scores,
            self.pairs[triplets],
            self.predicates[triplets],
            self.scores[triplets],
        )

    def best(self, predicates_per_pair: int = 0, limit: int = 0) -> "Prediction":
        """The ``limit`` best triplets after each pair kept its k best predicates; 0: no limit."""
        return self.reduced((predicates_per_pair,), limit)

    def reduced(self, predicates_per_pair: Sequence[int], limit: int = 0) -> "Prediction":
        """The union, over the values of k, of the ``limit`` best triplets; 0: no limit."""
        kept = np.zeros(len(self.scores), dtype=bool)
        for k in predicates_per_pair:
            rows = np.flatnonzero(limit_predicates_per_pair(self.pairs, k))
            kept[rows[:limit] if limit else rows] = True
        return self if kept.all() else self.select(np.flatnonzero(kept))

    @classmethod
    def from_arrays(
        cls,
        image_id: ImageId,
        boxes: Any,
        classes: Any,
        box_scores: Any,
        pairs: Any,
        predicates: Any,
        scores: Any,
    ) -> "Prediction":
        """Check arrays or lists, sort the triplets by score and keep them in small types.

        Raises:
            ValueError: shapes, types or lengths that do not fit, an index outside the boxes, a box
                with x2 < x1 or y2 < y1, or a number that is not finite; the message names the
                image.
        """
        where = f"Prediction of image {image_id!r}"
        boxes = _array(boxes, "boxes", where, float, 4)
        classes = _array(classes, "classes", where, int)
        box_scores = _array(box_scores, "box scores", where, float)
        pairs = _array(pairs, "pairs", where, int, 2)
        predicates = _array(predicates, "predicates", where, int)
        scores = _array(scores, "scores", where, float)
        if not len(boxes) == len(classes) == len(box_scores):
            raise ValueError(
                f"{where}: {len(boxes)} boxes, {len(classes)} classes and {len(box_scores)} box "
                "scores; each box needs one class and one score."
            )
        if not len(pairs) == len(predicates) == len(scores):
            raise ValueError(
                f"{where}: {len(pairs)} pairs, {len(predicates)} predicates and {len(scores)} "
                "triplet scores; each triplet needs one of each."
            )
        outside = np.flatnonzero(((pairs < 0) | (pairs >= len(boxes))).any(axis=1))
        if len(outside):
            raise ValueError(
                f"{where}: pair {outside[0]} is {tuple(pairs[outside[0]].tolist())}, but there are "
                f"{len(boxes)} boxes. Pairs are 0-based indices into the image's boxes: where "
                "boxes were dropped after the pairs were made, remap the pairs."
            )
        inverted = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(axis=1))
        if len(inverted):
            raise ValueError(
                f"{where}: box {inverted[0]} is {boxes[inverted[0]].tolist()}, which ends before "
                "it begins. Boxes are [x1, y1, x2, y2] in pixels; convert [x, y, width, height] or "
                "[y1, x1, y2, x2], and sort the corners."
            )
        order = rank_by_score(scores)
        return cls(
            image_id, boxes, classes, box_scores, pairs[order], predicates[order], scores[order]
        )

    @classmethod
    def from_output(cls, image_id: ImageId, output: dict[str, Instances]) -> "Prediction":
        """From a model's output for one image, already in the original image's frame.

        Args:
            image_id: as in the data set.
            output: ``"instances"`` (``pred_boxes``, ``pred_classes``, ``scores``) and
                ``"relations"`` (``pairs``, ``predicates``, ``scores``).

        Raises:
            ValueError: one of the two is missing, or as for :meth:`from_arrays`.
        """
        for key in ("instances", "relations"):
            if key not in output:
                raise ValueError(
                    f"The model's output for image {image_id!r} has no {key!r}, only "
                    f"{sorted(output)}. Relations are evaluated for models that return both "
                    '"instances" and "relations" (MODEL.META_ARCHITECTURE "RelDN").'
                )
        instances, relations = output["instances"].to("cpu"), output["relations"].to("cpu")
        return cls.from_arrays(
            image_id,
            instances.pred_boxes.tensor.detach().numpy(),
            instances.pred_classes.numpy(),
            instances.scores.detach().numpy(),
            relations.pairs.numpy(),
            relations.predicates.numpy(),
            relations.scores.detach().numpy(),
        )

    @classmethod
    def empty(cls, image_id: ImageId) -> "Prediction":
        """No boxes and no triplets."""
        return cls.from_arrays(image_id, [], [], [], [], [], [])

    def to_output(self, height: int, width: int) -> dict[str, Instances]:
        """As a model's output for an image of this size, such as pictures are drawn of.

        ``predicate_scores`` are what is left of the triplets' scores without those of the boxes.
        """
        size = (height, width)
        instances = Instances(size)
        instances.pred_boxes = Boxes(torch.from_numpy(self.boxes).float())
        instances.pred_classes = torch.from_numpy(self.classes).long()
        instances.scores = torch.from_numpy(self.box_scores).float()
        of_boxes = self.box_scores[self.pairs].prod(axis=1)
        of_predicates = np.divide(
            self.scores, of_boxes, out=np.zeros_like(self.scores), where=of_boxes > 0
        )
        relations = predicted_relations(
            size,
            torch.from_numpy(self.pairs).long(),
            torch.from_numpy(self.predicates).long(),
            torch.from_numpy(self.scores).float(),
            torch.from_numpy(of_predicates).float(),
        )
        return {"instances": instances, "relations": relations}

    def to_record(self) -> dict[str, Any]:
        """The image's record in ``relation_predictions.json``."""
        image_id = self.image_id.item() if isinstance(self.image_id, np.generic) else self.image_id
        return {
            "image_id": image_id,
            "instances": {
                "boxes": self.boxes.tolist(),
                "classes": self.classes.tolist(),
                "scores": self.box_scores.tolist(),
            },
            "relations": {
                "pairs": self.pairs.tolist(),
                "predicates": self.predicates.tolist(),
                "scores": self.scores.tolist(),
            },
        }


ImagePair = tuple[GroundTruth, Prediction]


def _labels(classes: np.ndarray, pairs: np.ndarray, predicates: np.ndarray) -> np.ndarray:
    return np.stack([classes[pairs[:, 0]], predicates, classes[pairs[:, 1]]], axis=1)


def _array(values: Any, name: str, where: str, kind: type, width: int = 0) -> np.ndarray:
    """(L,) or (L, width) int32 or finite float64 array.

    Raises:
        ValueError: another shape or type, or NaN or infinity.
    """
    shape = {0: "a flat list", 2: "a list of [subject, object]", 4: "a list of [x1, y1, x2, y2]"}[
        width
    ]
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{where}: {name} differ in length; expected {shape}.") from error
    if array.size == 0:
        array = array.reshape((0, width) if width else (0,)).astype(kind)
    if array.ndim != (2 if width else 1) or (width and array.shape[1] != width):
        raise ValueError(f"{where}: {name} have the shape {array.shape}; expected {shape}.")
    if array.dtype.kind not in ("iu" if kind is int else "iuf"):
        wanted = "whole numbers (0-based)" if kind is int else "numbers"
        raise ValueError(f"{where}: {name} are {str(array.tolist()):.60}; expected {wanted}.")
    if kind is int:
        limits = np.iinfo(np.int32)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise ValueError(f"{where}: {name} have numbers beyond 32 bits.")
        return array.astype(np.int32)
    array = array.astype(np.float64)
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        raise ValueError(
            f"{where}: NaN or infinite {name}, first number {int(wrong[0, 0])} (from 0). The "
            "model has diverged (lower the learning rate, look at the losses) or its checkpoint is "
            "broken; in a file, leave out what has no finite number."
        )
    return array


def load_ground_truth(dataset_name: str) -> dict[ImageId, GroundTruth]:
    """Ground truth of a registered data set, in its order.

    Raises:
        ValueError: two dicts have one ``image_id``, or a relation points outside the annotations.
    """
    images: dict[ImageId, GroundTruth] = {}
    for record in dicts_without_images(dataset_name):
        image_id = record["image_id"]
        where = f"Data set '{dataset_name}', image {image_id!r}"
        if image_id in images:
            raise ValueError(
                f"{where}: occurs twice. Give every image of the data set an image_id of its own."
            )
        images[image_id] = GroundTruth.from_dict(record, where)
    return images
