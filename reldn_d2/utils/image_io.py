"""Images from files, whatever their colour space, depth or orientation.

Detectron2's own reader keeps the first byte of 16-bit files and lets transparent pixels show what
lies under them; a demo must take what users have.
"""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from detectron2.utils.file_io import PathManager

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageError",
    "distinct_paths",
    "exif_orientation",
    "expand_inputs",
    "pil_to_rgb",
    "read_rgb",
    "to_rgb",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


_EXIF_ORIENTATION = 274


class ImageError(ValueError):
    """An image that cannot be used; the message is one line and names the file."""


def read_rgb(path: str | Path) -> np.ndarray:
    """Read a file as (H, W, 3) uint8 in RGB order.

    Greyscale, palette and CMYK files are converted, 16-bit ones scaled to 8 bits, transparent
    pixels laid on white, EXIF orientations applied; of an animation the first frame is taken.

    Raises:
        ImageError: there is no such file, or it is not an image, or it is cut off.
    """
    try:
        with PathManager.open(str(path), "rb") as file, Image.open(file) as image:
            image.load()
            return pil_to_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: this is a folder; name an image in it") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: more pixels than Pillow opens; scale it down first") from None
    except Exception as error:  # Pillow's readers stumble over broken files in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        if "cannot identify" in reason:
            empty = os.path.isfile(path) and os.path.getsize(path) == 0
            reason = "the file is empty" if empty else "its content is not that of an image"
        raise ImageError(f"{path}: cannot be read as an image: {reason}") from None


def exif_orientation(image: Image.Image) -> int | None:
    """The EXIF orientation of an image; None if it has none that can be read."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # Damaged EXIF blocks raise all sorts; Detectron2 ignores them likewise.
        return None


# What brings an image with this EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def pil_to_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image as :func:`read_rgb` reads it: (H, W, 3) uint8 in RGB order."""
    # Pillow's own exif_transpose writes all tags anew and fails on odd ones of some cameras.
    orientation = exif_orientation(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits: (H, W) grey
        values = np.asarray(image)
        high = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 65535.0
        if image.mode != "F" and values.max(initial=0) <= 255:
            high = 255.0
        grey = (values.astype(np.float64) * (255.0 / high)).round().clip(0, 255)
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


def to_rgb(image: np.ndarray, channels: str = "RGB", name: str = "image") -> np.ndarray:
    """An array of the caller's as (H, W, 3) uint8 in RGB order.

    Args:
        image: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); uint8, uint16, bool, or floating point in
            [0, 1] or [0, 255].
        channels: "RGB" or "BGR" (OpenCV), the order of the caller's channels.
        name: for messages.

    Raises:
        ImageError: another shape, type or order.
    """
    if channels not in ("RGB", "BGR"):
        raise ImageError(f"channels is '{channels}'; known: RGB, BGR")
    image = np.asarray(image)
    depth = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or depth not in (1, 3, 4) or 0 in image.shape:
        raise ImageError(
            f"{name}: an array of shape {image.shape} is no image; expected (height, width) or "
            "(height, width, 1, 3 or 4)"
        )
    if image.dtype == np.uint16:
        image = (image.astype(np.float64) / 257).round()
    elif image.dtype == bool or (image.dtype.kind == "f" and image.max() <= 1.0):
        image = image.astype(np.float64) * 255
    elif image.dtype.kind not in "uif":
        raise ImageError(f"{name}: an array of type {image.dtype} is no image")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ImageError(f"{name}: the array holds numbers that are not finite")
    image = image.round().clip(0, 255).astype(np.uint8) if image.dtype != np.uint8 else image
    if image.ndim == 2 or depth == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    color = image[:, :, :3] if channels == "RGB" else image[:, :, 2::-1]
    if depth == 4:
        alpha = image[:, :, 3:].astype(np.float64) / 255
        color = (color * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.ascontiguousarray(color)


def expand_inputs(inputs: Sequence[str | Path]) -> list[str]:
    """Files behind paths, globs and folders, in order, each once.

    Folders give the files in them (not in folders below) that have an image's suffix. A name that
    does not exist is given back as it is, for its reader to complain about.

    Raises:
        ImageError: a folder or a glob without any image.
    """
    files: list[str] = []
    for item in map(str, inputs):
        item = os.path.expanduser(item)
        if os.path.isdir(item):
            found = _with_image_suffix(sorted(os.path.join(item, x) for x in os.listdir(item)))
            if not found:
                raise ImageError(f"{item}: no image in this folder ({', '.join(IMAGE_SUFFIXES)})")
        elif not os.path.exists(item) and glob.has_magic(item):
            found = sorted(x for x in glob.glob(item, recursive=True) if os.path.isfile(x))
            if not found:
                raise ImageError(f"{item}: no file matches this pattern")
        else:
            found = [item]
        files += found
    return list(dict.fromkeys(files))


def distinct_paths(files: Sequence[str], folder: Path, suffix: str) -> dict[str, Path]:
    """A path in the folder for each file; equal names from different folders get a number."""
    paths: dict[str, Path] = {}
    used = set()
    for file in files:
        name, number = Path(file).stem, 1
        while name.lower() in used:
            number += 1
            name = f"{Path(file).stem}_{number}"
        used.add(name.lower())
        paths[file] = folder / f"{name}{suffix}"
    return paths


def _with_image_suffix(paths: Iterable[str]) -> list[str]:
    return [x for x in paths if x.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(x)]
