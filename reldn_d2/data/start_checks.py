"""Find out before training or evaluation starts what would make it pointless or wrong.

:mod:`.check` reports the same facts of a dataset, in detail.
"""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from detectron2.config import CfgNode
from detectron2.structures import BoxMode

from ..structures.box_frames import BoxDiagnosis, diagnose_boxes
from .statistics import RelationStatistics

__all__ = [
    "apart_pairs_warning",
    "check_records",
    "diagnose_dataset",
    "flip_warning",
    "mirrored_predicates",
    "missing_images",
    "training_warnings",
]

logger = logging.getLogger(__name__)

_FORMS = {BoxMode.XYXY_ABS: "xyxy", BoxMode.XYWH_ABS: "xywh"}
_MOST_BOXES = 200_000  # enough for a diagnosis
_NAMES_SHOWN = 3
# Words of predicates whose meaning changes in a mirrored image, by INPUT.RANDOM_FLIP.
_MIRRORED_WORDS = {
    "horizontal": {"left", "right", "leftmost", "rightmost"},
    "vertical": {
        *("above", "below", "over", "under", "underneath", "beneath"),
        *("top", "bottom", "upper", "lower", "up", "down", "upside"),
    },
}


def check_records(name: str, records: Sequence[dict[str, Any]], with_images: bool = True) -> None:
    """Check the images and boxes of a loaded dataset; log suspicious facts.

    Args:
        name: name of the dataset.
        records: its dicts, with valid annotations.
        with_images: whether the images must exist.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: all boxes have another form or unit than declared.
    """
    missing = missing_images(x["file_name"] for x in records) if with_images else []
    if missing:
        folders = list(dict.fromkeys(os.path.dirname(path) for path in missing))
        first = [os.path.basename(x) for x in missing if os.path.dirname(x) == folders[0]]
        shown = ", ".join(first[:_NAMES_SHOWN]) + (", ..." if len(first) > _NAMES_SHOWN else "")
        others = f" (and others in {len(folders) - 1} more)" if len(folders) > 1 else ""
        raise FileNotFoundError(
            f"Dataset '{name}': {len(missing)} of {len(records)} images do not exist: {shown} in "
            f"{os.path.abspath(folders[0])}{others}. Unpack the images again, fix the paths in the "
            "annotations, or remove the records."
        )
    diagnosis = diagnose_dataset(records)
    if diagnosis is not None and diagnosis.certain:
        raise ValueError(f"Dataset '{name}': {diagnosis.message}")
    if diagnosis is not None:
        logger.warning(f"Dataset '{name}': {diagnosis.message}")


def missing_images(paths: Iterable[str]) -> list[str]:
    """Return the paths that do not exist; remote ones (``scheme://``) are not looked up.

    Each folder is listed once, which is much faster than looking up each file, above all on
    network drives.
    """
    by_folder: dict[str, list[str]] = {}
    for path in map(str, paths):
        if "://" not in path:
            by_folder.setdefault(os.path.dirname(path), []).append(path)
    missing = []
    for folder, members in by_folder.items():
        try:
            with os.scandir(folder or ".") as entries:
                # Following a link costs a look-up, so only links are looked up.
                files = {x.name for x in entries if not x.is_symlink() or os.path.exists(x.path)}
        except OSError:
            files = set()
        missing += [
            path
            for path in members
            # Some file systems ignore case and store other Unicode forms than were written.
            if os.path.basename(path) not in files and not os.path.exists(path)
        ]
    return missing


def diagnose_dataset(records: Sequence[dict[str, Any]]) -> BoxDiagnosis | None:
    """Tell whether the boxes of a dataset look as if they were read in the wrong frame.

    Args:
        records: dataset dicts; a sample of large datasets is used.

    Returns:
        The diagnosis of the first :class:`BoxMode` with one, whose message also names the
        ``bbox_mode`` that would be right; None if nothing is suspicious.
    """
    sized = [x for x in records if x.get("annotations") and "height" in x and "width" in x]
    total = sum(len(record["annotations"]) for record in sized)
    sample = sized[:: max(total // _MOST_BOXES, 1)]
    for mode, form in _FORMS.items():
        boxes, sizes = [], []
        for record in sample:
            found = [x["bbox"] for x in record["annotations"] if x["bbox_mode"] == mode]
            boxes += found
            sizes += [(record["height"], record["width"])] * len(found)
        try:
            boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        except (TypeError, ValueError):  # not numbers; the mapper names the record
            return None
        finite = np.isfinite(boxes).all(axis=1)
        diagnosis = diagnose_boxes(boxes[finite], np.array(sizes)[finite], form)
        if diagnosis is None:
            continue
        right_mode = next((x for x, name in _FORMS.items() if name == diagnosis.form), None)
        if right_mode is None:
            return diagnosis
        hint = (
            f' Dicts of your own function can have "bbox_mode": BoxMode.{right_mode.name} instead.'
        )
        return replace(diagnosis, message=diagnosis.message + hint)
    return None


def training_warnings(statistics: RelationStatistics, cfg: CfgNode) -> list[str]:
    """Return what training with a config silently loses or confuses in its training sets.

    Args:
        statistics: of ``DATASETS.TRAIN``.
        cfg: with the keys of :func:`.config.add_reldn_config`.

    Raises:
        ValueError: training is pointless: the training sets have no relation, or the overlap filter
            loses all related pairs.
    """
    datasets = f"DATASETS.TRAIN ({', '.join(cfg.DATASETS.TRAIN)})"
    related, apart = statistics.num_related_pairs, statistics.num_apart_pairs
    if not related:
        raise ValueError(
            f"{datasets} has no relation in {statistics.num_images} images, so there is nothing "
            "to train on. Are the relations where the loader expects them (docs/own_data.md)?"
        )
    overlap_filter = cfg.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER
    if overlap_filter and apart == related:
        raise ValueError(
            f"None of the {related} related pairs of {datasets} overlap, so SGDET can predict "
            "none of them with MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER on. Set it to False."
        )
    warnings = []
    if overlap_filter and apart:
        warnings.append(f"{datasets}: {apart_pairs_warning(apart, related)}")
    flip = cfg.INPUT.RANDOM_FLIP
    mirrored = mirrored_predicates(statistics.predicate_classes, flip)
    if mirrored:
        warnings.append(f"{datasets}: {flip_warning(mirrored)} Now it is '{flip}'.")
    return warnings


def apart_pairs_warning(apart: int, related: int) -> str:
    """Say how many related pairs the overlap filter loses."""
    return (
        f"{apart} of {related} related pairs do not overlap and are out of reach in SGDET with "
        "MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER on. Set it to False to predict them."
    )


def flip_warning(mirrored: Sequence[str]) -> str:
    """Say which predicates random flips confuse."""
    quoted = ", ".join(f"'{name}'" for name in mirrored)
    return (
        f"predicates {quoted} with random flips: a flipped image shows the opposite. Set "
        "INPUT.RANDOM_FLIP to 'none' for training on this dataset."
    )


def mirrored_predicates(names: Iterable[str], flip: str = "horizontal") -> list[str]:
    """Return the predicates whose meaning changes in a flipped image, such as "left of".

    Args:
        names: English names of predicates.
        flip: value of ``INPUT.RANDOM_FLIP``: "horizontal", "vertical" or "none".
    """
    words = _MIRRORED_WORDS.get(flip, set())
    return [name for name in names if words & set(re.findall("[a-z]+", name.lower()))]
