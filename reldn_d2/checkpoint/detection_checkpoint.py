"""Reading checkpoint files without running what is in them, and writing them whole or not at all.

==========  =====================================================  ==============================
Suffix      What it is                                             How it is read
==========  =====================================================  ==============================
.pth, .pt   torch's format: ours, Detectron2's, torchvision's      tensors and plain types only
.pkl        a pickle: Detectron2's model zoo, Caffe2's             arrays and plain types only
.pyth       torch's format, by pycls                               tensors and plain types only
==========  =====================================================  ==============================

Anything else in a file is an error, unless unpickling is allowed explicitly: it can run code.
"""

import pickle
import re
from typing import Any

import torch
from torch import Tensor

from detectron2.utils.file_io import PathManager

from ..modeling.backbone.vgg import TORCHVISION_NAMES

__all__ = ["fetch", "from_torchvision_vgg16", "read_checkpoint"]

# What a pickle of numpy arrays in dicts is made of.
_HARMLESS = {
    ("_codecs", "encode"),
    ("builtins", "bytearray"),
    ("builtins", "complex"),
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dicts, lists, numbers, text and numpy arrays; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def fetch(path: str) -> None:
    """Bring a file into the cache, where Detectron2 finds it when it loads it.

    Args:
        path: a URL, of Detectron2's own kinds too (``detectron2://``).

    Raises:
        FileNotFoundError: it cannot be fetched.
    """
    try:
        PathManager.get_local_path(path.split("?")[0])
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"The checkpoint '{path}' (MODEL.WEIGHTS) could not be fetched: {error}. Without a "
            "network download it elsewhere and name the local file."
        ) from error


def read_checkpoint(path: str, allow_pickle: bool = False) -> dict[str, Any]:
    """What a checkpoint file holds.

    Args:
        path: a local file.
        allow_pickle: unpickle whatever it holds, which can run code.

    Raises:
        ValueError: it is broken, or holds Python objects and ``allow_pickle`` is off.
    """
    try:
        if not path.endswith(".pkl"):
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        with open(path, "rb") as file:
            kind = pickle.Unpickler if allow_pickle else _ArraysOnly
            return kind(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is broken or holds more than tensors and plain types, and is not unpickled, "
            "since that can run code. If you trust the file, set MODEL.RELDN.LOAD.ALLOW_PICKLE to "
            f"True (of a converter: --allow-pickle). ({_reason(error)})"
        ) from error
    except Exception as error:  # torch's readers stumble over other files in many ways
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is broken or cut off, or of another "
            f"format. ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
        ) from error


def _reason(error: pickle.UnpicklingError) -> str:
    """What the file holds, without torch's advice to load it unsafely."""
    text = str(error)
    found = re.search(r"(?i)unsupported (?:global:? |class )+(\w+(?:\.\w+)+)", text)
    if found:
        return f"it holds {found[1]}"
    found = re.search(r"WeightsUnpickler error: ([^\n]*)", text)
    return (found[1] if found else text.partition("\n")[0])[:200]


def from_torchvision_vgg16(state: dict[str, Any]) -> dict[str, Tensor] | None:
    """The weights of torchvision's VGG16 under the names of a detector; None if it is no VGG16.

    fc8, the classifier of ImageNet, has no place in a detector and is left out.
    """
    if not {"features.28.weight", "classifier.0.weight", "classifier.3.weight"} <= set(state):
        return None
    return {
        f"{TORCHVISION_NAMES[layer]}.{kind}": state[f"{layer}.{kind}"]
        for layer in TORCHVISION_NAMES
        for kind in ("weight", "bias")
    }
