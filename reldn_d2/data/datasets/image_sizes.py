"""Sizes of many images, read from their headers once and kept in a file beside them."""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from ...utils.file_io import write_atomically
from .io import Problems, cache_paths, image_size

__all__ = ["image_sizes"]

logger = logging.getLogger(__name__)

_VERSION = 1
_THREADS = 8  # reading headers waits for the disk

# by file name: bytes and modification time of the file, then its height and width
_Entries = dict[str, list[int]]


def image_sizes(image_root: str, paths: Sequence[str], what: str) -> list[tuple[int, int]]:
    """(height, width) of images in a folder, as ``detection_utils.read_image`` returns them.

    What was read is kept in ``reldn_cache/FOLDER.sizes.json`` beside the folder (in Detectron2's
    cache folder where that is read-only). An image whose length or modification time has changed is
    read again. An interrupted run keeps what it has read.

    Args:
        image_root: the folder.
        paths: of images in it.
        what: the data set, for messages.

    Raises:
        ValueError: if a file cannot be read as an image; all of them are in ``error.problems``.
    """
    if not os.path.isdir(image_root):  # a remote folder: nothing to tell a changed image by
        return [image_size(path) for path in paths]
    folder, name = os.path.split(os.path.abspath(image_root))
    places = cache_paths(folder, f"{name}.sizes.json")
    known = _read(places)
    keys = [os.path.relpath(path, image_root) for path in paths]
    stamps = _stamps(image_root, paths)
    stale = [
        number
        for number, (key, stamp) in enumerate(zip(keys, stamps, strict=True))
        if known.get(key, [])[:2] != stamp
    ]
    if stale:
        problems = Problems()

        def read(number: int) -> tuple[int, tuple[int, int] | None]:
            try:
                return number, image_size(paths[number])
            except ValueError as error:
                problems.add(str(error))
                return number, None

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                results = pool.map(read, stale)
                shown = dict(desc=f"Sizes of images of {what}", unit=" images", delay=1)
                for number, size in tqdm(results, total=len(stale), mininterval=1, **shown):
                    if size is not None:
                        known[keys[number]] = [*stamps[number], *size]
        finally:
            _write(places, known)
        problems.raise_any()
    return [(known[key][2], known[key][3]) for key in keys]


def _stamps(image_root: str, paths: Sequence[str]) -> list[list[int]]:
    """Bytes and modification time of each file."""
    stamps = []
    for path in paths:
        status = os.stat(path)
        stamps.append([status.st_size, status.st_mtime_ns])
    return stamps


def _read(places: Sequence[str]) -> _Entries:
    for path in places:
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            if content["version"] == _VERSION:
                return {key: [int(x) for x in entry] for key, entry in content["sizes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not there, or damaged: the sizes are read again
    return {}


def _write(places: Sequence[str], known: _Entries) -> None:
    for path in places:
        try:
            with write_atomically(path) as file:
                json.dump({"version": _VERSION, "sizes": known}, file, separators=(",", ":"))
            return
        except OSError:
            continue
    logger.warning(
        f"The sizes of {len(known)} images could not be kept in {' or '.join(places)}: they will "
        "be read again next time. Is the disk full or read-only?"
    )
