"""Checkpoints of RelDN and of detectors, and how the weights of a detector start a RelDN.

A detector checkpoint goes into the frozen detector as it is and initialises the relation branch; a
RelDN checkpoint is loaded whole, without that step.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..modeling.meta_arch import RelDN
from ..utils.file_io import write_atomically
from ..utils.protocols import predicates_per_pair
from .detection_checkpoint import fetch, from_torchvision_vgg16, read_checkpoint

__all__ = [
    "DetectorCheckpointer",
    "RelDNCheckpointer",
    "initialize_relation_branch",
    "pretrained_modules",
]

logger = logging.getLogger(__name__)

_RELDN_PREFIXES = ("detector.model.", "relation_head.", "predicate_backbone.")
_COUNTER = "num_batches_tracked"


def _copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Copy those weights of ``source`` that ``target`` has; all of its own must be there."""
    names, state = target.state_dict(), source.state_dict()
    target.load_state_dict({name: value for name, value in state.items() if name in names})


def _fits(target: nn.Module, source: nn.Module | None) -> bool:
    if source is None:
        return False
    shapes = {name: value.shape for name, value in source.state_dict().items()}
    return shapes == {name: value.shape for name, value in target.state_dict().items()}


def pretrained_modules(model: RelDN) -> list[nn.Module]:
    """The parts of the relation branch that start from trained weights: they learn more slowly."""
    head, detector = model.relation_head, model.detector
    modules = []
    if model.predicate_backbone is not None and model.predicate_weights != "":
        modules.append(model.predicate_backbone)
    return modules + [x for x in head.box_heads if _fits(x, detector.box_head)]


def initialize_relation_branch(model: RelDN, allow_pickle: bool = False) -> None:
    """Copy the detector's backbone into the predicate backbone and its box head into the three
    relation box heads (section 5 of the paper).

    A predicate backbone of another kind gets its own weights instead, and the box head of its
    vectors stays as it is where its structure is another. Without a box head to copy all stay.

    Args:
        model: its detector has been loaded.
        allow_pickle: of a predicate backbone's own file, see :class:`DetectorCheckpointer`.

    Raises:
        ValueError: a part of another structure, with the keys that differ.
    """
    detector, head = model.detector, model.relation_head
    copies, done = [], []
    if model.predicate_backbone is not None and model.predicate_weights is None:
        copies.append(("the predicate backbone", model.predicate_backbone, detector.backbone))
    elif model.predicate_weights:
        _load_backbone(model.predicate_backbone, model.predicate_weights, allow_pickle)
        done.append(f"the predicate backbone from {model.predicate_weights}")
    for box_head in head.box_heads if detector.box_head is not None else ():
        own = box_head is head.predicate_box_head and model.predicate_weights is not None
        if not own or _fits(box_head, detector.box_head):
            copies.append(("a relation box head", box_head, detector.box_head))
    for what, target, source in copies:
        try:
            _copy_weights(target, source)
        except RuntimeError as error:
            raise ValueError(
                f"The detector's weights do not fit {what}: both must have one structure. {error}"
            ) from error
        done.append(what)
    random = len(head.box_heads) - sum(what == "a relation box head" for what in done)
    counts = ", ".join(f"{number} x {what}" for what, number in Counter(done).items())
    logger.info(
        f"Initialised the relation branch: {counts or 'nothing to copy'}"
        + (f"; {random} box heads start from random weights." if random else ".")
    )


def _load_backbone(backbone: nn.Module, path: str, allow_pickle: bool) -> None:
    """Load a backbone alone, from a file of it (ImageNet) or of a detector on it."""
    wrapper = nn.Module()
    wrapper.backbone = backbone
    DetectorCheckpointer(wrapper, allow_pickle=allow_pickle).load(path)


class DetectorCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, safer.

    Files are read as tensors and plain types only; a file is written whole or not at all; weights
    that must be loaded and are not are an error. Torchvision's VGG16 is taken too.
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
            matching_only: load the layers whose shapes match, with a warning about the others.
            allow_pickle: unpickle files that hold Python objects, which can run code.
            complete: all weights must be loaded, not only the backbone's; for evaluation.
            kwargs: as for ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.matching_only = matching_only
        self.allow_pickle = allow_pickle
        self.complete = complete
        self._path = ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file or URL (``detectron2://`` included).

        Raises:
            FileNotFoundError: there is no such file, or it cannot be fetched.
            ValueError: it cannot be read, or weights that must be loaded are missing or of another
                shape.
        """
        # Detectron2's main branch takes options behind a question mark.
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
        """Save under ``name``; an interruption leaves the earlier checkpoints as they are.

        Args:
            name: without its suffix.
            tag: let ``last_checkpoint``, where ``--resume`` goes on, point to it.
            kwargs: more to save.
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
        """Let ``last_checkpoint`` point to a file of the folder."""
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        """As Detectron2's, without running what a file holds; see :mod:`.checkpoint_files`."""
        filename = PathManager.get_local_path(filename.split("?")[0])
        data = read_checkpoint(filename, self.allow_pickle)
        if not isinstance(data, dict):
            raise ValueError(f"{filename} holds a {type(data).__name__}, not a dict of weights.")
        if filename.endswith(".pkl") and not ("model" in data and "__author__" in data):
            blobs = data.get("blobs", data)  # Caffe2: detectors have them, ImageNet models do not
            blobs = {name: x for name, x in blobs.items() if not name.endswith("_momentum")}
            return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):
            state = data.get("model_state", {})
            state = {name: x for name, x in state.items() if not name.endswith(_COUNTER)}
            return {"model": state, "__author__": "pycls", "matching_heuristics": True}
        data = data if "model" in data else {"model": data}
        if "matching_heuristics=True" in self._path.partition("?")[2]:
            data["matching_heuristics"] = True
        data["model"] = from_torchvision_vgg16(data["model"]) or data["model"]
        return data

    def _load_model(self, checkpoint: dict[str, Any]):
        number = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        self._check_loaded(self.model, incompatible, number, "detector", self.complete)
        return incompatible

    def _check_loaded(self, module, incompatible, number: int, kind: str, complete: bool) -> None:
        """Say in one line what went where; raise if something that must be loaded was not."""
        where = f"{kind} checkpoint {self._path}"
        not_loaded = {*incompatible.missing_keys, *(x[0] for x in incompatible.incorrect_shapes)}
        not_loaded |= {name for name in module.state_dict() if name.endswith(_COUNTER)}
        loaded = [name for name in module.state_dict() if name not in not_loaded]
        parts = Counter(_part_of(name) for name in loaded)
        unused = len(incompatible.unexpected_keys)
        logger.info(
            f"Loaded {len(loaded)} weights of the {where}: "
            + (", ".join(f"{count} into {part}" for part, count in parts.items()) or "none")
            + (f"; {unused} others have no place in this model." if unused else ".")
        )
        if incompatible.incorrect_shapes and not self.matching_only:
            raise ValueError(
                f"{where} does not fit the config: "
                f"{self._explain_shapes(incompatible.incorrect_shapes)} To load the layers that "
                "fit and train the others anew, set MODEL.RELDN.LOAD.MATCHING_ONLY to True."
            )
        if not loaded:
            raise ValueError(
                f"None of the {number} weights of the {where} fits this model, which has "
                f"{', '.join(list(module.state_dict())[:3])}, ..."
            )
        missing = [x for x in incompatible.missing_keys if _must_load(module, x, complete)]
        if missing and not self.matching_only:
            hint = "Build the model with the config that the checkpoint was trained with."
            if kind == "detector" and any("roi_heads" in x for x in missing):
                hint = self.backbone_only_hint
                if incompatible.unexpected_keys:
                    hint += (
                        f" Or is it another kind of detector? It has "
                        f"{sorted(incompatible.unexpected_keys)[0]}, which this model has not; "
                        "MODEL.RELDN.DETECTOR names the kind."
                    )
            raise ValueError(
                f"{where} lacks {len(missing)} weights of the model, among them "
                f"{', '.join(missing[:3])}. {hint}"
            )
        not_loaded = [name for name in not_loaded if not name.endswith(_COUNTER)]
        if not_loaded and self.matching_only:
            logger.warning(
                f"{len(not_loaded)} weights stay as initialised (MODEL.RELDN.LOAD.MATCHING_ONLY), "
                f"among them {', '.join(sorted(not_loaded)[:5])}."
            )

    def _explain_shapes(self, shapes: list[tuple]) -> str:
        """The numbers of classes on both sides, and the first shapes that differ."""
        reasons = _explain_classes(shapes)
        reasons += [f"{name} is {found}, the model has {want}" for name, found, want in shapes[:2]]
        return "; ".join(reasons) + "."


def _must_load(module: nn.Module, name: str, complete: bool) -> bool:
    """Whether a missing weight is an error; a detector's training may start from its backbone."""
    if "pixel_" in name or name.endswith(_COUNTER):
        return False
    has_fpn = hasattr(getattr(module, "backbone", None), "bottom_up")
    return complete or name.startswith("backbone.bottom_up." if has_fpn else "backbone.")


def _part_of(name: str) -> str:
    """The module that a line about loading speaks of."""
    parts = name.split(".")
    depth = {"detector": 3, "relation_head": 2, "roi_heads": 2}.get(parts[0], 1)
    return ".".join(parts[: min(depth, len(parts) - 1)]) or name


