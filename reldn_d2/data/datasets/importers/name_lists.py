"""Lists of names in files, which fix the order of classes and predicates."""

import os

from ..io import read_json, require_file

__all__ = ["read_name_file"]

_BACKGROUND = "__background__"


def read_name_file(path: str, what: str) -> list[str]:
    """Read the names of classes or predicates, in the order of their ids.

    A first name ``__background__``, as other programs have it, is left out.

    Args:
        path: a text file with one name per line, or a JSON list of names.
        what: such as "classes", for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no names, or one name twice.
    """
    if path.lower().endswith(".json"):
        names = read_json(path, what)
    else:
        require_file(path, what)
        try:
            with open(path, encoding="utf-8-sig") as file:
                names = [line.strip() for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}). Expected {what}.") from error
    if not isinstance(names, list) or not all(isinstance(x, str) and x.strip() for x in names):
        raise ValueError(f"{path}: found {names!r:.80}; expected a list of names ({what}).")
    names = [name.strip() for name in names]
    names = names[1:] if names[:1] == [_BACKGROUND] else names
    if not names:
        raise ValueError(f"{path}: {os.path.basename(path)} has no names. Expected {what}.")
    repeated = [name for index, name in enumerate(names) if name in names[:index]]
    if repeated:
        raise ValueError(f"{path}: {what}: {repeated[0]!r} is listed more than once.")
    return names
