"""The interface between RelDN and a detector, its registry, and the training entities.

Shapes: N images, R boxes of one image, K entity classes, Q predictions of one image. Boxes are XYXY
in pixels of the network's input.

A new type of detector plugs in as a subclass of :class:`EntityDetector` in
:data:`ENTITY_DETECTOR_REGISTRY`; no other part of the package depends on the detector.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.registry import Registry

from ...utils.lazy_configs import KEY, instantiate_part
from ...utils.registry import explain_missing_keys, find_registered
from ..sampling import random_keys, sample_mask, true_indices

__all__ = [
    "ENTITY_DETECTOR_REGISTRY",
    "EntityDetector",
    "build_entity_detector",
    "classify_by_overlap",
    "is_meta_architecture",
    "label_entities",
]

ENTITY_DETECTOR_REGISTRY = Registry("ENTITY_DETECTOR")
ENTITY_DETECTOR_REGISTRY.__doc__ = """
Registry for adapters from a type of detector to :class:`EntityDetector`.

The registered object is called with ``obj(cfg)``. ``MODEL.RELDN.DETECTOR: "auto"`` selects the last
registered one whose ``accepts(cfg)`` is true. The model of ``MODEL.RELDN.DETECTOR_LAZY_CONFIG`` is
built first: ``accepts_model(model)`` selects the adapter, and ``obj(model=model)`` builds it.
"""


class EntityDetector(nn.Module, ABC):
    """A frozen detector: always in eval mode, without gradients.

    Attributes:
        model: the detector itself, a Detectron2 meta-architecture; checkpoints load into it.
        num_classes_key: config key for the number of classes, used in error messages.
        backbone_only_hint: advice for a checkpoint that has only a backbone, for error messages.
    """

    num_classes_key = "MODEL.ROI_HEADS.NUM_CLASSES"
    backbone_only_hint = "It looks like a backbone only: train the detector on your dataset first."

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.model.requires_grad_(False)
        self.eval()

    @classmethod
    def accepts(cls, cfg: CfgNode) -> bool:
        """Tell whether the config describes this type of detector; used for "auto"."""
        del cfg
        return False

    @classmethod
    def accepts_model(cls, model: nn.Module) -> bool:
        """Tell whether this adapter works with a model built from a LazyConfig; used for "auto".

        The adapter is then called with ``obj(model=model)``.
        """
        del model
        return False

    @classmethod
    def needs_images(cls, cfg: CfgNode) -> bool:
        """Tell whether the model of a config reads images; see :attr:`reads_images`."""
        del cfg
        return True

    @property
    def reads_images(self) -> bool:
        """Whether inputs need ``image``. If not, there are no feature maps."""
        return True

    def train(self, mode: bool = True):
        """Stay in eval mode whatever ``mode`` is: no statistics update, no dropout."""
        del mode
        return super().train(False)

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Return K."""

    @property
    def backbone(self) -> nn.Module:
        """Return the backbone; its weights initialize the predicate backbone."""
        return self.model.backbone

    @property
    def box_head(self) -> nn.Module | None:
        """Return the head whose weights initialize the relation box heads; None if none."""
        return None

    def relation_config(self, cfg: CfgNode) -> CfgNode:
        """Return the config for the relation head, with keys that this detector does not set.

        The relation head reads ``MODEL.ROI_HEADS.IN_FEATURES``, ``MODEL.ROI_BOX_HEAD`` (its box
        heads are of the detector's type) and ``MODEL.ROI_RELATION_HEAD``; K is
        :attr:`num_classes`.
        """
        return cfg

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the shapes of the feature maps."""
        return self.backbone.output_shape()

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalize, pad and batch the images of mapped dicts.

        Raises:
            ValueError: an image is larger than the square to which ViTDet and others pad; it would
                be cut off.
        """
        size = square_size(self.backbone)
        for x in batched_inputs if size else ():
            height, width = x["image"].shape[-2:]
            if max(height, width) > size:
                raise ValueError(
                    f"Image {x.get('image_id', '?')} ({x.get('file_name', 'no file name')}) has "
                    f"{height} x {width} pixels after resizing, but the detector's backbone pads "
                    f"images to {size} x {size} (square_pad): resize images to at most {size}."
                )
        return self.model.preprocess_image(batched_inputs)

    def extract_features(self, images: ImageList) -> dict[str, Tensor]:
        """Compute the feature maps, (N, c, h, w) each."""
        return self.backbone(images.tensor)

    @abstractmethod
    def propose(
        self, batched_inputs: list[dict], images: ImageList, features: dict[str, Tensor]
    ) -> list[Boxes]:
        """Propose class-agnostic boxes per image, from which training entities are chosen."""

    @abstractmethod
    def detect(
        self, batched_inputs: list[dict], images: ImageList, features: dict[str, Tensor]
    ) -> list[Instances]:
        """Detect entities per image: ``pred_boxes``, ``scores``, ``pred_classes``."""

    @abstractmethod
    def classify(
        self,
        batched_inputs: list[dict],
        images: ImageList,
        features: dict[str, Tensor],
        boxes: list[Boxes],
    ) -> list[Tensor]:
        """Compute (R, K) class probabilities of given boxes per image (task SGCLS)."""


