from .relation_head import ROI_RELATION_HEAD_REGISTRY, RelDNHead, build_relation_head

__all__ = ["ROI_RELATION_HEAD_REGISTRY", "RelDNHead", "build_relation_head"]
