"""Two-stage detectors: Faster and Mask R-CNN with FPN or VGG16, Cascade R-CNN, Faster R-CNN C4.

Shapes: R boxes of one image, K entity classes, d values per ROI vector, c channels, h x w cells.
Boxes are XYXY in pixels of the network's input.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances

from ...utils.lazy_configs import detector_node, instantiate_part
from .base import ENTITY_DETECTOR_REGISTRY, EntityDetector, is_meta_architecture

__all__ = ["C4RCNNDetector", "CascadeRCNNDetector", "GeneralizedRCNNDetector", "Res5BoxHead"]


@contextmanager
def _training_limits(proposal_generator: nn.Module | None) -> Iterator[None]:
    """Let an RPN in eval mode keep as many proposals as in training, while the block runs.

    Other proposal generators, which have no such limits, stay as they are.
    """
    limits = [
        getattr(proposal_generator, name)  # {is training: limit}
        for name in ("pre_nms_topk", "post_nms_topk")
        if isinstance(getattr(proposal_generator, name, None), dict)
    ]
    before = [limit[False] for limit in limits]
    try:
        for limit in limits:
            limit[False] = limit[True]
        yield
    finally:
        for limit, value in zip(limits, before):
            limit[False] = value


@ENTITY_DETECTOR_REGISTRY.register()
class GeneralizedRCNNDetector(EntityDetector):
    """``GeneralizedRCNN`` with ``StandardROIHeads``: Faster and Mask R-CNN."""

    roi_heads: type[nn.Module] = StandardROIHeads  # the class that this adapter supports
    parts: tuple[str, ...] = ("box_pooler", "box_head", "box_predictor", "box_in_features")
    one_stage_only = True  # a cascade of box heads needs another adapter

    @configurable
    def __init__(self, model: nn.Module):
        """
        Args:
            model: a built ``GeneralizedRCNN``.

        Raises:
            TypeError: if its ROI heads lack parts that this adapter uses.
        """
        missing = [name for name in self.parts if not hasattr(model.roi_heads, name)]
        stages = isinstance(getattr(model.roi_heads, "box_head", None), nn.ModuleList)
        if missing or stages == self.one_stage_only:
            raise TypeError(
                f"{type(self).__name__} works with {self.roi_heads.__name__}, but these are "
                f"{type(model.roi_heads).__name__}. Name another adapter in MODEL.RELDN.DETECTOR, "
                "or register an EntityDetector of your own (docs/detectors.md)."
            )
        super().__init__(model)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        model = cfg.MODEL
        if model.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals" and not model.LOAD_PROPOSALS:
            raise ValueError(
                "MODEL.PROPOSAL_GENERATOR.NAME is 'PrecomputedProposals', but MODEL.LOAD_PROPOSALS "
                "is False: set it to True and name DATASETS.PROPOSAL_FILES_TRAIN and "
                "PROPOSAL_FILES_TEST, or use a detector with an RPN."
            )
        try:
            return {"model": META_ARCH_REGISTRY.get("GeneralizedRCNN")(cfg)}
        except KeyError as error:
            wanted = {*model.RPN.IN_FEATURES, *model.ROI_HEADS.IN_FEATURES}
            if error.args[0] not in wanted:
                raise
            raise ValueError(
                f"The backbone {model.BACKBONE.NAME} has no feature map '{error.args[0]}', which "
                "MODEL.RPN.IN_FEATURES or MODEL.ROI_HEADS.IN_FEATURES names for "
                f"{model.ROI_HEADS.NAME}. Name maps that it has, or set MODEL.RELDN.DETECTOR to "
                "the adapter of your type of detector (docs/detectors.md)."
            ) from error

    @classmethod
    def accepts(cls, cfg: CfgNode) -> bool:
        name = cfg.MODEL.RELDN.DETECTOR_META_ARCHITECTURE
        if name and not is_meta_architecture(name, GeneralizedRCNN):
            return False
        roi_heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)
        return isinstance(roi_heads, type) and issubclass(roi_heads, cls.roi_heads)

    @classmethod
    def accepts_model(cls, model: nn.Module) -> bool:
        heads = getattr(model, "roi_heads", None)
        return isinstance(model, GeneralizedRCNN) and isinstance(heads, cls.roi_heads)

    def relation_config(self, cfg: CfgNode) -> CfgNode:
        """Take the maps and the box head from a detector that a LazyConfig describes."""
        if not cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG:
            return cfg
        cfg = cfg.clone()
        cfg.defrost()
        heads = self.model.roi_heads
        height, width = getattr(heads, self.parts[0]).output_size
        if height != width:
            raise ValueError(
                f"The box pooler of {cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG} "
                f"(MODEL.RELDN.DETECTOR_LAZY_CONFIG) returns {height} x {width} cells; the "
                "relation head needs as many rows as columns."
            )
        cfg.MODEL.ROI_HEADS.IN_FEATURES = list(getattr(heads, self.parts[-1]))
        cfg.MODEL.ROI_BOX_HEAD.NAME = "LazyBoxHead"
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = height
        return cfg

    @property
    def num_classes(self) -> int:
        return self.model.roi_heads.num_classes

    @property
    def box_head(self) -> nn.Module:
        return self.model.roi_heads.box_head

    def _proposals(self, batched_inputs, images, features) -> list[Instances]:
        if self.model.proposal_generator is None:
            for x in batched_inputs:
                if "proposals" not in x:
                    raise ValueError(
                        f"Image {x.get('image_id', '?')} ({x.get('file_name', 'no file name')}) "
                        "came without 'proposals', which a detector without an RPN needs. Name a "
                        "file for each dataset in DATASETS.PROPOSAL_FILES_TRAIN and "
                        "DATASETS.PROPOSAL_FILES_TEST."
                    )
            return [x["proposals"].to(images.device) for x in batched_inputs]
        return self.model.proposal_generator(images, features, None)[0]

    def propose(self, batched_inputs, images, features) -> list[Boxes]:
        """Return the RPN's proposals, as many as in the detector's own training.

        ``MODEL.RPN.PRE_NMS_TOPK_TRAIN`` and ``POST_NMS_TOPK_TRAIN`` apply, although the detector is
        frozen and in eval mode.
        """
        with _training_limits(self.model.proposal_generator):
            proposals = self._proposals(batched_inputs, images, features)
        return [x.proposal_boxes for x in proposals]

    def detect(self, batched_inputs, images, features) -> list[Instances]:
        proposals = self._proposals(batched_inputs, images, features)
        return self.model.roi_heads(images, features, proposals, None)[0]

    def classify(self, batched_inputs, images, features, boxes) -> list[Tensor]:
        heads = self.model.roi_heads
        pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
        predictions = heads.box_predictor(heads.box_head(pooled))
        return [x[:, :-1] for x in heads.box_predictor.predict_probs(predictions, boxes)]


@ENTITY_DETECTOR_REGISTRY.register()
class CascadeRCNNDetector(GeneralizedRCNNDetector):
    """``GeneralizedRCNN`` with ``CascadeROIHeads``.

    The relation box heads start from the first stage's head, which was trained on boxes like
    RelDN's (IoU of at least 0.5). Given boxes are classified by the average over all stages.
    """

    roi_heads = CascadeROIHeads
    one_stage_only = False

    @property
    def box_head(self) -> nn.Module:
        return self.model.roi_heads.box_head[0]

    def classify(self, batched_inputs, images, features, boxes) -> list[Tensor]:
        heads = self.model.roi_heads
        pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
        stages = [
            predictor.predict_probs(predictor(box_head(pooled)), boxes)
            for box_head, predictor in zip(heads.box_head, heads.box_predictor)
        ]
        return [sum(of_image)[:, :-1] / len(stages) for of_image in zip(*stages)]


@ROI_BOX_HEAD_REGISTRY.register()
class Res5BoxHead(nn.Module):
    """The box head of a C4 detector: the last ResNet stage on each ROI, averaged over its area."""

    @configurable
    def __init__(self, res5: nn.Module):
        """
        Args:
            res5: the stage, (R, c, h, w) to (R, d, h', w').
        """
        super().__init__()
        self.res5 = res5

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec):
        resnets = cfg.MODEL.RESNETS
        out_channels = resnets.RES2_OUT_CHANNELS * 8
        blocks = ResNet.make_stage(
            BottleneckBlock,
            3,
            stride_per_block=[2, 1, 1],
            in_channels=input_shape.channels,
            bottleneck_channels=resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 8,
            out_channels=out_channels,
            num_groups=resnets.NUM_GROUPS,
            norm=resnets.NORM,
            stride_in_1x1=resnets.STRIDE_IN_1X1,
        )
        return {"res5": nn.Sequential(*blocks)}

    @property
    def output_shape(self) -> ShapeSpec:
        """Return the shape of a vector: its d channels."""
        return ShapeSpec(channels=self.res5[-1].out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (R, c, h, w) pooled ROIs as (R, d) vectors."""
        return self.res5(x).mean(dim=(2, 3))