def square_size(backbone: nn.Module) -> int:
    """Return the size to which a backbone of Detectron2's main branch pads images, or 0."""
    return getattr(backbone, "padding_constraints", {}).get("square_size", 0)


def is_meta_architecture(name: str, base: type) -> bool:
    """Tell whether a registered meta-architecture is ``base`` or a subclass of it."""
    entry = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return isinstance(entry, type) and issubclass(entry, base)


def build_entity_detector(cfg: CfgNode) -> EntityDetector:
    """Build the adapter named by ``cfg.MODEL.RELDN.DETECTOR``, with its detector.

    Raises:
        ValueError: if there is no such adapter, or it is "auto" and none accepts the config's
            detector, or that is a TridentNet.
    """
    if cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG:
        return _build_from_lazy_config(cfg)
    _reject_trident(cfg)
    name = cfg.MODEL.RELDN.DETECTOR
    if name != "auto":
        adapter = find_registered(ENTITY_DETECTOR_REGISTRY, name, "MODEL.RELDN.DETECTOR")
        with explain_missing_keys(cfg, f"MODEL.RELDN.DETECTOR '{name}'"):
            return adapter(cfg)
    adapters = dict(ENTITY_DETECTOR_REGISTRY)
    for adapter in reversed(list(adapters.values())):
        if adapter.accepts(cfg):
            return adapter(cfg)
    described = f"MODEL.ROI_HEADS.NAME '{cfg.MODEL.ROI_HEADS.NAME}'"
    if cfg.MODEL.RELDN.DETECTOR_META_ARCHITECTURE:
        described = (
            f"meta-architecture '{cfg.MODEL.RELDN.DETECTOR_META_ARCHITECTURE}' "
            f"(MODEL.RELDN.DETECTOR_META_ARCHITECTURE) with {described}"
        )
    raise ValueError(
        f'MODEL.RELDN.DETECTOR is "auto", but no adapter knows {described}. RelDN needs a detector '
        f"that classifies boxes: name one of {', '.join(adapters)}, or register an EntityDetector "
        "of your own in a module that you pass with --module (docs/detectors.md)."
    )


def _build_from_lazy_config(cfg: CfgNode) -> EntityDetector:
    """Build the detector of ``MODEL.RELDN.DETECTOR_LAZY_CONFIG`` with the adapter that fits it.

    Raises:
        ValueError: no adapter fits, or the detector reads images in another format than the config.
    """
    path, name = cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG, cfg.MODEL.RELDN.DETECTOR
    model = instantiate_part(cfg)
    _check_lazy_model(cfg, model)
    if name != "auto":
        adapter = find_registered(ENTITY_DETECTOR_REGISTRY, name, "MODEL.RELDN.DETECTOR")
    else:
        adapters = reversed([adapter for _, adapter in ENTITY_DETECTOR_REGISTRY])
        adapter = next((x for x in adapters if _accepts_model(x, model)), None)
    if adapter is None or not _accepts_model(adapter, model):
        heads = getattr(model, "roi_heads", None)
        described = type(model).__name__ + (f" with {type(heads).__name__}" if heads else "")
        known = [x for x, entry in ENTITY_DETECTOR_REGISTRY if _accepts_model(entry, model)]
        raise ValueError(
            f"MODEL.RELDN.DETECTOR is '{name}', which does not work with {described}, the model of "
            f"{path} ({KEY}). {_advice(known)}"
        )
    detector = adapter(model=model)
    detector.num_classes_key = f"num_classes of the model in {path}"
    return detector


def _accepts_model(adapter: Any, model: nn.Module) -> bool:
    """Call ``accepts_model`` of a registered adapter, which may also be a function."""
    return hasattr(adapter, "accepts_model") and adapter.accepts_model(model)


def _advice(adapters: list[str]) -> str:
    if adapters:
        return f'Set it to "auto" or to {" or ".join(adapters)}.'
    return (
        "Register an EntityDetector of your own whose accepts_model returns True for it, in a "
        "module that you pass with --module (docs/detectors.md)."
    )


