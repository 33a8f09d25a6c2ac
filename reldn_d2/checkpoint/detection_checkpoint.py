"""Detectron2's checkpointer made safer, and aware of the names of classes."""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..structures.name_matching import NAME_FIELDS, NameMismatchError, match_names
from ..utils.config_keys import key_owners
from ..utils.file_io import write_atomically
from ..utils.user_modules import imported_modules
from .checkpoint_reader import fetch, from_torchvision_vgg16, read_checkpoint
from .class_weights import class_weights, model_zoo_classes, num_classes_of

__all__ = ["DetectorCheckpointer", "check_checkpoint_exists"]

logger = logging.getLogger(__name__)

# A BatchNorm buffer that older checkpoints lack and that no model here needs.
_BATCH_COUNTER = "num_batches_tracked"


def check_checkpoint_exists(path: str, key: str = "MODEL.WEIGHTS") -> None:
    """Check that a checkpoint to start from is there, unless it is a URL.

    Args:
        path: file or URL; empty means random weights.
        key: config key that names it, for the message.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    # Detectron2's main branch accepts options behind a question mark.
    if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
        raise FileNotFoundError(
            f"No checkpoint '{path}' ({key}). RelDN starts from a trained detector or continues "
            "from a RelDN checkpoint. Train the detector first, as README.md shows; for "
            "configs/Toy that is the config configs/Toy/detector.yaml."
        )


class DetectorCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, made safer.

    It reads tensors and plain types only, writes files atomically and raises if a required weight
    is not loaded. It also reads torchvision's VGG16.

    Besides the weights, a saved checkpoint has an entry of plain types (``"detector"``): the class
    names and the config. A loaded checkpoint gives the model its names, in its order.

    Attributes:
        description: the entry that is saved.
        loaded: the entry of the checkpoint that was loaded; empty if it has none.
    """

    entry = "detector"
    backbone_only_hint = "It looks like a backbone only: train the detector on your dataset first."

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        thing_classes: Sequence[str] | None = None,
        names_owner: str = "the dataset",
        cfg: CfgNode | None = None,
        matching_only: bool = False,
        allow_pickle: bool = False,
        complete: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            model: possibly wrapped for distributed training; gets an attribute ``names`` with the
                names of its classes (and predicates) by metadata field.
            save_dir: folder of checkpoints.
            thing_classes, cfg: written into saved checkpoints.
            names_owner: whose names these are, for messages.
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
        self.names_owner = names_owner
        self.loaded: dict[str, Any] = {}
        self.description: dict[str, Any] = {
            "thing_classes": list(thing_classes or []),
            "config": cfg.dump() if cfg is not None else "",
        }
        owners = {} if cfg is None else key_owners(cfg)
        if owners:  # whose module must be imported to read the config
            self.description["config_keys"] = owners
        if imported_modules():  # parts that the config names may be theirs
            self.description["modules"] = list(imported_modules())
        self._name_the_model()

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file or URL (``detectron2://`` included).

        Raises:
            FileNotFoundError: if there is no such file or it cannot be fetched.
            ValueError: if it cannot be read, or a required weight is missing or has another shape.
        """
        check_checkpoint_exists(path)
        if path and "://" in path:
            fetch(path)
        self._path, self.loaded = path, {}
        return super().load(path, *args, **kwargs)

    def save(self, name: str, tag: bool = True, **kwargs: Any) -> None:
        """Save under ``name``, with the entry that the class describes.

        An interruption leaves earlier checkpoints intact.

        Args:
            name: without its suffix.
            tag: let ``last_checkpoint``, which ``--resume`` starts from, point to the new file.
            kwargs: more entries to save.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), self.entry: self.description}
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
        if all(name.startswith("module.") for name in data["model"]):  # saved with DDP around it
            data["model"] = {name.removeprefix("module."): x for name, x in data["model"].items()}
        return data

    def _load_model(self, checkpoint: dict[str, Any]):
        state, self.loaded = checkpoint["model"], checkpoint.get("detector", {})
        num_weights = len(state)
        if class_weights(state) and class_weights(self.model.state_dict()):
            saved = {**self.loaded, "thing_classes": self._detector_classes(state)}
            if self._adopt_names(saved, ("thing_classes",)):
                for name in class_weights(state):  # those of other classes
                    del state[name]
        incompatible = super()._load_model(checkpoint)
        self._check_loaded(self.model, incompatible, num_weights, "detector", self.complete)
        return incompatible

    def _name_the_model(self) -> None:
        self.model.names = {x: self.description[x] for x in NAME_FIELDS if self.description.get(x)}

    def _detector_classes(self, state: Mapping[str, Any]) -> list[str] | None:
        """Return the classes of a detector checkpoint; None, with a warning, if it names none."""
        num_classes = num_classes_of(state)
        names = self.loaded.get("thing_classes") or model_zoo_classes(self._path, num_classes)
        if names and num_classes is not None and len(names) != num_classes:
            raise ValueError(
                f"{self._path} names {len(names)} classes, but its weights are for {num_classes}."
            )
        if not names and self.description["thing_classes"]:
            logger.warning(
                f"{self._path} does not name its classes: they are assumed to be those of "
                f"{self.names_owner}, in the same order."
            )
        return names or None

    def _adopt_names(self, saved: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
        """Give the model the names of a checkpoint of its own kind, in the checkpoint's order.

        Args:
            saved: names of the checkpoint by field.
            fields: fields whose names may differ with ``MATCHING_ONLY``.

        Returns:
            the fields whose names differ, which keep the dataset's names.

        Raises:
            NameMismatchError: if names differ by more than their order.
        """
        different = []
        for field in NAME_FIELDS:
            theirs, ours = saved.get(field), self.description.get(field)
            if not theirs or field not in self.description:
                continue
            hint = "Use a dataset with the names of the checkpoint."
            if field in fields:
                hint += (
                    " To train the layers of other names from scratch, set "
                    "MODEL.RELDN.LOAD.MATCHING_ONLY to True."
                )
            try:
                owners = (f"checkpoint {self._path}", self.names_owner)
                match_names(theirs, ours or theirs, field, *owners, hint=hint)
            except NameMismatchError as error:
                if not self.matching_only or field not in fields:
                    raise
                logger.warning(f"{error} (MODEL.RELDN.LOAD.MATCHING_ONLY is set.)")
                different.append(field)
            else:
                self.description[field] = list(theirs)
        self._name_the_model()
        return different

    def _check_loaded(
        self,
        module: nn.Module,
        incompatible: Any,
        num_weights: int,
        kind: str,
        complete: bool,
        frozen: str | None = None,
    ) -> None:
        """Log what was loaded; raise if a required weight is missing.

        Args:
            module: the module that was loaded.
            incompatible: what ``_load_model`` returned.
            num_weights: number of weights in the checkpoint.
            kind: "detector" or "RelDN", for messages.
            complete: require all weights, not only the backbone's.
            frozen: prefix of the weights that are never trained and must all be loaded, even with
                ``matching_only``; None if there are none.
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

        def is_frozen(name: str) -> bool:
            return frozen is not None and name.startswith(frozen)

        # A frozen layer with random weights would never learn: MATCHING_ONLY does not cover it.
        shapes = [
            x for x in incompatible.incorrect_shapes if not self.matching_only or is_frozen(x[0])
        ]
        if shapes:
            fixed = [x for x in shapes if is_frozen(x[0])]
            advice = _MATCHING_ONLY_ADVICE
            if fixed:
                sizes = _SIZES_ADVICE if kind == "detector" else _CONFIG_ADVICE
                advice = _CLASSES_ADVICE if explain_classes(fixed) else sizes
            raise ValueError(
                f"{source} does not fit the config: {self._explain_shapes(shapes)} {advice}"
            )
        if not loaded:
            raise ValueError(
                f"None of the {num_weights} weights of the {source} fits this model, which has "
                f"{', '.join(list(module.state_dict())[:3])}, ..."
            )
        missing = [x for x in incompatible.missing_keys if _is_required(module, x, complete)]
        missing = [x for x in missing if not self.matching_only or is_frozen(x)]
        if missing:
            hint = _CONFIG_ADVICE
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


_MATCHING_ONLY_ADVICE = (
    "To load the layers that fit and train the others from scratch, set "
    "MODEL.RELDN.LOAD.MATCHING_ONLY to True."
)
_CONFIG_ADVICE = "Build the model with the config that the checkpoint was trained with."
_SIZES_ADVICE = (
    "The detector was trained with other sizes: use its YAML as _BASE_, or repeat the options that "
    "it was trained with."
)
_CLASSES_ADVICE = (
    "RelDN does not train its detector: list all classes of the detector in the dataset, or train "
    "the detector on this dataset first."
)


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
    """Compare the numbers of entity classes; see ``DetectorCheckpointer._explain_shapes``.

    Returns:
        one reason if they differ; none if only other sizes of the layers do.
    """
    for name, theirs, ours in shapes:
        if theirs[:1] == ours[:1]:
            continue
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
