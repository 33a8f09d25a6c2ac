"""Checks of a config before anything is loaded or trained."""

import difflib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from ..checkpoint.detection_checkpoint import check_checkpoint_exists
from ..data.build import detection_files
from ..evaluation.relation_evaluation import RelationDatasetEvaluator
from ..modeling.meta_arch import needs_images, predicts_relations
from ..utils.file_io import check_writable_folder
from ..utils.registry import did_you_mean
from .launch import check_device

__all__ = ["check_run", "check_weights", "result_names"]

logger = logging.getLogger(__name__)

# What Detectron2's COCOEvaluator calls the results for boxes.
_BOX_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def check_run(
    cfg: CfgNode,
    *,
    eval_only: bool = False,
    resume: bool = True,
    build_evaluator: Callable[[CfgNode, str], Any] | None = None,
) -> None:
    """Check what would otherwise fail after the data has been loaded, or after the training.

    Args:
        cfg: config with the keys of :func:`.config.add_reldn_config`.
        eval_only: whether the run only evaluates.
        resume: whether the run may continue from the last checkpoint in ``OUTPUT_DIR``; then
            ``MODEL.WEIGHTS`` is not read.
        build_evaluator: builds the evaluator of a test set; its errors are raised now. With None,
            no evaluator is checked.

    Raises:
        FileNotFoundError: if there is no file ``MODEL.WEIGHTS``.
        ValueError: with the config key and the fix.
    """
    check_device(cfg.MODEL.DEVICE)
    try:
        check_writable_folder(cfg.OUTPUT_DIR)
    except OSError as error:
        raise ValueError(
            f"OUTPUT_DIR is '{cfg.OUTPUT_DIR}', where no file can be written "
            f"({error.strerror}); set OUTPUT_DIR to another folder"
        ) from None
    splits = ("TEST",) if eval_only else ("TRAIN", "TEST")
    if not cfg.DATASETS[splits[0]]:
        raise ValueError(f"DATASETS.{splits[0]} is empty; name at least one dataset")
    for split in splits:
        for name in cfg.DATASETS[split]:
            _check_dataset(f"DATASETS.{split}", name, needs_images(cfg))
        _check_extra_files(cfg, split)
    check_weights(cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, resume)
    if not eval_only and 0 < cfg.SOLVER.MAX_ITER <= cfg.SOLVER.WARMUP_ITERS:
        logger.warning(
            f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} is within the warm-up of SOLVER.WARMUP_ITERS "
            f"{cfg.SOLVER.WARMUP_ITERS}: the learning rate does not reach SOLVER.BASE_LR, and the "
            "model learns little. Set a larger MAX_ITER or a smaller WARMUP_ITERS."
        )
    if predicts_relations(cfg) and cfg.MODEL.RELDN.DETECTOR == "PrecomputedDetector":
        _check_boxes_come_from_somewhere(cfg, eval_only)
    if not eval_only and cfg.TEST.EVAL_PERIOD > 0 and not cfg.DATASETS.TEST:
        raise ValueError(
            f"TEST.EVAL_PERIOD is {cfg.TEST.EVAL_PERIOD}, but DATASETS.TEST is empty; name a test "
            "set or set TEST.EVAL_PERIOD to 0"
        )
    evaluators = {}
    wants_metric = cfg.SOLVER.BEST_CHECKPOINT.METRIC and not eval_only
    # Building a detector's evaluator converts the dataset, so only do it if it is needed.
    if build_evaluator is not None and (predicts_relations(cfg) or wants_metric):
        with suppress(NotImplementedError):  # Detectron2 then skips the evaluation
            evaluators = {name: build_evaluator(cfg, name) for name in cfg.DATASETS.TEST}
    if wants_metric:
        _check_best_checkpoint(cfg, evaluators)


