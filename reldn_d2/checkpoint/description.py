"""Names and config that a RelDN checkpoint holds next to its weights."""

import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..modeling.relation_head.head_losses import RELATION_LOSS_REGISTRY
from ..modeling.relation_head.pair_sampling import PAIR_SAMPLER_REGISTRY
from ..utils.protocols import PROTOCOL_REGISTRY
from .checkpoint_reader import fetch, read_checkpoint

__all__ = ["leave_out_training_parts", "read_description"]

logger = logging.getLogger(__name__)


def read_description(path: str) -> dict[str, Any]:
    """Return names and config of a checkpoint, as written by :class:`.RelDNCheckpointer`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or has no relation head.
    """
    if "://" in path:
        fetch(path)
        path = PathManager.get_local_path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"No checkpoint '{path}'. Training RelDN writes it as OUTPUT_DIR/model_final.pth."
        )
    try:
        checkpoint = read_checkpoint(path)
    except ValueError as error:  # its advice is for checkpoints of other programs
        raise ValueError(
            f"{path} cannot be read as a RelDN checkpoint, which has only tensors and plain types: "
            "it is broken, truncated or of another format"
        ) from error
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not any("relation_head." in x for x in weights):
        raise ValueError(
            f"{path} has no relation head: it is the checkpoint of a detector alone, or of another "
            f"program. Train RelDN on it (MODEL.WEIGHTS {path}) and give the checkpoint that this "
            "writes."
        )
    return checkpoint.get("reldn") or {}


def leave_out_training_parts(cfg: CfgNode, path: str) -> None:
    """Replace what only training and evaluation need where no registry has it; log what.

    Args:
        cfg: the config of a checkpoint, for prediction; changed in place.
        path: the checkpoint, for the log.
    """
    relations, head = cfg.TEST.RELATIONS, cfg.MODEL.ROI_RELATION_HEAD
    left_out = []
    if relations.PROTOCOL and relations.PROTOCOL not in PROTOCOL_REGISTRY:
        left_out.append(f"protocol '{relations.PROTOCOL}'")
        relations.PROTOCOL = ""  # the checkpoint has its numbers of predicates per pair
    if head.SAMPLING.NAME not in PAIR_SAMPLER_REGISTRY:
        left_out.append(f"pair sampler '{head.SAMPLING.NAME}'")
        head.SAMPLING.NAME = "RelDNPairSampler"
    unknown = [name for name in head.LOSS.NAMES if name not in RELATION_LOSS_REGISTRY]
    if unknown:
        left_out += [f"loss '{name}'" for name in unknown]
        known = [name for name in head.LOSS.NAMES if name not in unknown]
        head.LOSS.NAMES = known or ["PredicateLoss"]
    if left_out:
        logger.info(
            f"{path}: prediction does without its {', '.join(left_out)}, which no imported module "
            "registers."
        )
