"""Loading and saving checkpoints of detectors and of RelDN."""

from .checkpoint_reader import fetch, from_torchvision_vgg16, read_checkpoint
from .checkpoint_writer import write_checkpoint
from .detection_checkpoint import DetectorCheckpointer, check_checkpoint_exists
from .reldn_checkpoint import (
    RelDNCheckpointer,
    build_checkpointer,
    initialize_relation_branch,
    pretrained_predicate_modules,
)

__all__ = [
    "DetectorCheckpointer",
    "RelDNCheckpointer",
    "build_checkpointer",
    "check_checkpoint_exists",
    "fetch",
    "from_torchvision_vgg16",
    "initialize_relation_branch",
    "pretrained_predicate_modules",
    "read_checkpoint",
    "write_checkpoint",
]
