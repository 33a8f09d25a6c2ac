"""``--module``: import the user's own modules, which register datasets, heads, protocols, ....

A file is imported under the name that a Python import statement would use, so that it is one module
however it is named: registered once, and importable in worker processes.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

__all__ = [
    "UserModuleError",
    "add_module_argument",
    "import_modules",
    "imported_modules",
    "parse_and_import",
    "where_raised",
]

_imported: dict[str, None] = {}  # dotted names, in the order of their import


class UserModuleError(ImportError):
    """A module of the user's cannot be imported; the message is one line and names the fix."""


def add_module_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--module``; :func:`parse_and_import` imports the modules."""
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="FILE_OR_NAME",
        help="your own Python module to import first, as a file (my_head.py) or a dotted name "
        "(my_package.my_head): it may register datasets, protocols, config keys, detectors, heads "
        "and losses (docs/extending.md); can be repeated",
    )


def parse_and_import(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line and import the modules of ``--module``.

    Values that a module may register, such as names of protocols, must be checked after this, not
    by ``choices`` of the parser. A module that cannot be imported ends the program with one line
    and status 2.
    """
    args = parser.parse_args(arguments)
    try:
        import_modules(args.module)
    except UserModuleError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return args


def import_modules(modules: Sequence[str]) -> None:
    """Import the user's modules; one that is imported already is not run again.

    Args:
        modules: each the path of a Python file, with or without a folder, or a dotted name.
            Modules in the current folder are found by name, too.

    Raises:
        UserModuleError: there is no such file or module, or the module raises an error; the message
            names the file and line.
    """
    for module in modules:
        option = f"--module {module}"
        if module.endswith(".py") or os.sep in module:
            name = _import_file(Path(module), option)
        elif all(part.isidentifier() for part in module.split(".")):
            name = module
            _add_to_path(os.getcwd())
            _import(name, option)
        else:
            raise UserModuleError(
                f"{option}: this is neither a Python file (my_head.py) nor a dotted name as in an "
                "import statement (my_package.my_head)."
            )
        _imported[name] = None


def imported_modules() -> tuple[str, ...]:
    """Return the dotted names of the imported modules, for :func:`import_modules` of a new process.

    ``multiprocessing`` gives new processes this one's ``sys.path``, so they find them by name.
    """
    return tuple(_imported)


def _import_file(path: Path, option: str) -> str:
    """Import a file as a module or, in a folder with ``__init__.py``, as a part of its package.

    Returns:
        its dotted name.
    """
    if path.is_dir():
        raise UserModuleError(f"{option}: this is a folder; name a Python file in it.")
    if not path.is_file():
        raise UserModuleError(
            f"{option}: there is no such file in {os.getcwd()}. Give the path of a Python file, or "
            "a dotted name as in an import statement."
        )
    folder, parts = path.resolve().parent, [path.stem]
    if path.name == "__init__.py":
        folder, parts = folder.parent, [folder.name]
    while (folder / "__init__.py").is_file():
        folder, parts = folder.parent, [folder.name, *parts]
    name = ".".join(parts)
    if not all(part.isidentifier() for part in parts):
        raise UserModuleError(
            f"{option}: '{name}' is not a name that Python can import. Rename the file, with "
            "letters, digits and underscores only."
        )
    _add_to_path(str(folder))
    module = _import(name, option)
    found = getattr(module, "__file__", None)
    if found is None or not os.path.samefile(found, path):
        raise UserModuleError(
            f"{option}: Python has another module '{name}' already ({found or 'built in'}). Rename "
            "your file."
        )
    return name


def _add_to_path(folder: str) -> None:
    """Let imports find a folder before all others, as Python does for the folder of a script."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _import(name: str, option: str) -> ModuleType:
    """Import a module by its dotted name.

    Raises:
        UserModuleError: it does not exist, or raises an error.
    """
    importlib.invalidate_caches()  # the file may be newer than the last look into its folder
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            _explain(error, option)  # a module that this one imports
        raise UserModuleError(
            f"{option}: No module named '{error.name}'. Write it as in a Python import statement, "
            "and run the command in its folder or add that folder to PYTHONPATH; or give the path "
            "of its file."
        ) from error
    except (Exception, SystemExit) as error:
        _explain(error, option)


def _explain(error: BaseException, option: str) -> NoReturn:
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    text = text.rstrip(".")
    fix = "Fix the module"
    if isinstance(error, SystemExit):
        fix = 'Put what the module does as a program under `if __name__ == "__main__":`'
    raise UserModuleError(
        f"{option}: {where_raised(error)}: {type(error).__name__}: {text}. {fix}, then run the "
        "command again."
    ) from error


def where_raised(error: BaseException) -> str:
    """Return ``FILE, line N`` of the user's line that led to an error.

    It is the last one outside of installed packages and of this one; of a syntax error, the wrong
    line.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frames = [x for x in frames if not x.filename.startswith("<")]
    package = str(Path(__file__).resolve().parents[1]) + os.sep
    theirs = ("site-packages", "dist-packages", os.path.dirname(os.__file__), package)
    own = [x for x in frames if not any(part in x.filename for part in theirs)]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"
