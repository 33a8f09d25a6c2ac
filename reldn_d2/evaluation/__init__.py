"""Evaluation of relations; ``docs/evaluation.md`` describes the protocols.

The way of the data: :mod:`.records` (dataset dicts and model output as numpy arrays) and
:mod:`.predictions_file`; :mod:`.tables` joins many images, :mod:`.matching` has the pure functions
on arrays; one module per rule (:mod:`.lu2016`, :mod:`.motifs`, :mod:`.openimages_score`,
:mod:`.relations`, :mod:`.average_precision`, :mod:`.confusion`); and the evaluators on top of
:mod:`.evaluator`.
"""

from .box_evaluation import box_evaluator
from .build import (
    OpenImagesVRDEvaluator,
    RelationEvaluator,
    SceneGraphEvaluator,
    VRDEvaluator,
    build_relation_evaluator,
)
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
    "evaluate_predictions",
]
