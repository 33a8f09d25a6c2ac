#!/usr/bin/env python
"""Convert the R-CNN detections that VRD's authors published to a COCO results file.

Lu et al. (2016) published MATLAB files in
https://github.com/Prof-Lu-Cewu/Visual-Relationship-Detection: objectDetRCNN.mat has the detections
of the 1,000 test images, imagePath.mat the names of these images in the same order. The output is
the vrd/test_detections_rcnn.json that tools/vrd_benchmark.py and DATASETS.DETECTION_FILES_TEST
read. Needs scipy.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if it is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  must be imported before Detectron2
import numpy as np

from reldn_d2.data.datasets.vrd import VRD_CLASSES
from reldn_d2.utils.file_io import write_atomically

__all__ = ["convert", "main", "read_cells"]

# Variables of objectDetRCNN.mat: cell arrays with one matrix per image.
BOXES, LABELS, SCORES = "detection_bboxes", "detection_labels", "detection_confs"
NAMES = "imagePath"  # of imagePath.mat: a cell array of file names


def read_cells(path: str, names: Sequence[str]) -> list[list[Any]]:
    """Read cell arrays of a MATLAB file, each as a list of its cells.

    Raises:
        ImportError: scipy is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is not a MATLAB file, lacks a variable, or a variable is not a cell array.
    """
    try:
        from scipy.io import loadmat, whosmat
    except ImportError as error:
        raise ImportError(f"reading {path} needs scipy ({error}): pip install scipy") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {path}")
    try:
        content, found = loadmat(path, variable_names=names), [x[0] for x in whosmat(path)]
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}") from error
    for name in names:
        if name not in content:
            raise ValueError(f"{path} has no variable {name}; it has {', '.join(found) or 'none'}")
        if content[name].dtype != object:
            raise ValueError(f"{path}: {name} is not a cell array")
    return [list(content[name].ravel()) for name in names]


def convert(detections: str, image_paths: str) -> list[dict[str, Any]]:
    """Return the detections as COCO results.

    Boxes keep the file's pixels: (x1, y1) and the differences to (x2, y2). Classes become 0-based.

    Args:
        detections: ``objectDetRCNN.mat``, with boxes (R, 4) x1, y1, x2, y2 in pixels, labels (R, 1)
            from 1 to 100 and scores (R, 1) in [0, 1] per image.
        image_paths: ``imagePath.mat``.

    Returns:
        One dict per detection, ``image_id`` being the image's file name.

    Raises:
        ImportError, FileNotFoundError, ValueError: see :func:`read_cells`; or the values do not fit
            together or are out of range; the message names the image.
    """
    columns = read_cells(detections, [BOXES, LABELS, SCORES])
    (paths,) = read_cells(image_paths, [NAMES])
    if any(len(column) != len(paths) for column in columns):
        counts = ", ".join(f"{len(x)} {n}" for x, n in zip(columns, (BOXES, LABELS, SCORES)))
        raise ValueError(f"{detections} has {counts}, but {image_paths} has {len(paths)} images")
    records = []
    for index, (path, *values) in enumerate(zip(paths, *columns), start=1):
        name = str(np.asarray(path).ravel()[0]).replace("\\", "/").rsplit("/", 1)[-1]
        where = f"{detections}, image {index} ({name})"
        boxes, labels, scores = (np.asarray(x, dtype=np.float64) for x in values)
        if boxes.size == labels.size == scores.size == 0:
            continue
        labels, scores = labels.ravel(), scores.ravel()
        if boxes.shape != (len(labels), 4) or len(scores) != len(labels):
            raise ValueError(
                f"{where}: boxes of shape {boxes.shape}, {len(labels)} labels and {len(scores)} "
                "scores; expected four numbers, a label and a score per detection"
            )
        _check_values(where, boxes, labels, scores)
        sizes = boxes[:, 2:] - boxes[:, :2]
        for box, label, score in zip(np.hstack([boxes[:, :2], sizes]), labels, scores):
            record = {"image_id": name, "category_id": int(label) - 1, "bbox": box.tolist()}
            records.append({**record, "score": float(score)})
    return records


def _check_values(where: str, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> None:
    """Raise ValueError that names the first detection (from 1) with a value out of range."""
    count = len(VRD_CLASSES)
    for what, bad in (
        ("expected x1 <= x2 and y1 <= y2", ~(boxes[:, 2:] >= boxes[:, :2]).all(axis=1)),
        (f"expected a label from 1 to {count}", ~np.isin(labels, np.arange(1, count + 1))),
        ("expected a score from 0 to 1", ~((scores >= 0) & (scores <= 1))),
    ):
        if bad.any():
            i = int(bad.argmax())
            raise ValueError(
                f"{where}, detection {i + 1}: box {boxes[i].tolist()}, label {labels[i]:g}, score "
                f"{scores[i]:g}; {what}"
            )


def main(arguments: list[str] | None = None) -> int:
    """Write the file and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--detections", required=True, metavar="MAT", help="objectDetRCNN.mat")
    parser.add_argument(
        "--image-paths", required=True, metavar="MAT", help="imagePath.mat: names of the images"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="JSON")
    args = parser.parse_args(arguments)
    try:
        records = convert(args.detections, args.image_paths)
        with write_atomically(str(args.output)) as file:
            json.dump(records, file)
    except (OSError, ValueError, ImportError) as error:
        print(f"convert_vrd_detections.py: {error}", file=sys.stderr)
        return 1
    images = len({record["image_id"] for record in records})
    print(f"{args.output}: {len(records)} detections in {images} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
