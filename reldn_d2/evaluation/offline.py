"""Score a predictions file, the model's own or anyone's, without model or images."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..data.datasets.catalog import dataset_names
from ..structures.name_matching import NAME_FIELDS, Renumbering
from ..structures.ranking import limit_predicates_per_pair
from ..structures.scene_graph import SceneGraph
from .predictions_io import read_predictions, read_settings
from .relation_evaluation import RelationDatasetEvaluator
from .scoring import Results
from .submission import is_submission, read_submission

__all__ = ["evaluate_predictions", "read_file"]

logger = logging.getLogger(__name__)


def evaluate_predictions(
    dataset_name: str,
    predictions_file: str,
    output_dir: str | None = None,
    *,
    task: str | None = None,
    protocol: str = "",
    predicates_per_pair: Sequence[int | None] | None = None,
    recall_at: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    group_thresholds: Sequence[int] = (),
) -> Results:
    """Score a predictions file (:mod:`.predictions_io`) or a submission (:mod:`.submission`).

    Args:
        dataset_name: registered dataset that the predictions are for.
        predictions_file: plain or gzipped; or a submission of the OpenImages challenge (.csv).
        output_dir: folder for the tables of the predicates; None writes nothing.
        task: ``sgdet``, ``sgcls`` or ``prdcls``; default: the one that the file was made for, or
            ``sgdet`` if that is unknown.
        protocol: default: the dataset's own.
        predicates_per_pair: values of k, None for no limit; default: the protocol's.
        recall_at: the n of R@n; default: the protocol's.
        labels: names of the classes in a submission, see :func:`.submission.read_submission`.
        group_thresholds: of head, body and tail, see :func:`.frequency_groups.frequency_groups`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file or a record is wrong, or cannot contain what the protocol asks for;
            the message names the file and the record and says how to fix it.
    """
    submission = is_submission(predictions_file)
    settings = {} if submission else read_settings(predictions_file)
    if not task and "task" not in settings and not submission:
        logger.warning(
            f"{predictions_file} has no settings file beside it that names its task: it is scored "
            "as sgdet. If boxes or classes were given to the model, pass the task (--task)."
        )
    evaluator = RelationDatasetEvaluator(
        dataset_name,
        output_dir,
        distributed=False,
        task=task or settings.get("task", "sgdet"),
        protocol=protocol,
        predicates_per_pair=predicates_per_pair,
        recall_at=recall_at,
        group_thresholds=group_thresholds,
        keep_predictions=False,
    )
    _check_written_for(predictions_file, settings, dataset_name, evaluator)
    if evaluator.protocol.all_triplets and settings.get("triplets"):
        # The file's triplets beyond these are the best of another k, not the next best.
        evaluator.settings = replace(evaluator.settings, topk=settings["triplets"])
    signs = _SignsOfTruncation(predictions_file, evaluator)
    records: dict[Any, int] = {}
    for index, prediction in enumerate(read_file(dataset_name, predictions_file, labels)):
        image_id = prediction.image_id
        where = f"{predictions_file}, record {index} (image {image_id!r})"
        if image_id not in evaluator.ground_truth:
            raise ValueError(f"{where}: {evaluator.no_such_image()}")
        if image_id in records:
            raise ValueError(
                f"{where}: record {records[image_id]} is of the same image. Merge the two."
            )
        records[image_id] = index
        signs.add(prediction)
        evaluator.add(prediction)
    if not settings:
        signs.check()
    return evaluator.evaluate()


def read_file(
    dataset_name: str, file: str, labels: Sequence[str] | None = None
) -> Iterator[SceneGraph]:
    """Read a predictions file or a submission; see :func:`evaluate_predictions`.

    If the file's settings list the names of its ids, the ids are mapped to those of the dataset.

    Raises:
        NameMismatchError: the names differ by more than their order.
    """
    if is_submission(file):
        yield from read_submission(dataset_name, file, labels)
        return
    names = dataset_names(dataset_name)
    renumbering = Renumbering.between(read_settings(file), names, file, f"dataset '{dataset_name}'")
    counts = (len(names.get(field) or ()) or None for field in NAME_FIELDS)
    for prediction in read_predictions(file, *counts):
        yield renumbering.scene_graph(prediction) if renumbering else prediction


def _check_written_for(
    file: str, settings: dict[str, Any], dataset_name: str, evaluator: RelationDatasetEvaluator
) -> None:
    """Raise if the file was written for less than what is asked of it."""
    if not settings:
        return
    wanted = evaluator.settings
    if settings["dataset"] != dataset_name:
        logger.warning(
            "%s was written for dataset '%s' and is scored on '%s'.",
            file,
            settings["dataset"],
            dataset_name,
        )

    def limit(k: int | None) -> int:  # all predicates of a pair are no limit
        return wanted.num_predicates if k is None else min(k, wanted.num_predicates)

    available = {limit(k) for k in settings["predicates_per_pair"]}
    lacking = [k for k in wanted.predicates_per_pair if limit(k) not in available]
    if lacking:
        raise ValueError(
            f"{file} holds the best triplets for {_all(settings['predicates_per_pair'])} "
            f"predicates per pair, but protocol '{evaluator.protocol.name}' is asked for "
            f"{_all(lacking)}. Evaluate the model again with TEST.RELATIONS.PREDICATES_PER_PAIR "
            f"{list(wanted.predicates_per_pair)}, or score this file for the former alone "
            "(--predicates-per-pair)."
        )
    most, asked = settings["triplets"], max(wanted.recall_at, default=0)
    if most is not None and most < asked:
        raise ValueError(
            f"{file} holds the best {most} triplets per image, but R@{asked} is asked for. "
            f"Evaluate the model again with TEST.RELATIONS.TOPK {asked}, or ask for less "
            "(--recall-at)."
        )


def _all(values: Sequence[int | None]) -> str:
    """Return values of k for a message: [1, all]."""
    return f"[{', '.join('all' if k is None else str(k) for k in values)}]"


class _SignsOfTruncation:
    """Signs that a file without settings was cut at another k or to too few triplets."""

    def __init__(self, file: str, evaluator: RelationDatasetEvaluator):
        self.file, self.evaluator = file, evaluator
        self.settings = evaluator.settings
        self.needed = max(self.settings.recall_at, default=100)
        self.has_several = False  # some pair has several predicates
        self.num_cut = 0  # images with as many triplets as are needed, or more
        self.num_short = {k: 0 for k in self.settings.predicates_per_pair if k is not None}

    def add(self, prediction: SceneGraph) -> None:
        """Look at the prediction of one image."""
        if not self.has_several:
            self.has_several = not limit_predicates_per_pair(prediction.pairs, 1).all()
        if len(prediction.scores) < self.needed:
            return
        self.num_cut += 1
        num_pairs = len(prediction.boxes) * (len(prediction.boxes) - 1)
        for k in self.num_short:
            kept = int(limit_predicates_per_pair(prediction.pairs, k).sum())
            self.num_short[k] += kept < min(self.needed, num_pairs * k)

    def check(self) -> None:
        """Raise if the file cannot contain what is asked for; warn if it may not."""
        beyond = [k for k in self.settings.predicates_per_pair if k != 1]
        if self.evaluator.protocol.all_triplets:
            beyond = [k for k in beyond if k is not None]  # takes the given triplets as they are
        if beyond and self.num_cut and not self.has_several and self.settings.num_predicates > 1:
            raise ValueError(
                f"{self.file}: {self.num_cut} images have {self.needed} triplets or more, and no "
                "pair of any image has two predicates. The file holds the best triplets for one "
                f"predicate per pair and cannot contain those for {_all(beyond)}, which protocol "
                f"'{self.evaluator.protocol.name}' asks for. Write it with all predicates that "
                "can be among the best, or score it for one alone (--predicates-per-pair 1)."
            )
        for k, num_images in self.num_short.items():
            if num_images:
                logger.warning(
                    "%s: in %d images fewer than %d triplets are left when a pair keeps %d "
                    "predicate(s), although there were as many before. If the file was cut to the "
                    "best triplets of each image regardless of that k, recall for it is too low.",
                    self.file,
                    num_images,
                    self.needed,
                    k,
                )
