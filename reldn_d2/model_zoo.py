"""Included configs and trained models by the name of the config, as in ``detectron2.model_zoo``."""

import difflib

from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from .checkpoint.reldn_checkpoint import RelDNCheckpointer
from .config import load_config
from .pretrained.weights import pretrained_file
from .utils.included_configs import CONFIGS, included_configs

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]

# Trained models by config; more come from the conversion of released ones (docs/training.md).
_TRAINED = {"VRD/reldn_boxes.yaml": "vrd_boxes"}


def get_config_file(config_path: str) -> str:
    """Return the path of an included config.

    Args:
        config_path: relative to ``configs/``, such as ``"VRD/reldn_boxes.yaml"``.

    Raises:
        ValueError: there is no such config; the message names similar ones.
    """
    file = CONFIGS / config_path
    if not file.is_file():
        similar = difflib.get_close_matches(config_path, included_configs(), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        raise ValueError(f"there is no included config '{config_path}'{hint}")
    return str(file)


def get_checkpoint_url(config_path: str) -> str:
    """Return the file of the model that was trained with an included config.

    Raises:
        ValueError: there is none; the message lists the configs that have one.
    """
    get_config_file(config_path)
    if config_path not in _TRAINED:
        raise ValueError(
            f"no trained model of '{config_path}' is included; there is one of "
            f"{', '.join(sorted(_TRAINED))}"
        )
    return str(pretrained_file(_TRAINED[config_path]))


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """Return an included config.

    Args:
        config_path: see :func:`get_config_file`.
        trained: set ``MODEL.WEIGHTS`` to the trained model; see :func:`get_checkpoint_url`.
    """
    cfg = load_config(get_config_file(config_path))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
    return cfg


def get(config_path: str, trained: bool = False, device: str = "cpu") -> nn.Module:
    """Build the model of an included config, in training mode as Detectron2's.

    For predictions, :class:`reldn_d2.predictor.RelationPredictor` is easier.

    Args:
        config_path: see :func:`get_config_file`.
        trained: load the trained model. Otherwise weights are random: a trainer loads
            ``MODEL.WEIGHTS``, which most configs set to the file of a detector's training.
        device: such as ``cpu`` or ``cuda:0``.
    """
    cfg = get_config(config_path, trained)
    cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    if trained:
        RelDNCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
