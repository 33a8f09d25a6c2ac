"""Recall of scene graphs by the rule of Zellers et al., "Neural Motifs" (2018).

Of an image's triplets, with graph constraint every ordered pair of boxes keeps its best predicate
(k = 1), without constraint all (k = 0); then the n best triplets are kept (equal scores in the
order given). Matching is many-to-many: a ground truth is found if any of them has its three labels
and both boxes overlap by >= 0.5; one triplet may find several. Over images with ground truth, an
image without predictions counting 0:

- ``R@n``: the share that is found in an image, averaged over images;
- ``mR@n``: the same for each predicate over the images that have it, then averaged over the
  predicates of the ground truth;
- ``zR@n``: the same over the relations whose three labels the training set lacks, averaged over the
  images that have such.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from .average_precision import mean_average_precision, precision_of_predicates
from .batches import RelationTable, detections, found_ranks
from .ground_truth import ImagePair
from .scores import Scores, Settings

__all__ = ["image_recall", "predicate_recall", "recall_metrics", "score"]


def image_recall(found: np.ndarray, image: np.ndarray) -> float:
    """Recall in percent per image, averaged over the images that have a relation.

    Args:
        found: (M,) bool.
        image: (M,) number of the relation's image.

    Returns:
        NaN if there is no relation.
    """
    if len(found) == 0:
        return float("nan")
    total = np.bincount(image)
    hits = np.bincount(image, weights=found)
    has_relation = total > 0
    return float(100.0 * np.mean(hits[has_relation] / total[has_relation]))


def predicate_recall(found: np.ndarray, truth: RelationTable, num_predicates: int) -> np.ndarray:
    """(P,) :func:`image_recall` of each predicate alone; NaN where there is none to find."""
    if len(found) == 0:
        return np.full(num_predicates, np.nan)
    codes = truth.predicates * truth.num_images + truth.image
    groups, of_group = np.unique(codes, return_inverse=True)
    of_group = of_group.reshape(-1)
    share = np.bincount(of_group, weights=found) / np.bincount(of_group)
    predicate = groups // truth.num_images
    total = np.bincount(predicate, minlength=num_predicates)
    sums = np.bincount(predicate, weights=share, minlength=num_predicates)
    return 100.0 * np.divide(sums, total, out=np.full(num_predicates, np.nan), where=total > 0)


def recall_metrics(images: Sequence[ImagePair], settings: Settings) -> dict[int, dict[str, float]]:
    """For each k ``R@n``, ``mR@n`` and, where the training set is known, ``zR@n``."""
    return {k: metrics for k, (metrics, _) in _recalls(images, settings).items()}


def _recalls(
    images: Sequence[ImagePair], settings: Settings
) -> dict[int, tuple[dict[str, float], np.ndarray]]:
    """For each k the metrics and (P,) recall of the predicates at the largest n."""
    truth = RelationTable.from_images(images)
    unseen = settings.unseen(truth.labels)
    found = found_ranks(images, settings.predicates_per_pair)
    result = {}
    for k in settings.predicates_per_pair:
        metrics: dict[str, float] = OrderedDict()
        ranks = found[k, "relationship"]
        for n in settings.topk:
            metrics[f"R@{n}"] = image_recall(ranks < n, truth.image)
        of_predicates = np.full(settings.num_predicates, np.nan)
        for n in sorted(settings.topk):
            of_predicates = predicate_recall(ranks < n, truth, settings.num_predicates)
            metrics[f"mR@{n}"] = mean_average_precision(of_predicates)
        for n in settings.topk if unseen is not None else ():
            metrics[f"zR@{n}"] = image_recall(ranks[unseen] < n, truth.image[unseen])
        result[k] = metrics, of_predicates
    return result


def score(images: Sequence[ImagePair], settings: Settings) -> Scores:
    """Results: for each k a block of ``R@n``, ``mR@n`` and, where the training set is known, zR@n.

    The block is ``motifs_<task>_graph_constraint`` for k = 1, ``motifs_<task>_no_constraint`` for
    k = 0, and ``motifs_<task>_k<k>`` for any other.
    """
    truth = RelationTable.from_images(images)
    found = detections(images, settings.predicates_per_pair, limit=settings.max_triplets)
    scores = Scores()
    for k, (metrics, of_predicates) in _recalls(images, settings).items():
        suffix = {1: "_graph_constraint", 0: "_no_constraint"}.get(k, f"_k{k}")
        task = f"motifs_{settings.task}{suffix}"
        scores.results[task] = metrics
        precision = precision_of_predicates(
            found[k, "relationship"], truth, settings.num_predicates
        )
        scores.add_predicates(task, truth, settings, of_predicates, precision)
    return scores
