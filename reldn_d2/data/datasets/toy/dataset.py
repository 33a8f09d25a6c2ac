"""The built-in dataset: images of people and things, drawn by code from a seed.

``toy_vrd_train`` and ``toy_vrd_test`` need no download: they are drawn on first use and stored as
PNG files and one ``annotations.json`` in ``<root>/toy_vrd/<split>``. Small local cues decide which
entities are related (see :mod:`.scenes`), so boxes and classes alone are not enough to predict it.
"""

import json
import os
import shutil
import tempfile
from typing import Any

import cv2
import numpy as np
from iopath.common.file_io import file_lock, get_cache_dir
from tqdm import tqdm

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...dataset_dict import create_annotation, create_dataset_dict
from .scenes import make_scene
from .shapes import IMAGE_SIZE

__all__ = [
    "TOY_CLASSES",
    "TOY_PREDICATES",
    "draw_toy_image",
    "load_toy_vrd",
    "register_toy_vrd",
]

TOY_CLASSES = ("person", "cup", "ball", "guitar", "drum", "hat", "chair", "table", "box")
TOY_PREDICATES = ("holds", "plays", "wears", "on", "under", "inside of")

# Increment it when the same seed gives different images or annotations than before.
_GENERATOR_VERSION = 3
# split: (seed, number of images)
_SPLITS = {"train": (2019, 2000), "test": (1906, 400)}
_ANNOTATIONS = "annotations.json"


def draw_toy_image(seed: int, index: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Draw one image; the same arguments give the same image and annotations.

    Args:
        seed: seed of the split.
        index: index of the image in the split, from 1.

    Returns:
        The (160, 160, 3) uint8 BGR image, and its record: ``bboxes`` (absolute XYXY), ``classes``
        (one per box) and ``relations`` (subject index, object index, predicate).
    """
    scene = make_scene(np.random.default_rng([seed, index]))
    record = {
        "bboxes": [
            [round(min(max(value, 0.0), float(IMAGE_SIZE)), 2) for value in entity.box]
            for entity in scene.entities
        ],
        "classes": [TOY_CLASSES.index(entity.category) for entity in scene.entities],
        "relations": [
            [subject, object_, TOY_PREDICATES.index(predicate)]
            for subject, object_, predicate in scene.relations
        ],
    }
    return scene.render(), record


def load_toy_vrd(root: str, split: str, num_images: int | None = None) -> list[dict[str, Any]]:
    """Load a split; draw it first if it is missing, incomplete or of another version.

    Args:
        root: folder to store the drawn images in, as ``<root>/toy_vrd/<split>``.
        split: "train" or "test".
        num_images: draw only the first images; all images of the split when None.

    Returns:
        Dataset dicts in Detectron2's format, with ``relations``.
    """
    if split not in _SPLITS:
        raise ValueError(f"toy_vrd has no split {split!r}; use one of {', '.join(_SPLITS)}.")
    manifest = _manifest(split, num_images)
    folder = os.path.join(root, "toy_vrd", split)
    records = _read_records(folder, manifest)
    if records is None:
        with file_lock(folder):
            # Another process may have drawn it while this one waited for the lock.
            records = _read_records(folder, manifest) or _draw_split(folder, manifest)
    return [_dataset_dict(folder, image_id, record) for image_id, record in enumerate(records, 1)]


def register_toy_vrd(name: str, split: str, root: str | None = None) -> None:
    """Register a split; it is drawn on first use.

    Args:
        name: name of the dataset, e.g. "toy_vrd_train".
        split: "train" or "test".
        root: see :func:`load_toy_vrd`; Detectron2's cache folder (``$FVCORE_CACHE``) when None,
            because a folder of downloaded datasets may be shared or read-only.
    """
    DatasetCatalog.register(name, lambda: load_toy_vrd(root or get_cache_dir(), split))
    MetadataCatalog.get(name).set(
        thing_classes=list(TOY_CLASSES),
        predicate_classes=list(TOY_PREDICATES),
        evaluator_type="relation",
    )


def _manifest(split: str, num_images: int | None) -> dict[str, int]:
    seed, count = _SPLITS[split]
    return {
        "generator_version": _GENERATOR_VERSION,
        "seed": seed,
        "num_images": count if num_images is None else num_images,
    }


def _image_name(image_id: int) -> str:
    return f"{image_id:05d}.png"


def _read_records(folder: str, manifest: dict[str, int]) -> list[dict[str, Any]] | None:
    """Return the records of a folder, None if it is incomplete or has another manifest."""
    try:
        with open(os.path.join(folder, _ANNOTATIONS), encoding="utf-8") as file:
            content = json.load(file)
        files = {entry.name for entry in os.scandir(folder) if entry.stat().st_size > 0}
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("manifest") != manifest:
        return None
    if any(_image_name(i) not in files for i in range(1, manifest["num_images"] + 1)):
        return None
    return content["images"]


def _draw_split(folder: str, manifest: dict[str, int]) -> list[dict[str, Any]]:
    """Draw all images into a temporary folder, then move it to ``folder``."""
    parent, split = os.path.split(folder)
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f".{split}.", dir=parent)
    try:
        new = os.path.join(temporary, "new")
        os.mkdir(new)
        records = []
        image_ids = range(1, manifest["num_images"] + 1)
        progress = dict(desc=f"Drawing toy_vrd_{split}", unit=" images", mininterval=1)
        for image_id in tqdm(image_ids, **progress):
            image, record = draw_toy_image(manifest["seed"], image_id)
            path = os.path.join(new, _image_name(image_id))
            if not cv2.imwrite(path, image):
                raise OSError(f"Cannot write {path}. Is the disk full?")
            records.append(record)
        with open(os.path.join(new, _ANNOTATIONS), "w", encoding="utf-8") as file:
            json.dump({"manifest": manifest, "images": records}, file)
        if os.path.lexists(folder):
            os.rename(folder, os.path.join(temporary, "old"))
        os.rename(new, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return records


def _dataset_dict(folder: str, image_id: int, record: dict[str, Any]) -> dict[str, Any]:
    return create_dataset_dict(
        os.path.join(folder, _image_name(image_id)),
        image_id,
        (IMAGE_SIZE, IMAGE_SIZE),
        list(map(_annotation, record["bboxes"], record["classes"])),
        [tuple(relation) for relation in record["relations"]],
    )


def _annotation(box: list[float], category: int) -> dict[str, Any]:
    """Return an annotation whose mask is its box, so that detectors with masks can be trained."""
    x0, y0, x1, y1 = box
    polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
    return {**create_annotation(box, category), "segmentation": [polygon]}
