"""Atomic writing of files."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

__all__ = ["write_atomically"]


@contextmanager
def write_atomically(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that replaces ``path`` atomically.

    The content goes to a temporary file in the same folder, which is created if necessary, and the
    temporary file is moved to ``path`` when the block ends without an error. An error or an
    interruption leaves the previous file as it was and removes the temporary one.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=folder)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes it for the owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
