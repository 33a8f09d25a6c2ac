"""Writing files atomically."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["write_atomically", "write_results"]


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
        OSError: if the file cannot be written.
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
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            os.unlink(temporary)
        raise


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write ``{task: {metric: value}}`` as JSON, with null for NaN (metrics without any case)."""
    with write_atomically(path) as file:
        json.dump(_null_for_nan(results), file, indent=2)


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(x) for key, x in value.items()}
    return None if value != value else value
