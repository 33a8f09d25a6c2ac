"""The registry of relation heads."""

from typing import Dict

from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

__all__ = ["ROI_RELATION_HEAD_REGISTRY", "build_relation_head"]

ROI_RELATION_HEAD_REGISTRY = Registry("ROI_RELATION_HEAD")
ROI_RELATION_HEAD_REGISTRY.__doc__ = """
Registry for relation heads, which predict the predicates of pairs of entities.

The registered object is called with ``obj(cfg, entity_shape, predicate_shape)``: the output shapes
of the detector's and of the predicate backbone, as dicts from feature name to ShapeSpec. Its calls
are those of :class:`reldn_d2.modeling.relation_head.RelDNHead`.
"""


def build_relation_head(
    cfg: CfgNode, entity_shape: Dict[str, ShapeSpec], predicate_shape: Dict[str, ShapeSpec]
) -> nn.Module:
    """Build the head that ``cfg.MODEL.ROI_RELATION_HEAD.NAME`` names."""
    name = cfg.MODEL.ROI_RELATION_HEAD.NAME
    return ROI_RELATION_HEAD_REGISTRY.get(name)(cfg, entity_shape, predicate_shape)
