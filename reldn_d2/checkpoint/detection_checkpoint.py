"""Reading checkpoint files without running code in them, and Detectron2's checkpointer made safer.

==========  =====================================================  ==============================
Suffix      Format                                                 Accepted content
==========  =====================================================  ==============================
.pth, .pt   torch's format: ours, Detectron2's, torchvision's      tensors and plain types only
.pkl        a pickle: Detectron2's model zoo, Caffe2's             arrays and plain types only
.pyth       torch's format, by pycls                               tensors and plain types only
==========  =====================================================  ==============================

Any other content is an error unless unpickling is allowed explicitly, because it can run code.
"""

import logging
import os
import pickle
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from ..modeling.backbone.vgg import TORCHVISION_NAMES
from ..utils.file_io import write_atomically

__all__ = ["DetectorCheckpointer", "fetch", "from_torchvision_vgg16", "read_checkpoint"]

logger = logging.getLogger(__name__)

# A BatchNorm buffer that older checkpoints lack and that no model here needs.
_BATCH_COUNTER = "num_batches_tracked"

# The only globals that a pickle of dicts of numpy arrays refers to.
_HARMLESS_GLOBALS = {
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


class _ArraysOnlyUnpickler(pickle.Unpickler):
    """Unpickle dicts, lists, numbers, text and numpy arrays; refuse everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS_GLOBALS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def fetch(path: str) -> None:
    """Download a file into the cache, where Detectron2 finds it when it loads the checkpoint.

    Args:
        path: a URL; Detectron2's own schemes (``detectron2://``) work too.

    Raises:
        FileNotFoundError: if it cannot be fetched.
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
    """
    try:
        if not path.endswith(".pkl"):
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        with open(path, "rb") as file:
            unpickler = pickle.Unpickler if allow_pickle else _ArraysOnlyUnpickler
            return unpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is broken or holds more than tensors and plain types. It was not unpickled, "
            "because that can run code. If you trust the file, set MODEL.RELDN.LOAD.ALLOW_PICKLE "
            f"to True (converters: --allow-pickle). ({_unpickling_reason(error)})"
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


class DetectorCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, made safer.

    It reads tensors and plain types only, writes files atomically and raises if a required weight
    is not loaded. It also reads torchvision's VGG16.
    """

    backbone_only_hint = "It looks like a backbone only: train the detector on your data set first."

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        matching_only: bool = False,
        allow_pickle: bool = False,
        complete: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            model: possibly wrapped for distributed training.
            save_dir: folder of checkpoints.
            matching_only: load the layers whose shapes match and warn about the others.
            allow_pickle: unpickle files that hold Python objects, which can run code.
            complete: require all weights, not only the backbone's; for evaluation.
            kwargs: as for ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.matching_only = matching_only
        self.allow_pickle = allow_pickle
        self.complete = complete
        self._path = ""  # as the user gave it, for messages

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file or URL (``detectron2://`` included).

        Raises:
            FileNotFoundError: if there is no such file or it cannot be fetched.
            ValueError: if it cannot be read, or a required weight is missing or has another shape.
        """
        # Detectron2's main branch accepts options behind a question mark.
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise FileNotFoundError(
                f"No checkpoint '{path}' (MODEL.WEIGHTS). RelDN starts from a trained detector or "
                "continues from a RelDN checkpoint; README.md shows how to train the detector."
            )
        if path and "://" in path:
            fetch(path)
        self._path = path
        return super().load(path, *args, **kwargs)

    def save(self, name: str, tag: bool = True, **kwargs: Any) -> None:
        """Save under ``name``; an interruption leaves earlier checkpoints intact.

        Args:
            name: without its suffix.
            tag: let ``last_checkpoint``, which ``--resume`` starts from, point to the new file.
            kwargs: more entries to save.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: x.state_dict() for key, x in self.checkpointables.items()}, **kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info(f"Saving checkpoint to {path}")
        with write_atomically(path, "wb") as file:
            torch.save(data, file)
        if tag:
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Let ``last_checkpoint`` point to a file in ``save_dir``."""
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Read a file as Detectron2 does, but with :func:`read_checkpoint`."""
        filename = PathManager.get_local_path(filename.split("?")[0])
        data = read_checkpoint(filename, self.allow_pickle)
        if not isinstance(data, dict):
            raise ValueError(f"{filename} holds a {type(data).__name__}, not a dict of weights.")
        if filename.endswith(".pkl") and not ("model" in data and "__author__" in data):
            # Caffe2: detectors keep their weights under "blobs", ImageNet models do not.
            blobs = data.get("blobs", data)
            blobs = {name: x for name, x in blobs.items() if not name.endswith("_momentum")}
            return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):
            state = data.get("model_state", {})
            state = {name: x for name, x in state.items() if not name.endswith(_BATCH_COUNTER)}
            return {"model": state, "__author__": "pycls", "matching_heuristics": True}
        data = data if "model" in data else {"model": data}
        if "matching_heuristics=True" in self._path.partition("?")[2]:
            data["matching_heuristics"] = True
        data["model"] = from_torchvision_vgg16(data["model"]) or data["model"]
        return data

    def _load_model(self, checkpoint: dict[str, Any]):
        num_weights = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        self._check_loaded(self.model, incompatible, num_weights, "detector", self.complete)
        return incompatible

    def _check_loaded(
        self, module: nn.Module, incompatible: Any, num_weights: int, kind: str, complete: bool
    ) -> None:
        """Log what was loaded; raise if a required weight is missing.

        Args:
            module: the module that was loaded.
            incompatible: what ``_load_model`` returned.
            num_weights: number of weights in the checkpoint.
            kind: "detector" or "RelDN", for messages.
            complete: require all weights, not only the backbone's.
        """
        source = f"{kind} checkpoint {self._path}"
        not_loaded = {*incompatible.missing_keys, *(x[0] for x in incompatible.incorrect_shapes)}
        not_loaded |= {name for name in module.state_dict() if name.endswith(_BATCH_COUNTER)}
        loaded = [name for name in module.state_dict() if name not in not_loaded]
        counts = Counter(_part_of(name) for name in loaded)
        unexpected = sorted(incompatible.unexpected_keys)
        logger.info(
            f"Loaded {len(loaded)} weights of the {source}: "
            + (", ".join(f"{count} into {part}" for part, count in counts.items()) or "none")
            + (f"; ignored {len(unexpected)} unexpected weights." if unexpected else ".")
        )
        if incompatible.incorrect_shapes and not self.matching_only:
            raise ValueError(
                f"{source} does not fit the config: "
                f"{self._explain_shapes(incompatible.incorrect_shapes)} To load the layers that "
                "fit and train the others from scratch, set MODEL.RELDN.LOAD.MATCHING_ONLY to True."
            )
        if not loaded:
            raise ValueError(
                f"None of the {num_weights} weights of the {source} fits this model, which has "
                f"{', '.join(list(module.state_dict())[:3])}, ..."
            )
        missing = [x for x in incompatible.missing_keys if _is_required(module, x, complete)]
        if missing and not self.matching_only:
            hint = "Build the model with the config that the checkpoint was trained with."
            if kind == "detector" and any("roi_heads" in x for x in missing):
                hint = self.backbone_only_hint
                if unexpected:
                    hint += (
                        f" Or is it another kind of detector? It has {unexpected[0]}, which this "
                        "model does not have; set MODEL.RELDN.DETECTOR to the right kind."
                    )
            raise ValueError(
                f"{source} lacks {len(missing)} weights that the model needs, such as "
                f"{', '.join(missing[:3])}. {hint}"
            )
        not_loaded = {name for name in not_loaded if not name.endswith(_BATCH_COUNTER)}
        if not_loaded and self.matching_only:
            logger.warning(
                f"{len(not_loaded)} weights stay as initialized (MODEL.RELDN.LOAD.MATCHING_ONLY), "
                f"such as {', '.join(sorted(not_loaded)[:5])}."
            )

    def _explain_shapes(self, shapes: list[tuple]) -> str:
        """Name the class counts of both sides and the first shapes that differ.

        Args:
            shapes: (name, shape in the checkpoint, shape in the model) of each weight.
        """
        return join_reasons(explain_classes(shapes), shapes)


