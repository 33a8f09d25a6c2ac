"""Evaluation of relations.

The way of the data: :mod:`.records` (dataset dicts and model output as numpy arrays, predictions
file), :mod:`.matching` (pure functions on them), one module per rule (:mod:`.lu2016` recall,
:mod:`.average_precision`, :mod:`.confusion`), and the evaluators on top of :mod:`.evaluator`.
"""

from .box_evaluation import box_evaluator
from .build import build_relation_evaluator
from .evaluator import RelationDatasetEvaluator
from .relation_evaluation import RelationEvaluator
from .vrd_evaluation import VRDEvaluator

__all__ = [
    "RelationDatasetEvaluator",
    "RelationEvaluator",
    "VRDEvaluator",
    "box_evaluator",
    "build_relation_evaluator",
]
