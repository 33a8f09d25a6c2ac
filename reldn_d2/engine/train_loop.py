"""Detectron2's training steps, extended to models on the CPU."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.engine import create_ddp_model as create_ddp_model_on_gpu
from detectron2.utils import comm

from ..utils.memory import keep_freed_memory

__all__ = ["CPUAMPTrainer", "build_simple_trainer", "create_ddp_model"]


class CPUAMPTrainer(SimpleTrainer):
    """``SimpleTrainer`` with bfloat16 autocast on the CPU, where Detectron2's AMP needs CUDA."""

    def __init__(self, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer):
        super().__init__(model, data_loader, optimizer)
        forward = model.forward

        def autocast_forward(*args, **kwargs):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.training):
                return forward(*args, **kwargs)

        model.forward = autocast_forward


def build_simple_trainer(
    cfg: CfgNode, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    """Build the object that runs one training step, with mixed precision if the config says so."""
    on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
    if on_cpu and cfg.MODEL.RELDN.KEEP_FREED_MEMORY:
        keep_freed_memory()
    if not cfg.SOLVER.AMP.ENABLED:
        trainer = SimpleTrainer
    else:
        trainer = CPUAMPTrainer if on_cpu else AMPTrainer
    return trainer(model, data_loader, optimizer)


def create_ddp_model(model: nn.Module) -> nn.Module:
    """Wrap a model for distributed training; Detectron2's function works on GPUs only."""
    if next(model.parameters()).device.type != "cpu":
        return create_ddp_model_on_gpu(model, broadcast_buffers=False)
    if comm.get_world_size() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False)
