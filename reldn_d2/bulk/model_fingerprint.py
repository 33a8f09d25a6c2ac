"""What decides about the results of a model: its weights, names and config."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from ..predictor import RelationPredictor

__all__ = ["describe_model", "hash_path", "hash_weights"]

# Keys that say where something is computed or stored.
_PLACES = ("MODEL.DEVICE", "MODEL.WEIGHTS")
_NODES = ("MODEL", "INPUT", "TEST")


def describe_model(predictor: RelationPredictor) -> dict[str, Any]:
    """Return a hash of the weights, the names of classes and predicates, and the config's keys."""
    names = [predictor.thing_classes, predictor.predicate_classes, predictor.attribute_classes]
    config: dict[str, str] = {}
    for node in _NODES:
        _flatten(predictor.cfg[node], node, config)
    return {
        "weights": hash_weights(predictor.model),
        "names": hashlib.sha256(repr(names).encode()).hexdigest(),
        "unknown_classes": predictor.unknown_classes,
        "config": {key: value for key, value in config.items() if key not in _PLACES},
    }


def hash_weights(model: torch.nn.Module) -> str:
    """Return a hash of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, because numpy has no bfloat16.
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def _flatten(node: Any, name: str, into: dict[str, str]) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            _flatten(value, f"{name}.{key}", into)
    else:
        into[name] = repr(node)


def hash_path(path: str | Path | None) -> str | None:
    """Return a hash of a file's content, or of the files in a folder; otherwise the text."""
    if path is None:
        return None
    digest = hashlib.sha256()
    if os.path.isfile(path):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    if os.path.isdir(path):
        for file in sorted(x for x in Path(path).rglob("*") if x.is_file()):
            digest.update(f"{file.relative_to(path)} {hash_path(file)}\n".encode())
        return digest.hexdigest()
    return str(path)
