"""Evaluation of relations; ``docs/evaluation.md`` describes the protocols.

From bottom to top: :mod:`.batches` joins the arrays of many images, :mod:`.matching` says which
triplets find which relations, :mod:`.metrics` has recall and average precision,
:mod:`.protocol_metrics` the metrics of each protocol of :mod:`reldn_d2.utils.protocols`, and
:mod:`.scoring` the one loop over images. :mod:`.relation_evaluation` collects a model's
predictions, :mod:`.offline` reads them from files.
"""

from .box_evaluation import box_evaluator
from .build import (
    OpenImagesVRDEvaluator,
    RelationEvaluator,
    SceneGraphEvaluator,
    VRDEvaluator,
    build_relation_evaluator,
)
from .matching import counted_relations, match_relations
from .offline import evaluate_predictions
from .relation_evaluation import RelationDatasetEvaluator

__all__ = [
    "OpenImagesVRDEvaluator",
    "RelationDatasetEvaluator",
    "RelationEvaluator",
    "SceneGraphEvaluator",
    "VRDEvaluator",
    "box_evaluator",
    "build_relation_evaluator",
    "counted_relations",
    "evaluate_predictions",
    "match_relations",
]
