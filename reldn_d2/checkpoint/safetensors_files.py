"""Checkpoints as ``.safetensors`` files: weights, and the other entries as JSON in the header.

The header's metadata has one JSON string per entry of a checkpoint, such as ``"reldn"`` with names
and config. For other programs it is a plain file of weights; their files are read as checkpoints
without such entries.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ..utils.file_io import write_atomically

__all__ = ["load_safetensors", "require_safetensors", "save_safetensors"]

# Entries of a checkpoint besides "model" that the metadata holds; other keys are of other programs.
ENTRIES = ("reldn", "detector", "about", "iteration")


def require_safetensors(path: str) -> ModuleType:
    """Import the package safetensors, with its part for torch.

    Args:
        path: the file that needs it, for the message.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors ({error}): pip install safetensors") from error
    return safetensors


def save_safetensors(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint atomically.

    Args:
        content: ``"model"`` with weights by name, and any of ``ENTRIES``, of plain types.
        path: of the file.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: an entry has no place in the file.
    """
    package = require_safetensors(str(path))
    others = [key for key in content if key not in ("model", *ENTRIES)]
    if others:
        raise ValueError(
            f"{path}: a .safetensors file holds weights, names and config, but not "
            f"{', '.join(others)}; write a .pth file"
        )
    metadata = {"format": "pt"}  # as other programs write it
    metadata |= {key: json.dumps(content[key]) for key in ENTRIES if key in content}
    # The format refuses weights that share memory, as those of shared stages do, hence the copies.
    weights = {name: x.detach().cpu().clone().contiguous() for name, x in content["model"].items()}
    with write_atomically(path, "wb") as file:
        file.write(package.torch.save(weights, metadata=metadata))


def load_safetensors(path: str | Path) -> dict[str, Any]:
    """Read a file into the dict that :func:`save_safetensors` takes.

    Raises:
        ImportError: safetensors is not installed.
        Exception: the file is broken; safetensors and json raise errors of several types.
    """
    package = require_safetensors(str(path))
    with package.safe_open(str(path), framework="pt") as file:
        weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    entries = {key: json.loads(metadata[key]) for key in ENTRIES if key in metadata}
    for key, value in entries.items():
        if key != "iteration" and not isinstance(value, dict):
            raise ValueError(f"metadata '{key}' is a {type(value).__name__}, not a dict")
    return {"model": weights, **entries}
