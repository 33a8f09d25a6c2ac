"""Small datasets in the formats of the official files, written to a folder by the tests.

Each writer returns the keyword arguments of its loader; ``pictures`` are 60 x 40 pixels.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from reldn_d2.data.datasets.visual_genome import VG_CLASSES, VG_PREDICATES

WIDTH, HEIGHT = 60, 40

# OpenImages: label, name
CLASSES = [("/m/01", "Man"), ("/m/02", "Guitar"), ("/m/03", "Chair")]
ATTRIBUTES = [("/m/11", "Wooden"), ("/m/12", "Plastic")]
HEADER = "ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2"
HEADER = [*HEADER.split(","), "RelationshipLabel"]
MAN, GUITAR, CHAIR = ("0", "0.5", "0", "1"), ("0.25", "0.5", "0.5", "1"), ("0.5", "1", "0.5", "1")


def row(image: str, subject: str, predicate: str, object_: str, first, second) -> list:
    return [image, subject, object_, *first, *second, predicate]


OPENIMAGES_ROWS = [
    row("aa01", "/m/01", "plays", "/m/02", MAN, GUITAR),
    row("aa01", "/m/01", "holds", "/m/02", MAN, GUITAR),
    row("bb02", "/m/03", "is", "/m/11", CHAIR, CHAIR),
    row("aa01", "/m/02", "is", "/m/11", GUITAR, GUITAR),
    row("bb02", "/m/01", "on", "/m/03", MAN, CHAIR),
    row("aa01", "/m/01", "plays", "/m/02", MAN, GUITAR),  # once more
    row("cc03", "/m/03", "is", "/m/12", CHAIR, CHAIR),
    row("cc03", "/m/03", "is", "/m/11", CHAIR, CHAIR),
]


def rows_with_problems() -> list:
    """Three invalid rows, lines 2 to 4 of the file."""
    rows = [list(values) for values in OPENIMAGES_ROWS[:3]]
    rows[0][HEADER.index("XMin1")] = "left"
    rows[1][HEADER.index("LabelName1")] = "/m/77"
    rows[2][HEADER.index("YMax1")] = "7"
    return rows


LABEL_ROWS = [
    ["aa01", "/m/01", "1"],
    ["aa01", "/m/03", "0"],
    ["aa01", "/m/99", "1"],
    ["zz99", "/m/01", "1"],
]


def write_csv(path: Path, rows: Iterable[Sequence], header: Sequence[str] | None = None) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([header] if header else [])
        writer.writerows(rows)
    return str(path)


def pictures(folder: Path, names: Iterable[str], size=(WIDTH, HEIGHT)) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, (90, 120, 150)).save(folder / name)
    return str(folder)


def write_openimages(
    folder: Path, rows=OPENIMAGES_ROWS, labels=LABEL_ROWS, images=("aa01", "bb02", "cc03")
) -> dict[str, Any]:
    """The files of the 2018 challenge; those of V6 differ only in their names."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "relations_csv": write_csv(folder / "challenge-2018-train-vrd.csv", rows, HEADER),
        "classes_csv": write_csv(folder / "challenge-2018-classes-vrd.csv", CLASSES),
        "attributes_csv": write_csv(
            folder / "challenge-2018-attributes-description.csv", ATTRIBUTES
        ),
        "labels_csv": write_csv(
            folder / "challenge-2018-train-vrd-labels.csv",
            labels,
            ["ImageID", "LabelName", "Confidence"],
        ),
        "image_root": pictures(folder / "train", [f"{image}.jpg" for image in images]),
    }


# Visual Genome: five images of the h5 file, and the four corrupt ones in image_data.json.
VG_IMAGE_IDS = [1, 2, 1592, 3, 1722, 4616, 4617, 4, 5]
VG_LONG_SIDE = 1024 / WIDTH  # the factor of the frame of boxes_1024


