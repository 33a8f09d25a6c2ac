"""Detectron2's optimizers with RelDN's parameter groups."""

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from ..checkpoint.reldn_checkpoint import pretrained_predicate_modules
from ..modeling.meta_arch import RelDN

__all__ = ["build_optimizer"]

_OPTIMIZERS = ("SGD", "AdamW")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build Detectron2's optimizer with RelDN's parameter groups.

    The predicate backbone and the predicate box head learn at ``SOLVER.BACKBONE_MULTIPLIER`` times
    the base rate if they start from trained weights. Biases and norms follow Detectron2's keys; the
    frequency table counts as a bias. Frozen parameters are left out.

    Raises:
        ValueError: if ``SOLVER.OPTIMIZER`` is unknown or all parameters are frozen.
    """
    solver = cfg.SOLVER
    common = dict(
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    slow: list[nn.Module] = []
    tables: dict[str, nn.Parameter] = {}
    if isinstance(model, RelDN):
        slow = pretrained_predicate_modules(model)
        if getattr(model.relation_head, "semantic", None) is not None:
            tables["bias"] = model.relation_head.semantic.table.weight
    groups, grouped = [], set()
    for module, rate in (
        (nn.ModuleList(slow), solver.BASE_LR * solver.BACKBONE_MULTIPLIER),
        (nn.ParameterDict(tables), solver.BASE_LR),  # under the name of a bias
        (model, solver.BASE_LR),
    ):
        own = get_default_optimizer_params(module, base_lr=rate, **common)
        for group in own:
            group["params"] = [p for p in group["params"] if id(p) not in grouped]
        groups += [group for group in own if group["params"]]
        grouped |= {id(p) for group in own for p in group["params"]}
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
