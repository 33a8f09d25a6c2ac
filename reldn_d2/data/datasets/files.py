"""Reading data set files: every failure names the file, the record and the mend."""

import json
import os
from collections.abc import Set
from typing import Any

from PIL import Image

from detectron2.utils.file_io import PathManager

__all__ = ["find_image", "image_size", "read_json", "require_path"]

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
_EXIF_ORIENTATION = 274
_EXIF_TURNED = (5, 6, 7, 8)


def require_path(path: str, what: str) -> str:
    """Return ``path`` or raise if nothing is there.

    Args:
        path: file or folder.
        what: what it should be, e.g. "VRD annotations", for the message.

    Raises:
        FileNotFoundError: with the full path and the variable that the path comes from.
    """
    if PathManager.exists(path):
        return path
    root = os.environ.get("DETECTRON2_DATASETS")
    variable = f"DETECTRON2_DATASETS={root}" if root else "DETECTRON2_DATASETS is not set"
    raise FileNotFoundError(
        f"{what} not found: {os.path.abspath(path)} does not exist ({variable}; the built-in data "
        'sets are looked for below that folder, or below "datasets" when it is not set). '
        "datasets/README.md says what to download and how to lay it out."
    )


def read_json(path: str, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what it should be, for the message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON in UTF-8, with the place where reading stopped.
    """
    require_path(path, what)
    try:
        with PathManager.open(path, "rb") as file:
            return json.loads(file.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}). Expected JSON ({what}): download the "
            "file again."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}). "
            f"The file of the {what} is truncated or damaged: download it again."
        ) from error


def find_image(image_root: str, name: str, listing: Set[str], what: str) -> str:
    """Path of an image, also where its suffix is not the annotated one.

    Args:
        image_root: folder of the images.
        name: annotated file name.
        listing: names of the files in ``image_root``.
        what: the data set, for the message.

    Raises:
        FileNotFoundError: if the image is not there under any known suffix.
    """
    stem = os.path.splitext(name)[0]
    for candidate in (name, *(stem + suffix for suffix in _IMAGE_SUFFIXES)):
        if candidate in listing:
            return os.path.join(image_root, candidate)
    raise FileNotFoundError(
        f"{what}: image {name} is annotated but not in {os.path.abspath(image_root)} (also tried "
        f"{', '.join(_IMAGE_SUFFIXES)}). Unpack the images of the data set again "
        "(datasets/README.md) or remove this image from the annotations."
    )


def image_size(path: str) -> tuple[int, int]:
    """(height, width) of an image as ``detectron2.data.detection_utils.read_image`` returns it.

    Only the header is read (PNG excepted, whose EXIF block stands behind the pixels); the EXIF
    orientation is applied.

    Raises:
        ValueError: if the file cannot be read as an image.
    """
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            width, height = image.size
            orientation = _exif_orientation(image)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read as an image ({error}). Unpack the images of the data set "
            "again."
        ) from error
    return (width, height) if orientation in _EXIF_TURNED else (height, width)


def _exif_orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # Damaged EXIF blocks raise all sorts; Detectron2 ignores them likewise.
        return None
