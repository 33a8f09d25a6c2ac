"""Checkpoints of RelDN, and how the weights of a detector start one.

A detector checkpoint goes into the frozen detector as it is and initialises the relation branch; a
RelDN checkpoint is loaded whole, without that step.
"""

import logging
import os
from typing import Any, Dict, List, Optional, Sequence

from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

from .modeling.meta_arch import RelDN

__all__ = ["RelDNCheckpointer", "initialize_relation_branch"]

logger = logging.getLogger(__name__)

_RELDN_PREFIXES = ("detector.model.", "relation_head.", "predicate_backbone.")


def initialize_relation_branch(model: RelDN) -> None:
    """Copy the detector's backbone into the predicate backbone and its box head into the three
    relation box heads (section 5 of the paper).

    Raises:
        ValueError: a part of another structure, with the keys that differ.
    """
    detector, head = model.detector, model.relation_head
    copies = []
    if model.predicate_backbone is not None:
        copies.append(("the predicate backbone", model.predicate_backbone, detector.backbone))
    if detector.box_head is not None:
        copies += [("a relation box head", x, detector.box_head) for x in head.box_heads]
    for what, target, source in copies:
        try:
            target.load_state_dict(source.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"The detector's weights do not fit {what}: both must have one structure. {error}"
            ) from error
    logger.info(
        "Initialised the relation branch from the detector: "
        f"{'the predicate backbone' if model.predicate_backbone is not None else 'no backbone'} "
        f"and {len(copies) - (model.predicate_backbone is not None)} box heads."
    )


class RelDNCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer for :class:`RelDN`, taking detector and RelDN checkpoints.

    What it saves holds, beside the weights (the frequency table among them), the class names, the
    predicate names, the config and the statistics of the training set under ``"reldn"``, as plain
    types.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        thing_classes: Optional[Sequence[str]] = None,
        predicate_classes: Optional[Sequence[str]] = None,
        cfg: Optional[CfgNode] = None,
        **kwargs: Any,
    ):
        """
        Args:
            model: a RelDN, possibly wrapped for distributed training.
            save_dir: folder of checkpoints.
            thing_classes, predicate_classes, cfg: written into what is saved.
            kwargs: as for ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.started_from_detector = False  # the last load was of a detector: nothing is trained
        self.description: Dict[str, Any] = {
            "thing_classes": list(thing_classes or []),
            "predicate_classes": list(predicate_classes or []),
            "config": cfg.dump() if cfg is not None else "",
        }

    def save(self, name: str, **kwargs: Any) -> None:
        """Save under ``name``; see the class for what is added."""
        super().save(name, reldn=self.description, **kwargs)

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """Load a detector or a RelDN checkpoint from a file or URL (``detectron2://`` included).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: weights that must be loaded are missing or of another shape.
        """
        # Detectron2's main branch takes options behind a question mark.
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise FileNotFoundError(
                f"No checkpoint '{path}' (MODEL.WEIGHTS). RelDN starts from a trained detector or "
                "continues from a RelDN checkpoint; README.md shows how to train the detector."
            )
        if not path:
            logger.warning("MODEL.WEIGHTS is empty: the frozen detector has random weights.")
        self._path = path
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

    def _load_model(self, checkpoint: Dict[str, Any]):
        names = [
            name[len("module.") :] if name.startswith("module.") else name
            for name in checkpoint["model"]
        ]
        if any(name.startswith(_RELDN_PREFIXES) for name in names):
            incompatible = super()._load_model(checkpoint)
            self._raise_if_incomplete(self.model, incompatible, "RelDN")
            self._log_loaded("RelDN", len(names), incompatible)
            return incompatible

        detector = self.model.detector.model
        incompatible = DetectionCheckpointer(detector)._load_model(checkpoint)
        self._raise_if_incomplete(detector, incompatible, "detector")
        self._log_loaded("detector", len(names), incompatible)
        initialize_relation_branch(self.model)
        self.started_from_detector = True
        return incompatible

    def _log_loaded(self, kind: str, number: int, incompatible) -> None:
        unused = len(incompatible.unexpected_keys)
        logger.info(
            f"Loaded {number - unused} weights of the {kind} checkpoint {self._path}"
            + (f"; {unused} others have no place in this model." if unused else ".")
        )

    def _raise_if_incomplete(self, module: nn.Module, incompatible, kind: str) -> None:
        """Raise if a weight of ``module`` was not loaded; name class and predicate counts."""
        where = f"{kind} checkpoint {self._path}"
        shapes = incompatible.incorrect_shapes
        if shapes:
            raise ValueError(f"{where} does not fit the config: {self._explain_shapes(shapes)}")
        missing = [x for x in incompatible.missing_keys if "pixel_" not in x]
        if missing:
            hint = (
                "It looks like a backbone only: train the detector on your data set first."
                if kind == "detector" and any("roi_heads" in x for x in missing)
                else "Build the model with the config that the checkpoint was trained with."
            )
            raise ValueError(
                f"{where} lacks {len(missing)} weights of the model, among them "
                f"{', '.join(missing[:3])}. {hint}"
            )

    def _explain_shapes(self, shapes: List[tuple]) -> str:
        """The numbers of classes and predicates on both sides, and the first shapes that differ."""
        head = self.model.relation_head
        reasons = []
        for name, found, expected in shapes:
            if name.endswith("box_predictor.cls_score.weight"):
                reasons.append(
                    f"it was trained with {found[0] - 1} entity classes, the config has "
                    f"{expected[0] - 1} (MODEL.ROI_HEADS.NUM_CLASSES)"
                )
            if name == "relation_head.semantic.table.weight" and found[1] != expected[1]:
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
