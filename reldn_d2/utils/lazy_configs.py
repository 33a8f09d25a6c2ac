"""Detectors that are described by a LazyConfig of Detectron2, in place of YAML keys.

A LazyConfig is a Python file: loading one runs its code.
"""

import os
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, instantiate

from .included_configs import find_config_file
from .user_modules import where_raised

__all__ = [
    "KEY",
    "build_node",
    "detector_node",
    "instantiate_part",
    "is_lazy_config",
    "load_lazy_config",
]

KEY = "MODEL.RELDN.DETECTOR_LAZY_CONFIG"


def is_lazy_config(path: str) -> bool:
    """Tell whether the name of a config file is that of a LazyConfig."""
    return path.endswith(".py")


def load_lazy_config(path: str, overrides: list[str], source: str) -> DictConfig:
    """Load a LazyConfig and apply ``key=value`` overrides.

    Args:
        path: a file, one of the package's, such as ``configs/lazy/toy_detector.py``, or the name
            of a LazyConfig in Detectron2's model zoo.
        overrides: such as ``model.roi_heads.num_classes=9``.
        source: what names the file, for error messages.

    Raises:
        FileNotFoundError: if there is no such file and no such config in the model zoo.
        ValueError: if the file raises an error or an override does not fit; the message names the
            file and line.
    """
    file = find_config_file(path)
    if not os.path.isfile(file):
        try:
            file = model_zoo.get_config_file(path)
        except Exception as error:  # also without pkg_resources, which newer setuptools lack
            raise FileNotFoundError(
                f"{source} is '{path}': no such file, and the installed Detectron2 has no such "
                "config in its model zoo (its package may lack them). Give the path of the file "
                "in a copy of Detectron2's configs."
            ) from error
    try:
        config = LazyConfig.load(file)
    except Exception as error:
        raise ValueError(
            f"{source} is '{path}', which cannot be loaded: {where_raised(error)}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    for override in overrides:
        try:
            _check_override(config, override)
            LazyConfig.apply_overrides(config, [override])
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"override '{override}' of {path} is not valid: {reason}. Write KEY=VALUE with a "
                "key of the LazyConfig, such as model.roi_heads.num_classes=9."
            ) from error
    return config


def _check_override(config: DictConfig, override: str) -> None:
    """Raise if the node of an override's key does not exist; a new leaf may be an argument."""
    key = override.partition("=")[0].strip().lstrip("+~")
    node = key.rpartition(".")[0]
    if node and OmegaConf.select(config, node, default=None) is None:
        raise KeyError(f"it has no '{node}'")


def detector_node(cfg: CfgNode) -> DictConfig:
    """Return the node ``model`` of the LazyConfig that a config of RelDN names.

    Args:
        cfg: ``MODEL.RELDN.DETECTOR_LAZY_CONFIG`` is not empty.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_lazy_config`, and if it has no ``model``.
    """
    path = cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG
    config = load_lazy_config(path, list(cfg.MODEL.RELDN.DETECTOR_LAZY_OVERRIDES), KEY)
    if not isinstance(config.get("model"), DictConfig) or "_target_" not in config.model:
        raise ValueError(f"{KEY} is '{path}', but that file has no `model = L(...)(...)`.")
    return config.model


def instantiate_part(cfg: CfgNode, name: str = "") -> Any:
    """Build a part of the detector's ``model`` node with new weights.

    Args:
        cfg: names the LazyConfig.
        name: dotted, such as ``roi_heads.box_head``; empty means the whole model. Of a list of
            nodes, as a cascade has, the first is built.

    Raises:
        ValueError: if there is no such node, or building it fails.
    """
    path = cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG
    node, where = detector_node(cfg), f"model.{name}" if name else "model"
    for part in filter(None, name.split(".")):
        node = node.get(part) if isinstance(node, DictConfig) else None
    if isinstance(node, ListConfig) and len(node):
        node = node[0]
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ValueError(f"{KEY} is '{path}', which has no node {where} = L(...)(...).")
    return build_node(node, f"{KEY} is '{path}', whose {where}")


def build_node(node: DictConfig, source: str) -> Any:
    """Instantiate a node of a LazyConfig.

    Args:
        node: has a ``_target_``.
        source: names file and node at the beginning of an error message.

    Raises:
        ValueError: if building it fails.
    """
    try:
        return instantiate(node)
    except Exception as error:  # whatever the class that it names raises, or a missing package
        reason = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):  # timm, for Detectron2's ViT and MViT
            reason += f". Install the package of '{error.name}'"
        raise ValueError(f"{source} cannot be built: {type(error).__name__}: {reason}") from error
