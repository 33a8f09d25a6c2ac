"""The protocol of data sets that have none of their own, among them the built-in one.

For each k, ``{"relations_<task>[_k<k>]": metrics}`` with

- ``R@n``: recall when each image may give as many triplets as it has ground-truth relations;
  ``R@20``, ``R@50``, ``R@100``: when it may give so many (rule: :mod:`.lu2016`, pooled);
- ``mAP`` and, named as Detectron2 names per-category results, ``AP-<predicate>``
  (rule: :mod:`.average_precision`);
- ``instance_accuracy``, ``pairing_accuracy`` and their numbers of cases (rule: :mod:`.confusion`).

A relation that is annotated twice (same subject, predicate and object) counts once.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ..structures.scene_graph import SceneGraph
from .average_precision import mean_average_precision, precision_of_predicates
from .batches import RelationTable, detections, found_ranks
from .confusion import confusion_report
from .ground_truth import ImagePair
from .lu2016 import pooled, recall_of_predicates
from .scores import Scores, Settings, task_name

__all__ = ["score"]


def score(images: Sequence[ImagePair], settings: Settings) -> Scores:
    """Results as described above."""
    images = [(_each_relation_once(gt), prediction) for gt, prediction in images]
    truth = RelationTable.from_images(images)
    topk = ("n", *settings.topk)
    limit = settings.max_triplets
    ranks = found_ranks(images, settings.predicates_per_pair, one_to_one=True)
    found = detections(images, settings.predicates_per_pair, limit=limit)
    scores = Scores()
    for k in settings.predicates_per_pair:
        task = task_name("relations", settings.task, k)
        metrics = scores.results[task] = OrderedDict()
        key = (k, "relationship")
        for n, recall in zip(topk, pooled(ranks[key], truth, topk)):
            metrics[f"R@{n}"] = recall
        precision = precision_of_predicates(found[key], truth, settings.num_predicates)
        metrics["mAP"] = mean_average_precision(precision)
        metrics.update(confusion_report(images, k, limit))
        names = settings.predicate_names
        metrics.update({f"AP-{name}": ap for name, ap in zip(names, precision.tolist())})
        recalls = recall_of_predicates(ranks[key], truth, settings)
        scores.add_predicates(task, truth, settings, recalls, precision)
    return scores


def _each_relation_once(ground_truth: SceneGraph) -> SceneGraph:
    _, first = np.unique(ground_truth.relations, axis=0, return_index=True)
    return ground_truth.select(np.sort(first))
