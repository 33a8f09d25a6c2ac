"""RelDN checkpoints, and the initialization of the relation branch from a detector's weights.

A detector checkpoint goes into the frozen detector unchanged and initializes the relation branch; a
RelDN checkpoint is loaded whole, without that step.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

from ..data.datasets.catalog import dataset_names, joint_names
from ..modeling.detectors import PrecomputedDetector
from ..modeling.meta_arch import RelDN
from ..modeling.relation_head.joint import JointModule
from ..structures.name_matching import NAME_FIELDS, match_names
from ..utils.protocols import predicates_per_pair
from .class_weights import class_weights, relation_weights, take_classes
from .detection_checkpoint import DetectorCheckpointer, explain_classes, join_reasons

__all__ = [
    "RelDNCheckpointer",
    "build_checkpointer",
    "initialize_relation_branch",
    "pretrained_predicate_modules",
]

logger = logging.getLogger(__name__)

_RELDN_PREFIXES = ("detector.model.", "relation_head.", "predicate_backbone.")
_SEMANTIC_TABLE = "relation_head.semantic.table.weight"


def pretrained_predicate_modules(model: RelDN) -> list[nn.Module]:
    """Return the predicate backbone and the predicate box head if they start from trained weights.

    They get a lower learning rate than the others, also than the subject and the object box head.
    """
    modules = []
    if model.predicate_backbone is not None and model.predicate_weights != "":
        modules.append(model.predicate_backbone)
    box_head = getattr(model.relation_head, "predicate_box_head", None)
    if box_head is not None and _same_structure(box_head, model.detector.box_head):
        modules.append(box_head)
    return modules


def initialize_relation_branch(model: RelDN, allow_pickle: bool = False) -> None:
    """Copy the detector's weights into the relation branch (section 5 of the paper).

    The predicate backbone starts from the detector's backbone and each of the three relation box
    heads from the detector's box head. A predicate backbone of KIND "other" loads its own
    checkpoint instead; the predicate box head, which works on its features, then keeps its initial
    weights unless it has the structure of the detector's. If the detector has no box head, all box
    heads keep their initial weights.

    Args:
        model: its detector must have been loaded.
        allow_pickle: for the predicate backbone's own file; see :class:`.DetectorCheckpointer`.

    Raises:
        ValueError: if a part has another structure; the message names the keys that differ.
    """
    detector, head = model.detector, model.relation_head
    copies, done = [], []
    if model.predicate_backbone is not None and model.predicate_weights is None:
        copies.append(("the predicate backbone", model.predicate_backbone, detector.backbone))
    elif model.predicate_weights:
        _load_backbone(model.predicate_backbone, model.predicate_weights, allow_pickle)
        done.append(f"the predicate backbone from {model.predicate_weights}")
    for box_head in head.box_heads if detector.box_head is not None else ():
        own = (
            box_head is getattr(head, "predicate_box_head", None)
            and model.predicate_weights is not None
        )
        if not own or _same_structure(box_head, detector.box_head):
            copies.append(("a relation box head", box_head, detector.box_head))
    for part, target, source in copies:
        try:
            _copy_weights(target, source)
        except RuntimeError as error:
            raise ValueError(
                f"The detector's weights do not fit {part}: both need the same structure. {error}"
            ) from error
        done.append(part)
    num_random = len(head.box_heads) - sum(part == "a relation box head" for part in done)
    counts = ", ".join(f"{count} x {part}" for part, count in Counter(done).items())
    logger.info(
        f"Initialized the relation branch: {counts or 'nothing to copy'}"
        + (f"; {num_random} box heads start from random weights." if num_random else ".")
    )


def _copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Copy the weights that ``target`` has; raise if ``source`` lacks any of them."""
    names, state = target.state_dict(), source.state_dict()
    target.load_state_dict({name: value for name, value in state.items() if name in names})


def _same_structure(target: nn.Module, source: nn.Module | None) -> bool:
    if source is None:
        return False
    shapes = {name: value.shape for name, value in source.state_dict().items()}
    return shapes == {name: value.shape for name, value in target.state_dict().items()}


def _load_backbone(backbone: nn.Module, path: str, allow_pickle: bool) -> None:
    """Load a backbone from its own checkpoint (ImageNet) or from that of a detector."""
    wrapper = nn.Module()
    wrapper.backbone = backbone
    DetectorCheckpointer(wrapper, allow_pickle=allow_pickle).load(path)


