"""Evaluate relations: collect predictions, join them with the ground truth, score, write, warn."""

import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data.boxes_only import require_real_size
from ..data.dataset_dict import dicts_without_images
from ..data.datasets.catalog import dataset_names
from ..structures.name_matching import NAME_FIELDS
from ..structures.relations import TASKS
from ..structures.scene_graph import ImageId, SceneGraph
from ..utils.protocols import distinct_limits, find_protocol
from .attribute_evaluation import add_attribute_scores
from .batches import ImagePair
from .diagnosis import check_given_entities, check_not_normalized, find_misreading
from .frequency_groups import check_thresholds
from .predictions_io import PREDICTIONS_FILE, write_predictions, write_settings
from .protocol_metrics import Settings
from .score_report import report_scores
from .scoring import Results, Scores, score
from .training_set import training_triplets

__all__ = ["RelationDatasetEvaluator", "load_ground_truth"]

logger = logging.getLogger(__name__)


class RelationDatasetEvaluator(DatasetEvaluator):
    """Scores relations by a protocol.

    Ground truth comes from the registered dataset, in the frame of the original images. Every
    image of the dataset counts: one that was not processed has no predictions. Only the triplets
    of an image that the protocol looks at are kept, so memory is bounded.

    Results: the blocks of the protocol (see ``docs/evaluation.md``) and for each k the accuracies
    of :mod:`.confusion`. With ``output_dir``, the predictions, their settings and, for each block
    of the protocol, ``per_predicate_<block>.json``, ``.md`` and ``.png`` are written there.
    """

    PROTOCOL = ""  # the default; empty: that of the dataset's evaluator_type

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        distributed: bool = True,
        *,
        task: str = "sgdet",
        protocol: str = "",
        predicates_per_pair: Sequence[int | None] | None = None,
        kept_predicates_per_pair: Sequence[int | None] = (),
        recall_at: Sequence[int] | None = None,
        topk: int | None = None,
        seen_triplets: Iterable[tuple[int, int, int]] | None = None,
        group_thresholds: Sequence[int] = (),
        keep_predictions: bool = True,
        attributes: bool | None = None,
    ):
        """
        Args:
            dataset_name: registered dataset with ``image_id``, ``annotations`` and ``relations``,
                and ``predicate_classes`` in its metadata. ``train_dataset`` there names the
                training set for zero-shot recall.
            output_dir: folder for the files; nothing is written if None.
            distributed: gather the predictions of all processes instead of evaluating only those
                of this process.
            task: ``sgdet``, ``sgcls``, ``prdcls`` or ``preddet``, what was given to the model. It
                is part of the results' names; the rules of matching are the same for all.
            protocol: a name in :data:`reldn_d2.utils.protocols.PROTOCOL_REGISTRY`; default:
                that of the class or of the dataset's ``evaluator_type``.
            predicates_per_pair: values of k, each with results of its own; None in the list means
                no limit; default: the protocol's. The model's output must contain the exact best
                triplets for each.
            kept_predicates_per_pair: further values of k for which the output contains the exact
                best triplets. They are not evaluated; ``relation_predictions.json`` has them, so
                that other protocols can score it.
            recall_at: the n of R@n; default: the protocol's.
            topk: triplets kept per image, for each k; default: the protocol's, which is no limit
                for ``openimages`` (both) and otherwise 100, or the largest n if that is more.
            seen_triplets: (subject class, predicate, object class) of the training set, instead of
                those of the metadata's ``train_dataset``.
            group_thresholds: two numbers of training relations that divide the predicates into
                head, body and tail; empty: thirds (see :mod:`.frequency_groups`).
            keep_predictions: write ``relation_predictions.json`` to ``output_dir``.
            attributes: whether the model predicts attributes, which are then scored too if the
                dataset has any (:mod:`.attribute_evaluation`); None: if any prediction has some.

        Raises:
            ValueError: an unknown task or protocol, values out of range, or incomplete metadata.
        """
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; expected one of {', '.join(TASKS)}.")
        self._metadata = MetadataCatalog.get(dataset_name)
        evaluator_type = self._metadata.get("evaluator_type", None)
        self.protocol = find_protocol(protocol or self.PROTOCOL, evaluator_type, dataset_name)
        if predicates_per_pair is None:
            predicates_per_pair = self.protocol.predicates_per_pair
        recall_at = self.protocol.recall_at if recall_at is None else tuple(recall_at)
        if topk is None and not self.protocol.all_triplets:
            topk = max(100, *recall_at, 0)
        names = self._metadata.get("predicate_classes", None)
        _check_settings(dataset_name, names, predicates_per_pair, recall_at, topk)
        has_training_set = bool(self._metadata.get("train_dataset", None))
        check_thresholds(group_thresholds, has_training_set, dataset_name)
        if seen_triplets is not None:
            seen_triplets = np.asarray(list(seen_triplets), dtype=np.int64).reshape(-1, 3)
        self._seen_triplets = seen_triplets
        self.settings = Settings(
            predicate_names=tuple(names),
            task=task,
            predicates_per_pair=distinct_limits(predicates_per_pair),
            recall_at=recall_at,
            topk=topk,
            group_thresholds=tuple(group_thresholds),
        )
        self._kept = distinct_limits([*predicates_per_pair, *kept_predicates_per_pair])
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._distributed = distributed
        self._keep_predictions = keep_predictions
        self._attributes = attributes
        self._ground_truth: dict[ImageId, SceneGraph] | None = None
        self.reset()

    @property
    def metadata(self) -> Metadata:
        """Metadata of the dataset."""
        return self._metadata

    @property
    def ground_truth(self) -> dict[ImageId, SceneGraph]:
        """Annotations by ``image_id``, in the dataset's order; loaded at first use."""
        if self._ground_truth is None:
            images = load_ground_truth(self._dataset_name, self.settings.task)
            for image_id, truth in images.items():
                self._check_labels(image_id, truth, "annotations")
            self._ground_truth = images
        return self._ground_truth

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: list[SceneGraph] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Keep a batch's predictions as small arrays.

        Args:
            inputs: dicts with ``image_id``.
            outputs: ``"instances"`` and ``"relations"`` of each image, in its original frame.
        """
        for input_, output in zip(inputs, outputs):
            self.add(SceneGraph.from_output(input_["image_id"], output))

    def add(self, prediction: SceneGraph) -> None:
        """Add the prediction of one image; only the triplets that can count are kept."""
        self._predictions.append(prediction.reduced(self._kept, self.settings.topk))

    def evaluate(self) -> Results:
        """Score the predictions of all processes.

        Returns:
            ``{block: {metric: value}}``; values in percent unless the metric is a number of cases,
            NaN where the ground truth has nothing to find. ``{}`` in all but the main process.
        """
        predictions = self._predictions
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            gathered = comm.gather(predictions, dst=0)
            if not comm.is_main_process():
                return {}
            predictions = list(itertools.chain(*gathered))
        images = self._join(predictions)
        self._check_evidence(images)
        if self._output_dir and self._keep_predictions:
            self._write_predictions([p for _, p in images if p is not None])
        missing = sum(p is None for _, p in images)
        if missing:
            logger.warning(
                "%d of the %d images of '%s' were not processed; they count as having no triplets.",
                missing,
                len(images),
                self._dataset_name,
            )
        if self.protocol.verified_labels and not any(len(gt.verified) for gt, _ in images):
            logger.warning(
                "No image of '%s' has verified labels: triplets with classes that are not "
                "annotated in their image are ignored instead of counting as false positives. Add "
                '"verified_labels" to its dicts, or expect these metrics to be too high.',
                self._dataset_name,
            )
        none = SceneGraph.empty("")
        pairs = [(gt, none if p is None else p) for gt, p in images]
        self.settings = self._with_training_set(self.settings)
        scores = score(pairs, self.protocol, self.settings)
        if self._attributes or any(p.attributes is not None for _, p in pairs):
            self._add_attribute_scores(scores, pairs)
        self._warn_if_nothing_matched(pairs, scores.anything_matched)
        misreading = find_misreading(pairs)
        if misreading:
            logger.warning("The predictions for '%s' %s.", self._dataset_name, misreading)
        report_scores(scores, self._dataset_name, self._output_dir)
        return scores.results

    def result_names(self) -> dict[str, list[str]]:
        """Return the names of the metrics of each block, which do not depend on the images."""
        scores = score([], self.protocol, self._with_training_set(self.settings))
        if self._attributes:
            self._add_attribute_scores(scores, [])
        return {block: list(metrics) for block, metrics in scores.results.items()}

    def joined(self) -> list[ImagePair]:
        """Return this process's ground truth and prediction of every image of the dataset."""
        none = SceneGraph.empty("")
        return [(gt, none if p is None else p) for gt, p in self._join(self._predictions)]

    def _add_attribute_scores(self, scores: Scores, images: Sequence[ImagePair]) -> None:
        """Add the results of attributes, if the dataset has any."""
        names = dataset_names(self._dataset_name)
        attributes = names.get("attribute_classes")
        if attributes:
            num_classes = len(names["thing_classes"])
            settings = self.settings
            add_attribute_scores(scores, images, self.protocol, settings, num_classes, attributes)

    def _with_training_set(self, settings: Settings) -> Settings:
        train_dataset = self._metadata.get("train_dataset", None)
        seen, counts = self._seen_triplets, None
        if not train_dataset and seen is None and self.protocol.zero_shot:
            logger.info(
                "The metadata of '%s' names no train_dataset: zero-shot recall is left out.",
                self._dataset_name,
            )
        if train_dataset:
            training = training_triplets(train_dataset, self._dataset_name)
            if training is not None:
                seen = training.labels if seen is None else seen
                counts = training.counts
        return replace(settings, seen_triplets=seen, training_counts=counts)

    def _check_evidence(self, images: Sequence[tuple[SceneGraph, SceneGraph | None]]) -> None:
        """Raise if the predictions are not of this task, or have normalized boxes."""
        what = f"Predictions for dataset '{self._dataset_name}'"
        processed = [(truth, predicted) for truth, predicted in images if predicted is not None]
        check_not_normalized(processed, what)
        for truth, predicted in processed:
            try:
                check_given_entities(self.settings.task, truth, predicted, what)
            except ValueError as error:
                for record in dicts_without_images(self._dataset_name):
                    if record["image_id"] == truth.image_id:  # the cause, if its size is unknown
                        require_real_size(record, f"{what}, image {truth.image_id!r}", given=True)
                raise error

    def _write_predictions(self, predictions: Sequence[SceneGraph]) -> None:
        file = os.path.join(self._output_dir, PREDICTIONS_FILE)
        write_predictions(predictions, file)
        settings = {
            "dataset": self._dataset_name,
            "task": self.settings.task,
            "predicates_per_pair": list(self._kept),
            "triplets": self.settings.topk,
            **{field: list(names) for field, names in dataset_names(self._dataset_name).items()},
        }
        write_settings(file, settings)
        logger.info("Wrote the predictions to %s", file)

    def _join(self, predictions: Sequence[SceneGraph]) -> list[Any]:
        """Return (ground truth, prediction or None) of each image, in the dataset's order."""
        by_image: dict[ImageId, SceneGraph] = {}
        for prediction in predictions:
            image_id = prediction.image_id
            if image_id not in self.ground_truth:
                raise ValueError(f"Prediction of image {image_id!r}: {self.no_such_image()}")
            self._check_labels(image_id, prediction, "predictions")
            # Samplers that pad the last batch repeat images; the first prediction counts.
            by_image.setdefault(image_id, prediction)
        return [(gt, by_image.get(image_id)) for image_id, gt in self.ground_truth.items()]

    def no_such_image(self) -> str:
        """Return the message about an unknown image."""
        return (
            f"dataset '{self._dataset_name}' has no such image_id (its first is "
            f"{next(iter(self.ground_truth), None)!r}). Evaluate on the dataset whose images were "
            "processed."
        )

    def _check_labels(self, image_id: ImageId, graph: SceneGraph, what: str) -> None:
        """Raise if a class, predicate or attribute lies outside the names in the metadata."""
        attributes = () if graph.attributes is None else graph.attributes.ids
        for key, values in zip(NAME_FIELDS, (graph.classes, graph.predicates, attributes)):
            names = self._metadata.get(key, None)
            if key == "attribute_classes" and not names:
                continue  # the dataset has none, so they are not scored
            if names is None or len(values) == 0:
                continue
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= len(names):
                raise ValueError(
                    f"Dataset '{self._dataset_name}', image {image_id!r}: its {what} have the id "
                    f"{low if low < 0 else high}, but {key} has {len(names)} names, 0 to "
                    f"{len(names) - 1}. Ids are 0-based; check that the model was built for this "
                    "dataset (MODEL.ROI_HEADS.NUM_CLASSES, "
                    "MODEL.ROI_RELATION_HEAD.NUM_PREDICATES) and that the loader's ids start at 0."
                )

    def _warn_if_nothing_matched(self, images: Sequence[ImagePair], anything_matched: bool) -> None:
        num_relations = sum(len(gt.pairs) for gt, _ in images)
        if num_relations == 0:
            logger.warning(
                "No image of '%s' has a relation: its metrics are NaN.", self._dataset_name
            )
        elif not anything_matched:
            logger.warning(
                "None of the %d predicted triplets in %d images matched any of the %d "
                "ground-truth relations of '%s'. The most likely causes: (1) the model is "
                "untrained, its checkpoint was not loaded, or a score threshold removed "
                "everything; (2) class or predicate ids differ between model and dataset (0-based "
                "here, other order of names); (3) boxes are in another frame (resized image, XYWH "
                "or normalized instead of absolute XYXY).",
                sum(len(p.scores) for _, p in images),
                len(images),
                num_relations,
                self._dataset_name,
            )