def _explain_classes(shapes: list[tuple]) -> list[str]:
    for name, found, expected in shapes:
        if re.search(r"box_predictor\.(\d\.)?cls_score\.weight$", name):
            return [
                f"it was trained with {found[0] - 1} entity classes, the config has "
                f"{expected[0] - 1} (MODEL.ROI_HEADS.NUM_CLASSES)"
            ]
        if name.endswith("head.cls_score.bias"):  # RetinaNet: classes times anchors
            return [
                f"it was trained with {found[0]} class logits of a place, the config has "
                f"{expected[0]} (MODEL.RETINANET.NUM_CLASSES times anchors)"
            ]
    return []


class RelDNCheckpointer(DetectorCheckpointer):
    """Checkpointer for :class:`RelDN`, taking detector and RelDN checkpoints.

    What it saves holds, beside the weights (the frequency table among them), the class names, the
    predicate names, the config and the statistics of the training set under ``"reldn"``, as plain
    types.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        thing_classes: Sequence[str] | None = None,
        predicate_classes: Sequence[str] | None = None,
        cfg: CfgNode | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            model: a RelDN, possibly wrapped for distributed training.
            save_dir: folder of checkpoints.
            thing_classes, predicate_classes, cfg: written into what is saved.
            kwargs: as for :class:`DetectorCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.backbone_only_hint = self.model.detector.backbone_only_hint
        self.started_from_detector = False  # the last load was of a detector: nothing is trained
        self.description: dict[str, Any] = {
            "thing_classes": list(thing_classes or []),
            "predicate_classes": list(predicate_classes or []),
            "config": cfg.dump() if cfg is not None else "",
            # Where the config leaves it to the data set, which may not be registered later.
            "predicates_per_pair": list(predicates_per_pair(cfg)) if cfg is not None else [],
        }

    def save(self, name: str, tag: bool = True, **kwargs: Any) -> None:
        """Save under ``name``; see the class for what is added."""
        super().save(name, tag, reldn=self.description, **kwargs)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a detector or a RelDN checkpoint; see :meth:`DetectorCheckpointer.load`."""
        if not path:
            logger.warning("MODEL.WEIGHTS is empty: the frozen detector has random weights.")
        rest = super().load(path, *args, **kwargs)
        statistics = rest.get("reldn", {}).get("statistics")
        if statistics:  # those of the training, which a resumed run goes on with
            self.description["statistics"] = statistics
        for field in ("thing_classes", "predicate_classes"):
            saved, known = rest.get("reldn", {}).get(field), self.description[field]
            if saved and known and saved != known:
                logger.warning(
                    f"{path} was trained with other {field}, or in another order, than the data "
                    f"set has: {saved[:3]}..., {known[:3]}... Its predictions carry the numbers."
                )
        return rest

    def _load_model(self, checkpoint: dict[str, Any]):
        names = [
            name[len("module.") :] if name.startswith("module.") else name
            for name in checkpoint["model"]
        ]
        if any(name.startswith(_RELDN_PREFIXES) for name in names):
            incompatible = DetectionCheckpointer._load_model(self, checkpoint)
            self._check_loaded(self.model, incompatible, len(names), "RelDN", True)
            semantic = getattr(self.model.relation_head, "semantic", None)
            skipped = [x[0] for x in incompatible.incorrect_shapes] + incompatible.missing_keys
            if semantic is not None and "relation_head.semantic.table.weight" in skipped:
                semantic.counted.fill_(False)  # the table was not loaded: it is counted anew
            return incompatible

        detector = DetectionCheckpointer(self.model.detector.model)
        incompatible = detector._load_model(checkpoint)
        self._check_loaded(detector.model, incompatible, len(names), "detector", True)
        initialize_relation_branch(self.model, self.allow_pickle)
        self.started_from_detector = True
        return incompatible

    def _explain_shapes(self, shapes: list[tuple]) -> str:
        """The numbers of classes and predicates on both sides, and the first shapes that differ."""
        head = self.model.relation_head
        reasons = _explain_classes(shapes)
        for name, found, expected in shapes:
            if name != "relation_head.semantic.table.weight":
                continue
            if found[0] != expected[0] and not reasons:  # rows are pairs of classes
                reasons.append(
                    f"it was trained with {isqrt(found[0])} entity classes, the config has "
                    f"{isqrt(expected[0])}"
                )
            if found[1] != expected[1]:
                reasons.append(self._explain_predicates(found[1]))
        if not any("predicates" in x for x in reasons):
            last = [x for x in shapes if x[0].startswith("relation_head.") and len(x[1]) == 1]
            last = [x for x in last if x[2] == (head.num_predicates + 1,)]
            reasons += [self._explain_predicates(x[1][0]) for x in last[:1]]
        reasons += [f"{name} is {found}, the model has {want}" for name, found, want in shapes[:2]]
        return "; ".join(reasons) + "."

    def _explain_predicates(self, found: int) -> str:
        return (
            f"it was trained with {found - 1} predicates, the config has "
            f"{self.model.relation_head.num_predicates} (MODEL.ROI_RELATION_HEAD.NUM_PREDICATES)"
        )