class RelDNCheckpointer(DetectorCheckpointer):
    """Checkpointer for :class:`RelDN` that loads detector and RelDN checkpoints.

    Besides the weights (which include the frequency table), a saved checkpoint has an entry
    ``"reldn"`` of plain types: the class names, the predicate names, the config, the numbers of
    predicates per pair that the model keeps triplets for, and the training set's statistics.
    """

    entry = "reldn"

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        predicate_classes: Sequence[str] | None = None,
        attribute_classes: Sequence[str] | None = None,
        cfg: CfgNode | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            model: a RelDN, possibly wrapped for distributed training.
            save_dir: folder of checkpoints.
            predicate_classes, attribute_classes, cfg: written into saved checkpoints; attributes
                only if the model predicts them.
            kwargs: as for :class:`.DetectorCheckpointer`.
        """
        super().__init__(model, save_dir, cfg=cfg, **kwargs)
        self.backbone_only_hint = self.model.detector.backbone_only_hint
        self.started_from_detector = False  # whether the last load left the relation head untrained
        self.description.update(
            predicate_classes=list(predicate_classes or []),
            attribute_classes=list(attribute_classes or []),
            # If the config leaves it to the dataset, the dataset may be unknown when loading.
            predicates_per_pair=list(predicates_per_pair(cfg)) if cfg is not None else [],
        )
        self._name_the_model()

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a detector or a RelDN checkpoint; see :meth:`.DetectorCheckpointer.load`.

        The order of a RelDN checkpoint's names becomes that of the model. A detector's classes are
        brought into the order of the dataset, which may also have only some of them.
        """
        if not path and self.model.detector.reads_images:
            logger.warning("MODEL.WEIGHTS is empty: the frozen detector has random weights.")
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: dict[str, Any]):
        state = checkpoint["model"]
        num_weights = len(state)
        if any(name.startswith(_RELDN_PREFIXES) for name in state):
            self.loaded = checkpoint.get(self.entry, {})
            different = self._adopt_reldn_names()
            for field in different:  # train the layers of other names from scratch
                for name in relation_weights(state, field):
                    del state[name]
            incompatible = DetectionCheckpointer._load_model(self, checkpoint)
            self._check_loaded(
                self.model, incompatible, num_weights, "RelDN", True, frozen="detector."
            )
            semantic = getattr(self.model.relation_head, "semantic", None)
            skipped = [x[0] for x in incompatible.incorrect_shapes] + incompatible.missing_keys
            if semantic is not None and _SEMANTIC_TABLE in skipped:
                semantic.counted.fill_(False)  # so that the trainer counts the table again
            elif self.loaded.get("statistics"):  # a resumed run saves them again
                self.description["statistics"] = self.loaded["statistics"]
            if "predicate_classes" not in different:
                self._take_predicate_counts()
            if "thing_classes" not in different:
                self._take_class_counts()
            return incompatible

        if not self.model.detector.reads_images:
            raise ValueError(
                f"{self._path} (MODEL.WEIGHTS) is not a RelDN checkpoint, and this model has no "
                "detector or backbone that it could initialize: its boxes are given, and no module "
                'of its relation head reads pixels. Set MODEL.WEIGHTS to "" or to a RelDN '
                "checkpoint."
            )
        detector = DetectionCheckpointer(self.model.detector.model)
        self.loaded = checkpoint.get("detector", {})
        self._take_detector_classes(detector, state)
        incompatible = detector._load_model(checkpoint)
        self._check_loaded(detector.model, incompatible, num_weights, "detector", True, frozen="")
        initialize_relation_branch(self.model, self.allow_pickle)
        self.started_from_detector = True
        return incompatible

    def _take_predicate_counts(self) -> None:
        """Take the relations of each predicate from the statistics of an older checkpoint."""
        prior = self.model.relation_head.prior
        counts = (self.loaded.get("statistics") or {}).get("predicate_counts") or []
        if not prior.known and len(counts) == len(prior.predicate_counts):
            prior.set_counts(torch.tensor(counts))

    def _take_class_counts(self) -> None:
        """Take the relations of each class from the statistics of an older checkpoint."""
        joint = getattr(self.model.relation_head, "joint", None)
        rows = (self.loaded.get("statistics") or {}).get("relation_counts") or []
        if not isinstance(joint, JointModule) or joint.counts_known or not rows:
            return
        subjects, objects, _, counts = torch.tensor(rows).unbind(1)
        unknown = torch.zeros_like(joint.subject_relations)
        if max(int(subjects.max()), int(objects.max())) < len(unknown):
            of_role = (unknown.cpu().index_add(0, x, counts) for x in (subjects, objects))
            joint.set_counts(*of_role)

    def _adopt_reldn_names(self) -> list[str]:
        """Give the model the checkpoint's names; see ``DetectorCheckpointer._adopt_names``."""
        fields = ["predicate_classes", "attribute_classes"]
        saved = dict(self.loaded)
        if getattr(self.model.relation_head, "attribute_head", None) is None:
            saved.pop("attribute_classes", None)  # nothing here has these names
        if not class_weights(self.model.detector.model.state_dict()):
            fields.append("thing_classes")  # a detector without classes of its own
        known = any(self.description[field] for field in NAME_FIELDS)
        if known and not any(self.loaded.get(field) for field in NAME_FIELDS):
            logger.warning(
                f"{self._path} does not name its classes and predicates: they are assumed to be "
                f"those of {self.names_owner}, in the same order."
            )
        return self._adopt_names(saved, fields)

    def _take_detector_classes(
        self, detector: DetectionCheckpointer, state: dict[str, Any]
    ) -> None:
        """Bring the class weights of a detector checkpoint into the order of the dataset.

        Args:
            detector: checkpointer of the detector.
            state: weights of the checkpoint by name; changed in place.

        Raises:
            NameMismatchError: if the detector lacks a class of the dataset.
            ValueError: if the classes of this type of detector cannot be reordered.
        """
        if isinstance(self.model.detector, PrecomputedDetector):
            return  # its files, not the checkpoint, have the classes
        theirs, ours = self._detector_classes(state), self.description["thing_classes"]
        if not theirs or not ours:
            return
        source = f"detector checkpoint {self._path}"
        hint = (
            "RelDN does not train its detector: list classes of the detector only, or train the "
            "detector on this dataset first."
        )
        indices = match_names(
            ours, theirs, "thing_classes", self.names_owner, source, allow_more=True, hint=hint
        )
        if indices is None:
            return
        if not class_weights(state):
            raise ValueError(
                f"thing_classes: {self.names_owner} lists the classes of {source} in another "
                "order, and the class weights of this type of detector are not known. List them "
                f"in the order of the detector: {', '.join(theirs)}."
            )
        detector._convert_ndarray_to_tensor(state)
        take_classes(state, indices, len(theirs))
        logger.info(
            f"thing_classes: took the {len(ours)} classes of {self.names_owner} by name from the "
            f"{len(theirs)} of {source}."
        )

    def _explain_shapes(self, shapes: list[tuple]) -> str:
        """Name the counts of classes and predicates of both sides, and the first shapes."""
        num_logits = self.model.relation_head.num_predicates + 1
        reasons = explain_classes(shapes)
        for name, theirs, ours in shapes:
            if name.endswith("_embedding.weight") and theirs[0] != ours[0] and not reasons:
                reasons.append(self._explain_entity_classes(theirs[0], ours[0]))
            if name != _SEMANTIC_TABLE:
                continue
            if theirs[0] != ours[0] and not reasons:  # rows are pairs of classes
                reasons.append(self._explain_entity_classes(isqrt(theirs[0]), isqrt(ours[0])))
            if theirs[1] != ours[1]:
                reasons.append(self._explain_predicates(theirs[1]))
        if not any("predicates" in x for x in reasons):  # no table: look at the biases of logits
            biases = [
                theirs[0]
                for name, theirs, ours in shapes
                if name.startswith("relation_head.")
                and len(theirs) == 1
                and tuple(ours) == (num_logits,)
            ]
            reasons += [self._explain_predicates(x) for x in biases[:1]]
        return join_reasons(reasons, shapes)

    def _explain_entity_classes(self, theirs: int, ours: int) -> str:
        return f"it was trained with {theirs} entity classes, the config has {ours}"

    def _explain_predicates(self, num_logits: int) -> str:
        return (
            f"it was trained with {num_logits - 1} predicates, the config has "
            f"{self.model.relation_head.num_predicates} (MODEL.ROI_RELATION_HEAD.NUM_PREDICATES)"
        )


