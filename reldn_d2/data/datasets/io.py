"""Read dataset files. Errors name the file and record and say how to fix them."""

import csv
import gc
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from iopath.common.file_io import get_cache_dir
from PIL import Image

from detectron2.utils.file_io import PathManager

from ...utils.file_io import json_problem, write_atomically
from ...utils.image_io import exif_orientation

__all__ = [
    "Problems",
    "cache_paths",
    "csv_rows",
    "image_size",
    "locate_images",
    "no_garbage_collection",
    "read_csv",
    "read_json",
    "read_names",
    "require_file",
    "write_cache",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
_SWAPS_WIDTH_AND_HEIGHT = (5, 6, 7, 8)  # EXIF orientations
_MAX_MESSAGES = 10_000
_NAME_HEADERS = ("LabelName", "RelationshipName", "AttributeName")


class Problems:
    """Collects the problems of a file, to raise them all in one error.

    Example::

        problems = Problems()
        problems.add("a.csv, line 7: ...")
        problems.raise_any()
    """

    def __init__(self, error: type[Exception] = ValueError) -> None:
        """Args:
        error: type of the error that :meth:`raise_any` raises.
        """
        self.error = error
        self.messages: list[str] = []
        self.count = 0

    def add(self, message: str) -> None:
        """Add a problem: file, record and what was expected."""
        self.count += 1
        if len(self.messages) < _MAX_MESSAGES:
            self.messages.append(message)

    def raise_any(self) -> None:
        """Raise if there is a problem: the message is the first one, ``error.problems`` has all."""
        if not self.count:
            return
        text = self.messages[0]
        if self.count > 1:
            text += (
                f"\n{self.count - 1} more problems; `python -m reldn_d2.data.check NAME` "
                "lists all problems of a registered dataset."
            )
        error = self.error(text)
        error.problems = self.messages
        raise error


def _require_path(path: str, what: str) -> str:
    """Return ``path``; raise if it does not exist.

    Args:
        path: file or folder.
        what: its content, e.g. "VRD annotations", for the message.

    Raises:
        FileNotFoundError: with the full path and ``DETECTRON2_DATASETS``.
    """
    if PathManager.exists(path):
        return path
    root = os.environ.get("DETECTRON2_DATASETS")
    variable = f"DETECTRON2_DATASETS={root}" if root else "DETECTRON2_DATASETS is not set"
    raise FileNotFoundError(
        f"{what} not found: {os.path.abspath(path)} does not exist ({variable}; built-in "
        'datasets are expected below that folder, or below "datasets" when it is not set). See '
        "datasets/README.md for what to download and where to put it."
    )


def require_file(path: str, what: str) -> str:
    """Return ``path``; raise if it does not exist (see :func:`_require_path`) or is a folder."""
    if PathManager.isdir(_require_path(path, what)):
        raise ValueError(f"{path}: expected a file ({what}), found a folder.")
    return path


def read_json(path: str, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: its content, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON in UTF-8, with the position of the error.
    """
    require_file(path, what)
    try:
        with PathManager.open(path, "rb") as file:
            # One expression, so that the bytes are freed before the text is parsed.
            text = file.read().decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_without_repeated_keys)
    except _RepeatedKey as error:
        raise ValueError(
            f"{path}: the key {error.args[0]!r:.120} occurs twice in one object, so one of the two "
            f"values would be lost ({what}). Rename or merge them."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}). Expected JSON ({what}): download the "
            "file again."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}). "
            f"The file ({what}) is truncated or damaged: fix it at that position, or download it "
            "again."
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number too long
        raise ValueError(
            f"{path}: cannot be read as JSON ({json_problem(error)}). Expected {what}."
        ) from error


class _RepeatedKey(Exception):
    """A JSON object has this key twice."""


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in result if keys.count(key) > 1))
    return result


def read_csv(
    path: str, columns: Sequence[str], what: str, problems: Problems
) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file whose first line names its columns.

    Args:
        path: the file, in UTF-8.
        columns: names of the columns to read; others are ignored.
        what: its content, for messages.
        problems: rows whose length differs from the header are added to it and skipped.

    Yields:
        Line number (the header is line 1) and the values of ``columns``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, is not UTF-8 text, or lacks a column.
    """
    rows = csv_rows(path, what)
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
                "Remove or rename all but one."
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
    """Read names by identifier from a CSV file of two columns, with or without a header line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, or a line does not have two values or repeats an identifier.
    """
    names: dict[str, str] = {}
    for line, row in csv_rows(path, what):
        if line == 1 and row[0] in _NAME_HEADERS:
            continue
        if len(row) != 2 or not row[0] or not row[1]:
            raise ValueError(
                f"{path}, line {line}: found {','.join(row)!r:.120}; expected two values, "
                f"identifier and name ({what})."
            )
        if row[0] in names:
            raise ValueError(
                f"{path}, line {line}: {row[0]} has a name already ({what}). Remove one line."
            )
        names[row[0]] = row[1]
    if not names:
        raise ValueError(f"{path}: the file has no names. Expected {what}: download it again.")
    return names


def csv_rows(path: str, what: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, values) of the lines that are not blank."""
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
                f"an uncompressed CSV file ({what}): download it again."
            ) from error
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: not a CSV file ({error}). Expected {what}: "
                "download it again."
            ) from error


def locate_images(image_root: str, names: Sequence[str], what: str) -> list[str]:
    """Return the paths of annotated images, which may have another suffix than annotated.

    Args:
        image_root: folder of the images.
        names: annotated file names.
        what: name of the dataset, for messages.

    Raises:
        FileNotFoundError: if the folder is missing or empty, or lacks images under any known
            suffix; all missing images are in the error's ``problems``.
        ValueError: if ``image_root`` is a file.
    """
    if not names:
        return []
    files = _list_images(image_root, what)
    problems = Problems(FileNotFoundError)
    paths = []
    for name in names:
        stem = os.path.splitext(name)[0]
        candidates = (name, *(stem + suffix for suffix in IMAGE_SUFFIXES))
        match = next((candidate for candidate in candidates if candidate in files), None)
        if match is not None:
            paths.append(os.path.join(image_root, match))
            continue
        problems.add(
            f"{what}: image {name} is annotated but not in {os.path.abspath(image_root)} (also "
            f"tried {', '.join(IMAGE_SUFFIXES)}). Unpack the images of the dataset again "
            "(datasets/README.md) or remove this image from the annotations."
        )
    problems.raise_any()
    return paths


def _list_images(image_root: str, what: str) -> frozenset[str]:
    """Return the names of the files in a folder of images; raise if there are none."""
    _require_path(image_root, f"The image folder of {what}")
    if not PathManager.isdir(image_root):
        raise ValueError(f"{image_root}: expected the image folder of {what}, found a file.")
    names = frozenset(PathManager.ls(image_root))
    if not names:
        raise FileNotFoundError(
            f"{os.path.abspath(image_root)}: the image folder of {what} is empty. Unpack the "
            "images into it (datasets/README.md)."
        )
    return names


def image_size(path: str) -> tuple[int, int]:
    """Return (height, width) of an image as Detectron2's ``read_image`` would.

    Only the header is read (except for PNG, where the EXIF block may follow the pixels). The EXIF
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
            f"{path}: cannot be read as an image ({error}). Unpack the images of the dataset "
            "again."
        ) from error
    return (width, height) if orientation in _SWAPS_WIDTH_AND_HEIGHT else (height, width)


def cache_paths(folder: str, name: str) -> list[str]:
    """Return where to keep a file derived from a dataset: next to it, or in Detectron2's cache.

    Args:
        folder: a folder of the dataset.
        name: name of the derived file.

    Returns:
        Paths in the order to try them.
    """
    folder = os.path.abspath(folder)
    flat = folder.strip(os.sep).replace(os.sep, "__").replace(":", "")
    paths = [os.path.join(get_cache_dir(), "reldn_d2", flat, name)]
    # Leave folders marked as read-only alone, even for root, who could write to them.
    if os.path.isdir(folder) and os.stat(folder).st_mode & stat.S_IWUSR:
        paths.insert(0, os.path.join(folder, "reldn_cache", name))
    return paths


def write_cache(paths: Sequence[str], write: Callable[[IO[bytes]], object]) -> str | None:
    """Write a file to the first of :func:`cache_paths` that can be written.

    Returns:
        Its path; None if none of them can be written.
    """
    for path in paths:
        try:
            with write_atomically(path, "wb") as file:
                write(file)
            return path
        except OSError:
            continue
    return None


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: with millions of records without cycles it doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
