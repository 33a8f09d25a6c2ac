"""Detectron2's optimizers with RelDN's parameter groups."""

from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from ..checkpoint.reldn_checkpoint import pretrained_predicate_modules
from ..modeling.meta_arch import RelDN

__all__ = ["build_optimizer", "relation_parameter_groups"]

_OPTIMIZERS = ("SGD", "AdamW")


def relation_parameter_groups(
    model: nn.Module, *, base_lr: float, backbone_multiplier: float = 0.1, **options: Any
) -> list[dict[str, Any]]:
    """Group a model's parameters by their rate and decay.

    The predicate backbone and the predicate box head learn at ``backbone_multiplier`` times the
    base rate if they start from trained weights. The frequency table counts as a bias. Frozen
    parameters are left out.

    Args:
        model: a RelDN; any other model has one base rate.
        base_lr: the base rate.
        backbone_multiplier: see above.
        options: ``weight_decay`` and others of Detectron2's ``get_default_optimizer_params``.

    Returns:
        Groups for an optimizer; empty if nothing is trained.
    """
    slow: list[nn.Module] = []
    tables: dict[str, nn.Parameter] = {}
    if isinstance(model, RelDN):
        slow = pretrained_predicate_modules(model)
        if getattr(model.relation_head, "semantic", None) is not None:
            tables["bias"] = model.relation_head.semantic.table.weight
    groups, grouped = [], set()
    for module, rate in (
        (nn.ModuleList(slow), base_lr * backbone_multiplier),
        (nn.ParameterDict(tables), base_lr),  # under the name of a bias
        (model, base_lr),
    ):
        own = get_default_optimizer_params(module, base_lr=rate, **options)
        for group in own:
            group["params"] = [p for p in group["params"] if id(p) not in grouped]
        groups += [group for group in own if group["params"]]
        grouped |= {id(p) for group in own for p in group["params"]}
    return groups


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build Detectron2's optimizer with RelDN's parameter groups.

    See :func:`relation_parameter_groups`. Biases and norms follow Detectron2's keys.

    Raises:
        ValueError: if ``SOLVER.OPTIMIZER`` is unknown or all parameters are frozen.
    """
    solver = cfg.SOLVER
    groups = relation_parameter_groups(
        model,
        base_lr=solver.BASE_LR,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if not groups:
        raise ValueError(
            "Nothing in this model is trained. To evaluate the frequency table alone, use "
            "--eval-only; to train it, set MODEL.ROI_RELATION_HEAD.SEMANTIC.FREEZE to False."
        )
    if solver.OPTIMIZER == "SGD":
        optimizer, extra = torch.optim.SGD, dict(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    elif solver.OPTIMIZER == "AdamW":
        # The default on GPUs. On CPUs it gives the same values in less than half the time.
        optimizer, extra = torch.optim.AdamW, dict(foreach=True)
    else:
        raise ValueError(
            f"SOLVER.OPTIMIZER is '{solver.OPTIMIZER}'; known: {', '.join(_OPTIMIZERS)}"
        )
    optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    return optimizer(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **extra)
