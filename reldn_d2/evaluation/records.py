"""What the evaluators keep of an image, as small numpy arrays, and the predictions file.

Shapes: N ground-truth entities, M ground-truth relations, R predicted boxes, K predicted triplets.
All boxes are XYXY, absolute pixels, in the frame of the data set's dicts (the original image).

``relation_predictions.json`` is a list with one record per processed image::

    {"image_id": same as the data set's,
     "instances": {"boxes": [[x1, y1, x2, y2], ...], "classes": [int, ...], "scores": [float, ...]},
     "relations": {"pairs": [[subject_index, object_index], ...], "predicates": [int, ...],
                   "scores": [float, ...]}}

Classes and predicates are contiguous and 0-based; the scores of relations are triplet scores.
"""

import json
import os
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Tuple, Union

import numpy as np

from detectron2.data import DatasetCatalog
from detectron2.structures import Instances

from ..data.annotations import boxes_xyxy
from ..structures.relations import check_relation_triplets
from .matching import rank_by_score

__all__ = [
    "GroundTruth",
    "ImagePair",
    "Prediction",
    "load_ground_truth",
    "write_predictions",
]

ImageId = Union[int, str]


@dataclass(frozen=True)
class GroundTruth:
    """Annotations of one image."""

    boxes: np.ndarray  # (N, 4) float64
    classes: np.ndarray  # (N,) int64
    relations: np.ndarray  # (M, 3) int64: subject index, object index, predicate

    @property
    def pairs(self) -> np.ndarray:
        """(M, 2) subject and object indices."""
        return self.relations[:, :2]

    @property
    def labels(self) -> np.ndarray:
        """(M, 3) subject class, predicate, object class."""
        return _labels(self.classes, self.pairs, self.relations[:, 2])

    @classmethod
    def from_dict(cls, record: Dict[str, Any], where: str = "data set") -> "GroundTruth":
        """From a dict of the data set; one without annotations or relations is in order."""
        annotations = record.get("annotations", [])
        relations = record.get("relations", [])
        check_relation_triplets(relations, len(annotations), where=where)
        return cls(
            boxes_xyxy(annotations),
            np.asarray([a["category_id"] for a in annotations], dtype=np.int64),
            np.asarray(relations, dtype=np.int64).reshape(-1, 3),
        )


@dataclass(frozen=True)
class Prediction:
    """Predictions of one image, triplets in descending score (ties in the order given)."""

    image_id: ImageId
    boxes: np.ndarray  # (R, 4) float32
    classes: np.ndarray  # (R,) int32
    box_scores: np.ndarray  # (R,) float32
    pairs: np.ndarray  # (K, 2) int32
    predicates: np.ndarray  # (K,) int32
    scores: np.ndarray  # (K,) float32, triplet scores

    @property
    def labels(self) -> np.ndarray:
        """(K, 3) subject class, predicate, object class."""
        return _labels(self.classes, self.pairs, self.predicates)

    def select(self, triplets: Union[np.ndarray, slice]) -> "Prediction":
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
            ValueError: lengths that differ, an index outside the boxes, or a score that is not
                finite; the message names the image.
        """
        boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        classes = np.asarray(classes, dtype=np.int32).reshape(-1)
        box_scores = np.asarray(box_scores, dtype=np.float32).reshape(-1)
        pairs = np.asarray(pairs, dtype=np.int32).reshape(-1, 2)
        predicates = np.asarray(predicates, dtype=np.int32).reshape(-1)
        scores = np.asarray(scores, dtype=np.float32).reshape(-1)
        where = f"Prediction of image {image_id!r}"
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
        for name, values in (("boxes", boxes), ("box scores", box_scores), ("scores", scores)):
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{where}: NaN or infinite {name}. The model has diverged (lower the learning "
                    "rate, look at the losses) or its checkpoint is broken."
                )
        order = rank_by_score(scores)
        return cls(
            image_id, boxes, classes, box_scores, pairs[order], predicates[order], scores[order]
        )

    @classmethod
    def from_output(cls, image_id: ImageId, output: Dict[str, Instances]) -> "Prediction":
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

    def to_record(self) -> Dict[str, Any]:
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


ImagePair = Tuple[GroundTruth, Prediction]


def _labels(classes: np.ndarray, pairs: np.ndarray, predicates: np.ndarray) -> np.ndarray:
    return np.stack([classes[pairs[:, 0]], predicates, classes[pairs[:, 1]]], axis=1)


def load_ground_truth(dataset_name: str) -> Dict[ImageId, GroundTruth]:
    """Ground truth of a registered data set, in its order.

    Raises:
        ValueError: two dicts have one ``image_id``, or a relation points outside the annotations.
    """
    images: Dict[ImageId, GroundTruth] = {}
    for record in DatasetCatalog.get(dataset_name):
        image_id = record["image_id"]
        where = f"Data set '{dataset_name}', image {image_id!r}"
        if image_id in images:
            raise ValueError(
                f"{where}: occurs twice. Give every image of the data set an image_id of its own."
            )
        images[image_id] = GroundTruth.from_dict(record, where)
    return images


def write_predictions(predictions: Iterable[Prediction], file: str) -> None:
    """Write ``relation_predictions.json``, whole or not at all."""
    os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
    unfinished = f"{file}.{os.getpid()}.tmp"
    try:
        with open(unfinished, "w", encoding="utf-8") as stream:
            stream.write("[")
            for number, prediction in enumerate(predictions):
                stream.write(",\n" if number else "\n")
                stream.write(json.dumps(prediction.to_record(), allow_nan=False))
            stream.write("\n]\n")
        os.replace(unfinished, file)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)
