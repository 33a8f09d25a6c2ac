"""Pick the evaluator that fits a dataset and a model."""

import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ..modeling.meta_arch import predicts_relations
from ..utils.protocols import find_protocol, kept_predicates_per_pair, predicates_per_pair
from .box_evaluation import box_evaluator
from .relation_evaluation import RelationDatasetEvaluator

__all__ = [
    "OpenImagesVRDEvaluator",
    "RelationEvaluator",
    "SceneGraphEvaluator",
    "VRDEvaluator",
    "build_relation_evaluator",
]

logger = logging.getLogger(__name__)


class OpenImagesVRDEvaluator(RelationDatasetEvaluator):
    """OpenImages VRD: ``released``, as in the paper.

    The challenge's own rule is ``openimages``.
    """

    PROTOCOL = "released"


class SceneGraphEvaluator(RelationDatasetEvaluator):
    """Visual Genome: ``motifs``."""

    PROTOCOL = "motifs"


class VRDEvaluator(RelationDatasetEvaluator):
    """VRD: ``lu2016``."""

    PROTOCOL = "lu2016"


class RelationEvaluator(RelationDatasetEvaluator):
    """Any dataset of relations: ``relations``."""

    PROTOCOL = "relations"


def build_relation_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str
) -> DatasetEvaluator:
    """Build the evaluator for the predictions of the configured model.

    RelDN's relations are scored by the protocol ``TEST.RELATIONS.PROTOCOL`` or, if that is empty,
    by that of the dataset's ``evaluator_type``. Any other meta-architecture is a detector and is
    scored by COCO's box AP.

    Args:
        cfg: config with the keys of ``add_reldn_config``.
        dataset_name: registered dataset.
        output_folder: where the evaluator writes its files; with several datasets in
            ``DATASETS.TEST`` each gets a folder of its name in there.

    Raises:
        ValueError: there is no such protocol, or the dataset has none and none is named.
    """
    if len(cfg.DATASETS.TEST) > 1:
        output_folder = os.path.join(output_folder, dataset_name)
    if not predicts_relations(cfg):
        return box_evaluator(dataset_name, output_folder)
    relations = cfg.TEST.RELATIONS
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    protocol = find_protocol(relations.PROTOCOL, evaluator_type, dataset_name)
    recall_at = _reachable(relations.RECALL_AT or protocol.recall_at, relations.TOPK)
    most = max(100, *recall_at, 0)  # all that protocols other than the challenge's look at
    return RelationDatasetEvaluator(
        dataset_name,
        output_folder,
        task=relations.TASK,
        protocol=protocol.name,
        predicates_per_pair=predicates_per_pair(cfg, dataset_name),
        kept_predicates_per_pair=kept_predicates_per_pair(cfg),
        recall_at=recall_at,
        group_thresholds=tuple(relations.GROUP_THRESHOLDS),
        topk=relations.TOPK if protocol.all_triplets else min(relations.TOPK, most),
        attributes=cfg.MODEL.ROI_ATTRIBUTE_HEAD.ENABLED,
    )


def _reachable(recall_at: Sequence[int], topk: int) -> list[int]:
    """Return the n of R@n for which the model keeps enough triplets; warn about the others."""
    left_out = [n for n in recall_at if n > topk]
    if left_out:
        logger.warning(
            "The model keeps %d triplets per image (TEST.RELATIONS.TOPK): %s is left out.",
            topk,
            ", ".join(f"R@{n}" for n in left_out),
        )
    return [n for n in recall_at if n <= topk]
