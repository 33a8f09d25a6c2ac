"""RelDN (Graphical Contrastive Losses for Scene Graph Parsing, CVPR 2019) for Detectron2."""

from .utils import compat  # isort: skip  must run before Detectron2 is imported
from . import data, modeling  # noqa: F401  register datasets and architectures
from .checkpoint.reldn_checkpoint import RelDNCheckpointer, initialize_relation_branch
from .config import add_reldn_config, load_config, merge_config, register_config_keys

__version__ = "0.1.0"

__all__ = [
    "RelDNCheckpointer",
    "add_reldn_config",
    "compat",
    "initialize_relation_branch",
    "load_config",
    "merge_config",
    "register_config_keys",
]
