"""The trainer with its hooks and its optimizer, and launching several processes."""

from .defaults import RelDNTrainer
from .hooks import FiniteLossCheck, ResumableBestCheckpointer, SeedEachIteration
from .interruption import StopOnSignal, TrainingInterrupted
from .launch import LaunchError, ProcessFailed, check_device, launch
from .model_setup import check_counts, ensure_frequency_table
from .optimizer import build_optimizer
from .run_check import check_run, check_weights
from .train_loop import CPUAMPTrainer, build_simple_trainer, create_ddp_model

__all__ = [
    "ResumableBestCheckpointer",
    "CPUAMPTrainer",
    "FiniteLossCheck",
    "LaunchError",
    "ProcessFailed",
    "RelDNTrainer",
    "SeedEachIteration",
    "StopOnSignal",
    "TrainingInterrupted",
    "build_optimizer",
    "build_simple_trainer",
    "check_counts",
    "check_device",
    "check_run",
    "check_weights",
    "create_ddp_model",
    "ensure_frequency_table",
    "launch",
]
