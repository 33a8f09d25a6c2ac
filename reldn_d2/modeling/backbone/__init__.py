from .folding import prepare_folding, set_folding
from .frozen_stages import FrozenStages
from .lazy_fpn import MapsOnDemand, maps_on_demand
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
    "FrozenStages",
    "LaterStages",
    "MapsOnDemand",
    "VGG16",
    "VGG16BoxHead",
    "build_predicate_backbone",
    "build_small_resnet_fpn_backbone",
    "build_vgg16_backbone",
    "freeze_unused",
    "maps_on_demand",
    "prepare_folding",
    "record_stages",
    "set_folding",
    "share_first_stages",
]
