"""Resuming with another config, and new runs in the folder of an earlier one.

A checkpoint holds the config that it was trained with. When a run is resumed, the given config
counts: rates, decay and schedule of ``SOLVER`` take effect, and only the state that training has
built up (momentum, iteration, seed) comes from the checkpoint.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import nn

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier

__all__ = [
    "changed_keys",
    "log_changed_keys",
    "optimizer_state",
    "separate_from_earlier_run",
    "with_saved_solver",
    "use_rates_of",
]

logger = logging.getLogger(__name__)

_NOT_COMPARED = ("OUTPUT_DIR", "VERSION", "MODEL.WEIGHTS")  # a resumed run does not read the last


def changed_keys(saved: str, cfg: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Compare the config in a checkpoint with the given one.

    Args:
        saved: YAML of the checkpoint's config; empty if it has none.
        cfg: the given config, rescaled to the number of processes.

    Returns:
        old and new value of every key that both have and that differs, by dotted name.
    """
    old, new = (_flatten(yaml.safe_load(text) or {}) for text in (saved, cfg.dump()))
    return {
        key: (old[key], value)
        for key, value in new.items()
        if key in old and old[key] != value and key not in _NOT_COMPARED
    }


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            result.update(_flatten(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def log_changed_keys(changes: Mapping[str, tuple[Any, Any]], seed: int) -> None:
    """Log the schedule of a resumed run if it is new, and warn about other new values.

    Args:
        changes: see :func:`changed_keys`.
        seed: seed of the run, which the checkpoint holds.
    """
    solver = {key: x for key, x in changes.items() if key.startswith("SOLVER.")}
    others = {key: x for key, x in changes.items() if key not in solver and key != "SEED"}
    if solver:
        logger.info(f"The resumed run uses new values of the config: {_list(solver)}.")
    if others:
        logger.warning(
            f"The config differs from that of the resumed checkpoint in {len(others)} keys outside "
            f"SOLVER: {_list(others)}. The new values are used."
        )
    if "SEED" in changes:
        logger.warning(f"SEED of the config is ignored: the resumed run keeps its seed {seed}.")


def _list(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items())


def with_saved_solver(cfg: CfgNode, changes: Mapping[str, tuple[Any, Any]]) -> CfgNode:
    """Return the config with the ``SOLVER`` keys of the checkpoint."""
    cfg = cfg.clone()
    cfg.defrost()
    for key, (old, _) in changes.items():
        *path, leaf = key.split(".")
        if path[:1] == ["SOLVER"]:
            node = cfg
            for part in path:
                node = node[part]
            node[leaf] = old
    return cfg


def optimizer_state(
    saved: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    build_saved: Callable[[], torch.optim.Optimizer] | None = None,
) -> dict[str, Any]:
    """Combine the momentum of a checkpoint with the parameter groups of a new optimizer.

    Args:
        saved: state of the checkpoint's optimizer.
        optimizer: built from the given config.
        build_saved: builds the checkpoint's optimizer on the same parameters; None if that config
            has the same optimizer. Detectron2 groups the parameters by their rates and decay, and
            the saved state has only their order.

    Returns:
        a state for ``optimizer``; without momentum, with a warning, if the two do not fit.
    """
    state = optimizer.state_dict()
    own = _parameters(optimizer)
    before = optimizer if build_saved is None else build_saved()
    old = _parameters(before)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    # Gradient clipping makes a new class for each optimizer: compare what the classes define.
    fits = set(before.defaults) == set(optimizer.defaults) and len(indices) == len(old)
    position = {id(parameter): index for index, parameter in enumerate(own)}
    merged = {}
    for index, parameter in zip(indices, old):
        values = saved["state"].get(index)
        if values is None or id(parameter) not in position:
            continue
        fits = fits and all(_same_shape(value, parameter) for value in values.values())
        merged[position[id(parameter)]] = values
    if not fits:
        logger.warning(
            "The optimizer starts from scratch: the checkpoint's was of another kind or had other "
            "parameters, because the config has changed."
        )
        return state
    return {**state, "state": merged}


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _same_shape(value: Any, parameter: nn.Parameter) -> bool:
    """Whether a value of an optimizer's state fits; step counts are scalars."""
    return not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == parameter.shape


def use_rates_of(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Let a scheduler whose state was loaded continue with the base rates of the optimizer.

    Args:
        optimizer: its groups have ``initial_lr``; their ``lr`` is set.
        scheduler: Detectron2's, which multiplies the base rates by a function of the iteration; the
            rates of any other stay those of the checkpoint.
    """
    if not isinstance(scheduler, LRMultiplier):
        return
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    rates = scheduler.get_lr()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    scheduler._last_lr = rates


def separate_from_earlier_run(folder: str) -> None:
    """Make a later ``--resume`` continue the new run that starts in a folder, not an earlier one.

    Removes ``last_checkpoint`` and ``model_best.json``, the best value so far, with a warning;
    checkpoints stay until the new run overwrites them.

    Args:
        folder: ``OUTPUT_DIR``.
    """
    pointer, best = (os.path.join(folder, x) for x in ("last_checkpoint", "model_best.json"))
    names: Sequence[str] = [x for x in (pointer, best) if os.path.isfile(x)]
    if not names:
        return
    last = "unknown"
    if os.path.isfile(pointer):
        with open(pointer) as file:
            last = file.read().strip()
    for name in names:
        os.remove(name)
    logger.warning(
        f"{folder} (OUTPUT_DIR) holds checkpoints of an earlier run; its last is {last}. This is a "
        f"new run: removed {' and '.join(map(os.path.basename, names))}, so that --resume "
        "continues the new run. Files of the same name will be overwritten, and log.txt and "
        "metrics.json are continued. To keep the runs apart, use another OUTPUT_DIR."
    )
