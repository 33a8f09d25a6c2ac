"""Evaluator for any data set of relations (``evaluator_type`` "relation")."""

from collections import OrderedDict
from typing import Optional, Sequence

import numpy as np

from .average_precision import mean_average_precision, relation_average_precision
from .confusion import confusion_report
from .evaluator import RelationDatasetEvaluator, Results, task_name
from .lu2016 import pooled_recall
from .records import GroundTruth, ImagePair

__all__ = ["RelationEvaluator"]


class RelationEvaluator(RelationDatasetEvaluator):
    """Recall, average precision and the two confusion accuracies.

    Results: for each k, ``{"relations_<task>_k<k>": metrics}`` (``"relations_<task>"`` where a pair
    may have all predicates), with

    - ``R@n``: recall when each image may give as many triplets as it has ground-truth relations;
      ``R@20``, ``R@50``, ``R@100``: when it may give so many (rule: :mod:`.lu2016`, pooled);
    - ``mAP`` and, named as Detectron2 names per-category results, ``AP-<predicate>``
      (rule: :mod:`.average_precision`);
    - ``instance_accuracy``, ``pairing_accuracy`` and their numbers of cases (rule:
      :mod:`.confusion`).

    A relation that is annotated twice (same subject, predicate and object) counts once. Metrics use
    an image's ``max_triplets`` best triplets at most.
    """

    TOPK = (20, 50, 100)

    def __init__(
        self,
        dataset_name: str,
        output_dir: Optional[str] = None,
        distributed: bool = True,
        *,
        task: str = "sgdet",
        predicates_per_pair: Sequence[int] = (0,),
        topk: Sequence[int] = TOPK,
        max_triplets: int = 100,
    ):
        """
        Args:
            dataset_name: see :class:`RelationDatasetEvaluator`, as for the other arguments. Its
                metadata must have ``predicate_classes``.
            output_dir: folder for ``relation_predictions.json``.
            distributed: gather the predictions of all processes.
            task: ``sgdet``, ``sgcls`` or ``prdcls``.
            predicates_per_pair: values of k; 0 means all.
            topk: numbers n of an image's triplets for R@n; each at most ``max_triplets``.
            max_triplets: triplets that count in an image.
        """
        super().__init__(
            dataset_name,
            output_dir,
            distributed,
            task=task,
            predicates_per_pair=predicates_per_pair,
        )
        if self._metadata.get("predicate_classes", None) is None:
            raise ValueError(
                f"The metadata of data set '{dataset_name}' has no predicate_classes. Set them: "
                f'MetadataCatalog.get("{dataset_name}").predicate_classes = [...].'
            )
        if max(topk, default=0) > max_triplets:
            raise ValueError(
                f"R@{max(topk)} needs {max(topk)} triplets an image, but only {max_triplets} are "
                "kept (TEST.RELATIONS.TOPK)."
            )
        self._topk = ("n",) + tuple(topk)
        self._max_triplets = max_triplets

    def score(self, images: Sequence[ImagePair]) -> Results:
        """See the base class."""
        names = self._metadata.predicate_classes
        images = [(_each_relation_once(gt), prediction) for gt, prediction in images]
        results: Results = OrderedDict()
        for k in self._predicates_per_pair:
            metrics = results[task_name("relations", self._task, k)] = OrderedDict()
            for n, recall in zip(self._topk, pooled_recall(images, self._topk, k)):
                metrics[f"R@{n}"] = recall
            precision, _ = relation_average_precision(images, len(names), k, self._max_triplets)
            metrics["mAP"] = mean_average_precision(precision)
            metrics.update(confusion_report(images, k, self._max_triplets))
            metrics.update({f"AP-{name}": ap for name, ap in zip(names, precision.tolist())})
        return results


def _each_relation_once(ground_truth: GroundTruth) -> GroundTruth:
    _, first = np.unique(ground_truth.relations, axis=0, return_index=True)
    relations = ground_truth.relations[np.sort(first)]
    return GroundTruth(ground_truth.boxes, ground_truth.classes, relations)
