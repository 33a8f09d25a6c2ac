"""The trainer with its hooks and its optimizer, and launching several processes."""

from .defaults import RelDNTrainer
from .hooks import FiniteLossCheck, ResumableBestCheckpointer, SeedEachIteration
from .launch import launch
from .model_setup import check_counts, ensure_frequency_table
from .optimizer import build_optimizer
from .train_loop import CPUAMPTrainer, build_simple_trainer, create_ddp_model

__all__ = [
    "ResumableBestCheckpointer",
    "CPUAMPTrainer",
    "FiniteLossCheck",
    "RelDNTrainer",
    "SeedEachIteration",
    "build_optimizer",
    "build_simple_trainer",
    "check_counts",
    "create_ddp_model",
    "ensure_frequency_table",
    "launch",
]
