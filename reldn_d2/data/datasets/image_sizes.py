"""Read the sizes of many images from their headers, and cache them next to the images."""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from .io import IMAGE_SUFFIXES, Problems, cache_paths, image_size, write_cache

__all__ = ["image_sizes", "known_sizes"]

logger = logging.getLogger(__name__)

_VERSION = 1
_THREADS = 8  # reading headers is limited by the disk

# by file name: size in bytes and modification time of the file, height and width of the image
_Entries = dict[str, list[int]]


def image_sizes(image_root: str, paths: Sequence[str], what: str) -> list[tuple[int, int]]:
    """Return (height, width) of images in a folder, as Detectron2's ``read_image`` would.

    Sizes are cached in ``reldn_cache/FOLDER.sizes.json`` next to the folder (in Detectron2's cache
    folder if that is read-only). An image is read again when its file size or modification time
    has changed. An interrupted run keeps the sizes that it has read.

    Args:
        image_root: the folder.
        paths: paths of images in it.
        what: name of the dataset, for messages.

    Raises:
        ValueError: if a file cannot be read as an image; all of them are in ``error.problems``.
    """
    if not os.path.isdir(image_root):  # remote: changed images could not be recognized
        return [image_size(path) for path in paths]
    cache_files = _cache_files(image_root)
    sizes = _read(cache_files)
    keys = [os.path.relpath(path, image_root) for path in paths]
    stamps = _stamps(paths)
    stale = [
        index
        for index, (key, stamp) in enumerate(zip(keys, stamps, strict=True))
        if sizes.get(key, [])[:2] != stamp
    ]
    if stale:
        problems = Problems()

        def read(index: int) -> tuple[int, tuple[int, int] | None]:
            try:
                return index, image_size(paths[index])
            except ValueError as error:
                problems.add(str(error))
                return index, None

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                results = pool.map(read, stale)
                progress = dict(desc=f"Sizes of images of {what}", unit=" images", delay=1)
                for index, size in tqdm(results, total=len(stale), mininterval=1, **progress):
                    if size is not None:
                        sizes[keys[index]] = [*stamps[index], *size]
        finally:
            _write(cache_files, sizes)
        problems.raise_any()
    return [(sizes[key][2], sizes[key][3]) for key in keys]


def known_sizes(image_root: str, names: Sequence[str]) -> list[tuple[int, int] | None]:
    """Return the (height, width) that :func:`image_sizes` has cached, without opening an image.

    The images need not exist any more. The size of one that has changed since is not used.

    Args:
        image_root: the folder.
        names: annotated file names; an image may have been cached under another suffix.

    Returns:
        None for an image whose size is unknown.
    """
    sizes = _read(_cache_files(image_root)) if "://" not in image_root else {}
    known: list[tuple[int, int] | None] = []
    for name in names if sizes else ():
        stem = os.path.splitext(name)[0]
        keys = [name, *(stem + suffix for suffix in IMAGE_SUFFIXES)]
        key = next((x for x in keys if len(sizes.get(x, ())) == 4), None)
        path = None if key is None else os.path.join(image_root, key)
        changed = path and os.path.exists(path) and _stamps([path]) != [sizes[key][:2]]
        known.append(None if key is None or changed else (sizes[key][2], sizes[key][3]))
    return known or [None] * len(names)


def _cache_files(image_root: str) -> list[str]:
    folder, name = os.path.split(os.path.abspath(image_root))
    return cache_paths(folder, f"{name}.sizes.json")


def _stamps(paths: Sequence[str]) -> list[list[int]]:
    """Return size in bytes and modification time of each file."""
    return [[status.st_size, status.st_mtime_ns] for status in map(os.stat, paths)]


def _read(cache_files: Sequence[str]) -> _Entries:
    for path in cache_files:
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            if content["version"] == _VERSION:
                return {key: [int(x) for x in entry] for key, entry in content["sizes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # missing or damaged: the sizes are read again
    return {}


def _write(cache_files: Sequence[str], sizes: _Entries) -> None:
    content = json.dumps({"version": _VERSION, "sizes": sizes}, separators=(",", ":"))
    if write_cache(cache_files, lambda file: file.write(content.encode())) is None:
        logger.warning(
            f"Could not cache the sizes of {len(sizes)} images in {' or '.join(cache_files)}: they "
            "will be read again next time. Is the disk full or read-only?"
        )