@ROI_BOX_HEAD_REGISTRY.register()
def LazyBoxHead(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the box head of the detector that ``MODEL.RELDN.DETECTOR_LAZY_CONFIG`` describes.

    Raises:
        ValueError: if it does not read pooled maps of this shape.
    """
    roi_heads = detector_node(cfg).get("roi_heads", {})
    if "res5" in roi_heads:
        blocks = instantiate_part(cfg, "roi_heads.res5")
        head = Res5BoxHead(blocks if isinstance(blocks, nn.Module) else nn.Sequential(*blocks))
    else:
        name = "box_heads" if "box_heads" in roi_heads else "box_head"  # a cascade has several
        head = instantiate_part(cfg, f"roi_heads.{name}")
    maps = torch.zeros(1, input_shape.channels, input_shape.height, input_shape.width)
    try:
        with torch.no_grad():
            head.eval()(maps)
    except RuntimeError as error:
        raise ValueError(
            f"The box head of {cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG} "
            "(MODEL.RELDN.DETECTOR_LAZY_CONFIG) does not fit the relation head's maps of "
            f"{input_shape.channels} channels and {input_shape.height} x {input_shape.width} "
            f"cells: {' '.join(str(error).split())}. Set MODEL.ROI_RELATION_HEAD.POOLER_RESOLUTION "
            "to 0, and use a predicate backbone with the detector's channels."
        ) from error
    return head.train()


@ENTITY_DETECTOR_REGISTRY.register()
class C4RCNNDetector(GeneralizedRCNNDetector):
    """``GeneralizedRCNN`` with ``Res5ROIHeads``: Faster R-CNN on one feature map."""

    roi_heads = Res5ROIHeads
    parts = ("pooler", "res5", "box_predictor", "in_features")

    @property
    def box_head(self) -> nn.Module:
        return Res5BoxHead(self.model.roi_heads.res5)

    def relation_config(self, cfg: CfgNode) -> CfgNode:
        """Use box heads of the detector's type, which end in a sum of residuals, not in a ReLU."""
        cfg = super().relation_config(cfg).clone()
        cfg.defrost()
        if not cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG:
            cfg.MODEL.ROI_BOX_HEAD.NAME = "Res5BoxHead"
        cfg.MODEL.ROI_RELATION_HEAD.NO_FC7_RELU = False
        return cfg

    def classify(self, batched_inputs, images, features, boxes) -> list[Tensor]:
        heads = self.model.roi_heads
        pooled = heads.pooler([features[name] for name in heads.in_features], boxes)
        predictions = heads.box_predictor(heads.res5(pooled).mean(dim=(2, 3)))
        return [x[:, :-1] for x in heads.box_predictor.predict_probs(predictions, boxes)]
