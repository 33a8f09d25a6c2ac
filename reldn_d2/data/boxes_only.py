"""Datasets whose boxes are used without their images, which need not exist."""

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from detectron2.data import MetadataCatalog

from ..structures.scene_graph import boxes_xyxy
from .dataset_dict import dicts_without_images
from .datasets.image_sizes import known_sizes

__all__ = [
    "add_sizes",
    "image_name",
    "load_without_images",
    "require_real_size",
    "spanned_size",
]

logger = logging.getLogger(__name__)


def load_without_images(name: str) -> list[dict[str, Any]]:
    """Return the dicts of a registered dataset without opening an image.

    ``height`` and ``width`` are missing if they are neither annotated nor cached (see
    :func:`.datasets.image_sizes.known_sizes`); :func:`add_sizes` adds them.
    """
    image_root = MetadataCatalog.get(name).get("image_root")
    dicts = dicts_without_images(name)
    dicts = [{"file_name": _expected_path(image_root, x), **x} for x in dicts]
    unsized = [index for index, record in enumerate(dicts) if not _has_size(record)]
    if not unsized or not image_root:
        return dicts
    names = [os.path.relpath(dicts[index]["file_name"], image_root) for index in unsized]
    for index, size in zip(unsized, known_sizes(image_root, names), strict=True):
        if size is not None:
            dicts[index].update(height=size[0], width=size[1])
    return dicts


def add_sizes(name: str, dicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give dicts without ``height`` and ``width`` the size that their boxes span.

    That is the largest x1 and y1 of an image's annotations and detections, rounded up. The log says
    how many images this concerns.

    Args:
        name: dataset, for the log.
        dicts: with valid annotations; not modified.

    Raises:
        ValueError: an image has detections, but its annotated boxes are not in its pixels.
    """
    for record in dicts:
        if "detections" in record:
            require_real_size(record, image_name(record))
    unsized = sum(not _has_size(record) for record in dicts)
    if not unsized:
        return list(dicts)
    logger.info(
        f"Dataset '{name}': the sizes of {unsized} of {len(dicts)} images are neither annotated "
        "nor cached. Their boxes (annotated and detected) are taken to reach to the right and the "
        "lower edge of the image."
    )
    return [_with_size(record) for record in dicts]


def require_real_size(record: dict[str, Any], where: str, given: bool = False) -> None:
    """Raise ValueError if boxes of a dict are not in pixels of the image.

    Args:
        record: the dict.
        where: image, for the message.
        given: whether they are compared with predictions for given boxes, not with detections.
    """
    if not record.get("nominal_size"):
        return
    problem = (
        f"{where}: its boxes are annotated as fractions of the image, whose size is unknown "
        "because the image does not exist"
    )
    sizes = (
        "Unpack the images (datasets/README.md), or put the cached sizes, "
        "reldn_cache/FOLDER.sizes.json, next to their folder (docs/boxes.md)"
    )
    if given:
        raise ValueError(f"{problem}, so predicted boxes in pixels do not match them. {sizes}.")
    raise ValueError(
        f"{problem}, so they cannot be compared with detected boxes. {sizes}, or use given boxes "
        "(TEST.RELATIONS.TASK prdcls or --task prdcls, without DATASETS.DETECTION_FILES_TRAIN and "
        "_TEST)."
    )


def image_name(record: dict[str, Any]) -> str:
    """Return the file name of a dict, or its image id if it has none, for messages."""
    return str(record.get("file_name", record.get("image_id", "an image")))


def spanned_size(boxes: Sequence[np.ndarray]) -> tuple[int, int]:
    """Return height and width of an image whose (R, 4) XYXY boxes reach to its lower right."""
    x1, y1 = (max([1.0, *(float(x[:, column].max(initial=0)) for x in boxes)]) for column in (2, 3))
    return math.ceil(y1), math.ceil(x1)


def _expected_path(image_root: str | None, record: dict[str, Any]) -> str:
    """Return where the image would be if its loader has not looked for it."""
    return os.path.join(image_root or "", str(record.get("image_id", "")))


def _has_size(record: dict[str, Any]) -> bool:
    return "height" in record and "width" in record


def _with_size(record: dict[str, Any]) -> dict[str, Any]:
    if _has_size(record):
        return record
    boxes = [boxes_xyxy(record.get("annotations", []))]
    if "detections" in record:
        boxes.append(record["detections"]["boxes"])
    height, width = spanned_size(boxes)
    return {**record, "height": height, "width": width}
