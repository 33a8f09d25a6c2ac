"""Read and check the files of Visual Genome's scene graphs.

Shape shorthand: N images, B boxes and R relations in the whole file.
"""

import importlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .io import Problems, read_json, require_file

__all__ = [
    "TEST",
    "TRAIN",
    "Graphs",
    "check_names",
    "read_graphs",
    "read_image_data",
    "read_vg_names",
]

CORRUPT_IMAGES = (1592, 1722, 4616, 4617)  # in image_data.json, not in the h5 file
TRAIN, TEST = 0, 2  # values of `split`
_PER_IMAGE = ("split", "img_to_first_box", "img_to_last_box", "img_to_first_rel", "img_to_last_rel")
_DATASETS = (*_PER_IMAGE, "boxes_1024", "labels", "predicates", "relationships")


class Graphs(NamedTuple):
    """Checked content of the h5 file; all indices and ids are 0-based."""

    split: np.ndarray  # (N,) TRAIN or TEST
    boxes: np.ndarray  # (N, 2) [start, end) range of boxes per image
    relations: np.ndarray  # (N, 2) [start, end) range of relations per image
    xywh: np.ndarray  # (B, 4) float64: center, width, height in the 1024 frame
    labels: np.ndarray  # (B,)
    triplets: np.ndarray  # (R, 3): subject and object as indices into the B boxes, predicate id
    attributes: np.ndarray | None  # (B, A): ids from 1, 0 for none


def read_vg_names(dicts_file: str) -> dict[str, list[str]]:
    """Read classes, predicates and, if any, attributes from ``VG-SGG-dicts.json``.

    Returns:
        ``thing_classes``, ``predicate_classes``, ``attribute_classes``, in the order of their
        ids (1, 2, ... in the file).
    """
    content = read_json(dicts_file, "The names of Visual Genome")
    names = {}
    for field, key, required in (
        ("thing_classes", "label_to_idx", True),
        ("predicate_classes", "predicate_to_idx", True),
        ("attribute_classes", "attribute_to_idx", False),
    ):
        table = content.get(key) if isinstance(content, dict) else None
        if table is None and not required:
            continue
        if not isinstance(table, dict) or not table:
            raise ValueError(
                f'{dicts_file}: no object "{key}" from names to ids; it has '
                f"{list(content)[:9]}. Expected VG-SGG-dicts.json of the split with 150 classes."
            )
        ordered = sorted(table.items(), key=lambda item: (str(type(item[1])), item[1]))
        for position, (name, value) in enumerate(ordered, start=1):
            if value != position or isinstance(value, bool):
                raise ValueError(
                    f'{dicts_file}: "{key}" gives {name!r} the id {value!r}; expected the ids '
                    f"from 1 to {len(table)}, each once."
                )
        names[field] = [name for name, _ in ordered]
    return names


def check_names(path: str, key: str, names: Sequence[str], expected: Sequence[str]) -> None:
    """Raise if names are not the expected ones, in their order.

    Args:
        path: file that they were read from.
        key: the object in the file that holds them.
        names: names in the file.
        expected: expected names.

    Raises:
        ValueError: with the first name that differs.
    """
    for identifier, (name, official) in enumerate(zip(names, expected), start=1):
        if name != official:
            raise ValueError(
                f'{path}: "{key}" has {name!r} with id {identifier}, expected {official!r}. Use '
                "the file of the split with 150 classes and 50 predicates, or register with "
                "read_vg_names(file)."
            )
    if len(names) != len(expected):
        raise ValueError(
            f'{path}: "{key}" has {len(names)} names, expected {len(expected)}. Use the file of '
            "the split with 150 classes and 50 predicates, or register with read_vg_names(file)."
        )


