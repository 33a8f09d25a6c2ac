"""Programs: a file of the repository that is installed as a command, too."""

import sys
from pathlib import Path

__all__ = ["program_name"]


def program_name(script: str) -> str:
    """Return the name that error lines start with.

    Args:
        script: ``__file__`` of the program.

    Returns:
        the command that the user called, such as ``reldn-train``; otherwise the file's name.
    """
    called = Path(sys.argv[0]).name
    return called if called.startswith("reldn-") else Path(script).name
