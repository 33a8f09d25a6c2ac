"""Check a registered dataset: ``python -m reldn_d2.data.check NAME``.

Print a summary and list every problem with its file, its record and how to fix it. The headers of
all images are read, and the pixels of a random sample or, with --decode, of all. If there is no
image at all, a note says so, and the annotations alone are checked. The exit status is 0 if the
dataset is usable, 1 if it is not, and 2 if the command is wrong. To look at the annotations, run
tools/draw_relations.py (reldn-draw) with ``--dataset NAME --output FOLDER``.
"""

import argparse
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from tqdm import tqdm

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..structures.box_frames import BoxDiagnosis
from ..structures.name_matching import NAME_FIELDS
from ..structures.scene_graph import boxes_xyxy
from ..utils.events import log_to_terminal
from ..utils.image_io import ImageError, read_rgb
from ..utils.programs import program_help
from ..utils.user_modules import add_module_argument, parse_and_import
from .boxes_only import add_sizes, load_without_images
from .dataset_dict import annotation_problems
from .datasets.catalog import (
    DATASET_ERRORS,
    dataset_names,
    require_dataset,
)
from .datasets.io import image_size
from .start_checks import (
    apart_pairs_warning,
    diagnose_dataset,
    flip_warning,
    mirrored_predicates,
    missing_images,
)
from .summary import DatasetSummary

__all__ = ["Report", "check_dataset", "main"]

_TOLERANCE = 1e-3  # pixels that a box may extend beyond its image due to rounding
_SAMPLE = 50  # images to decode by default
_SAMPLE_SEED = 2019
_IMAGE_KEYS = ("file_name", "image_id", "height", "width")
_THREADS = 8


@dataclass
class Report:
    """The result of a check."""

    errors: list[str] = field(default_factory=list)  # the dataset cannot be used
    warnings: list[str] = field(default_factory=list)  # it can be used, but look at these
    summary: DatasetSummary | None = None  # covers the images without errors
    dataset_dicts: list[dict[str, Any]] = field(default_factory=list)
    decoded_images: int = 0  # images whose pixels were read
    absent_images: str = ""  # why no image was read; empty if there are images

    @property
    def usable(self) -> bool:
        """Whether there are no errors."""
        return not self.errors


def check_dataset(name: str, decode: bool = False) -> Report:
    """Check a registered dataset.

    Args:
        name: name of the dataset.
        decode: read the pixels of every image, to find truncated ones, and not only of a random
            sample.

    Raises:
        UnknownDatasetError: if there is no such dataset.
    """
    require_dataset(name)
    report = Report()
    try:
        report.dataset_dicts, report.absent_images = _load(name)
        found = dataset_names(name)
    except DATASET_ERRORS as error:
        report.errors += getattr(error, "problems", [str(error)])
        return report
    names = {key: found.get(key) for key in NAME_FIELDS if key != "attribute_classes"}
    attributes = found.get("attribute_classes") or []
    for key, value in names.items():
        if value is None:
            report.errors.append(
                f"dataset {name}: its metadata has no {key}. Set them when you register it."
            )
    if None in names.values():
        return report
    if not report.dataset_dicts:
        report.errors.append(f"dataset {name}: it has no images.")
    report.errors += [
        f"dataset {name}: its {key} is an empty list. Set the names when you register it, or in "
        "its files."
        for key, value in names.items()
        if not len(value)
    ]
    report.summary = DatasetSummary(*names.values(), attribute_classes=attributes)
    diagnosis = _diagnose(report, name)
    counts = (*map(len, names.values()), len(attributes))
    identified = _check_records(report, counts, diagnosis)
    _check_relations(report, name)
    if not report.absent_images:
        _check_images(report, identified, decode)
    return report


def _load(name: str) -> tuple[list[dict[str, Any]], str]:
    """Return the dicts of a dataset and, if all its images are absent, where they should be."""
    root = MetadataCatalog.get(name).get("image_root")
    try:
        dicts = DatasetCatalog.get(name)
    except FileNotFoundError:
        # Missing annotations, or some of the images, remain errors.
        if not root or "://" in root or (os.path.isdir(root) and os.listdir(root)):
            raise
        return add_sizes(name, load_without_images(name)), os.path.abspath(root)
    paths = [str(record["file_name"]) for record in dicts if "file_name" in record]
    if paths and len(missing_images(paths)) == len(dicts):
        return dicts, os.path.abspath(root or os.path.dirname(paths[0]))
    return dicts, ""


