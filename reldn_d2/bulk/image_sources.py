"""The images of folders, lists of paths, tar shards and Parquet files, each with a key of its own.

A key is the image's path below the folder that was given; for an image that is given by itself, the
path as written, also in a list; in a tar file ``TAR/MEMBER``; in Parquet the column ``key``, or
else the path that the column ``path`` has, or ``FILE/ROW``.
"""

import glob
import os
import posixpath
import tarfile
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..utils.image_io import IMAGE_SUFFIXES, ImageError, decode_rgb, read_rgb

__all__ = [
    "CONTAINER_SUFFIXES",
    "ImageItem",
    "ImageReader",
    "expand_sources",
    "import_parquet",
    "images_of",
    "list_images",
    "unique_images",
]

CONTAINER_SUFFIXES = (".tar", ".parquet")


class ImageItem(NamedTuple):
    """One image.

    Attributes:
        key: unique among the images of a run.
        path: of the file that holds it.
        position: offset and size in bytes of a tar file's member, its size being -1 if it cannot be
            read; or row of a Parquet file; None if the file is the image.
    """

    key: str
    path: str
    position: tuple[int, int] | int | None = None


def expand_sources(inputs: Iterable[str | Path]) -> list[str]:
    """Return the files and folders that paths and globs name, in order.

    Raises:
        ImageError: no file matches a glob.
    """
    paths = []
    for item in map(str, inputs):
        item = os.path.expanduser(item)
        found = [item]
        if glob.has_magic(item) and not os.path.exists(item):
            found = sorted(x for x in glob.glob(item, recursive=True) if os.path.isfile(x))
            if not found:
                raise ImageError(f"{item}: no file matches this pattern")
        paths += found
    return list(dict.fromkeys(paths))


def list_images(inputs: Iterable[str | Path]) -> list[ImageItem]:
    """List the images of paths, globs, folders, ``.txt`` lists, tar and Parquet files, in order.

    Raises:
        ImageError: there is no image, or two images have the same key; or as :func:`images_of`.
    """
    return unique_images(image for path in expand_sources(inputs) for image in images_of(path))


def unique_images(images: Iterable[ImageItem]) -> list[ImageItem]:
    """Return the images, each once.

    Raises:
        ImageError: two images have the same key.
    """
    by_key: dict[str, ImageItem] = {}
    places = set()
    for image in images:
        place = image.path if image.position is None else image
        if place in places:
            continue
        places.add(place)
        other = by_key.setdefault(image.key, image)
        if other is not image:
            raise ImageError(
                f"two images have the key {image.key!r} ({_place(other)}, {_place(image)}): give "
                "the folder that holds both, or rename one"
            )
    return list(by_key.values())


def _place(image: ImageItem) -> str:
    part = image.position[0] if isinstance(image.position, tuple) else image.position
    return image.path if part is None else f"{image.path} at {part}"


def images_of(path: str) -> Iterator[ImageItem]:
    """Yield the images of one file or folder; an image file itself is not looked at.

    Raises:
        ImageError: a folder or tar file has no image, a list or file cannot be read, or a Parquet
            file has neither a column ``image`` nor ``path``.
    """
    name = path.lower()
    if os.path.isdir(path):
        yield from _images_of_folder(path)
    elif name.endswith(".txt"):
        yield from _images_of_list(path)
    elif name.endswith(".tar"):
        yield from _images_of_tar(path)
    elif name.endswith(".parquet"):
        yield from _images_of_parquet(path)
    elif name.endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ImageError(f"{path}: a compressed tar file has no direct access: uncompress it first")
    else:
        yield ImageItem(path, path)


def _images_of_folder(folder: str) -> Iterator[ImageItem]:
    """Yield the files with an image suffix in a folder and its subfolders, sorted by path."""

    def stop(error: OSError) -> None:  # os.walk itself would silently skip such a folder
        raise ImageError(f"{error.filename}: this folder cannot be read: {error.strerror}")

    found, visited = False, set()
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link to a folder above or to one that was seen
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES):
                found = True
                path = os.path.join(parent, name)
                yield ImageItem(os.path.relpath(path, folder).replace(os.sep, "/"), path)
    if not found:
        raise ImageError(
            f"{folder}: no image in this folder and its subfolders ({', '.join(IMAGE_SUFFIXES)}); "
            "tar and Parquet files are given by themselves, such as 'shards/*.tar'"
        )


def _images_of_list(path: str) -> Iterator[ImageItem]:
    try:
        # Windows' editors write a mark at the start. Names may have the separators of splitlines().
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{path}: cannot be read as a list of paths in UTF-8: {error}") from None
    for line in lines:
        if line.strip():
            yield ImageItem(line, os.path.join(os.path.dirname(path), line))