def check_weights(path: str, output_dir: str, resume: bool, key: str = "MODEL.WEIGHTS") -> None:
    """Check that the checkpoint that a run starts from is there, unless it is not read.

    Args:
        path: file or URL; empty means random weights.
        output_dir: of the run.
        resume: whether the run continues from the last checkpoint in ``output_dir``, if it has one.
        key: config key that names ``path``, for the message.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not (resume and os.path.isfile(os.path.join(output_dir, "last_checkpoint"))):
        check_checkpoint_exists(path, key)


def _check_boxes_come_from_somewhere(cfg: CfgNode, eval_only: bool) -> None:
    """Check that detections come from files wherever ground truth does not take their place.

    A data loader of the user's own may add detections to images, but not without images.
    """
    missing = []
    if not eval_only and cfg.MODEL.RELDN.TRAIN_ENTITIES == "proposals":
        missing.append(("TRAIN", "MODEL.RELDN.TRAIN_ENTITIES", "proposals", "ground_truth"))
    if cfg.DATASETS.TEST and cfg.TEST.RELATIONS.TASK in ("sgdet", "sgcls"):
        missing.append(("TEST", "TEST.RELATIONS.TASK", cfg.TEST.RELATIONS.TASK, "prdcls"))
    for split, key, value, other in missing:
        files = f"DATASETS.DETECTION_FILES_{split}"
        if detection_files(cfg, split == "TRAIN"):
            continue
        message = (
            f"{key} is '{value}', which needs detections, but PrecomputedDetector detects nothing "
            f"and {files} is empty; name one file per dataset there, or set {key} to '{other}'"
        )
        if not needs_images(cfg):
            raise ValueError(message)
        logger.warning(f"{message}, unless your own data loader adds detections.")


def _check_dataset(key: str, name: str, with_images: bool) -> None:
    registered = DatasetCatalog.list()
    if name not in registered:
        raise ValueError(
            f"{key} names '{name}', which is not registered.{did_you_mean(name, registered)} Pass "
            "--module to import the module that registers your own dataset."
        )
    metadata = MetadataCatalog.get(name)
    paths = [*(metadata.get("annotation_files") or ())]
    if with_images:
        paths.append(metadata.get("image_root"))
    for path in paths:
        if path and "://" not in path and not os.path.exists(path):
            raise ValueError(
                f"{key} names '{name}', but there is no {path}; download the dataset "
                "(datasets/README.md) or set DETECTRON2_DATASETS to the folder that has it"
            )


def _check_extra_files(cfg: CfgNode, split: str) -> None:
    """Check the files of detections and proposals, one per dataset."""
    keys = {f"DATASETS.DETECTION_FILES_{split}": detection_files(cfg, split == "TRAIN")}
    if cfg.MODEL.LOAD_PROPOSALS:
        files = list(cfg.DATASETS[f"PROPOSAL_FILES_{split}"])
        keys[f"DATASETS.PROPOSAL_FILES_{split}"] = files
        if len(files) != len(cfg.DATASETS[split]):
            raise ValueError(
                f"DATASETS.PROPOSAL_FILES_{split} has {len(files)} files, but DATASETS.{split} has "
                f"{len(cfg.DATASETS[split])} datasets; set one file per dataset, or "
                "MODEL.LOAD_PROPOSALS to False"
            )
    for key, files in keys.items():
        for path in files:
            if "://" not in path and not os.path.isfile(path):
                raise ValueError(f"{key} names '{path}', but there is no such file")


def result_names(cfg: CfgNode, evaluators: dict[str, Any]) -> list[str] | None:
    """Return the names that ``SOLVER.BEST_CHECKPOINT.METRIC`` can have; None if they are unknown.

    Args:
        cfg: config of the run.
        evaluators: by test set.

    Returns:
        Names such as ``relations_sgdet/R@n``, with the dataset in front if there are several.
    """
    names = []
    for dataset_name in cfg.DATASETS.TEST:
        prefix = f"{dataset_name}/" if len(cfg.DATASETS.TEST) > 1 else ""
        evaluator = evaluators.get(dataset_name)
        if isinstance(evaluator, RelationDatasetEvaluator):
            results = evaluator.result_names()
        elif isinstance(evaluator, COCOEvaluator):
            results = {"bbox": _box_metrics(dataset_name)}
        else:  # one of the user's own
            return None
        names += [f"{prefix}{task}/{x}" for task, metrics in results.items() for x in metrics]
    return names


def _box_metrics(dataset_name: str) -> list[str]:
    classes: Sequence[str] = MetadataCatalog.get(dataset_name).get("thing_classes") or ()
    return [*_BOX_METRICS, *(f"AP-{name}" for name in classes if len(classes) > 1)]


def _check_best_checkpoint(cfg: CfgNode, evaluators: dict[str, Any]) -> None:
    best = cfg.SOLVER.BEST_CHECKPOINT
    if best.MODE not in ("max", "min"):
        raise ValueError(f"SOLVER.BEST_CHECKPOINT.MODE is '{best.MODE}'; known: max, min")
    if cfg.TEST.EVAL_PERIOD <= 0:
        raise ValueError("SOLVER.BEST_CHECKPOINT.METRIC needs a TEST.EVAL_PERIOD above 0")
    names = result_names(cfg, evaluators)
    if names is None or best.METRIC in names:
        return
    similar = difflib.get_close_matches(best.METRIC, names, n=3, cutoff=0.5)
    shown = list(dict.fromkeys([*similar, *names]))[:30]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    raise ValueError(
        f"SOLVER.BEST_CHECKPOINT.METRIC is '{best.METRIC}', which is not a result of the "
        f"evaluation; its results are {', '.join(shown)}{more}"
    )
