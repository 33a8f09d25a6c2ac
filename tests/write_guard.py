"""Finds what tests write outside their temporary folders.

Python reports its own writes through audit events, with the test that is running. New files in the
home folder and in those of installed packages are found by listing them, so those of child
processes as well.
"""

import os
import sys
import sysconfig
import tempfile
from pathlib import Path

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Arguments of audit events: index of the path that changes, and of the folder it is relative to.
_CHANGES = {
    "os.mkdir": (0, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.truncate": (0, None),
    "os.rename": (1, 3),
    "os.link": (1, 3),
    "os.symlink": (1, 2),
}
_CACHES = {"__pycache__", ".pytest_cache", ".hypothesis"}  # of Python and of the test tools


class WriteGuard:
    """Collects the paths that this process changes.

    Args:
        home: home folder of child processes.

    Attributes:
        allowed: folders in which everything may be written.
        found: paths outside of them that were written to.
    """

    def __init__(self, home: str) -> None:
        self._home = home
        self.allowed = [os.path.realpath(x) for x in (tempfile.gettempdir(), "/dev", "/proc")]
        self.found: list[str] = []
        self._listed = self._list()

    def start(self) -> None:
        """Watch this process until it ends; audit hooks cannot be removed."""
        sys.addaudithook(self._hook)

    def take(self) -> list[str]:
        """Return the paths found since the last call."""
        found, self.found = self.found, []
        now = self._list()
        found += sorted(now - self._listed)
        self._listed = now
        return found

    def _list(self) -> set[str]:
        # Hidden folders are caches of programs, such as rustc, whose version pip asks for.
        return _installed_files() | {str(x) for x in Path(self._home).glob("[!.]*")}

    def _hook(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if flags & _WRITING == 0:
                return
        elif event in _CHANGES:
            position, folder = _CHANGES[event]
            path = arguments[position]
            if folder is not None and arguments[folder] not in (-1, None):
                return  # relative to an open folder, whose name is not known
            if event == "os.mkdir" and os.path.isdir(path):
                return  # nothing changes
        else:
            return
        if isinstance(path, (str, bytes, os.PathLike)):
            self._note(os.path.abspath(os.fsdecode(path)))

    def _note(self, path: str) -> None:
        if not _CACHES.isdisjoint(path.split(os.sep)):
            return
        for name in (path, os.path.realpath(path)):
            if any(name == x or name.startswith(x + os.sep) for x in self.allowed):
                return
        self.found.append(path)


def _installed_files() -> set[str]:
    """Return the files and folders in site-packages of this environment and of its base."""
    folders = set()
    for prefix in (sys.prefix, sys.base_prefix):
        names = {"base": prefix, "platbase": prefix}
        folders |= {sysconfig.get_path(x, vars=names) for x in ("purelib", "platlib")}
    files = {str(file) for x in folders if os.path.isdir(x) for file in Path(x).iterdir()}
    return {x for x in files if not x.endswith("__pycache__")}
