from .attribute_head import AttributeHead, build_attribute_head
from .build import ROI_RELATION_HEAD_REGISTRY, build_relation_head
from .entity_context import ENTITY_CONTEXT_REGISTRY, EntityContext, LSTMContext, TransformerContext
from .head_base import EntitiesAndRelations, RelationHead
from .head_losses import RELATION_LOSS_REGISTRY, ContrastiveLosses, PredicateLoss, RelationLoss
from .pair_sampling import PAIR_SAMPLER_REGISTRY, PairSampler, RelDNPairSampler, SampledPairs
from .pairs import EntityBatch, PairBatch, PairGrid
from .predicate_classifier import RELATION_PREDICTOR_REGISTRY, PredicateClassifier, RelDNPredictor
from .relation_head import RelDNHead

__all__ = [
    "ENTITY_CONTEXT_REGISTRY",
    "PAIR_SAMPLER_REGISTRY",
    "RELATION_LOSS_REGISTRY",
    "RELATION_PREDICTOR_REGISTRY",
    "ROI_RELATION_HEAD_REGISTRY",
    "AttributeHead",
    "ContrastiveLosses",
    "EntitiesAndRelations",
    "EntityBatch",
    "EntityContext",
    "LSTMContext",
    "PairBatch",
    "PairGrid",
    "PairSampler",
    "PredicateClassifier",
    "PredicateLoss",
    "RelDNHead",
    "RelDNPairSampler",
    "RelDNPredictor",
    "RelationHead",
    "RelationLoss",
    "SampledPairs",
    "TransformerContext",
    "build_attribute_head",
    "build_relation_head",
]
