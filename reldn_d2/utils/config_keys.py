"""Config keys of the user's own modules, next to Detectron2's and this package's.

A checkpoint holds its config as text. Reading it needs the functions that add its keys, so these
are registered, and every config that this package builds has their keys.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode

from .user_modules import where_raised

__all__ = [
    "CONFIG_HOOKS",
    "ConfigKeyError",
    "add_registered_keys",
    "all_keys",
    "key_owners",
    "register_config_keys",
    "unknown_keys_message",
]

ConfigHook = Callable[[CfgNode], None]
CONFIG_HOOKS: dict[str, ConfigHook] = {}  # by dotted name
_owners: dict[str, str] = {}  # dotted name of the function that adds a key, by key


class ConfigKeyError(ValueError):
    """A registered function cannot add its config keys; the message names its file and line."""


class _KeyExistsError(Exception):
    pass


def register_config_keys(function: ConfigHook) -> ConfigHook:
    """Register a function that adds config keys of your own; used as a decorator.

    ``add_reldn_config`` calls it, and therefore everything that builds a config: training, tools,
    and the predictor for the config of a checkpoint. A function of the same module and name
    replaces the earlier one.

    Examples:
        >>> @register_config_keys
        ... def add_my_keys(cfg):
        ...     cfg.MODEL.MY_HEAD = CfgNode({"LAYERS": 2})

    Args:
        function: called with a config that has all keys of Detectron2 and this package; it adds new
            keys with their defaults and changes no others.
    """
    CONFIG_HOOKS[f"{function.__module__}.{function.__qualname__}"] = function
    return function


def add_registered_keys(cfg: CfgNode) -> None:
    """Add the keys of all registered functions to a config.

    Args:
        cfg: changed in place.

    Raises:
        ConfigKeyError: a function sets a key that exists, or raises an error.
    """
    for name, function in CONFIG_HOOKS.items():
        guarded = _GuardedNode(cfg)
        try:
            function(guarded)
            new = list(_take_new_keys(guarded, cfg))
        except _KeyExistsError as error:
            key = str(error)
            owner = _owners.get(key, "Detectron2 or reldn_d2")
            code = function.__code__
            raise ConfigKeyError(
                f"{code.co_filename}, line {code.co_firstlineno}: {name} sets {key}, which exists "
                f"already (from {owner}). Choose another key; YAML files and KEY VALUE options set "
                "the values of existing keys."
            ) from error
        except Exception as error:
            raise ConfigKeyError(
                f"{where_raised(error)}: {name}, which adds config keys, raises "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        for key in new:
            _owners[key] = name


def key_owners(cfg: CfgNode) -> dict[str, str]:
    """Return, for each registered key of a config, the dotted name of the function that added it.

    Checkpoints keep this, for the message of :func:`unknown_keys_message`.
    """
    return {key: _owners[key] for key in all_keys(cfg) if key in _owners}


def unknown_keys_message(
    cfg: CfgNode, saved: CfgNode, owners: Mapping[str, str], source: str
) -> str | None:
    """Return the error about keys of a saved config that a config lacks; None if there are none.

    Args:
        cfg: a config with all registered keys.
        saved: the config of a checkpoint.
        owners: :func:`key_owners` of the process that wrote it.
        source: the checkpoint's file.
    """
    known = set(all_keys(cfg))
    lacking = [key for key in all_keys(saved) if key not in known]
    unknown = [x for x in lacking if not any(x.startswith(f"{other}.") for other in lacking)]
    if not unknown:
        return None
    makers = {owner for key, owner in owners.items() if key in lacking}
    by = f" (by {', '.join(sorted(makers))} when it was written)" if makers else ""
    return (
        f"{source}: its config has keys that are not registered: {', '.join(unknown)}. Import the "
        f"module that registers them{by}: --module on the command line, import in Python."
    )


def all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys, nodes included."""
    keys = []
    for key, value in node.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys.extend(all_keys(value, f"{prefix}{key}."))
    return keys


class _GuardedNode(CfgNode):
    """A copy of a config whose keys can be read, and none of which can be set again."""

    def __init__(self, init_dict: Any = None, key_list: Any = None, new_allowed: bool = False):
        self.__dict__["_prefix"] = "".join(f"{key}." for key in key_list or ())
        super().__init__(init_dict, key_list, new_allowed)

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            raise _KeyExistsError(self.__dict__["_prefix"] + key)
        super().__setitem__(key, value)


def _take_new_keys(source: CfgNode, target: CfgNode, prefix: str = "") -> Iterator[str]:
    """Copy the keys that ``target`` lacks, and yield their dotted names.

    Raises:
        _KeyExistsError: the value of another key was changed in place.
    """
    for key, value in source.items():
        name = prefix + key
        if key not in target:
            target[key] = CfgNode(value) if isinstance(value, dict) else copy.deepcopy(value)
            yield name
            if isinstance(value, dict):
                yield from all_keys(target[key], f"{name}.")
        elif isinstance(value, dict):
            yield from _take_new_keys(value, target[key], f"{name}.")
        elif value != target[key]:
            raise _KeyExistsError(name)
