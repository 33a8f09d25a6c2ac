"""Writing files atomically, and the reason why a file cannot be read."""

import errno
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = [
    "check_writable",
    "check_writable_folder",
    "json_problem",
    "write_atomically",
    "write_results",
]

# The disk or the user's quota is full, or the file has reached the size limit of the process.
FULL_DISK = tuple(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)
)


@contextmanager
def write_atomically(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that replaces ``path`` atomically.

    The content goes to a temporary file in the same folder, which is created if necessary. The
    temporary file replaces ``path`` when the block ends without an error; it keeps the permissions
    of a file that it replaces. After an error or an interruption the previous file is unchanged
    and the temporary file is gone. A symbolic link is followed. A device or pipe, such as
    ``/dev/stdout``, cannot be replaced and is written directly.

    Args:
        path: of the file.
        mode: "w" for text in UTF-8, "wb" for bytes.

    Raises:
        ValueError: if the mode is another one.
        IsADirectoryError: if ``path`` is a folder.
        OSError: if the file cannot be written; the message names it, also if the disk is full.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode is '{mode}'; known: w, wb")
    encoding = None if "b" in mode else "utf-8"
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, encoding=encoding) as file:  # raises if it is a folder
            yield file
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut may leave an empty file under `path`
        if os.path.exists(path):
            os.chmod(temporary, os.stat(path).st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to report
            os.unlink(temporary)
        no_space = _find_full_disk(error)
        if no_space is not None:
            raise OSError(no_space.errno, no_space.strerror, path) from None
        if isinstance(error, OSError) and error.filename == temporary:
            error.filename, error.filename2 = path, None
        raise


def _find_full_disk(error: BaseException | None) -> OSError | None:
    """Return the error that says that the disk is full; ``torch.save`` hides it behind another."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            return error
        error = error.__context__
    return None


def check_writable(path: str | Path) -> None:
    """Check before long work that its output can be written to ``path``; leaves nothing behind.

    Raises:
        IsADirectoryError: if ``path`` is a folder.
        OSError: if the file cannot be written; the message names it.
    """
    path = os.path.realpath(path)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "this is a folder, not a file to write", path)
    if not os.path.exists(path) or os.path.isfile(path):  # not a device or a pipe
        check_writable_folder(os.path.dirname(path))


def check_writable_folder(folder: str | Path) -> None:
    """Check that files can be created in a folder, or in one that could be created there.

    Raises:
        OSError: if not; the message names the folder.
    """
    folder = os.path.abspath(folder)
    existing = folder
    while not os.path.lexists(existing) and os.path.dirname(existing) != existing:
        existing = os.path.dirname(existing)
    try:  # permissions alone do not tell: the disk may be full or read-only
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, folder) from None


def json_problem(error: Exception) -> str:
    """Return why ``json`` cannot read a text, in the same words with every Python."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write ``{task: {metric: value}}`` as JSON, with null for NaN (metrics without any case)."""
    with write_atomically(path) as file:
        json.dump(_null_for_nan(results), file, indent=2)


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(x) for key, x in value.items()}
    return None if value != value else value
