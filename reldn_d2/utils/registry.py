"""Building objects that a config names, with errors that say what to do."""

import difflib
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from .config_keys import all_keys

__all__ = [
    "UnregisteredError",
    "build_registered",
    "did_you_mean",
    "explain_missing_keys",
    "explain_unregistered",
    "find_registered",
]


class UnregisteredError(ValueError):
    """A name that a registry does not have."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean ...?`` with the known names that are similar; empty if none is."""
    by_lower_case = {x.lower(): x for x in known}
    similar = difflib.get_close_matches(str(name).lower(), by_lower_case, n=3, cutoff=0.6)
    return f" Did you mean {', '.join(by_lower_case[x] for x in similar)}?" if similar else ""


def find_registered(registry: Registry, name: str, key: str) -> Any:
    """Return the entry of a registry.

    Args:
        registry: maps names to classes or functions.
        name: entry of the registry.
        key: config key of the name, used in error messages.

    Raises:
        UnregisteredError: if the registry has no such entry.
    """
    known = sorted(entry for entry, _ in registry)
    if name not in known:
        raise UnregisteredError(
            f"{key} is '{name}'; known: {', '.join(known)}.{did_you_mean(name, known)} A class of "
            "your own is known once the module that registers it is imported (--module)."
        )
    return registry.get(name)


@contextmanager
def explain_unregistered(checkpoint: str = "", modules: Iterable[str] = ()) -> Iterator[None]:
    """Turn an error about a name that no registry has into one with its source and the fix.

    Detectron2's own registries raise a ``KeyError`` with the registry's name only.

    Args:
        checkpoint: the file whose config names it; empty: the config of this run.
        modules: the modules of the user's that were imported when the checkpoint was written.

    Raises:
        UnregisteredError: names the checkpoint, the entry, the registry and the modules.
    """
    written_with = f" It was written with --module {', '.join(modules)}." if modules else ""
    try:
        yield
    except UnregisteredError as error:
        if not checkpoint:
            raise
        raise UnregisteredError(f"{checkpoint}: {error}{written_with}") from error
    except KeyError as error:
        found = _failed_look_up(error)
        if found is None:
            raise
        name, registry = found
        source = f"{checkpoint}: its config" if checkpoint else "The config"
        raise UnregisteredError(
            f"{source} names '{name}', which the registry {registry._name} does not have."
            f"{did_you_mean(name, (entry for entry, _ in registry))} A class of your own is known "
            f"once the module that registers it is imported (--module).{written_with}"
        ) from error


def _failed_look_up(error: KeyError) -> tuple[str, Registry] | None:
    """Return the name that ``Registry.get`` did not find, and the registry; else None."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    values = {} if last is None else last.tb_frame.f_locals
    registry = values.get("self")
    return (values["name"], registry) if isinstance(registry, Registry) else None


@contextmanager
def explain_missing_keys(cfg: CfgNode, what: str) -> Iterator[None]:
    """Turn the error about a config key that was read but never registered into one with the fix.

    Args:
        cfg: the config that is read.
        what: reads it, for the message.

    Raises:
        ValueError: names the key in full, similar keys, and ``register_config_keys``.
    """
    try:
        yield
    except AttributeError as error:
        if not isinstance(error.obj, CfgNode) or error.name in error.obj:
            raise
        nodes = (f"{key}." for key in all_keys(cfg) if _node(cfg, key) is error.obj)
        raise ValueError(
            f"{what} reads the config key {next(nodes, '')}{error.name}, which does not exist."
            f"{did_you_mean(error.name, error.obj)} Add keys of your own, with their "
            "defaults, in a function that is decorated with reldn_d2.register_config_keys "
            "(docs/extending.md)."
        ) from error


def _node(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def build_registered(
    registry: Registry, name: str, key: str, base: type, cfg: CfgNode, *args: Any
) -> Any:
    """Build a registered object and check that it is a complete ``base``.

    Args:
        registry: maps names to classes or functions.
        name: entry of the registry.
        key: config key of the name, used in error messages.
        base: abstract class that states the contract.
        cfg, args: passed to the entry.

    Raises:
        UnregisteredError: if the registry has no such entry.
        ValueError: if the entry reads a config key that does not exist.
        TypeError: if the entry is not derived from ``base`` or lacks a member; the message names
            the class, the member and the fix.
    """
    entry = find_registered(registry, name, key)
    contract = f"derive it from {base.__module__.rpartition('.')[0]}.{base.__name__}"
    if inspect.isclass(entry):
        if not issubclass(entry, base):
            raise TypeError(
                f"{key} is '{name}', but that class is not a subclass of "
                f"{base.__name__}: {contract}."
            )
        missing = sorted(getattr(entry, "__abstractmethods__", ()))
        if missing:
            raise TypeError(
                f"{key} is '{name}', but that class lacks {', '.join(missing)}: implement it as "
                f"the docstring of {base.__name__}.{missing[0]} says."
            )
    with explain_missing_keys(cfg, f"{key} '{name}'"):
        built = entry(cfg, *args)
    if not isinstance(built, base):
        raise TypeError(
            f"{key} is '{name}', which built a {type(built).__name__}, and that class is not a "
            f"subclass of {base.__name__}: {contract}."
        )
    return built