def _check_lazy_model(cfg: CfgNode, model: nn.Module) -> None:
    """Raise if the model of a LazyConfig cannot be used with this config at all."""
    path = cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG
    for part in model.modules():
        if type(part).__name__.startswith("Trident"):
            raise ValueError(
                f"{path} ({KEY}) has a {type(part).__name__}: TridentNet computes several feature "
                "maps per image, which RelDN cannot use."
            )
    theirs = getattr(model, "input_format", None)
    if theirs and theirs != cfg.INPUT.FORMAT:
        raise ValueError(
            f"The model of {path} ({KEY}) reads images as {theirs}, but INPUT.FORMAT is "
            f"{cfg.INPUT.FORMAT}; set INPUT.FORMAT to {theirs}."
        )
    size = square_size(getattr(model, "backbone", model))
    for name in ("MAX_SIZE_TRAIN", "MAX_SIZE_TEST") if size else ():
        if cfg.INPUT[name] > size:
            raise ValueError(
                f"The backbone of {path} ({KEY}) pads images to {size} x {size} (square_pad), but "
                f"INPUT.{name} is {cfg.INPUT[name]}; set INPUT.{name} to {size}."
            )


def _reject_trident(cfg: CfgNode) -> None:
    """Raise for TridentNet, whose backbone returns three maps per image in training."""
    model = cfg.MODEL
    for key in ("BACKBONE", "PROPOSAL_GENERATOR", "ROI_HEADS"):
        if "trident" in model[key].NAME.lower():
            raise ValueError(
                f"MODEL.{key}.NAME is '{model[key].NAME}': TridentNet computes several feature "
                "maps per image, which RelDN cannot use. Write its detections to files and use "
                "PrecomputedDetector with another backbone (docs/detectors.md)."
            )


def classify_by_overlap(
    boxes: Boxes, candidates: Boxes, probabilities: Tensor, max_candidates: int = 50
) -> Tensor:
    """Estimate class probabilities of given boxes from predictions for other boxes.

    The probability of a class is the highest product of class probability and IoU over the
    predictions; 0 if none overlaps. Rows do not sum to 1.

    Args:
        boxes: the R given boxes.
        candidates: the Q predicted boxes.
        probabilities: (Q, K).
        max_candidates: number of best overlapping predictions considered per given box.

    Returns:
        (R, K).
    """
    if len(candidates) == 0 or len(boxes) == 0:
        return probabilities.new_zeros((len(boxes), probabilities.shape[1]))
    overlap, index = pairwise_iou(boxes, candidates).topk(
        min(max_candidates, len(candidates)), dim=1
    )
    return (probabilities[index] * overlap[:, :, None]).amax(dim=1)


@torch.no_grad()
def label_entities(
    proposals: list[Boxes],
    targets: list[Instances],
    *,
    iou_threshold: float,
    max_entities: int,
    generator: torch.Generator | None = None,
) -> list[Instances]:
    """Choose training entities: boxes that match a ground-truth box, with its class (section 5).

    The ground-truth boxes are appended to the proposals, and up to ``max_entities`` boxes that
    match are drawn at random: first the ground-truth boxes, then proposals. A ground-truth box
    keeps its own class, whatever other boxes are equal to it.

    The numbers of entities of all images are read on the host, in one transfer.

    Args:
        proposals: candidate boxes of each image; may be empty.
        targets: ``gt_boxes`` and ``gt_classes`` of each image.
        iou_threshold: minimum IoU between a box and the ground-truth box that it matches.
        max_entities: max entities per image.
        generator: source of randomness; the device's default generator when None.

    Returns:
        ``proposal_boxes``, ``gt_classes`` and ``gt_index`` of each image; the latter is the index
        of a ground-truth box among the targets, and -1 for a proposal. If the targets have
        attributes, also ``gt_attributes`` and ``gt_attributes_known`` of the matched box.
    """
    drawn, candidates = [], []
    for boxes, target in zip(proposals, targets):
        own = torch.arange(len(target), device=boxes.device)
        gt_index = torch.cat([own.new_full((len(boxes),), -1), own])
        boxes = Boxes.cat([boxes, target.gt_boxes])
        if len(target) == 0:
            is_drawn = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
            matched = gt_index
        else:
            overlap, matched = pairwise_iou(target.gt_boxes, boxes).max(dim=0)
            is_own = gt_index >= 0
            matched = torch.where(is_own, gt_index, matched)
            matches = is_own | (overlap >= iou_threshold)
            keys = random_keys(matches, generator)
            is_drawn = sample_mask(matches, max_entities, max_entities, preferred=is_own, keys=keys)
        drawn.append(is_drawn)
        candidates.append((boxes, matched, gt_index))
    entities = []
    for chosen, (boxes, matched, gt_index), target in zip(true_indices(drawn), candidates, targets):
        result = Instances(target.image_size)
        result.proposal_boxes = boxes[chosen]
        result.gt_classes = target.gt_classes[matched[chosen]]
        result.gt_index = gt_index[chosen]
        for field in ("gt_attributes", "gt_attributes_known"):
            if target.has(field):
                result.set(field, target.get(field)[matched[chosen]])
        entities.append(result)
    return entities
