"""What all relation evaluators share: collect, gather, join with the ground truth, write, warn."""

import itertools
import logging
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
from tabulate import tabulate

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..structures.relations import TASKS
from .lu2016 import match_triplets
from .records import (
    GroundTruth,
    ImageId,
    ImagePair,
    Prediction,
    load_ground_truth,
    write_predictions,
)

__all__ = ["RelationDatasetEvaluator", "Results", "task_name"]

Results = Dict[str, Dict[str, float]]
PREDICTIONS_FILE = "relation_predictions.json"

logger = logging.getLogger(__name__)


def task_name(rule: str, task: str, predicates_per_pair: int) -> str:
    """Key of a block of results: ``lu2016_sgdet_k10``; without limit k, ``relations_prdcls``."""
    return f"{rule}_{task}" + (f"_k{predicates_per_pair}" if predicates_per_pair else "")


class RelationDatasetEvaluator(DatasetEvaluator):
    """Base of the relation evaluators; a subclass implements :meth:`score`.

    Ground truth comes from the registered data set, in the original images' frame. Every image of
    the data set counts: one that was not processed has no predictions.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: Optional[str] = None,
        distributed: bool = True,
        *,
        task: str = "sgdet",
        predicates_per_pair: Sequence[int] = (0,),
    ):
        """
        Args:
            dataset_name: registered data set with ``image_id``, ``annotations`` and ``relations``.
            output_dir: folder for ``relation_predictions.json``; nothing is written if None.
            distributed: gather the predictions of all processes; else evaluate only this one's.
            task: ``sgdet``, ``sgcls`` or ``prdcls``: what was given to the model. It names the
                results; the rules of matching are the same for all.
            predicates_per_pair: values of k, each with results of its own; 0 means all. The model's
                output must contain the exact best triplets for each of them.
        """
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; known are {', '.join(TASKS)}.")
        if not predicates_per_pair or min(predicates_per_pair) < 0:
            raise ValueError(
                f"predicates_per_pair is {list(predicates_per_pair)}; give one number or more, "
                "each at least 1, or 0 for all predicates (TEST.RELATIONS.PREDICATES_PER_PAIR)."
            )
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._distributed = distributed
        self._task = task
        self._predicates_per_pair = tuple(dict.fromkeys(predicates_per_pair))
        self._metadata = MetadataCatalog.get(dataset_name)
        self._ground_truth: Optional[Dict[ImageId, GroundTruth]] = None
        self.reset()

    def score(self, images: Sequence[ImagePair]) -> Results:
        """Metrics in percent from every image of the data set, in its order."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: List[Prediction] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Reduce a batch's predictions to small arrays.

        Args:
            inputs: dicts with ``image_id``.
            outputs: ``"instances"`` and ``"relations"`` of each image, in its original frame.
        """
        for input_, output in zip(inputs, outputs):
            self._predictions.append(Prediction.from_output(input_["image_id"], output))

    def evaluate(self) -> Results:
        """Results of the main process; ``{}`` in the others.

        Returns:
            ``{task: {metric: value}}``; values in percent unless the metric is a number of cases,
            NaN where the ground truth has no case to judge.
        """
        predictions = self._predictions
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            gathered = comm.gather(predictions, dst=0)
            if not comm.is_main_process():
                return {}
            predictions = list(itertools.chain(*gathered))
        images = self._join(predictions)
        if self._output_dir:
            file = os.path.join(self._output_dir, PREDICTIONS_FILE)
            write_predictions((p for _, p in images if p is not None), file)
            logger.info("Wrote the predictions to %s", file)
        missing = sum(p is None for _, p in images)
        if missing:
            logger.warning(
                "%d of the %d images of '%s' were not processed; they count as having no triplets.",
                missing,
                len(images),
                self._dataset_name,
            )
        pairs = [(gt, Prediction.empty("") if p is None else p) for gt, p in images]
        self._warn_if_nothing_matched(pairs)
        results = self.score(pairs)
        for task, metrics in results.items():
            rows = [(name, f"{value:.2f}") for name, value in metrics.items()]
            table = tabulate(
                rows,
                headers=("metric", "value"),
                tablefmt="pipe",
                colalign=("left", "right"),
                disable_numparse=True,
            )
            logger.info("'%s', %s:\n%s", self._dataset_name, task, table)
        return results

    def _join(self, predictions: Sequence[Prediction]) -> List[Any]:
        """(ground truth, prediction or None) of each image, in the data set's order."""
        if self._ground_truth is None:
            self._ground_truth = load_ground_truth(self._dataset_name)
            for image_id, ground_truth in self._ground_truth.items():
                self._check_labels(
                    image_id, ground_truth.classes, ground_truth.relations[:, 2], "annotations"
                )
        by_image: Dict[ImageId, Prediction] = {}
        for prediction in predictions:
            image_id = prediction.image_id
            if image_id not in self._ground_truth:
                raise ValueError(
                    f"Prediction of image {image_id!r}: data set '{self._dataset_name}' has no "
                    f"such image_id (its first is {next(iter(self._ground_truth), None)!r}). "
                    "Evaluate on the data set whose images were processed."
                )
            self._check_labels(image_id, prediction.classes, prediction.predicates, "predictions")
            # Samplers that pad the last batch repeat images; the first prediction counts.
            by_image.setdefault(image_id, prediction)
        return [(gt, by_image.get(image_id)) for image_id, gt in self._ground_truth.items()]

    def _check_labels(
        self, image_id: ImageId, classes: np.ndarray, predicates: np.ndarray, what: str
    ) -> None:
        """Raise where a class or predicate lies outside the names in the metadata."""
        for key, values in (("thing_classes", classes), ("predicate_classes", predicates)):
            names = self._metadata.get(key, None)
            if names is None or len(values) == 0:
                continue
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= len(names):
                raise ValueError(
                    f"Data set '{self._dataset_name}', image {image_id!r}: its {what} have number "
                    f"{low if low < 0 else high}, but {key} has the {len(names)} names 0 to "
                    f"{len(names) - 1}. Numbers are 0-based; check that the model was built for "
                    "this data set (MODEL.ROI_HEADS.NUM_CLASSES, "
                    "MODEL.ROI_RELATION_HEAD.NUM_PREDICATES) and that the loader numbers from 0."
                )

    def _warn_if_nothing_matched(self, images: Sequence[ImagePair]) -> None:
        num_relations = sum(len(gt.relations) for gt, _ in images)
        num_triplets = sum(len(p.scores) for _, p in images)
        if num_relations == 0:
            logger.warning(
                "No image of '%s' has a relation: its metrics are NaN.", self._dataset_name
            )
        elif not any((match_triplets(gt, p) >= 0).any() for gt, p in images):
            logger.warning(
                "Not one of the %d predicted triplets in %d images matched any of the %d "
                "ground-truth relations of '%s'. The likeliest causes: (1) the model is untrained, "
                "its checkpoint was not loaded, or a score threshold dropped everything; (2) "
                "classes or predicates are numbered differently in model and data set (0-based "
                "here, other order of names); (3) boxes are in another frame (resized image, XYWH "
                "or normalised instead of absolute XYXY).",
                num_triplets,
                len(images),
                num_relations,
                self._dataset_name,
            )