def read_graphs(
    h5_file: str, num_classes: int, num_predicates: int, num_attributes: int = 0
) -> Graphs:
    """Read and check the whole h5 file.

    Its attributes are left out if the file of names has none (``num_attributes`` is 0).

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if h5py is not installed.
        ValueError: if an HDF5 dataset is missing or damaged, or a row is invalid.
    """
    arrays = _read_h5(h5_file)
    _check_lengths(h5_file, arrays)
    boxes = _row_ranges(h5_file, arrays, "box", len(arrays["boxes_1024"]))
    relations = _row_ranges(h5_file, arrays, "rel", len(arrays["relationships"]))
    labels, predicates = arrays["labels"][:, 0], arrays["predicates"][:, 0]
    ends, xywh = arrays["relationships"], arrays["boxes_1024"].astype(np.float64)
    image_of_box = _image_of_row(boxes, len(labels))
    image_of_relation = _image_of_row(relations, len(predicates))
    first, end = boxes[image_of_relation].T
    if not num_attributes:
        arrays.pop("attributes", None)
    attributes = arrays.get("attributes", np.zeros((len(labels), 0), dtype=np.int64))

    problems = Problems()
    for name, invalid, image_index, expected in (
        (
            "labels",
            (labels < 1) | (labels > num_classes),
            image_of_box,
            f"a class from 1 to {num_classes}",
        ),
        (
            "boxes_1024",
            ~((xywh[:, 2:] > 0).all(axis=1) & np.isfinite(xywh).all(axis=1)),
            image_of_box,
            "x and y of the center, and a width and a height above 0",
        ),
        (
            "predicates",
            (predicates < 1) | (predicates > num_predicates),
            image_of_relation,
            f"a predicate from 1 to {num_predicates}",
        ),
        (
            "relationships",
            ((ends < first[:, None]) | (ends >= end[:, None])).any(axis=1),
            image_of_relation,
            "two indices of boxes of the same image",
        ),
        (
            "attributes",
            ((attributes < 0) | (attributes > num_attributes)).any(axis=1),
            image_of_box,
            f"attributes from 1 to {num_attributes}, and 0 in the other columns",
        ),
    ):
        # Rows that belong to no image are never used.
        for row in np.flatnonzero(invalid & (image_index >= 0)).tolist():
            problems.add(
                f"{h5_file}: {name}[{row}] (image {image_index[row]} of the file) is "
                f"{arrays[name][row].tolist()}; expected {expected}. Is it the complete "
                "official file?"
            )
    problems.raise_any()
    triplets = np.concatenate([ends, predicates[:, None] - 1], axis=1)
    return Graphs(
        arrays["split"], boxes, relations, xywh, labels - 1, triplets, arrays.get("attributes")
    )


def _read_h5(h5_file: str) -> dict[str, np.ndarray]:
    """Return the datasets of the file; those with one value per row have the shape (rows, 1)."""
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise ImportError(
            f"{h5_file} needs h5py, which is not installed: pip install 'reldn_d2[vg]', or pip "
            "install h5py."
        ) from error
    require_file(h5_file, "The scene graphs of Visual Genome")
    if not os.path.getsize(h5_file):
        raise ValueError(f"{h5_file}: the file is empty. Expected VG-SGG.h5: download it again.")
    try:
        with h5py.File(h5_file, "r") as file:
            missing = [name for name in _DATASETS if name not in file]
            if missing:
                raise ValueError(
                    f"{h5_file}: no dataset {', '.join(missing)}; it has "
                    f"{', '.join(sorted(file)) or 'none'}. Expected VG-SGG.h5 of the split with "
                    "150 classes."
                )
            names = [*_DATASETS, *(["attributes"] if "attributes" in file else [])]
            arrays = {name: np.asarray(file[name]) for name in names}
    except OSError as error:
        raise ValueError(
            f"{h5_file}: cannot be read as HDF5 ({error}). The file is truncated or not "
            "an HDF5 file: download it again."
        ) from error
    columns = {
        "boxes_1024": 4,
        "relationships": 2,
        "labels": 1,
        "predicates": 1,
        "attributes": None,
    }
    for name, array in arrays.items():
        if name in columns:
            array = array[:, None] if array.ndim == 1 and columns[name] == 1 else array
            expected = f"(rows, {columns[name] or 'attributes'})"
            valid = array.ndim == 2 and columns[name] in (None, array.shape[1])
        else:
            expected, valid = "(images,)", array.ndim == 1
        if not valid or array.dtype.kind not in ("iuf" if name == "boxes_1024" else "iu"):
            raise ValueError(
                f"{h5_file}: {name} has the shape {array.shape} and the type {array.dtype}; "
                f"expected numbers of the shape {expected}. Is it VG-SGG.h5?"
            )
        arrays[name] = array if array.dtype.kind == "f" else array.astype(np.int64)
    return arrays