def _images_of_tar(path: str) -> Iterator[ImageItem]:
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
            # tarfile also stops at a header that is cut off; a whole archive ends with zeros.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut off")
            while block := archive.fileobj.read(1 << 20):
                if block.strip(b"\0"):
                    raise tarfile.ReadError("after its end there is more, such as a second archive")
    except (OSError, tarfile.TarError) as error:
        raise ImageError(f"{path}: cannot be read as a tar file: {error}; replace it") from None
    images = [x for x in members if x.name.lower().endswith(IMAGE_SUFFIXES)]
    images = [x for x in images if x.isfile() or x.islnk() or x.issym()]
    if not images:
        raise ImageError(f"{path}: no image in this tar file ({', '.join(IMAGE_SUFFIXES)})")
    files = {posixpath.normpath(x.name): x for x in members if x.isfile()}
    for member in images:
        file = member
        if not member.isfile():  # a link, hard ones have the path in the archive
            parent = posixpath.dirname(member.name) if member.issym() else ""
            file = files.get(posixpath.normpath(posixpath.join(parent, member.linkname)))
        readable = file is not None and not file.issparse()
        place = (file.offset_data, file.size) if readable else (0, -1)
        yield ImageItem(f"{path}/{member.name}", path, place)


def import_parquet() -> Any:
    """Return the module ``pyarrow.parquet``.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Parquet needs pyarrow ({error}): pip install pyarrow") from None
    return pyarrow.parquet


def _images_of_parquet(path: str) -> Iterator[ImageItem]:
    parquet = import_parquet()
    try:
        with parquet.ParquetFile(path) as file:
            names = [x for x in ("key", "path") if x in file.schema_arrow.names]
            has_pixels, count = "image" in file.schema_arrow.names, file.metadata.num_rows
            columns = {name: file.read(columns=[name])[name].to_pylist() for name in names}
    except (OSError, ValueError) as error:  # pyarrow's errors are of these types
        reason = " ".join(str(error).split())
        raise ImageError(f"{path}: cannot be read as Parquet: {reason}; replace it") from None
    if not has_pixels and "path" not in columns:
        raise ImageError(
            f"{path}: there is neither a column 'image' (content of an image file) nor 'path'"
        )
    for name, values in columns.items():
        if None in values:
            raise ImageError(f"{path}: row {values.index(None)} has no {name}")
    for row in range(count):
        file_name = None if has_pixels else str(columns["path"][row])
        key = columns["key"][row] if "key" in columns else file_name or f"{path}/{row}"
        if has_pixels:
            yield ImageItem(str(key), path, row)
        else:
            yield ImageItem(str(key), os.path.join(os.path.dirname(path), file_name))


class ImageReader:
    """Reads the pixels of images; fastest in the order in which they are listed."""

    def __init__(self):
        self._rows: _ParquetRows | None = None

    def __call__(self, image: ImageItem) -> np.ndarray:
        """Return an image as :func:`reldn_d2.utils.image_io.read_rgb` does.

        Raises:
            ImageError: it cannot be read, or its path cannot be written as UTF-8.
        """
        try:
            f"{image.key}{image.path}".encode()
        except UnicodeEncodeError:
            raise ImageError(f"{image.path!r}: this path is not UTF-8; rename it") from None
        if image.position is None:
            return read_rgb(image.path)
        try:
            content = self._read_part(image)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ImageError(f"{image.key}: {image.path} cannot be read: {reason}") from None
        return decode_rgb(content, image.key)

    def _read_part(self, image: ImageItem) -> bytes:
        if isinstance(image.position, tuple):
            offset, size = image.position
            if size < 0:
                raise ValueError("this member is sparse, or a link to a file that is not in it")
            with open(image.path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        if self._rows is None or self._rows.path != image.path:
            self._rows = _ParquetRows(image.path)
        return self._rows[image.position]


class _ParquetRows:
    """The column ``image`` of a Parquet file; few rows are in memory if they are read in order."""

    def __init__(self, path: str):
        self.path = path
        self._file = import_parquet().ParquetFile(path)
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])[:-1].tolist()  # first row of each row group
        self._group = -1
        self._first = 0  # row of self._values[0]
        self._values: Sequence[Any] = ()
        self._batches: Iterator[Any] = iter(())

    def __getitem__(self, row: int) -> bytes:
        """Return the content of a row's image file.

        Raises:
            ValueError: the row has none.
        """
        group = bisect(self._starts, row) - 1
        if group != self._group or row < self._first:
            self._group, self._first, self._values = group, self._starts[group], ()
            self._batches = self._file.iter_batches(16, row_groups=[group], columns=["image"])
        while row >= self._first + len(self._values):
            self._first += len(self._values)
            self._values = next(self._batches)["image"].to_pylist()
        value = self._values[row - self._first]
        if isinstance(value, dict):  # the image type of Hugging Face's datasets
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise ValueError(f"row {row} of the column 'image' has no content of an image file")
        return value
