"""Registry of relation heads, and the parts of a head that follow from a config."""

from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.box_head import build_box_head
from detectron2.utils.registry import Registry

from ...config import reads_pixels
from ..backbone.vgg import VGG16BoxHead
from .predictors import VisualModule, without_last_relu

__all__ = ["ROI_RELATION_HEAD_REGISTRY", "build_relation_head", "build_visual_parts"]

ROI_RELATION_HEAD_REGISTRY = Registry("ROI_RELATION_HEAD")
ROI_RELATION_HEAD_REGISTRY.__doc__ = """
Registry for relation heads, which predict the predicates of pairs of entities.

The registered object is called with ``obj(cfg, entity_shape, predicate_shape)``: the output shapes
of the detector's and of the predicate backbone, as dicts from feature name to ShapeSpec; both are
empty without images (:func:`reldn_d2.config.reads_pixels`). It is used like
:class:`reldn_d2.modeling.relation_head.RelDNHead`, whose ``forward`` describes the arguments.
"""


def build_relation_head(
    cfg: CfgNode, entity_shape: dict[str, ShapeSpec], predicate_shape: dict[str, ShapeSpec]
) -> nn.Module:
    """Build the head named by ``cfg.MODEL.ROI_RELATION_HEAD.NAME``."""
    name = cfg.MODEL.ROI_RELATION_HEAD.NAME
    return ROI_RELATION_HEAD_REGISTRY.get(name)(cfg, entity_shape, predicate_shape)


def build_visual_parts(
    cfg: CfgNode,
    in_features: list[str],
    entity_shape: dict[str, ShapeSpec],
    predicate_shape: dict[str, ShapeSpec],
) -> dict[str, nn.Module]:
    """Build the enabled parts of the visual module, with the poolers and box heads that they need.

    Args:
        cfg: config with ``MODEL.ROI_RELATION_HEAD`` and ``MODEL.ROI_BOX_HEAD``.
        in_features: names of the feature maps that the poolers read.
        entity_shape, predicate_shape: output shapes of the detector's and the predicate backbone.

    Returns:
        Keyword arguments of :class:`.relation_head.RelDNHead`, without those that are not needed.
    """
    head, switch = cfg.MODEL.ROI_RELATION_HEAD, cfg.MODEL.ROI_RELATION_HEAD.VISUAL
    resolution = head.POOLER_RESOLUTION or cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
    if not reads_pixels(cfg):
        return {}

    def pooler(shape: dict[str, ShapeSpec]) -> ROIPooler:
        return ROIPooler(
            output_size=resolution,
            scales=tuple(1.0 / shape[name].stride for name in in_features),
            sampling_ratio=head.POOLER_SAMPLING_RATIO,
            pooler_type=head.POOLER_TYPE,
        )

    def box_head(shape: dict[str, ShapeSpec]) -> nn.Module:
        channels = shape[in_features[0]].channels
        pooled = ShapeSpec(channels=channels, height=resolution, width=resolution)
        built = build_box_head(cfg, pooled)
        if isinstance(built, VGG16BoxHead):
            built.fc6_dropout.p = head.FC6_DROPOUT
        return without_last_relu(built) if head.NO_FC7_RELU else built

    parts = {"entity_pooler": pooler(entity_shape)}
    if switch.SPO or switch.SUBJECT_SKIP:
        parts["subject_box_head"] = box_head(entity_shape)
    if switch.SPO or switch.OBJECT_SKIP:
        parts["object_box_head"] = box_head(entity_shape)
    if switch.SPO:
        parts["predicate_pooler"] = pooler(predicate_shape)
        parts["predicate_box_head"] = box_head(predicate_shape)
    some_head = next(part for name, part in parts.items() if name.endswith("box_head"))
    parts["visual"] = VisualModule(
        some_head.output_shape.channels,
        head.NUM_PREDICATES,
        spo=switch.SPO,
        subject_skip=switch.SUBJECT_SKIP,
        object_skip=switch.OBJECT_SKIP,
    )
    return parts