def _is_required(module: nn.Module, name: str, complete: bool) -> bool:
    """Whether a missing weight is an error; a detector's training may start from its backbone."""
    if "pixel_" in name or name.endswith(_BATCH_COUNTER):
        return False
    has_fpn = hasattr(getattr(module, "backbone", None), "bottom_up")
    return complete or name.startswith("backbone.bottom_up." if has_fpn else "backbone.")


def _part_of(name: str) -> str:
    """Return the module under which the log counts a weight."""
    parts = name.split(".")
    depth = {"detector": 3, "relation_head": 2, "roi_heads": 2}.get(parts[0], 1)
    return ".".join(parts[: min(depth, len(parts) - 1)]) or name


def explain_classes(shapes: list[tuple]) -> list[str]:
    """Compare the numbers of entity classes; see ``DetectorCheckpointer._explain_shapes``."""
    for name, theirs, ours in shapes:
        if re.search(r"box_predictor\.(\d\.)?cls_score\.weight$", name):
            return [
                f"it was trained with {theirs[0] - 1} entity classes, the config has "
                f"{ours[0] - 1} (MODEL.ROI_HEADS.NUM_CLASSES)"
            ]
        if name.endswith("head.cls_score.bias"):  # RetinaNet: classes times anchors
            return [
                f"it was trained with {theirs[0]} class logits per location, the config has "
                f"{ours[0]} (MODEL.RETINANET.NUM_CLASSES times anchors)"
            ]
    return []


def join_reasons(reasons: list[str], shapes: list[tuple]) -> str:
    """Append the first two shapes that differ to the reasons, as one sentence."""
    first = [f"{name} is {theirs}, the model has {ours}" for name, theirs, ours in shapes[:2]]
    return "; ".join(reasons + first) + "."