def _check_lengths(h5_file: str, arrays: dict[str, np.ndarray]) -> None:
    groups = [
        _PER_IMAGE,
        ("boxes_1024", "labels", *(["attributes"] if "attributes" in arrays else [])),
        ("relationships", "predicates"),
    ]
    for names in groups:
        lengths = {name: len(arrays[name]) for name in names}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(
                f"{h5_file}: {', '.join(names)} should have the same length, but have: {found}. "
                "The file is damaged: download it again."
            )


def _row_ranges(h5_file: str, arrays: dict[str, np.ndarray], kind: str, count: int) -> np.ndarray:
    """Return (N, 2) [start, end) range of rows per image, [0, 0) if it has none."""
    first, last = arrays[f"img_to_first_{kind}"], arrays[f"img_to_last_{kind}"]
    invalid = (first >= 0) & ((last < first) | (last >= count))
    if invalid.any():
        row = int(np.flatnonzero(invalid)[0])
        raise ValueError(
            f"{h5_file}: image {row} of the file has the rows {first[row]} to {last[row]} "
            f"(img_to_first_{kind}, img_to_last_{kind}) of {count}; expected a first and a last "
            "row, or -1 for none. The file is damaged: download it again."
        )
    return np.where(first[:, None] < 0, 0, np.stack([first, last + 1], axis=1))


def _image_of_row(ranges: np.ndarray, count: int) -> np.ndarray:
    """Return (count,) index of the image that each row belongs to, -1 for none."""
    # for image, (start, end) in enumerate(ranges): result[start:end] = image
    lengths = ranges[:, 1] - ranges[:, 0]
    images = np.repeat(np.arange(len(ranges)), lengths)
    offsets = np.arange(len(images)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    result = np.full(count, -1, dtype=np.int64)
    result[ranges[images, 0] + offsets] = images
    return result


def read_image_data(path: str, count: int, h5_file: str) -> list[dict[str, int]]:
    """Return id, width and height of the images, in the order of the h5 file."""
    content = read_json(path, "The list of images of Visual Genome")
    if not isinstance(content, list):
        raise ValueError(
            f"{path}: expected a list of images, found a {type(content).__name__}. Is it "
            "image_data.json?"
        )
    problems = Problems()
    seen: dict[int, int] = {}
    images = []
    for index, record in enumerate(content):
        fields = record if isinstance(record, dict) else {}
        values = [fields.get(key) for key in ("image_id", "width", "height")]
        if not all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in values):
            problems.add(
                f"{path}: image {index} is {record!r:.160}; expected image_id, width and height, "
                "integers above 0."
            )
            continue
        image_id = record["image_id"]
        if image_id in seen:
            problems.add(
                f"{path}: image {index} has the same image_id {image_id} as image {seen[image_id]}."
            )
        seen[image_id] = index
        if image_id not in CORRUPT_IMAGES:
            images.append(record)
    problems.raise_any()
    if len(images) != count:
        raise ValueError(
            f"{path}: {len(images)} images besides the {len(CORRUPT_IMAGES)} corrupt ones, but "
            f"{h5_file} has {count}. They belong together: download both again."
        )
    return images
