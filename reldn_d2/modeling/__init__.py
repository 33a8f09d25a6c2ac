from . import backbone  # noqa: F401  registers its builders
from . import relation_head
from .detectors import ENTITY_DETECTOR_REGISTRY, EntityDetector, GeneralizedRCNNDetector
from .meta_arch import RelDN
from .relation_head import *  # noqa: F403

__all__ = [
    "ENTITY_DETECTOR_REGISTRY",
    "EntityDetector",
    "GeneralizedRCNNDetector",
    "RelDN",
    *relation_head.__all__,
]
