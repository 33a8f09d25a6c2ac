"""The one reader of images, for training, evaluation, prediction and the check of a dataset.

It takes images of any color space, bit depth or orientation. Ordinary 8-bit images give exactly the
pixels of Detectron2's ``read_image``, which checkpoints were trained with; that reader clips 16-bit
and floating-point values and shows the hidden colors of transparent pixels.
"""

import glob
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image

from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager

__all__ = [
    "IMAGE_SUFFIXES",
    "ONE_IMAGE",
    "ImageError",
    "OneImage",
    "decode_rgb",
    "distinct_paths",
    "exif_orientation",
    "expand_inputs",
    "from_rgb",
    "load_rgb",
    "pil_to_rgb",
    "read_image",
    "read_rgb",
    "to_rgb",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

ONE_IMAGE = (str, Path, np.ndarray, Image.Image)
OneImage = Union[ONE_IMAGE]  # what load_rgb takes

_EXIF_ORIENTATION = 274


class ImageError(ValueError):
    """An image that cannot be used; the message is one line and names the file."""


def read_image(path: str | Path, image_format: str) -> np.ndarray:
    """Read a file with :func:`read_rgb` as (H, W, C) in ``cfg.INPUT.FORMAT``."""
    return from_rgb(read_rgb(path), image_format)


def from_rgb(rgb: np.ndarray, image_format: str) -> np.ndarray:
    """Convert (H, W, 3) uint8 in RGB order to a format.

    Args:
        rgb: the image.
        image_format: "BGR", "RGB" or any other that Detectron2's ``read_image`` knows.

    Returns:
        (H, W, C) uint8; floating point for "YUV-BT.601".
    """
    if image_format in ("BGR", "RGB"):
        return rgb[:, :, ::-1] if image_format == "BGR" else rgb
    return convert_PIL_to_numpy(Image.fromarray(rgb), image_format)


def read_rgb(path: str | Path) -> np.ndarray:
    """Read a file as (H, W, 3) uint8 in RGB order.

    Grayscale, palette and CMYK images are converted, images of more than 8 bits are scaled as in
    :func:`to_rgb`, transparent pixels are blended with white, EXIF orientations are applied, and
    only the first frame of an animation is read.

    Raises:
        ImageError: if there is no such file, or it is not an image, is truncated or has more pixels
            than Pillow opens.
    """
    with (
        _explain_unreadable(str(path)),
        PathManager.open(str(path), "rb") as file,
        Image.open(file) as image,
    ):
        image.load()
        return pil_to_rgb(image, str(path))


def decode_rgb(data: bytes, name: str) -> np.ndarray:
    """Decode the content of an image file as :func:`read_rgb` does.

    Args:
        data: content of the file.
        name: of the image, for messages.

    Raises:
        ImageError: as :func:`read_rgb`.
    """
    with _explain_unreadable(name):
        if not data:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return pil_to_rgb(image, name)


@contextmanager
def _explain_unreadable(path: str) -> Iterator[None]:
    """Turn the errors of reading an image into an ImageError that starts with its path."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: this is a folder; give the path of an image in it") from None
    except Image.DecompressionBombError:
        # Pillow itself refuses images of twice its MAX_IMAGE_PIXELS.
        limit = f"{2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        raise ImageError(
            f"{path}: the image has more than {limit}, the most that Pillow opens: scale it (and "
            "its boxes) down, or cut it into parts"
        ) from None
    except Exception as error:  # Pillow's readers fail on broken files in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        if "cannot identify" in reason:
            empty = os.path.isfile(path) and os.path.getsize(path) == 0
            reason = "the file is empty" if empty else "its content is not an image"
        raise ImageError(
            f"{path}: cannot be read as an image: {reason}; replace the file"
        ) from None


def load_rgb(image: OneImage, channels: str = "RGB", name: str = "image") -> np.ndarray:
    """Read a path, an array or a PIL image as (H, W, 3) uint8 in RGB order.

    Raises:
        ImageError: the image cannot be used; the message starts with the path or ``name``.
    """
    if isinstance(image, (str, Path)):
        return read_rgb(image)
    if isinstance(image, Image.Image):
        return pil_to_rgb(image, name)
    if not isinstance(image, np.ndarray):
        raise ImageError(
            f"{name}: a {type(image).__name__} is not an image; give a path, an (H, W, 3) numpy "
            "array or a PIL image"
        )
    return to_rgb(image, channels, name)


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


def pil_to_rgb(image: Image.Image, name: str = "image") -> np.ndarray:
    """Convert a PIL image as :func:`read_rgb` does: (H, W, 3) uint8 in RGB order.

    Raises:
        ImageError: it cannot be decoded, or has values that are not finite; the message starts
            with ``name``.
    """
    try:
        image.load()
    except Exception as error:  # as in read_rgb: an image that was opened, but not decoded yet
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: cannot be read as an image: {reason}") from None
    # Pillow's own exif_transpose rewrites all tags and fails on the unusual ones of some cameras.
    orientation = exif_orientation(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits: (H, W) gray
        return to_rgb(np.asarray(image), name=name)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


def to_rgb(image: np.ndarray, channels: str = "RGB", name: str = "image") -> np.ndarray:
    """Convert an array to (H, W, 3) uint8 in RGB order.

    Args:
        image: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); bool, or integers or floating-point
            numbers in [0, 255], in [0, 65535], or (floating point) in [0, 1]. The largest value
            tells which; small excesses are clipped.
        channels: order of the array's channels, "RGB" or "BGR" (OpenCV).
        name: of the image in error messages.

    Raises:
        ImageError: if it has another shape, type, range or order.
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
    if image.dtype.kind not in "buif":
        raise ImageError(f"{name}: an array of type {image.dtype} is not an image")
    if image.dtype != np.uint8:
        image = _to_8_bits(image, name)
    if image.ndim == 2 or depth == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    color = image[:, :, :3] if channels == "RGB" else image[:, :, 2::-1]
    if depth == 4:
        alpha = image[:, :, 3:].astype(np.float64) / 255
        color = (color * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.ascontiguousarray(color)


def _to_8_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Scale an array to uint8; its largest value tells whether white is 1, 255 or 65535."""
    if not np.isfinite(values).all():
        raise ImageError(f"{name}: the image has values that are not finite; remove them first")
    high = values.max()
    if high > 65535:
        raise ImageError(
            f"{name}: the image has values up to {high:g}; scale them to [0, 255] or [0, 65535]"
        )
    # Interpolated images overshoot their range a little, except for those stored in 16 bits.
    if values.dtype == bool or (values.dtype.kind == "f" and high <= 1.01):
        white = 1.0
    elif high <= (255 if values.dtype == np.uint16 else 510):
        white = 255.0
    else:
        white = 65535.0
    return (values.astype(np.float64) * (255.0 / white)).round().clip(0, 255).astype(np.uint8)


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
