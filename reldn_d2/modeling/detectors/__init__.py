from .base import (
    ENTITY_DETECTOR_REGISTRY,
    EntityDetector,
    build_entity_detector,
    classify_by_overlap,
    label_entities,
)
from .precomputed import PrecomputedDetector
from .rcnn import C4RCNNDetector, CascadeRCNNDetector, GeneralizedRCNNDetector, Res5BoxHead
from .retinanet import FCOSDetector, RetinaNetDetector

__all__ = [
    "C4RCNNDetector",
    "CascadeRCNNDetector",
    "ENTITY_DETECTOR_REGISTRY",
    "EntityDetector",
    "FCOSDetector",
    "GeneralizedRCNNDetector",
    "PrecomputedDetector",
    "Res5BoxHead",
    "RetinaNetDetector",
    "build_entity_detector",
    "classify_by_overlap",
    "label_entities",
]
