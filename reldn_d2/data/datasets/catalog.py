"""Registration in Detectron2's catalogs, with names that are read from files when asked for."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

__all__ = ["add_module_argument", "import_modules", "register_dataset", "require_dataset"]

_ON_DEMAND = (
    "thing_classes",
    "predicate_classes",
    "attribute_classes",
    "thing_dataset_id_to_contiguous_id",
)
_readers: dict[str, Callable[[], dict[str, Any]]] = {}


class _MetadataFromFiles(Metadata):
    """Detectron2's ``Metadata``; names that are not set yet are read from the data set's files."""

    def __getattr__(self, key: str) -> Any:
        # Attributes of its own would appear in as_dict(), so the reader is kept elsewhere.
        if key in _ON_DEMAND and self.name in _readers:
            try:
                found = _readers[self.name]()
            except FileNotFoundError as error:  # unknown as yet, as before any loading
                raise AttributeError(f"{key} of data set '{self.name}': {error}") from error
            for name, value in found.items():
                self.__dict__.setdefault(name, value)
            if key in self.__dict__:
                return self.__dict__[key]
        return super().__getattr__(key)


def register_dataset(
    name: str,
    load: Callable[..., list[dict[str, Any]]],
    arguments: dict[str, Any],
    *,
    annotation_files: Sequence[str],
    read_names: Callable[[], dict[str, Any]] | None = None,
    **metadata: Any,
) -> None:
    """Register a data set. Reads no file before its first use.

    Args:
        name: of the data set.
        load: gives the dataset dicts.
        arguments: keyword arguments of ``load``.
        annotation_files: the files that the annotations depend on; statistics are counted anew when
            the content of one of them changes.
        read_names: gives ``thing_classes``, ``predicate_classes``, ... when they are first asked
            for; None when they are in ``metadata``.
        metadata: further metadata.
    """
    DatasetCatalog.register(name, lambda: load(**arguments))
    if read_names is not None:
        before = MetadataCatalog.pop(name).as_dict() if name in MetadataCatalog else {}
        _readers[name] = read_names
        MetadataCatalog[name] = _MetadataFromFiles(**{**before, "name": name})
    options = dict(sorted(arguments.items()))
    MetadataCatalog.get(name).set(
        annotation_files=list(annotation_files),
        loader=f"{load.__module__}.{load.__qualname__}({options})",
        **metadata,
    )


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
