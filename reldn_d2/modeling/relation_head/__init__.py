from .build import ROI_RELATION_HEAD_REGISTRY, build_relation_head
from .relation_head import RelDNHead

__all__ = ["ROI_RELATION_HEAD_REGISTRY", "RelDNHead", "build_relation_head"]
