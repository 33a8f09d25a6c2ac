"""Building objects that a config names, with errors that say what to do."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.utils.registry import Registry

__all__ = ["build_registered", "explain_unregistered", "find_registered"]


def find_registered(registry: Registry, name: str, key: str) -> Any:
    """Return the entry of a registry.

    Args:
        registry: maps names to classes or functions.
        name: entry of the registry.
        key: config key of the name, used in error messages.

    Raises:
        ValueError: if the registry has no such entry.
    """
    known = sorted(entry for entry, _ in registry)
    if name not in known:
        raise ValueError(
            f"{key} is '{name}'; known: {', '.join(known)}. A class of your own is known once the "
            f"module that registers it is imported (--module)."
        )
    return registry.get(name)


@contextmanager
def explain_unregistered(source: str) -> Iterator[None]:
    """Turn Detectron2's ``KeyError`` about a name that no registry has into an error with the fix.

    Args:
        source: what names it, such as a checkpoint.

    Raises:
        ValueError: names ``source``, the entry and the registry.
    """
    try:
        yield
    except KeyError as error:
        match = re.search("No object named '(.*?)' found in '(.*?)' registry", str(error.args[:1]))
        if match is None:
            raise
        raise ValueError(
            f"{source} names '{match[1]}', which the registry {match[2]} does not have. A class of "
            "your own is known once the module that registers it is imported (--module)."
        ) from error


def build_registered(
    registry: Registry, name: str, key: str, base: type, *args: Any, **kwargs: Any
) -> Any:
    """Build a registered object and check that it is a complete ``base``.

    Args:
        registry: maps names to classes or functions.
        name: entry of the registry.
        key: config key of the name, used in error messages.
        base: abstract class that states the contract.
        args, kwargs: passed to the entry.

    Raises:
        ValueError: if the registry has no such entry.
        TypeError: if the entry is not derived from ``base`` or lacks a member; the message names
            the class, the member and the fix.
    """
    entry = find_registered(registry, name, key)
    contract = f"derive it from {base.__module__.rpartition('.')[0]}.{base.__name__}"
    if inspect.isclass(entry):
        if not issubclass(entry, base):
            raise TypeError(f"{key} is '{name}', but that class is no {base.__name__}: {contract}.")
        missing = sorted(getattr(entry, "__abstractmethods__", ()))
        if missing:
            raise TypeError(
                f"{key} is '{name}', but that class lacks {', '.join(missing)}: implement it as "
                f"the docstring of {base.__name__}.{missing[0]} says."
            )
    built = entry(*args, **kwargs)
    if not isinstance(built, base):
        raise TypeError(
            f"{key} is '{name}', which built a {type(built).__name__}, and that class is no "
            f"{base.__name__}: {contract}."
        )
    return built
