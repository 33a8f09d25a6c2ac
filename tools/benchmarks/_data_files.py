"""Data sets of the real sizes, drawn at random in the formats of the official files."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reldn_d2.data.datasets.openimages import OPENIMAGES_PREDICATES
from reldn_d2.data.datasets.visual_genome import VG_CLASSES, VG_PREDICATES

__all__ = ["write_coco", "write_openimages", "write_visual_genome"]

_OPENIMAGES_CLASSES = 57
_ATTRIBUTES = 5
_SIZES = [(1024, 768), (1024, 683), (768, 1024), (1024, 1024), (683, 1024), (1024, 576)]
_LINKS = 30_000  # file systems allow some ten thousand names of one file


def write_openimages(folder: Path, images: int, rows: int, seed: int = 0) -> dict[str, Any]:
    """Challenge 2018: ``rows`` relationships over ``images`` images, an eighth with attributes.

    Every image is there under a name of its own; the bytes are those of a few JPEG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    labels = [f"/m/{number:05x}" for number in range(_OPENIMAGES_CLASSES)]
    attributes = [f"/m/{number:05x}" for number in range(900, 900 + _ATTRIBUTES)]
    ids = [f"{number:016x}" for number in range(images)]
    # Every image has a row; the others are drawn.
    image_of_row = np.concatenate([np.arange(images), draw.integers(0, images, rows - images)])
    # An image has few boxes, and most of them are part of several rows.
    first, second = draw.integers(0, 4, (2, rows))
    second = np.where(second == first, (first + 1) % 4, second)
    corners = np.sort(draw.random((images, 4, 2, 2)), axis=2).round(6)
    classes = draw.integers(0, _OPENIMAGES_CLASSES, (images, 4))
    predicates = draw.integers(0, len(OPENIMAGES_PREDICATES), rows)
    is_attribute = draw.random(rows) < 0.125
    header = "ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2"
    with open(folder / "relations.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header.split(","), "RelationshipLabel"])
        for row, image in enumerate(image_of_row.tolist()):
            subject, object_ = first[row], first[row] if is_attribute[row] else second[row]
            (x0, y0), (x1, y1) = corners[image, subject].tolist()
            (x2, y2), (x3, y3) = corners[image, object_].tolist()
            label = labels[classes[image, object_]]
            predicate = OPENIMAGES_PREDICATES[predicates[row]]
            if is_attribute[row]:
                label, predicate = attributes[row % _ATTRIBUTES], "is"
            ends = [ids[image], labels[classes[image, subject]], label]
            writer.writerow([*ends, x0, x1, y0, y1, x2, x3, y2, y3, predicate])
    _write_rows(folder / "classes.csv", [(label, f"class {label}") for label in labels])
    _write_rows(folder / "attributes.csv", [(label, f"attribute {label}") for label in attributes])
    verified = [(image, labels[number], number % 2) for image in ids for number in (3, 8, 21, 40)]
    _write_rows(folder / "labels.csv", [("ImageID", "LabelName", "Confidence"), *verified])
    _write_images(folder / "images", [f"{image}.jpg" for image in ids])
    return {
        "relations_csv": str(folder / "relations.csv"),
        "classes_csv": str(folder / "classes.csv"),
        "attributes_csv": str(folder / "attributes.csv"),
        "labels_csv": str(folder / "labels.csv"),
        "image_root": str(folder / "images"),
    }


def write_visual_genome(folder: Path, images: int, relations: int, seed: int = 0) -> dict[str, Any]:
    """VG-SGG.h5, its names, image_data.json and (empty) images; 12 boxes an image on average."""
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    widths, heights = np.array(_SIZES)[draw.integers(0, len(_SIZES), images)].T
    boxes = draw.integers(2, 23, images)
    relations_of = draw.multinomial(relations, np.full(images, 1 / images))
    first_box, first_relation = np.cumsum(boxes) - boxes, np.cumsum(relations_of) - relations_of
    # Sizes and centres such that the boxes lie inside.
    limits = np.repeat(np.stack([widths, heights], 1), boxes, axis=0) * (
        1024 / np.repeat(np.maximum(widths, heights), boxes)[:, None]
    )
    size = np.maximum(limits * draw.uniform(0.05, 0.8, limits.shape), 2).round()
    centre = (size / 2 + draw.random(limits.shape) * (limits - size)).round()
    image_of_relation = np.repeat(np.arange(images), relations_of)
    subject = draw.integers(0, boxes[image_of_relation])
    object_ = (subject + draw.integers(1, boxes[image_of_relation])) % boxes[image_of_relation]
    ends = np.stack([subject, object_], 1) + first_box[image_of_relation][:, None]
    arrays = {
        "split": np.where(draw.random(images) < 0.7, 0, 2).astype(np.int32),
        "boxes_1024": np.concatenate([centre, size], 1).astype(np.int32),
        "boxes_512": (np.concatenate([centre, size], 1) / 2).astype(np.int32),
        "labels": draw.integers(1, len(VG_CLASSES) + 1, (boxes.sum(), 1)),
        "predicates": draw.integers(1, len(VG_PREDICATES) + 1, (relations, 1)),
        "relationships": ends.astype(np.int32),
    }
    for name, first, count in (
        ("box", first_box, boxes),
        ("rel", first_relation, relations_of),
    ):
        arrays[f"img_to_first_{name}"] = np.where(count, first, -1).astype(np.int32)
        arrays[f"img_to_last_{name}"] = np.where(count, first + count - 1, -1).astype(np.int32)
    with h5py.File(folder / "VG-SGG.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    names = {"label_to_idx": VG_CLASSES, "predicate_to_idx": VG_PREDICATES}
    tables = {key: {name: i for i, name in enumerate(x, 1)} for key, x in names.items()}
    (folder / "VG-SGG-dicts.json").write_text(json.dumps(tables))
    records = [
        {"image_id": 2_000_000 + i, "width": w, "height": h, "url": f"https://x/{i}.jpg"}
        for i, (w, h) in enumerate(zip(widths.tolist(), heights.tolist()))
    ]
    (folder / "image_data.json").write_text(json.dumps(records))
    (folder / "VG_100K").mkdir(exist_ok=True)
    for record in records:
        (folder / "VG_100K" / f"{record['image_id']}.jpg").touch()
    return {
        "h5_file": str(folder / "VG-SGG.h5"),
        "dicts_file": str(folder / "VG-SGG-dicts.json"),
        "image_data_file": str(folder / "image_data.json"),
        "image_root": str(folder / "VG_100K"),
        "num_val_images": min(5000, images // 20),
    }


def write_coco(folder: Path, images: int, relations: int, seed: int = 0) -> dict[str, Any]:
    """A COCO file with relations of Visual Genome's size, with (empty) images."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(VG_CLASSES, 1)],
        "predicates": [{"id": i, "name": name} for i, name in enumerate(VG_PREDICATES, 1)],
    }
    number = 1
    (folder / "images").mkdir(exist_ok=True)
    relations_of = draw.multinomial(relations, np.full(images, 1 / images))
    for image, (boxes, count) in enumerate(zip(draw.integers(2, 23, images), relations_of)):
        ends = draw.permuted(np.tile(np.arange(boxes), (count, 1)), axis=1)[:, :2] + number
        predicates = draw.integers(1, len(VG_PREDICATES) + 1, count)
        name = f"{image:06d}.jpg"
        (folder / "images" / name).touch()
        content["images"].append(
            {
                "id": image,
                "file_name": name,
                "width": 1024,
                "height": 768,
                "relations": np.column_stack([ends, predicates]).tolist(),
            }
        )
        sizes = np.column_stack(
            [draw.uniform(0, 400, (boxes, 2)), draw.uniform(5, 300, (boxes, 2))]
        )
        for bbox, label in zip(sizes.round(2).tolist(), draw.integers(1, 151, boxes).tolist()):
            entry = {"id": number, "image_id": image, "category_id": label, "bbox": bbox}
            content["annotations"].append({**entry, "iscrowd": 0})
            number += 1
    (folder / "relations.json").write_text(json.dumps(content))
    return {
        "json_file": str(folder / "relations.json"),
        "image_root": str(folder / "images"),
    }


def _write_rows(path: Path, rows: Any) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _write_images(folder: Path, names: Any) -> None:
    folder.mkdir(exist_ok=True)
    sources: dict[tuple[int, int], Path] = {}
    for number, name in enumerate(names):
        size, generation = _SIZES[number % len(_SIZES)], number // _LINKS
        source = sources.get((number % len(_SIZES), generation))
        if source is None:
            source = sources[(number % len(_SIZES), generation)] = folder / name
            Image.new("RGB", size, (90, 120, 150)).save(source)
        else:
            os.link(source, folder / name)
