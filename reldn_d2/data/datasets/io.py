"""Reading data set files: every failure names the file, the record and the mend."""

import csv
import gc
import json
import os
import stat
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

from iopath.common.file_io import get_cache_dir
from PIL import Image

from detectron2.utils.file_io import PathManager

from ...utils.image_io import exif_orientation

__all__ = [
    "Problems",
    "cache_paths",
    "find_image",
    "find_images",
    "image_size",
    "list_images",
    "no_garbage_collection",
    "read_csv",
    "read_json",
    "read_names",
    "require_file",
    "require_path",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
_EXIF_TURNED = (5, 6, 7, 8)
_KEPT_PROBLEMS = 10_000
_NAME_HEADERS = ("LabelName", "RelationshipName", "AttributeName")


class Problems:
    """Collects what is wrong with the records of a file, to raise it all at once.

    Example::

        problems = Problems()
        problems.add("a.csv, line 7: ...")
        problems.raise_any()
    """

    def __init__(self, error: type[Exception] = ValueError) -> None:
        """Args:
        error: what :meth:`raise_any` raises.
        """
        self.error = error
        self.messages: list[str] = []
        self.count = 0

    def add(self, message: str) -> None:
        """Note a problem: file, record, what was expected."""
        self.count += 1
        if len(self.messages) < _KEPT_PROBLEMS:
            self.messages.append(message)

    def raise_any(self) -> None:
        """Raise if there is a problem: the first one as text, all as ``error.problems``."""
        if not self.count:
            return
        text = self.messages[0]
        if self.count > 1:
            text += (
                f"\n{self.count - 1} more problems were found; "
                "`python -m reldn_d2.data.check NAME` lists those of a registered data set."
            )
        error = self.error(text)
        error.problems = self.messages
        raise error


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


def require_file(path: str, what: str) -> str:
    """As :func:`require_path`; a folder is no file."""
    if PathManager.isdir(require_path(path, what)):
        raise ValueError(f"{path}: a folder, expected a file: {what}.")
    return path


def read_json(path: str, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what it should be, for the message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON in UTF-8, with the place where reading stopped.
    """
    require_file(path, what)
    try:
        with PathManager.open(path, "rb") as file:
            # One expression, so that the bytes are given back before the text is parsed.
            text = file.read().decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_without_repeated_keys)
    except _RepeatedKey as error:
        raise ValueError(
            f"{path}: the key {error.args[0]!r:.120} stands twice in one object, so that one of "
            f"the two values would be lost ({what}). Rename or merge them."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}). Expected JSON ({what}): download the "
            "file again."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}). "
            f"The file ({what}) is truncated or damaged: mend it there, or download it again."
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number too long
        raise ValueError(f"{path}: cannot be read as JSON ({error}). Expected {what}.") from error


class _RepeatedKey(Exception):
    """Of a JSON object."""


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in result if keys.count(key) > 1))
    return result


def read_csv(
    path: str, columns: Sequence[str], what: str, problems: Problems
) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file whose first line names its columns.

    Args:
        path: the file, in UTF-8.
        columns: names of the columns that are wanted; others are ignored.
        what: what the file should be, for messages.
        problems: rows of another length than the header are added to it and left out.

    Yields:
        Line number (the header is line 1) and the values of ``columns``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, is no text in UTF-8, or lacks a column.
    """
    rows = _csv_rows(path, what)
    _, header = next(rows, (1, None))
    if header is None:
        raise ValueError(
            f"{path}: the file is empty. Expected {what}, with the columns {', '.join(columns)}: "
            "download it again."
        )
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(
            f"{path}, line 1: no column {', '.join(missing)} for {what}; the columns are "
            f"{', '.join(header)!r:.200}. Is it the right file? Expected {', '.join(columns)}."
        )
    for column in columns:
        if header.count(column) > 1:
            raise ValueError(
                f"{path}, line 1: {header.count(column)} columns are called {column} ({what}). "
                "Which one is meant? Remove or rename the others."
            )
    indices = [header.index(column) for column in columns]
    for line, row in rows:
        if len(row) != len(header):
            problems.add(
                f"{path}, line {line}: {len(row)} values, expected {len(header)} as in the header "
                "(line 1). The file is truncated or was edited: download it again."
            )
            continue
        yield line, [row[index] for index in indices]


def read_names(path: str, what: str) -> dict[str, str]:
    """Names by identifier from a CSV file of two columns, with or without a header line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, or a line does not have two values or repeats an identifier.
    """
    names: dict[str, str] = {}
    for line, row in _csv_rows(path, what):
        if line == 1 and row[0] in _NAME_HEADERS:
            continue
        if len(row) != 2 or not row[0] or not row[1]:
            raise ValueError(
                f"{path}, line {line}: found {','.join(row)!r:.120}; expected two values, "
                f"identifier and name ({what})."
            )
        if row[0] in names:
            raise ValueError(
                f"{path}, line {line}: {row[0]} was named before ({what}). Remove one of the lines."
            )
        names[row[0]] = row[1]
    if not names:
        raise ValueError(f"{path}: no names in it. Expected {what}: download the file again.")
    return names


def _csv_rows(path: str, what: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, values) of the lines that are not blank."""
    require_file(path, what)
    with PathManager.open(path, "r", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, after line {reader.line_num}: not UTF-8 text ({error.reason}). Expected "
                f"a CSV file ({what}), not compressed: download it again."
            ) from error
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: not a CSV file ({error}). Expected {what}: "
                "download it again."
            ) from error


def list_images(image_root: str, what: str) -> Set[str]:
    """Names of the files in a folder of images.

    Args:
        image_root: the folder.
        what: the data set, for messages.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing in it.
        ValueError: if it is a file.
    """
    require_path(image_root, f"The image folder of {what}")
    if not PathManager.isdir(image_root):
        raise ValueError(f"{image_root}: a file, expected the folder of the images of {what}.")
    names = frozenset(PathManager.ls(image_root))
    if not names:
        raise FileNotFoundError(
            f"{os.path.abspath(image_root)}: the image folder of {what} is empty. Unpack the "
            "images into it (datasets/README.md)."
        )
    return names


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
    if name in listing:
        return os.path.join(image_root, name)
    stem = os.path.splitext(name)[0]
    for candidate in (stem + suffix for suffix in IMAGE_SUFFIXES):
        if candidate in listing:
            return os.path.join(image_root, candidate)
    raise FileNotFoundError(
        f"{what}: image {name} is annotated but not in {os.path.abspath(image_root)} (also tried "
        f"{', '.join(IMAGE_SUFFIXES)}). Unpack the images of the data set again "
        "(datasets/README.md) or remove this image from the annotations."
    )


def find_images(image_root: str, names: Sequence[str], what: str) -> list[str]:
    """Paths of images, see :func:`find_image`.

    Raises:
        FileNotFoundError: if the folder is not there or empty, or lacks images; all of them are in
            the error's ``problems``.
    """
    listing = list_images(image_root, what) if names else frozenset()
    problems = Problems(FileNotFoundError)
    paths = []
    for name in names:
        try:
            paths.append(find_image(image_root, name, listing, what))
        except FileNotFoundError as error:
            problems.add(str(error))
    problems.raise_any()
    return paths


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
            orientation = exif_orientation(image)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: cannot be read as an image ({error}). Unpack the images of the data set "
            "again."
        ) from error
    return (width, height) if orientation in _EXIF_TURNED else (height, width)


def cache_paths(folder: str, name: str) -> list[str]:
    """Where a file derived from a data set may be kept: beside it, or in Detectron2's cache.

    Args:
        folder: a folder of the data set.
        name: of the derived file.

    Returns:
        Paths in the order in which they are tried.
    """
    folder = os.path.abspath(folder)
    flat = folder.strip(os.sep).replace(os.sep, "__").replace(":", "")
    paths = [os.path.join(get_cache_dir(), "reldn_d2", flat, name)]
    # A folder that is marked as read-only stays as it is, also for root, who could write.
    if os.path.isdir(folder) and os.stat(folder).st_mode & stat.S_IWUSR:
        paths.insert(0, os.path.join(folder, "reldn_cache", name))
    return paths


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Millions of records without cycles are made: looking for cycles doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