def _check_relations(report: Report, name: str) -> None:
    """Warn about relations that training may lose or confuse."""
    if report.dataset_dicts and not any(x.get("relations") for x in report.dataset_dicts):
        report.warnings.append(
            f"dataset {name}: none of its images has a relation, so RelDN cannot be trained on "
            "it. Are the relations where the loader expects them (docs/own_data.md)?"
        )
    summary = report.summary
    if summary.apart_pairs:
        report.warnings.append(
            f"dataset {name}: {apart_pairs_warning(summary.apart_pairs, summary.related_pairs)}"
        )
    used = [x for x, count in zip(summary.predicate_classes, summary.predicate_counts) if count]
    mirrored = mirrored_predicates(used)
    if mirrored:
        report.warnings.append(f"dataset {name}: {flip_warning(mirrored)}")


def _check_records(
    report: Report, counts: tuple[int, int, int], diagnosis: BoxDiagnosis | None
) -> list[tuple[str, dict[str, Any]]]:
    """Check annotations and relations; return (place in messages, dict) of complete records.

    ``counts`` are those of classes, predicates and attributes.
    """
    num_classes, num_predicates, num_attributes = counts
    seen: dict[str, dict[Any, int]] = {"image_id": {}, "file_name": {}}
    complete = []
    for index, record in enumerate(report.dataset_dicts):
        where = f"image {index} ({record.get('file_name', 'no file name')})"
        missing = [key for key in _IMAGE_KEYS if key not in record]
        if missing:
            report.errors.append(f"{where}: the dict has no {', '.join(missing)}. Add these keys.")
            continue
        for key, indices in seen.items():
            first = indices.setdefault(record[key], index)
            if first != index:
                report.errors.append(
                    f"{where}: image {first} has the same {key} {record[key]!r}. Keep one record "
                    "per image."
                )
        complete.append((where, record))
        errors = list(
            annotation_problems(record, num_classes, num_predicates, where, num_attributes)
        )
        if "annotations" in record:
            box_errors, box_warnings = _box_problems(record, where, diagnosis)
            errors += box_errors
            report.warnings += box_warnings
        report.errors += errors
        if not errors:
            report.warnings += _duplicates(record, where)
            report.summary.add(record)
    return complete


def _diagnose(report: Report, name: str) -> BoxDiagnosis | None:
    """Report and return what all boxes look like if they were read in the wrong frame."""
    records = []
    for record in report.dataset_dicts:
        annotations = record.get("annotations", ())
        boxes = [x for x in annotations if {"bbox", "bbox_mode"} <= x.keys() and _is_box(x)]
        records.append({**record, "annotations": boxes})
    diagnosis = diagnose_dataset(records)
    if diagnosis is not None:
        problems = report.errors if diagnosis.certain else report.warnings
        problems.append(f"dataset {name}: {diagnosis.message}")
    return diagnosis


def _box_problems(
    record: dict[str, Any], where: str, diagnosis: BoxDiagnosis | None
) -> tuple[list[str], list[str]]:
    """Return (errors, warnings) about the boxes of an image, unless a diagnosis explains them."""
    errors, warnings = [], []
    width, height = record["width"], record["height"]
    for index, annotation in enumerate(record["annotations"]):
        if "bbox" not in annotation or "bbox_mode" not in annotation:
            continue  # reported already
        place = f"{where}: annotation {index} has the box {_short(annotation['bbox'])}"
        if not _is_box(annotation):
            errors.append(
                f"{place} in mode {annotation['bbox_mode']!r}; expected four finite numbers in a "
                "BoxMode. Fix or remove it."
            )
            continue
        if diagnosis is not None and diagnosis.certain:
            continue
        ((x0, y0, x1, y1),) = boxes_xyxy([annotation]).tolist()
        if x0 > x1 or y0 > y1:
            errors.append(f"{place}, whose corners are swapped. Fix or remove it.")
        elif x0 == x1 or y0 == y1:
            warnings.append(
                f"{place}, which has no area: training skips it and its relations, and in "
                "evaluation nothing can match it. Fix or remove it."
            )
        elif x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            errors.append(
                f"{place}, which is outside the image of {width} x {height} pixels. Fix or "
                "remove it."
            )
        elif diagnosis is None and (
            min(x0, y0) < -_TOLERANCE or x1 > width + _TOLERANCE or y1 > height + _TOLERANCE
        ):
            warnings.append(
                f"{place}, which extends beyond the image of {width} x {height} pixels; "
                "training clips it."
            )
    return errors, warnings


def _is_box(annotation: dict[str, Any]) -> bool:
    box = annotation["bbox"]
    return (
        isinstance(annotation["bbox_mode"], BoxMode)
        and isinstance(box, (list, tuple, np.ndarray))
        and len(box) == 4
        and all(isinstance(x, Real) and np.isfinite(x) for x in box)
    )


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and all(isinstance(x, float) for x in value):
        return str([round(x, 2) for x in value])
    return f"{value!r:.100}"


