"""Score a predictions file, the model's own or anyone's, without model or images."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..structures.ranking import limit_predicates_per_pair
from ..structures.scene_graph import SceneGraph
from .build import evaluator_class
from .predictions_io import read_predictions, read_settings
from .relation_evaluation import RelationDatasetEvaluator
from .scores import Results
from .submission import read_submission

__all__ = ["evaluate_predictions"]

logger = logging.getLogger(__name__)


def evaluate_predictions(
    dataset_name: str,
    predictions_file: str,
    output_dir: str | None = None,
    *,
    task: str | None = None,
    protocol: str = "",
    predicates_per_pair: Sequence[int] | None = None,
    topk: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> Results:
    """Score a predictions file in the format of :mod:`.predictions_file`.

    Args:
        dataset_name: registered data set that the predictions are for.
        predictions_file: plain or gzipped; or a submission of the OpenImages challenge (.csv).
        output_dir: folder for the tables of the predicates; None writes nothing.
        task: ``sgdet``, ``sgcls`` or ``prdcls``; by default the one that the file was made for, and
            ``sgdet`` where that is not known.
        protocol: by default the data set's own.
        predicates_per_pair: values of k; by default the protocol's.
        topk: numbers n of R@n; by default the protocol's.
        labels: what the classes are called in a submission, see :mod:`.submission`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file or a record is wrong, or cannot contain what the protocol asks for;
            the message names the file, the record and the mend.
    """
    is_submission = predictions_file.endswith((".csv", ".csv.gz"))
    settings: dict[str, Any] = {} if is_submission else read_settings(predictions_file)
    evaluator = evaluator_class(dataset_name, protocol)(
        dataset_name,
        output_dir,
        distributed=False,
        task=task or settings.get("task", "sgdet"),
        protocol=protocol,
        predicates_per_pair=predicates_per_pair,
        topk=topk,
        keep_predictions=False,
    )
    _check_written_for(predictions_file, settings, dataset_name, evaluator)
    if evaluator.protocol.all_triplets and settings.get("triplets"):
        # The file's triplets beyond these are the best of another k, not the next best.
        evaluator.settings = replace(evaluator.settings, max_triplets=settings["triplets"])
    if is_submission:
        predictions = read_submission(dataset_name, predictions_file, labels)
    else:
        predictions = read_predictions(
            predictions_file,
            len(evaluator.metadata.get("thing_classes", None) or ()) or None,
            evaluator.settings.num_predicates,
        )
    evidence = _Evidence(predictions_file, evaluator)
    records: dict[Any, int] = {}
    for number, prediction in enumerate(predictions):
        image_id = prediction.image_id
        where = f"{predictions_file}, record {number} (image {image_id!r})"
        if image_id not in evaluator.ground_truth:
            raise ValueError(f"{where}: {evaluator.no_such_image()}")
        if image_id in records:
            raise ValueError(
                f"{where}: record {records[image_id]} is of the same image. Merge the two."
            )
        records[image_id] = number
        evidence.add(prediction)
        evaluator.add(prediction)
    if not settings:
        evidence.check()
    return evaluator.evaluate()


def _canonical(k: int, num_predicates: int) -> int:
    return 0 if k >= num_predicates else k


def _check_written_for(
    file: str, settings: dict[str, Any], dataset_name: str, evaluator: RelationDatasetEvaluator
) -> None:
    """Compare what the file was written for with what is asked of it."""
    if not settings:
        return
    wanted = evaluator.settings
    if settings["dataset"] != dataset_name:
        logger.warning(
            "%s was written for data set '%s', and is scored on '%s'.",
            file,
            settings["dataset"],
            dataset_name,
        )
    has = {_canonical(k, wanted.num_predicates) for k in settings["predicates_per_pair"]}
    lacking = [
        k for k in wanted.predicates_per_pair if _canonical(k, wanted.num_predicates) not in has
    ]
    if lacking:
        ks = list(wanted.predicates_per_pair)
        raise ValueError(
            f"{file} holds the best triplets for {settings['predicates_per_pair']} predicates a "
            f"pair (0: all), but protocol '{evaluator.protocol.name}' is asked for {lacking}. "
            f"Evaluate the model again with TEST.RELATIONS.PREDICATES_PER_PAIR {ks}, or score this "
            f"file for the former alone (--predicates-per-pair)."
        )
    most, asked = settings["triplets"], max(wanted.topk, default=0)
    if most is not None and most < asked:
        raise ValueError(
            f"{file} holds the best {most} triplets of an image, but R@{asked} is asked for. "
            f"Evaluate the model again with TEST.RELATIONS.TOPK {asked}, or ask for less "
            "(--recall-at)."
        )


class _Evidence:
    """What a file of unknown origin tells of the k and the number of triplets it was cut at."""

    def __init__(self, file: str, evaluator: RelationDatasetEvaluator):
        self.file, self.evaluator = file, evaluator
        self.settings = evaluator.settings
        self.needed = max(self.settings.topk, default=100)
        self.several = False  # some pair has several predicates
        self.cut = 0  # images with as many triplets as are needed, or more
        self.short: dict[int, int] = {k: 0 for k in self.settings.predicates_per_pair if k}

    def add(self, prediction: SceneGraph) -> None:
        self.several = self.several or not limit_predicates_per_pair(prediction.pairs, 1).all()
        if len(prediction.scores) < self.needed:
            return
        self.cut += 1
        num_pairs = len(prediction.boxes) * (len(prediction.boxes) - 1)
        for k in self.short:
            kept = int(limit_predicates_per_pair(prediction.pairs, k).sum())
            self.short[k] += kept < min(self.needed, num_pairs * k)

    def check(self) -> None:
        """Raise where the file cannot hold what is asked for; warn where it may not."""
        num_predicates = self.settings.num_predicates
        beyond: list[int] = [k for k in self.settings.predicates_per_pair if k != 1]
        if self.evaluator.protocol.all_triplets:
            beyond = [k for k in beyond if k]  # its rule takes what is given as it is
        if beyond and self.cut and not self.several and num_predicates > 1:
            raise ValueError(
                f"{self.file}: {self.cut} images have {self.needed} triplets or more, and no pair "
                "of any image has two predicates. The file holds the best triplets for one "
                f"predicate a pair, and cannot hold them for {beyond} (0: all), which protocol "
                f"'{self.evaluator.protocol.name}' asks for. Write it with all predicates that "
                "can be among the best, or score it for one alone (--predicates-per-pair 1)."
            )
        for k, images in self.short.items():
            if images:
                logger.warning(
                    "%s: in %d images fewer than %d triplets are left when a pair keeps %d "
                    "predicate(s), although there were as many before. If the file was cut to an "
                    "image's best triplets without regard to that k, recall for it is too low.",
                    self.file,
                    images,
                    self.needed,
                    k,
                )
