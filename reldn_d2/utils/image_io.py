"""Reading images of any color space, bit depth or orientation.

Detectron2's own reader keeps only one byte of 16-bit values and shows the hidden colors of
transparent pixels; a demo must handle any image that users have.
"""

import glob
import os
from collections.abc import Sequence
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

    Grayscale, palette and CMYK images are converted, 16-bit images are scaled to 8 bits,
    transparent pixels are blended with white, EXIF orientations are applied, and only the first
    frame of an animation is read.

    Raises:
        ImageError: if there is no such file, or it is not an image, or it is truncated.
    """
    try:
        with PathManager.open(str(path), "rb") as file, Image.open(file) as image:
            image.load()
            return pil_to_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: this is a folder; give the path of an image in it") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: more pixels than Pillow opens; scale it down first") from None
    except Exception as error:  # Pillow's readers fail on broken files in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        if "cannot identify" in reason:
            empty = os.path.isfile(path) and os.path.getsize(path) == 0
            reason = "the file is empty" if empty else "its content is not an image"
        raise ImageError(f"{path}: cannot be read as an image: {reason}") from None


def exif_orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation of an image; None if it has none or it cannot be read."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged EXIF blocks raise many errors, which Detectron2 ignores as well
        return None


# EXIF orientation -> the transposition that turns the image upright.
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
    """Convert a PIL image as :func:`read_rgb` does: (H, W, 3) uint8 in RGB order."""
    # Pillow's own exif_transpose rewrites all tags and fails on the unusual ones of some cameras.
    orientation = exif_orientation(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits: (H, W) gray
        values = np.asarray(image)
        high = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 65535.0
        if image.mode != "F" and values.max(initial=0) <= 255:
            high = 255.0
        gray = (values.astype(np.float64) * (255.0 / high)).round().clip(0, 255)
        return np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


def to_rgb(image: np.ndarray, channels: str = "RGB", name: str = "image") -> np.ndarray:
    """Convert an array to (H, W, 3) uint8 in RGB order.

    Args:
        image: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); uint8, uint16, bool, or floating point in
            [0, 1] or [0, 255].
        channels: order of the array's channels, "RGB" or "BGR" (OpenCV).
        name: of the image in error messages.

    Raises:
        ImageError: if it has another shape, type or order.
    """
    if channels not in ("RGB", "BGR"):
        raise ImageError(f"channels is '{channels}'; known: RGB, BGR")
    image = np.asarray(image)
    depth = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or depth not in (1, 3, 4) or 0 in image.shape:
        raise ImageError(
            f"{name}: an array of shape {image.shape} is not an image; expected (height, width) or "
            "(height, width, 1, 3 or 4)"
        )
    if image.dtype == np.uint16:
        image = (image.astype(np.float64) / 257).round()
    elif image.dtype == bool or (image.dtype.kind == "f" and image.max() <= 1.0):
        image = image.astype(np.float64) * 255
    elif image.dtype.kind not in "uif":
        raise ImageError(f"{name}: an array of type {image.dtype} is not an image")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ImageError(f"{name}: the array has values that are not finite")
    image = image.round().clip(0, 255).astype(np.uint8) if image.dtype != np.uint8 else image
    if image.ndim == 2 or depth == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    color = image[:, :, :3] if channels == "RGB" else image[:, :, 2::-1]
    if depth == 4:
        alpha = image[:, :, 3:].astype(np.float64) / 255
        color = (color * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.ascontiguousarray(color)


def expand_inputs(inputs: Sequence[str | Path]) -> list[str]:
    """List the files of paths, globs and folders in order, each once.

    A folder gives the files directly in it that have an image suffix. A path that does not exist is
    returned unchanged, so that reading it raises the error.

    Raises:
        ImageError: if a folder has no image or no file matches a glob.
    """
    files: list[str] = []
    for item in map(str, inputs):
        item = os.path.expanduser(item)
        if os.path.isdir(item):
            paths = sorted(os.path.join(item, x) for x in os.listdir(item))
            paths = [x for x in paths if x.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(x)]
            if not paths:
                raise ImageError(f"{item}: no image in this folder ({', '.join(IMAGE_SUFFIXES)})")
        elif not os.path.exists(item) and glob.has_magic(item):
            paths = sorted(x for x in glob.glob(item, recursive=True) if os.path.isfile(x))
            if not paths:
                raise ImageError(f"{item}: no file matches this pattern")
        else:
            paths = [item]
        files += paths
    return list(dict.fromkeys(files))


def distinct_paths(files: Sequence[str], folder: Path, suffix: str) -> dict[str, Path]:
    """Return an output path in ``folder`` per file; duplicate names get a suffix such as ``_2``."""
    paths: dict[str, Path] = {}
    used = set()
    for file in files:
        name, copy = Path(file).stem, 1
        while name.lower() in used:  # some file systems ignore case
            copy += 1
            name = f"{Path(file).stem}_{copy}"
        used.add(name.lower())
        paths[file] = folder / f"{name}{suffix}"
    return paths