def build_checkpointer(cfg: CfgNode, model: nn.Module, **kwargs: Any) -> DetectorCheckpointer:
    """Build the :class:`RelDNCheckpointer` of a RelDN or the checkpointer of any other model.

    Args:
        cfg: config of the model; its first dataset with names gives those of the model, until a
            checkpoint that has names is loaded.
        model: possibly wrapped for distributed training.
        kwargs: as for :class:`.DetectorCheckpointer`, to override what the config says.
    """
    kwargs.setdefault("matching_only", cfg.MODEL.RELDN.LOAD.MATCHING_ONLY)
    kwargs.setdefault("allow_pickle", cfg.MODEL.RELDN.LOAD.ALLOW_PICKLE)
    kwargs.setdefault("cfg", cfg)
    for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = dataset_names(dataset)
        if names:
            kwargs.setdefault("names_owner", f"dataset '{dataset}'")
            kwargs.setdefault("thing_classes", names.get("thing_classes"))
            break
    else:
        names = {}
    if not isinstance(getattr(model, "module", model), RelDN):
        return DetectorCheckpointer(model, cfg.OUTPUT_DIR, **kwargs)
    kwargs.setdefault("predicate_classes", names.get("predicate_classes"))
    if cfg.MODEL.ROI_ATTRIBUTE_HEAD.ENABLED:
        datasets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)  # not every one has attributes
        kwargs.setdefault("attribute_classes", joint_names(datasets).get("attribute_classes"))
    return RelDNCheckpointer(model, cfg.OUTPUT_DIR, **kwargs)
