"""Evaluator for the VRD data set (Lu et al., ECCV 2016), protocol ``lu2016``."""

from collections import OrderedDict
from typing import Optional, Sequence

from .confusion import confusion_report
from .evaluator import RelationDatasetEvaluator, Results, task_name
from .lu2016 import pooled_recall
from .records import ImagePair

__all__ = ["VRDEvaluator"]


class VRDEvaluator(RelationDatasetEvaluator):
    """Recall of relationships and phrases by the rule written down in :mod:`.lu2016`.

    Results: for each k, ``{"lu2016_<task>_k<k>": {"relationship R@50", "relationship R@100",
    "phrase R@50", "phrase R@100"}}``. In the task PRDCLS, where boxes and classes are given, the
    relationship recall is what Lu et al. call predicate detection: ``"predicate R@50"``, and the
    phrase recall is left out. ``confusion_<task>_k<k>`` holds the accuracies of
    :mod:`.confusion`.
    """

    TOPK = (50, 100)

    def __init__(
        self,
        dataset_name: str,
        output_dir: Optional[str] = None,
        distributed: bool = True,
        *,
        task: str = "sgdet",
        predicates_per_pair: Sequence[int] = (1, 10, 70),
        topk: Sequence[int] = TOPK,
    ):
        """
        Args:
            dataset_name: see :class:`RelationDatasetEvaluator`, as for the other arguments.
            output_dir: folder for ``relation_predictions.json``.
            distributed: gather the predictions of all processes.
            task: ``sgdet``, ``sgcls`` or ``prdcls``.
            predicates_per_pair: values of k; 0 means all.
            topk: numbers n of an image's triplets for R@n.
        """
        super().__init__(
            dataset_name,
            output_dir,
            distributed,
            task=task,
            predicates_per_pair=predicates_per_pair,
        )
        self._topk = tuple(topk)

    def score(self, images: Sequence[ImagePair]) -> Results:
        """See the base class."""
        kinds = {"relationship": "relationship", "phrase": "phrase"}
        if self._task == "prdcls":
            kinds = {"predicate": "relationship"}
        results: Results = OrderedDict()
        for k in self._predicates_per_pair:
            metrics = results[task_name("lu2016", self._task, k)] = OrderedDict()
            for name, kind in kinds.items():
                for n, recall in zip(self._topk, pooled_recall(images, self._topk, k, kind)):
                    metrics[f"{name} R@{n}"] = recall
        for k in self._predicates_per_pair:
            report = confusion_report(images, k, max(self._topk, default=100))
            results[task_name("confusion", self._task, k)] = OrderedDict(report)
        return results
