"""The evaluators by data set: each brings the protocol of its data set's tables as its default."""

from .evaluator import RelationDatasetEvaluator

__all__ = ["OpenImagesVRDEvaluator", "RelationEvaluator", "SceneGraphEvaluator", "VRDEvaluator"]


class OpenImagesVRDEvaluator(RelationDatasetEvaluator):
    """OpenImages VRD: ``released``, as in the paper; the challenge's own rule is ``openimages``.

    The rules stand in :mod:`.openimages`; the latter uses the dicts' ``verified_labels``.
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
