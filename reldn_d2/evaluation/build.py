"""Pick the evaluator that fits a data set and a model."""

import logging
import os
from typing import Callable, Dict, List, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ..modeling.meta_arch import predicts_relations
from .box_evaluation import box_evaluator
from .relation_evaluation import RelationEvaluator
from .vrd_evaluation import VRDEvaluator

__all__ = ["build_relation_evaluator"]

logger = logging.getLogger(__name__)


def build_relation_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str
) -> DatasetEvaluator:
    """The evaluator for what the configured model predicts.

    RelDN's relations are judged by the evaluator that the data set's metadata names in
    ``evaluator_type``; any other meta-architecture is a detector and gets COCO's box AP.

    Args:
        cfg: config with the keys of ``add_reldn_config``.
        dataset_name: registered data set.
        output_folder: where the evaluator writes its files; with several data sets in
            ``DATASETS.TEST`` each gets a folder of its name in there.

    Raises:
        ValueError: no relation evaluator is known for the data set.
    """
    if len(cfg.DATASETS.TEST) > 1:
        output_folder = os.path.join(output_folder, dataset_name)
    if not predicts_relations(cfg):
        return box_evaluator(dataset_name, output_folder)
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if evaluator_type not in _EVALUATORS:
        raise ValueError(
            f"Data set '{dataset_name}' has evaluator_type {evaluator_type!r} in its metadata; "
            f"relation evaluators are known for: {', '.join(sorted(_EVALUATORS))}. Set the one "
            f'that fits: MetadataCatalog.get("{dataset_name}").evaluator_type = "relation" '
            "(any data set whose dicts have relations)."
        )
    return _EVALUATORS[evaluator_type](cfg, dataset_name, output_folder)


def _relation_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    relations = cfg.TEST.RELATIONS
    return RelationEvaluator(
        dataset_name,
        output_folder,
        task=relations.TASK,
        predicates_per_pair=relations.PREDICATES_PER_PAIR,
        topk=_reachable(RelationEvaluator.TOPK, relations.TOPK),
        max_triplets=relations.TOPK,
    )


def _vrd_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    relations = cfg.TEST.RELATIONS
    return VRDEvaluator(
        dataset_name,
        output_folder,
        task=relations.TASK,
        predicates_per_pair=relations.PREDICATES_PER_PAIR,
        topk=_reachable(VRDEvaluator.TOPK, relations.TOPK),
    )


def _reachable(topk: Sequence[int], kept: int) -> List[int]:
    """The n of R@n for which the model keeps enough triplets; the others would say too little."""
    left_out = [n for n in topk if n > kept]
    if left_out:
        logger.warning(
            "The model keeps %d triplets an image (TEST.RELATIONS.TOPK): %s is left out.",
            kept,
            ", ".join(f"R@{n}" for n in left_out),
        )
    return [n for n in topk if n <= kept]


_EVALUATORS: Dict[str, Callable[[CfgNode, str, str], DatasetEvaluator]] = {
    "relation": _relation_evaluator,
    "vrd": _vrd_evaluator,
}
