from . import backbone  # noqa: F401  registers its builders
from .detectors import ENTITY_DETECTOR_REGISTRY, EntityDetector, GeneralizedRCNNDetector
from .meta_arch import RelDN
from .relation_head import ROI_RELATION_HEAD_REGISTRY, RelDNHead, build_relation_head

__all__ = [
    "ENTITY_DETECTOR_REGISTRY",
    "EntityDetector",
    "GeneralizedRCNNDetector",
    "ROI_RELATION_HEAD_REGISTRY",
    "RelDN",
    "RelDNHead",
    "build_relation_head",
]
