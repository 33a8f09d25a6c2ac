"""What all relation evaluators share: collect, gather, join with the ground truth, write, warn."""

import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..structures.relations import TASKS
from ..structures.scene_graph import ImageId, SceneGraph
from ..utils.protocols import find_protocol
from . import generic as relations
from . import lu2016, openimages_score
from . import sgg as motifs
from .batches import anything_matches
from .confusion import confusion_report
from .ground_truth import ImagePair, load_ground_truth
from .predictions_io import write_predictions, write_settings
from .scores import Results, Scores, Settings, task_name
from .training_set import same_names, training_triplets

__all__ = ["RelationDatasetEvaluator", "Results", "task_name"]

PREDICTIONS_FILE = "relation_predictions.json"

_RULES: dict[str, Callable[[Sequence[ImagePair], Settings], Scores]] = {
    "lu2016": lu2016.score,
    "motifs": motifs.score,
    "openimages": openimages_score.score_openimages,
    "released": openimages_score.score_released,
    "relations": relations.score,
}

logger = logging.getLogger(__name__)


class RelationDatasetEvaluator(DatasetEvaluator):
    """Scores relations by a protocol; base of the data sets' evaluators.

    Ground truth comes from the registered data set, in the original images' frame. Every image of
    the data set counts: one that was not processed has no predictions. Of an image's predictions
    only the triplets that the protocol looks at are kept, so that the memory is bounded.

    Results: the blocks of the protocol (see ``docs/evaluation.md``) and for each k the accuracies
    of :mod:`.confusion`. With ``output_dir``, the predictions, their settings and, for each block
    of the protocol, ``per_predicate_<block>.json``, ``.md`` and ``.png`` are written there.
    """

    EVALUATOR_TYPE: str | None = None  # whose protocol is the default

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        distributed: bool = True,
        *,
        task: str = "sgdet",
        protocol: str = "",
        predicates_per_pair: Sequence[int] | None = None,
        topk: Sequence[int] | None = None,
        max_triplets: int | None = None,
        seen_triplets: Iterable[tuple[int, int, int]] | None = None,
        keep_predictions: bool = True,
    ):
        """
        Args:
            dataset_name: registered data set with ``image_id``, ``annotations`` and ``relations``,
                and ``predicate_classes`` in its metadata. ``train_dataset`` there names the
                training set for zero-shot recall.
            output_dir: folder for the files; nothing is written if None.
            distributed: gather the predictions of all processes; else evaluate only this one's.
            task: ``sgdet``, ``sgcls`` or ``prdcls``: what was given to the model. It names the
                results; the rules of matching are the same for all.
            protocol: a name of :data:`reldn_d2.utils.protocols.PROTOCOLS`; by default that of the
                evaluator, or of the data set's ``evaluator_type``.
            predicates_per_pair: values of k, each with results of its own; 0 means all; by default
                the protocol's. The model's output must contain the exact best triplets for each.
            topk: numbers n of an image's triplets for R@n; by default the protocol's.
            max_triplets: triplets that count in an image; 0 means all given; by default the
                protocol's, which is 100 or all.
            seen_triplets: (subject class, predicate, object class) of the training set, in place
                of those of the metadata's ``train_dataset``.
            keep_predictions: write ``relation_predictions.json`` to ``output_dir``.
        """
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; known are {', '.join(TASKS)}.")
        self._metadata = MetadataCatalog.get(dataset_name)
        evaluator_type = self.EVALUATOR_TYPE or self._metadata.get("evaluator_type", None)
        self.protocol = find_protocol(protocol, evaluator_type)
        if predicates_per_pair is None:
            predicates_per_pair = self.protocol.predicates_per_pair
        topk = self.protocol.recall_at if topk is None else tuple(topk)
        if max_triplets is None:
            max_triplets = 0 if self.protocol.all_triplets else max(100, *topk, 0)
        names = self._metadata.get("predicate_classes", None)
        _check_settings(dataset_name, names, predicates_per_pair, topk, max_triplets)
        if seen_triplets is not None:
            seen_triplets = np.asarray(list(seen_triplets), dtype=np.int64).reshape(-1, 3)
        self._seen_triplets = seen_triplets
        self.settings = Settings(
            predicate_names=tuple(names),
            task=task,
            predicates_per_pair=tuple(dict.fromkeys(predicates_per_pair)),
            topk=topk,
            max_triplets=max_triplets,
        )
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._distributed = distributed
        self._keep_predictions = keep_predictions
        self._ground_truth: dict[ImageId, SceneGraph] | None = None
        self.reset()

    @property
    def metadata(self) -> Metadata:
        """Of the data set."""
        return self._metadata

    @property
    def ground_truth(self) -> dict[ImageId, SceneGraph]:
        """Annotations by ``image_id``, in the data set's order; loaded at first use."""
        if self._ground_truth is None:
            images = load_ground_truth(self._dataset_name)
            for image_id, truth in images.items():
                self._check_labels(image_id, truth.classes, truth.predicates, "annotations")
            self._ground_truth = images
        return self._ground_truth

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: list[SceneGraph] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Reduce a batch's predictions to small arrays.

        Args:
            inputs: dicts with ``image_id``.
            outputs: ``"instances"`` and ``"relations"`` of each image, in its original frame.
        """
        for input_, output in zip(inputs, outputs):
            self.add(SceneGraph.from_output(input_["image_id"], output))

    def add(self, prediction: SceneGraph) -> None:
        """Take the predictions of one image; only the triplets that can count are kept."""
        settings = self.settings
        self._predictions.append(
            prediction.reduced(settings.predicates_per_pair, settings.max_triplets)
        )

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
        none = SceneGraph.empty("")
        pairs = [(gt, none if p is None else p) for gt, p in images]
        self._warn_if_nothing_matched(pairs)
        if self.protocol.name == "openimages" and not any(len(gt.verified) for gt, _ in pairs):
            logger.warning(
                "No image of '%s' has verified labels: triplets with classes that are not "
                "annotated in their image are ignored instead of counting as false positives. Give "
                'its dicts "verified_labels", or read these metrics as too high.',
                self._dataset_name,
            )
        scores = self.score(pairs)
        self._report(scores)
        return scores.results

    def joined(self) -> list[ImagePair]:
        """Ground truth and prediction of every image, in the data set's order, of this process."""
        none = SceneGraph.empty("")
        return [(gt, none if p is None else p) for gt, p in self._join(self._predictions)]

    def score(self, images: Sequence[ImagePair]) -> Scores:
        """Metrics in percent from every image of the data set, in its order."""
        self.settings = self._with_training_set(self.settings)
        scores = _RULES[self.protocol.name](images, self.settings)
        if self.protocol.name != "relations":  # which has the accuracies among its metrics
            for k in self.settings.predicates_per_pair:
                report = confusion_report(images, k, self.settings.max_triplets or 100)
                task = task_name("confusion", self.settings.task, k)
                scores.results[task] = OrderedDict(report)
        return scores

    def _with_training_set(self, settings: Settings) -> Settings:
        train_dataset = self._metadata.get("train_dataset", None)
        seen, counts = self._seen_triplets, None
        if not train_dataset and seen is None and self.protocol.name in ("lu2016", "motifs"):
            logger.info(
                "The metadata of '%s' names no train_dataset: zero-shot recall is left out.",
                self._dataset_name,
            )
        if train_dataset and same_names(self._metadata, train_dataset):
            found = training_triplets(train_dataset)
            if found is not None:
                seen, counts = found.labels if seen is None else seen, found.counts
        return Settings(**{**vars(settings), "seen_triplets": seen, "training_counts": counts})

    def _write_predictions(self, predictions: Sequence[SceneGraph]) -> None:
        file = os.path.join(self._output_dir, PREDICTIONS_FILE)
        write_predictions(predictions, file)
        settings = {
            "dataset": self._dataset_name,
            "task": self.settings.task,
            "predicates_per_pair": list(self.settings.predicates_per_pair),
            "triplets": self.settings.max_triplets or None,
        }
        write_settings(file, settings)
        logger.info("Wrote the predictions to %s", file)

    def _report(self, scores: Scores) -> None:
        """Log every block, and write the predicates one by one."""
        for task, metrics in scores.results.items():
            table = tabulate(
                [(name, f"{value:.2f}") for name, value in metrics.items()],
                headers=("metric", "value"),
                tablefmt="pipe",
                colalign=("left", "right"),
                disable_numparse=True,
            )
            logger.info("'%s', %s:\n%s", self._dataset_name, task, table)
        for task, predicates in scores.predicates.items() if self._output_dir else ():
            paths = predicates.write(self._output_dir, task, f"{self._dataset_name}, {task}")
            logger.info("'%s', %s: every predicate in %s", self._dataset_name, task, paths[1])

    def _join(self, predictions: Sequence[SceneGraph]) -> list[Any]:
        """(ground truth, prediction or None) of each image, in the data set's order."""
        by_image: dict[ImageId, SceneGraph] = {}
        for prediction in predictions:
            image_id = prediction.image_id
            if image_id not in self.ground_truth:
                raise ValueError(f"Prediction of image {image_id!r}: {self.no_such_image()}")
            self._check_labels(image_id, prediction.classes, prediction.predicates, "predictions")
            # Samplers that pad the last batch repeat images; the first prediction counts.
            by_image.setdefault(image_id, prediction)
        return [(gt, by_image.get(image_id)) for image_id, gt in self.ground_truth.items()]

    def no_such_image(self) -> str:
        """The message about an unknown image."""
        return (
            f"data set '{self._dataset_name}' has no such image_id (its first is "
            f"{next(iter(self.ground_truth), None)!r}). Evaluate on the data set whose images were "
            "processed."
        )

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
        num_relations = sum(len(gt.pairs) for gt, _ in images)
        if num_relations == 0:
            logger.warning(
                "No image of '%s' has a relation: its metrics are NaN.", self._dataset_name
            )
        elif not anything_matches(images):
            logger.warning(
                "Not one of the %d predicted triplets in %d images matched any of the %d "
                "ground-truth relations of '%s'. The likeliest causes: (1) the model is untrained, "
                "its checkpoint was not loaded, or a score threshold dropped everything; (2) "
                "classes or predicates are numbered differently in model and data set (0-based "
                "here, other order of names); (3) boxes are in another frame (resized image, XYWH "
                "or normalised instead of absolute XYXY).",
                sum(len(p.scores) for _, p in images),
                len(images),
                num_relations,
                self._dataset_name,
            )


def _check_settings(
    dataset_name: str,
    names: Sequence[str] | None,
    predicates_per_pair: Sequence[int],
    topk: Sequence[int],
    max_triplets: int,
) -> None:
    if names is None:
        raise ValueError(
            f"The metadata of data set '{dataset_name}' has no predicate_classes. Set them: "
            f'MetadataCatalog.get("{dataset_name}").predicate_classes = [...].'
        )
    if not predicates_per_pair or min(predicates_per_pair) < 0:
        raise ValueError(
            f"predicates_per_pair is {list(predicates_per_pair)}; give one number or more, "
            "each at least 1, or 0 for all predicates (TEST.RELATIONS.PREDICATES_PER_PAIR)."
        )
    if min(topk, default=1) < 1:
        raise ValueError(
            f"R@n is asked for n = {list(topk)}; each n is at least 1 (TEST.RELATIONS.RECALL_AT)."
        )
    if max_triplets and max(topk, default=0) > max_triplets:
        raise ValueError(
            f"R@{max(topk)} needs {max(topk)} triplets an image, but only {max_triplets} are "
            "kept (TEST.RELATIONS.TOPK)."
        )
