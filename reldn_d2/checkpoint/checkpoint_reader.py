"""Reading checkpoint files without running code in them.

============  ===================================================  ==============================
Suffix        Format                                               Accepted content
============  ===================================================  ==============================
.pth, .pt     torch's format: ours, Detectron2's, torchvision's    tensors and plain types only
.pkl          a pickle: Detectron2's model zoo, Caffe2's           arrays and plain types only
.pyth         torch's format, by pycls                             tensors and plain types only
.pth.xz       torch's format, compressed: models in this package   tensors and plain types only
.safetensors  safetensors, with our entries as JSON in the header  tensors and JSON, never code
============  ===================================================  ==============================

Any other content is an error unless unpickling is allowed explicitly, because it can run code.
"""

import io
import lzma
import pickle
import re
from typing import Any

import torch
from torch import Tensor

from detectron2.utils.file_io import PathManager

from ..modeling.backbone.vgg import TORCHVISION_NAMES
from ..utils.safe_pickle import ArraysOnlyUnpickler
from . import hub_files  # noqa: F401  lets Detectron2's path manager open hf://
from .safetensors_files import load_safetensors, require_safetensors

__all__ = ["UntrustedContentError", "fetch", "from_torchvision_vgg16", "read_checkpoint"]


class UntrustedContentError(ValueError):
    """A file that is not unpickled, because that can run code.

    Attributes:
        reason: what it holds, such as "it holds torchvision.models.resnet.ResNet".
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def fetch(path: str) -> None:
    """Download a file into the cache, where Detectron2 finds it when it loads the checkpoint.

    Args:
        path: a URL; Detectron2's own schemes (``detectron2://``) and the Hugging Face Hub's
            (``hf://``, :mod:`.hub_files`) work too.

    Raises:
        FileNotFoundError: if it cannot be fetched.
        ImportError: if it is of the Hub, and huggingface_hub or safetensors is not installed.
        ValueError: if it is of the Hub and not of the form ``hf://OWNER/NAME[@REVISION]``.
    """
    try:
        PathManager.get_local_path(path.split("?")[0])
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"The checkpoint '{path}' (MODEL.WEIGHTS) could not be fetched: {error}. Without "
            "network access, download it on another machine and give the path of the local file."
        ) from error


def read_checkpoint(path: str, allow_pickle: bool = False) -> dict[str, Any]:
    """Read the content of a checkpoint file.

    Args:
        path: a local file.
        allow_pickle: unpickle any Python object, which can run code.

    Raises:
        ValueError: if the file is broken, or holds Python objects and ``allow_pickle`` is off.
        ImportError: if the format needs a package that is not installed.
    """
    if path.endswith(".safetensors"):
        require_safetensors(path)
    try:
        if path.endswith(".safetensors"):
            return load_safetensors(path)
        if path.endswith(".xz"):
            with lzma.open(path) as file:
                content = io.BytesIO(file.read())
            return torch.load(content, map_location="cpu", weights_only=not allow_pickle)
        if not path.endswith(".pkl"):
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        with open(path, "rb") as file:
            unpickler = pickle.Unpickler if allow_pickle else ArraysOnlyUnpickler
            return unpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        reason = _unpickling_reason(error)
        raise UntrustedContentError(
            f"{path} is broken or holds more than tensors and plain types. It was not unpickled, "
            "because that can run code. If you trust the file, set MODEL.RELDN.LOAD.ALLOW_PICKLE "
            f"to True (converters: --allow-pickle). ({reason})",
            reason,
        ) from error
    except Exception as error:  # torch's readers fail on other files in many ways
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is broken, truncated or in another "
            f"format. ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
        ) from error


def _unpickling_reason(error: pickle.UnpicklingError) -> str:
    """Say what the file holds, without torch's advice to load it unsafely."""
    text = str(error)
    match = re.search(r"(?i)unsupported (?:global:? |class )+(\w+(?:\.\w+)+)", text)
    if match:
        return f"it holds {match[1]}"
    match = re.search(r"WeightsUnpickler error: ([^\n]*)", text)
    return (match[1] if match else text.partition("\n")[0])[:200]


def from_torchvision_vgg16(state: dict[str, Any]) -> dict[str, Tensor] | None:
    """Rename the weights of torchvision's VGG16 to a detector's; None if ``state`` is no VGG16.

    fc8, the ImageNet classifier, is left out because a detector has no use for it.
    """
    if not {"features.28.weight", "classifier.0.weight", "classifier.3.weight"} <= set(state):
        return None
    return {
        f"{ours}.{kind}": state[f"{theirs}.{kind}"]
        for theirs, ours in TORCHVISION_NAMES.items()
        for kind in ("weight", "bias")
    }
