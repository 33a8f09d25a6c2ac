"""Programs: a file of the repository that is installed as a command, too."""

import re
import sys
from pathlib import Path

__all__ = ["program_help", "program_name"]


def program_name(script: str) -> str:
    """Return the name that error lines start with.

    Args:
        script: ``__file__`` of the program.

    Returns:
        the command that the user called, such as ``reldn-train``; otherwise the file's name.
    """
    called = Path(sys.argv[0]).name
    return called if called.startswith("reldn-") else Path(script).name


def program_help(text: str, script: str) -> str:
    """Return the description of a program for ``--help``.

    Args:
        text: with example commands as in a clone, such as ``python tools/export_model.py``.
        script: ``__file__`` of the program.

    Returns:
        the text; if the user called the installed command, with that in the examples.
    """
    name, file = program_name(script), Path(script)
    if not name.startswith("reldn-"):
        return text
    module = file.parent.name if file.stem == "__main__" else file.stem
    as_file, as_module = rf"\S*{re.escape(file.name)}", rf"-m \S*\.{re.escape(module)}"
    return re.sub(rf"\bpython ({as_file}|{as_module})\b", name, text)
