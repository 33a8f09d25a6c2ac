"""The trainer, its hooks and its optimizer, and launching on several processes."""

from .defaults import RelDNTrainer
from .launch import launch
from .optimizer import build_optimizer

__all__ = ["RelDNTrainer", "build_optimizer", "launch"]