def load_ground_truth(dataset_name: str, task: str = "prdcls") -> dict[ImageId, SceneGraph]:
    """Load the ground truth of a registered dataset, in its order.

    Args:
        dataset_name: registered dataset.
        task: what was given to the model; detected boxes (``sgdet``) need the images' real sizes.

    Raises:
        ValueError: two dicts have one ``image_id``, a relation points outside the annotations, or
            the sizes of images are needed and unknown.
    """
    images: dict[ImageId, SceneGraph] = {}
    for record in dicts_without_images(dataset_name):
        image_id = record["image_id"]
        where = f"Dataset '{dataset_name}', image {image_id!r}"
        if task == "sgdet":
            require_real_size(record, where)
        if image_id in images:
            raise ValueError(
                f"{where}: occurs twice. Every image of a dataset needs its own image_id."
            )
        images[image_id] = SceneGraph.from_dataset_dict(record, where)
    return images


def _check_settings(
    dataset_name: str,
    names: Sequence[str] | None,
    predicates_per_pair: Sequence[int | None],
    recall_at: Sequence[int],
    topk: int | None,
) -> None:
    if names is None:
        raise ValueError(
            f"The metadata of dataset '{dataset_name}' has no predicate_classes. Set them: "
            f'MetadataCatalog.get("{dataset_name}").predicate_classes = [...].'
        )
    if not predicates_per_pair or min(k or 0 for k in predicates_per_pair) < 0:
        raise ValueError(
            f"predicates_per_pair is {list(predicates_per_pair)}; expected one value or more, each "
            "at least 1, or None for no limit (TEST.RELATIONS.PREDICATES_PER_PAIR)."
        )
    if min(recall_at, default=1) < 1:
        raise ValueError(
            f"recall_at is {list(recall_at)}; each n of R@n must be at least 1 "
            "(TEST.RELATIONS.RECALL_AT)."
        )
    if topk is not None and max(recall_at, default=0) > topk:
        raise ValueError(
            f"R@{max(recall_at)} needs {max(recall_at)} triplets per image, but only {topk} are "
            "kept (TEST.RELATIONS.TOPK)."
        )
