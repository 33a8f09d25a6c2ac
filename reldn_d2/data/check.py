"""Check a registered data set: ``python -m reldn_d2.data.check NAME``.

Prints a summary and lists every problem with its file, its record and how to fix it. The exit
status is 0 if the data set is usable, 1 if it is not, and 2 if the command is wrong. To look at the
annotations, run ``python tools/draw_relations.py --dataset NAME --output FOLDER``.
"""

import argparse
import os
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
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.logger import setup_logger

from ..structures.scene_graph import boxes_xyxy
from .dataset_dict import annotation_problems
from .datasets.catalog import add_module_argument, import_modules, require_dataset
from .datasets.io import image_size
from .summary import DatasetSummary

__all__ = ["Report", "check_dataset", "main"]

_OUTSIDE = 1e-3  # pixels; boxes are computed from rounded numbers
_IMAGE_KEYS = ("file_name", "image_id", "height", "width")
_THREADS = 8


@dataclass
class Report:
    """What a check found."""

    errors: list[str] = field(default_factory=list)  # the data set cannot be used as it is
    warnings: list[str] = field(default_factory=list)  # it can, but a person should know
    summary: DatasetSummary | None = None  # of the images without errors
    dataset_dicts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether there are no errors."""
        return not self.errors


def check_dataset(name: str, decode: bool = False) -> Report:
    """Check a registered data set.

    Args:
        name: of the data set.
        decode: read the pixels of every image, not only its header; finds truncated images.

    Raises:
        KeyError: if there is no such data set.
    """
    require_dataset(name)
    report = Report()
    try:
        report.dataset_dicts = DatasetCatalog.get(name)
    except (OSError, ValueError, ImportError) as error:
        report.errors += getattr(error, "problems", [str(error)])
        return report
    metadata = MetadataCatalog.get(name)
    names = [metadata.get(key) for key in ("thing_classes", "predicate_classes")]
    for key, value in zip(("thing_classes", "predicate_classes"), names):
        if value is None:
            report.errors.append(
                f"data set {name}: its metadata has no {key}. Set them when you register it."
            )
    if None in names:
        return report
    if not report.dataset_dicts:
        report.errors.append(f"data set {name}: it has no image.")
    report.errors += [
        f"data set {name}: its list of {what} is empty. Name them when you register it, or in its "
        "files."
        for what, value in zip(("classes", "predicates"), names)
        if not len(value)
    ]
    report.summary = DatasetSummary(*names)
    sound = _check_records(report, *map(len, names))
    if report.dataset_dicts and not any(x.get("relations") for x in report.dataset_dicts):
        report.warnings.append(
            f"data set {name}: none of its images has a relation. Do they stand where its loader "
            "looks for them (docs/own_data.md)?"
        )
    _check_images(report, sound, decode)
    return report


def _check_records(
    report: Report, num_classes: int, num_predicates: int
) -> list[tuple[str, dict[str, Any]]]:
    """Check annotations and relations; returns the images that can be looked for."""
    seen: dict[str, dict[Any, int]] = {"image_id": {}, "file_name": {}}
    sound = []
    for number, record in enumerate(report.dataset_dicts):
        where = f"image {number} ({record.get('file_name', 'no file name')})"
        missing = [key for key in _IMAGE_KEYS if key not in record]
        if missing:
            report.errors.append(f"{where}: its dict has no {', '.join(missing)}. Add them.")
            continue
        for key, known in seen.items():
            first = known.setdefault(record[key], number)
            if first != number:
                report.errors.append(
                    f"{where}: {key} {record[key]!r} is that of image {first} as well. Give every "
                    "image one record."
                )
        sound.append((where, record))
        errors = list(annotation_problems(record, num_classes, num_predicates, where))
        if "annotations" in record:
            broken, outside = _box_problems(record, where)
            errors += broken
            report.warnings += outside
        report.errors += errors
        if not errors:
            report.warnings += _duplicates(record, where)
            report.summary.add(record)
    return sound


def _box_problems(record: dict[str, Any], where: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) of the boxes of an image."""
    errors, warnings = [], []
    width, height = record["width"], record["height"]
    for number, annotation in enumerate(record["annotations"]):
        if "bbox" not in annotation or "bbox_mode" not in annotation:
            continue  # reported already
        place = f"{where}: annotation {number} has the box {_short(annotation['bbox'])}"
        if not _is_box(annotation):
            errors.append(
                f"{place} in mode {annotation['bbox_mode']!r}; expected four finite numbers in a "
                "BoxMode. Mend or remove it."
            )
            continue
        ((x0, y0, x1, y1),) = boxes_xyxy([annotation]).tolist()
        if x0 > x1 or y0 > y1:
            errors.append(f"{place}, whose corners are the wrong way round. Mend or remove it.")
        elif x0 == x1 or y0 == y1:
            warnings.append(
                f"{place}, which has no area: training leaves it out, with its relations, and "
                "evaluation never finds it. Mend or remove it."
            )
        elif x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            errors.append(
                f"{place}, which lies outside the image of {width} x {height} pixels. Mend or "
                "remove it."
            )
        elif min(x0, y0) < -_OUTSIDE or x1 > width + _OUTSIDE or y1 > height + _OUTSIDE:
            warnings.append(
                f"{place}, which reaches beyond the image of {width} x {height} pixels; it is "
                "clipped in training."
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
    """Entities and relations that stand more than once in an image."""
    first: dict[tuple, int] = {}
    for number, annotation in enumerate(record["annotations"]):
        key = (annotation["category_id"], annotation["bbox_mode"], *map(float, annotation["bbox"]))
        before = first.setdefault(key, number)
        if before != number:
            yield (
                f"{where}: annotation {number} has the class and box of annotation {before}. Is it "
                "one entity?"
            )
    for relation, times in Counter(map(tuple, record.get("relations", ()))).items():
        if times > 1:
            yield (
                f"{where}: relation {relation} stands there {times} times; recall counts each. "
                "Remove the others if that is not meant."
            )


def _check_images(
    report: Report, records: Sequence[tuple[str, dict[str, Any]]], decode: bool
) -> None:
    """Read the header, or the pixels, of every image."""

    def problem(item: tuple[str, dict[str, Any]]) -> str | None:
        where, record = item
        path, expected = record["file_name"], (record["height"], record["width"])
        if not os.path.isfile(path) and "://" not in path:
            return f"{where}: there is no such image. Unpack it, or remove the record."
        try:
            size = read_image(path).shape[:2] if decode else image_size(path)
        except Exception as error:  # decoders raise all sorts
            return (
                f"{where}: cannot be read as an image ({error.__cause__ or error}). Unpack it "
                "again, or remove the record."
            )
        if tuple(size) != expected:
            return (
                f"{where}: the image is {size[1]} x {size[0]} pixels, its record says "
                f"{expected[1]} x {expected[0]}. Use the image that was annotated, or mend width "
                "and height (and the boxes)."
            )
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = tqdm(
            pool.map(problem, records),
            total=len(records),
            desc="Images",
            unit=" images",
            delay=1,
            mininterval=1,
        )
        report.errors += [text for text in found if text is not None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the data set, print the report and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m reldn_d2.data.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="a registered data set")
    add_module_argument(parser)
    parser.add_argument("--decode", action="store_true", help="read the pixels of every image")
    parser.add_argument("--limit", type=int, help="problems printed of each kind; default: all")
    args = parser.parse_args(arguments)
    setup_logger(name="reldn_d2")
    try:
        import_modules(args.module)
        report = check_dataset(args.name, args.decode)
    except ImportError as error:
        parser.error(str(error))
    except KeyError as error:
        parser.error(error.args[0])
    if report.summary is not None:
        print(report.summary.text(args.name))
    for kind, texts in (("warning", report.warnings), ("error", report.errors)):
        for text in texts[: args.limit]:
            print(f"{kind}: {text}")
        if len(texts) > len(texts[: args.limit]):
            print(f"... {len(texts)} {kind}s in all; a higher --limit shows more")
    verdict = "usable" if report.usable else "NOT usable"
    print(
        f"\n{args.name} is {verdict}: {len(report.errors)} errors, {len(report.warnings)} warnings"
    )
    return 0 if report.usable else 1


if __name__ == "__main__":
    sys.exit(main())