def _duplicates(record: dict[str, Any], where: str) -> Iterator[str]:
    """Yield warnings about entities and relations that an image has more than once.

    Equal entities that a relation holds between are two on purpose: "person next to person" over
    one group, whose box and class loaders give to both ends (see
    :class:`.datasets.relationship_list.RelationshipList`).
    """
    first: dict[tuple, int] = {}
    related = {frozenset(x[:2]) for x in record.get("relations", ())}
    for index, annotation in enumerate(record["annotations"]):
        key = (annotation["category_id"], annotation["bbox_mode"], *map(float, annotation["bbox"]))
        earlier = first.setdefault(key, index)
        if earlier != index and frozenset((earlier, index)) not in related:
            yield (
                f"{where}: annotation {index} has the class and box of annotation {earlier}. Are "
                "they the same entity?"
            )
    for relation, count in Counter(map(tuple, record.get("relations", ()))).items():
        if count > 1:
            yield (
                f"{where}: relation {relation} is listed {count} times; recall counts every copy. "
                "Remove the others if this is not intended."
            )


def _check_images(
    report: Report, records: Sequence[tuple[str, dict[str, Any]]], decode: bool
) -> None:
    """Read the header of every image, and the pixels of a sample or, with ``decode``, of all."""
    count = len(records) if decode else min(_SAMPLE, len(records))
    sample = set(random.Random(_SAMPLE_SEED).sample(range(len(records)), count))
    report.decoded_images = count

    def problem(item: tuple[int, tuple[str, dict[str, Any]]]) -> str | None:
        index, (where, record) = item
        decode = index in sample
        path, annotated = record["file_name"], (record["height"], record["width"])
        if not os.path.isfile(path) and "://" not in path:
            return f"{where}: this image does not exist. Unpack it, or remove the record."
        try:
            size = read_rgb(path).shape[:2] if decode else image_size(path)
        except ImageError as error:
            reason = str(error).removeprefix(f"{path}: ")
            return f"{where}: {reason}, or remove the record."
        except Exception as error:  # decoders raise many types
            return (
                f"{where}: cannot be read as an image ({error.__cause__ or error}). Unpack it "
                "again, or remove the record."
            )
        if tuple(size) != annotated:
            return (
                f"{where}: the image is {size[1]} x {size[0]} pixels, but its record says "
                f"{annotated[1]} x {annotated[0]}. Use the image that was annotated, or fix width "
                "and height (and the boxes)."
            )
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        problems = tqdm(
            pool.map(problem, enumerate(records)),
            total=len(records),
            desc="Images",
            unit=" images",
            delay=1,
            mininterval=1,
        )
        report.errors += [text for text in problems if text is not None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the dataset, print the report and return the exit status."""
    parser = argparse.ArgumentParser(
        prog=program_help("python -m reldn_d2.data.check", __file__),
        description=program_help(__doc__, __file__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="name of a registered dataset")
    add_module_argument(parser)
    parser.add_argument(
        "--decode",
        action="store_true",
        help=f"read the pixels of every image; default: of {_SAMPLE} random ones",
    )
    parser.add_argument(
        "--limit", type=int, help="max errors and max warnings to print; default: all"
    )
    args = parse_and_import(parser, arguments)
    log_to_terminal()
    try:
        require_dataset(args.name)
    except ValueError as error:
        parser.error(str(error))
    report = check_dataset(args.name, args.decode)
    if report.summary is not None:
        print(report.summary.text(args.name))
    for severity, texts in (("warning", report.warnings), ("error", report.errors)):
        for text in texts[: args.limit]:
            print(f"{severity}: {text}")
        if len(texts) > len(texts[: args.limit]):
            print(f"... {len(texts)} {severity}s in total; raise --limit to see more")
    if report.absent_images:
        print(
            f"note: there are no images in {report.absent_images}, so the annotations alone were "
            "checked. Detectors and models with a visual module need the images; models that read "
            "boxes only, statistics and the evaluation of predictions do not (docs/boxes.md)."
        )
    elif report.decoded_images < len(report.dataset_dicts):
        print(
            f"Decoded {report.decoded_images} of {len(report.dataset_dicts)} images; add --decode "
            "to read all."
        )
    verdict = "usable" if report.usable else "NOT usable"
    if report.usable and report.absent_images:
        verdict += " without images"
    counts = (("error", len(report.errors)), ("warning", len(report.warnings)))
    found = ", ".join(f"{n} {what}{'' if n == 1 else 's'}" for what, n in counts)
    print(f"\n{args.name} is {verdict}: {found}")
    return 0 if report.usable else 1


if __name__ == "__main__":
    sys.exit(main())