def vg_arrays(attributes: bool = False) -> dict[str, np.ndarray]:
    """Images: training with relations, without relations, with relations; test; without boxes."""
    xywh = np.array(
        [[15, 20, 30, 40], [45, 30, 20, 20], [10, 10, 10, 10]]
        + [[20, 20, 20, 20]]
        + [[15, 20, 30, 40], [45, 30, 20, 20]]
        + [[30, 20, 40, 30], [30, 20, 10, 10], [40, 25, 8, 8]]
    )
    arrays = {
        "split": np.array([0, 0, 0, 2, 2], np.int32),
        "img_to_first_box": np.array([0, 3, 4, 6, -1], np.int32),
        "img_to_last_box": np.array([2, 3, 5, 8, -1], np.int32),
        "img_to_first_rel": np.array([0, -1, 3, 4, -1], np.int32),
        "img_to_last_rel": np.array([2, -1, 3, 6, -1], np.int32),
        "boxes_1024": np.round(xywh * VG_LONG_SIDE).astype(np.int32),
        "boxes_512": np.round(xywh * VG_LONG_SIDE / 2).astype(np.int32),
        "labels": np.array([[78], [130], [150], [1], [78], [130], [20], [78], [150]], np.int64),
        "relationships": np.array(
            [[0, 1], [0, 1], [1, 2], [4, 5], [6, 7], [6, 7], [8, 7]], np.int32
        ),
        "predicates": np.array([[31], [31], [50], [1], [20], [20], [22]], np.int64),
    }
    if attributes:
        arrays["attributes"] = np.zeros((9, 10), np.int64)
        arrays["attributes"][0, :2] = [2, 1]
    return arrays


def vg_dicts(attributes: bool = False) -> dict[str, Any]:
    tables = {"label": VG_CLASSES, "predicate": VG_PREDICATES}
    if attributes:
        tables["attribute"] = ("red", "old")
    content = {}
    for key, names in tables.items():
        content[f"{key}_to_idx"] = {name: i for i, name in enumerate(names, 1)}
        content[f"idx_to_{key}"] = {str(i): name for i, name in enumerate(names, 1)}
    return content


def write_h5(path: Path, arrays: dict[str, np.ndarray]) -> str:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return str(path)


def write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_visual_genome(folder: Path, attributes: bool = False) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"image_id": i, "width": WIDTH, "height": HEIGHT, "url": f"https://example.org/{i}.jpg"}
        for i in VG_IMAGE_IDS
    ]
    suffix = "-with-attri" if attributes else ""
    return {
        "h5_file": write_h5(folder / f"VG-SGG{suffix}.h5", vg_arrays(attributes)),
        "dicts_file": write_json(folder / f"VG-SGG-dicts{suffix}.json", vg_dicts(attributes)),
        "image_data_file": write_json(folder / "image_data.json", records),
        "image_root": pictures(folder / "VG_100K", [f"{i}.jpg" for i in (1, 2, 3, 4, 5)]),
    }


def released_content() -> dict[str, Any]:
    """The files of RelDN's authors: 0-based boxes [ymin, ymax, xmin, xmax]."""

    def entity(category, bbox):
        return {"category": category, "bbox": bbox}

    man, guitar = entity(0, [0, 40, 0, 30]), entity(1, [20, 40, 15, 30])
    return {
        "a.jpg": [
            {"predicate": 3, "subject": man, "object": guitar},
            {"predicate": 0, "subject": guitar, "object": man},
        ],
        "b.jpg": [],
    }


def write_released(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    categories = [{"id": i, "name": name} for i, (_, name) in enumerate(CLASSES)]
    return {
        "json_file": write_json(folder / "rel_only_annotations_train.json", released_content()),
        "objects_file": write_json(folder / "detections_train.json", {"categories": categories}),
        "predicates_file": write_json(
            folder / "rel_9_predicates.json", ["at", "on", "holds", "plays"]
        ),
        "image_root": pictures(folder / "train", ["a.jpg", "b.jpg"]),
    }


def coco_content() -> dict[str, Any]:
    return {
        "images": [
            {
                "id": 7,
                "file_name": "a.jpg",
                "height": HEIGHT,
                "width": WIDTH,
                "relations": [[101, 102, 5], [101, 102, 2]],
                "verified_labels": [[3, 1], [9, 0]],
            },
            {"id": 8, "file_name": "more/b.jpg", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {"id": 101, "image_id": 7, "category_id": 3, "bbox": [0, 0, 30, 40], "iscrowd": 0},
            {
                "id": 102,
                "image_id": 7,
                "category_id": 9,
                "bbox": [15, 20, 15, 20],
                "iscrowd": 0,
                "attributes": [1],
                "relations": [[102, 101, 5]],
            },
        ],
        "categories": [{"id": 9, "name": "guitar"}, {"id": 3, "name": "man"}],
        "predicates": [{"id": 2, "name": "holds"}, {"id": 5, "name": "plays"}],
        "attributes": [{"id": 1, "name": "wooden"}],
    }


def write_coco(folder: Path, content: dict[str, Any] | None = None) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    pictures(folder / "images/more", ["b.jpg"])
    return {
        "json_file": write_json(folder / "relations.json", content or coco_content()),
        "image_root": pictures(folder / "images", ["a.jpg"]),
    }
