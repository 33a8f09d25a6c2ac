"""Entities of images: from the files of --boxes and --detections, or from --detector."""

import argparse
import json
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from reldn_d2.predictor import RelationPredictor
from reldn_d2.pretrained import load_detector
from reldn_d2.pretrained.image_detectors import ImageDetector
from reldn_d2.structures.given_boxes import ENTITY_KEYS, check_keys
from reldn_d2.utils.file_io import json_problem
from reldn_d2.utils.image_io import ImageError

__all__ = ["EntityFile", "FileEntities", "read_boxes", "read_detections", "read_entities"]

_FORM = '{"FILE NAME": {"boxes": [[x0, y0, x1, y1], ...], "classes": [name, ...]}}'


class EntityFile:
    """The entities of ``--boxes`` or ``--detections``, by image."""

    def __init__(self, path: Path, by_image: dict[str, dict[str, Any]], has_ids: bool = False):
        """
        Args:
            path: the file.
            by_image: entities by file name, or by image id.
            has_ids: whether the keys are image ids.
        """
        self.path = path
        self.by_image = by_image
        self.has_ids = has_ids
        self._repeated: set[str] = set()  # names, or names without suffix, of several images

    def check_names(self, files: Iterable[str]) -> None:
        """Find out which images share their name, so that an entry by name is not unambiguous."""
        counts = Counter(self._name(file) for file in files)
        self._repeated = {name for name, count in counts.items() if count > 1}

    def _name(self, file: str) -> str:
        return Path(file).stem if self.has_ids else Path(file).name

    def __getitem__(self, file: str) -> dict[str, Any]:
        """Return the entities of an image.

        Raises:
            ImageError: there are none, or there are some for its name, which several images have.
        """
        stem = Path(file).stem
        keys = [file, Path(file).name]
        if self.has_ids:  # COCO's image 139 is the file 000000000139.jpg
            keys += [stem, *([str(int(stem))] if stem.isdecimal() else [])]
        for key in keys:
            if key not in self.by_image:
                continue
            if key != file and self._name(file) in self._repeated:
                fix = "rename them" if self.has_ids else f"give its entry the key {file!r}"
                raise ImageError(
                    f"{file}: several images are named {self._name(file)}, so the entry {key!r} of "
                    f"{self.path} may belong to another one: {fix}"
                )
            return self.by_image[key]
        what = f"image id {' or '.join(keys[2:])}" if self.has_ids else f"key {keys[1]!r}"
        raise ImageError(f"{file}: {self.path} has nothing for it ({what})")


def read_boxes(path: Path, required: Collection[str] = ("boxes",)) -> EntityFile:
    """Read boxes, and classes and scores if there are any, by file name.

    Args:
        path: a file in the format of ``--boxes``.
        required: keys that each image must have.

    Raises:
        ImageError: the file does not have this format.
    """
    try:
        table = json.loads(path.read_text())
    except (OSError, RecursionError, ValueError) as error:
        raise ImageError(
            f"{path}: cannot be read as JSON: {json_problem(error)}. Expected {_FORM}"
        ) from None
    if not isinstance(table, dict):
        raise ImageError(f"{path}: expected {_FORM}, found a {type(table).__name__}")
    for name, entry in table.items():
        check_keys(entry, ENTITY_KEYS, required, f"{path}: {name}")
    return EntityFile(path, table)


def read_detections(path: Path, predictor: RelationPredictor) -> EntityFile:
    """Read detections from a file in one of the formats of ``--detections``.

    Raises:
        OSError, ValueError: the file has none of these formats.
    """
    with open(path, "rb") as file:
        is_table = path.suffix == ".json" and file.read(100).lstrip()[:1] == b"{"
    if is_table:
        return read_boxes(path, ENTITY_KEYS)
    return EntityFile(path, predictor.read_detections(path), has_ids=True)


def read_detector(args: argparse.Namespace) -> ImageDetector:
    """Load the detector of ``--detector``, which returns the entities of an image."""
    if args.boxes is not None or args.detections is not None:
        raise ValueError("--detector finds the entities: leave out --boxes and --detections")
    options = {}
    if args.confidence_threshold is not None:
        options["min_score"] = args.confidence_threshold
    return load_detector(args.detector, args.detector_weights, args.device, **options)


class FileEntities:
    """Returns the predictor's arguments ``boxes``, ... for an image, from files.

    It can be pickled, so that worker processes can have a copy.
    """

    def __init__(self, boxes: EntityFile | None, detections: EntityFile | None):
        self.boxes = boxes
        self.detections = detections

    def __call__(self, file: str) -> dict[str, Any]:
        """Return the arguments for an image.

        Args:
            file: its path or key; not used without files.

        Raises:
            ImageError: a file has nothing for it.
        """
        result = {} if self.boxes is None else dict(self.boxes[file])
        if self.detections is not None:
            result["detections"] = self.detections[file]
        return result

    def check_names(self, files: Collection[str]) -> None:
        """Take no entry by file name alone for images that share their name."""
        for part in (self.boxes, self.detections):
            if part is not None:
                part.check_names(files)


def read_entities(
    predictor: RelationPredictor, args: argparse.Namespace
) -> FileEntities | ImageDetector:
    """Return a function that gives the predictor's arguments ``boxes``, ... for an image.

    Images are file names, and with ``--detector`` or without any of these options also arrays.

    Raises:
        OSError, ValueError, ImportError: the model needs detections and none are given, or takes
            none; options that exclude each other; or the detector cannot be loaded.
    """
    if args.detector is not None:
        return read_detector(args)
    if args.detector_weights is not None:
        raise ValueError("--detector-weights: add --detector, which they belong to")
    if args.detections is not None and not predictor.needs_detections:
        raise ValueError(
            "--detections: this model has its own detector and takes none; give --boxes with "
            "boxes, classes and scores instead"
        )
    if predictor.needs_detections and args.detections is None and args.boxes is None:
        raise ValueError(
            "this model was trained on detections from files and has no detector of its own: add "
            "--detector NAME, --detections FILE, or --boxes with boxes and classes"
        )
    boxes = None if args.boxes is None else read_boxes(args.boxes)
    detections = None if args.detections is None else read_detections(args.detections, predictor)

    return FileEntities(boxes, detections)
