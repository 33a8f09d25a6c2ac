"""Registered data sets by name, and on a command line the modules that register more of them."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from detectron2.data import DatasetCatalog

__all__ = ["add_module_argument", "import_modules", "require_dataset"]


def add_module_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--module``, for :func:`import_modules`."""
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        help="a Python module that registers your data sets; may be given several times",
    )


def import_modules(modules: Sequence[str]) -> None:
    """Import modules that register data sets; those in the current folder are found.

    Raises:
        ImportError: there is no such module, or it cannot be imported; names the option.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"--module {module}: {error}. Name it as for Python's import, and run the command "
                "in its folder or put that into PYTHONPATH."
            ) from error


def require_dataset(name: str) -> None:
    """Raise if no data set of this name is registered, with names near to it.

    Raises:
        KeyError: with the names.
    """
    known = DatasetCatalog.list()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        near = f"Near to it: {', '.join(near)}. " if near else ""
        raise KeyError(
            f"No data set '{name}' is registered. {near}One of your own "
            "is registered by the module that you name with --module."
        )
