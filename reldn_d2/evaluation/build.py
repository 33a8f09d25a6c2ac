"""Pick the evaluator that fits a data set and a model."""

import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ..modeling.meta_arch import predicts_relations
from ..utils.protocols import find_protocol, predicates_per_pair
from .box_evaluation import box_evaluator
from .relation_evaluation import RelationDatasetEvaluator

__all__ = [
    "OpenImagesVRDEvaluator",
    "RelationEvaluator",
    "SceneGraphEvaluator",
    "VRDEvaluator",
    "build_relation_evaluator",
    "evaluator_class",
]

logger = logging.getLogger(__name__)


class OpenImagesVRDEvaluator(RelationDatasetEvaluator):
    """OpenImages VRD: ``released``, as in the paper; the challenge's own rule is ``openimages``.

    The rules stand in :mod:`.openimages_score`; the latter uses the dicts' ``verified_labels``.
    """

    EVALUATOR_TYPE = "openimages_vrd"


class SceneGraphEvaluator(RelationDatasetEvaluator):
    """Visual Genome: ``motifs`` (:mod:`.motifs`)."""

    EVALUATOR_TYPE = "scene_graph"


class VRDEvaluator(RelationDatasetEvaluator):
    """VRD: ``lu2016`` (:mod:`.lu2016`)."""

    EVALUATOR_TYPE = "vrd"


class RelationEvaluator(RelationDatasetEvaluator):
    """Any data set of relations: ``relations`` (:mod:`.relations`)."""

    EVALUATOR_TYPE = "relation"


_EVALUATORS: dict[str, type[RelationDatasetEvaluator]] = {
    str(kind.EVALUATOR_TYPE): kind
    for kind in (RelationEvaluator, VRDEvaluator, OpenImagesVRDEvaluator, SceneGraphEvaluator)
}


def evaluator_class(dataset_name: str, protocol: str = "") -> type[RelationDatasetEvaluator]:
    """The evaluator that the data set's metadata names in ``evaluator_type``.

    Args:
        dataset_name: registered data set.
        protocol: with a protocol named, a data set without known ``evaluator_type`` is in order.

    Raises:
        ValueError: no relation evaluator is known for the data set.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if evaluator_type not in _EVALUATORS:
        if protocol:
            return RelationDatasetEvaluator
        raise ValueError(
            f"Data set '{dataset_name}' has evaluator_type {evaluator_type!r} in its metadata; "
            f"relation evaluators are known for: {', '.join(sorted(_EVALUATORS))}. Set the one "
            f'that fits: MetadataCatalog.get("{dataset_name}").evaluator_type = "relation" '
            "(any data set whose dicts have relations), or name a protocol "
            "(TEST.RELATIONS.PROTOCOL)."
        )
    return _EVALUATORS[evaluator_type]


def build_relation_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str
) -> DatasetEvaluator:
    """The evaluator for what the configured model predicts.

    RelDN's relations are judged by the evaluator that the data set's metadata names in
    ``evaluator_type``, by the protocol ``TEST.RELATIONS.PROTOCOL`` or the data set's own; any other
    meta-architecture is a detector and gets COCO's box AP.

    Args:
        cfg: config with the keys of ``add_reldn_config``.
        dataset_name: registered data set.
        output_folder: where the evaluator writes its files; with several data sets in
            ``DATASETS.TEST`` each gets a folder of its name in there.

    Raises:
        ValueError: no relation evaluator is known for the data set, or no such protocol.
    """
    if len(cfg.DATASETS.TEST) > 1:
        output_folder = os.path.join(output_folder, dataset_name)
    if not predicts_relations(cfg):
        return box_evaluator(dataset_name, output_folder)
    relations = cfg.TEST.RELATIONS
    kind = evaluator_class(dataset_name, relations.PROTOCOL)
    protocol = find_protocol(relations.PROTOCOL, kind.EVALUATOR_TYPE)
    topk = _reachable(relations.RECALL_AT or protocol.recall_at, relations.TOPK)
    most = max(100, *topk, 0)  # what the protocols other than the challenge's look at
    return kind(
        dataset_name,
        output_folder,
        task=relations.TASK,
        protocol=protocol.name,
        predicates_per_pair=predicates_per_pair(cfg, dataset_name),
        topk=topk,
        max_triplets=relations.TOPK if protocol.all_triplets else min(relations.TOPK, most),
    )


def _reachable(topk: Sequence[int], kept: int) -> list[int]:
    """The n of R@n for which the model keeps enough triplets; the others would say too little."""
    left_out = [n for n in topk if n > kept]
    if left_out:
        logger.warning(
            "The model keeps %d triplets an image (TEST.RELATIONS.TOPK): %s is left out.",
            kept,
            ", ".join(f"R@{n}" for n in left_out),
        )
    return [n for n in topk if n <= kept]
