"""Names and config that a RelDN checkpoint holds next to its weights."""

import os
from typing import Any

from detectron2.utils.file_io import PathManager

from .checkpoint_reader import fetch, read_checkpoint

__all__ = ["read_description"]


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
