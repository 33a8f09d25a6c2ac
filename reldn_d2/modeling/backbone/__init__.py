from .predicate_backbone import (
    LaterStages,
    build_predicate_backbone,
    freeze_unused,
    record_stages,
    share_first_stages,
)
from .small_resnet import build_small_resnet_fpn_backbone
from .vgg import VGG16, VGG16BoxHead, build_vgg16_backbone

__all__ = [
    "LaterStages",
    "VGG16",
    "VGG16BoxHead",
    "build_predicate_backbone",
    "build_small_resnet_fpn_backbone",
    "build_vgg16_backbone",
    "freeze_unused",
    "record_stages",
    "share_first_stages",
]
