"""Registry of relation heads, and the parts of a head that follow from a config."""

from typing import Any

from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import build_box_head
from detectron2.utils.registry import Registry

from ...config import reads_pixels
from ...utils.registry import build_registered
from ..backbone.vgg import VGG16BoxHead
from .head_base import RelationHead
from .poolers import LevelPooler
from .predictors import without_last_relu

__all__ = ["ROI_RELATION_HEAD_REGISTRY", "build_relation_head", "build_visual_parts"]

ROI_RELATION_HEAD_REGISTRY = Registry("ROI_RELATION_HEAD")
ROI_RELATION_HEAD_REGISTRY.__doc__ = """
Registry for relation heads, subclasses of :class:`.head_base.RelationHead`, which predict the
predicates of pairs of entities.

The registered object is called with ``obj(cfg, entity_shape, predicate_shape)``: the output shapes
of the detector's and of the predicate backbone, as dicts from feature name to ShapeSpec; both are
empty without images (:func:`reldn_d2.config.reads_pixels`).
"""


def build_relation_head(
    cfg: CfgNode, entity_shape: dict[str, ShapeSpec], predicate_shape: dict[str, ShapeSpec]
) -> RelationHead:
    """Build the head named by ``cfg.MODEL.ROI_RELATION_HEAD.NAME`` and check its contract.

    Raises:
        ValueError: if no head of this name is registered.
        TypeError: if its class does not fulfill the contract of :class:`.head_base.RelationHead`.
    """
    key, name = "MODEL.ROI_RELATION_HEAD.NAME", cfg.MODEL.ROI_RELATION_HEAD.NAME
    registry, shapes = ROI_RELATION_HEAD_REGISTRY, (entity_shape, predicate_shape)
    head = build_registered(registry, name, key, RelationHead, cfg, *shapes)
    if "losses" not in head._modules:
        raise TypeError(
            f"{key} is '{name}', but its class {type(head).__name__} does not initialize "
            "RelationHead: call super().__init__ with the arguments of the class."
        )
    for member in head._modules:
        if isinstance(getattr(type(head), member, None), property):  # which would be read instead
            raise TypeError(
                f"{key} is '{name}', but its class {type(head).__name__} has a submodule "
                f"'{member}', which is a property of the head: rename the submodule and override "
                "the property."
            )
    if cfg.MODEL.ROI_ATTRIBUTE_HEAD.ENABLED and head.attribute_head is None:
        raise ValueError(
            f"MODEL.ROI_ATTRIBUTE_HEAD.ENABLED is True, but {key} '{name}' has no attribute head: "
            "pass attribute_head=build_attribute_head(cfg, size of the entities' vectors) to "
            "RelationHead (reldn_d2.modeling), or set ENABLED to False."
        )
    return head


def build_visual_parts(
    cfg: CfgNode,
    in_features: list[str],
    entity_shape: dict[str, ShapeSpec],
    predicate_shape: dict[str, ShapeSpec],
) -> dict[str, Any]:
    """Build the poolers and box heads that the enabled parts of the visual module need.

    Args:
        cfg: config with ``MODEL.ROI_RELATION_HEAD`` and ``MODEL.ROI_BOX_HEAD``.
        in_features: names of the feature maps that the poolers read.
        entity_shape, predicate_shape: output shapes of the detector's and the predicate backbone.

    Returns:
        Keyword arguments of :class:`.relation_head.RelDNHead`, without those that are not needed;
        ``vector_size`` among them if any box head is.
    """
    head, switch = cfg.MODEL.ROI_RELATION_HEAD, cfg.MODEL.ROI_RELATION_HEAD.VISUAL
    resolution = head.POOLER_RESOLUTION or cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
    if not reads_pixels(cfg):
        return {}

    def pooler(shape: dict[str, ShapeSpec]) -> LevelPooler:
        return LevelPooler(
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

    parts: dict[str, Any] = {"entity_pooler": pooler(entity_shape)}
    if switch.SPO or switch.SUBJECT_SKIP:
        parts["subject_box_head"] = box_head(entity_shape)
    if switch.SPO or switch.OBJECT_SKIP:
        parts["object_box_head"] = box_head(entity_shape)
    if switch.SPO:
        parts["predicate_pooler"] = pooler(predicate_shape)
        parts["predicate_box_head"] = box_head(predicate_shape)
    some_head = next(part for name, part in parts.items() if name.endswith("box_head"))
    parts["vector_size"] = some_head.output_shape.channels
    return parts
