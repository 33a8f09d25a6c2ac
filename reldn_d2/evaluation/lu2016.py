"""Recall by the rule of Lu et al., "Visual Relationship Detection with Language Priors" (2016).

Of an image's triplets, first every ordered pair of boxes keeps its k best predicates, then the n
best triplets are kept. In descending score (equal scores in the order given) each takes the
best-overlapping *unmatched* ground truth with the same three labels and an overlap >= 0.5; of equal
overlaps the first ground truth. Recall is pooled: the hits of all images over the ground-truth
relations of all images; an image without predictions has no hits. The overlap is

- ``relationship``: the smaller of the subject boxes' and the object boxes' IoU;
- ``phrase``: the IoU of the boxes that enclose subject and object.

A ground truth that is annotated twice must be predicted twice to be found twice. The zero-shot
recall counts, of the same matches, only the ground truth whose three labels the training set lacks.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from .average_precision import precision_of_predicates
from .batches import RelationTable, detections, found_ranks
from .ground_truth import ImagePair
from .matching import NEVER
from .scores import Scores, Settings, task_name

__all__ = ["pooled", "pooled_recall", "score"]


def pooled(ranks: np.ndarray, truth: RelationTable, topk: Sequence[int | str]) -> list[float]:
    """Recall in percent over all images together.

    Args:
        ranks: (M,) at which each ground truth is found.
        truth: M relations.
        topk: numbers n of triplets that count in an image; ``"n"`` stands for the image's own
            number of ground-truth relations.

    Returns:
        One value for each of ``topk``; NaN if there is no ground-truth relation at all.
    """
    if len(ranks) == 0:
        return [float("nan")] * len(topk)
    own = np.bincount(truth.image, minlength=truth.num_images)[truth.image]
    hits = [int((ranks < (own if n == "n" else int(n))).sum()) for n in topk]
    return [100.0 * hit / len(ranks) for hit in hits]


def pooled_recall(
    images: Sequence[ImagePair],
    topk: Sequence[int | str],
    predicates_per_pair: int = 0,
    kind: str = "relationship",
) -> list[float]:
    """Recall in percent over all images together, by the rule above.

    Args:
        images: ground truth and prediction of every image of the data set.
        topk: as for :func:`pooled`.
        predicates_per_pair: k; 0 means all.
        kind: ``relationship`` or ``phrase``.

    Returns:
        One value for each of ``topk``; NaN if there is no ground-truth relation at all.
    """
    k = predicates_per_pair
    found = found_ranks(images, [k], [kind], one_to_one=True)
    return pooled(found[k, kind], RelationTable.from_images(images), topk)


def score(images: Sequence[ImagePair], settings: Settings) -> Scores:
    """Results: for each k ``{"lu2016_<task>_k<k>": metrics}``.

    Metrics are ``relationship R@n`` and ``phrase R@n``, and with ``zero-shot`` in front over the
    triplets that the training set lacks. In the task PRDCLS, where boxes and classes are given, the
    relationship recall is what Lu et al. call predicate detection: ``predicate R@n``, and the
    phrase recall is left out.
    """
    kinds = {"relationship": "relationship", "phrase": "phrase"}
    if settings.task == "prdcls":
        kinds = {"predicate": "relationship"}
    truth = RelationTable.from_images(images)
    unseen = settings.unseen(truth.labels)
    found = found_ranks(images, settings.predicates_per_pair, kinds.values(), one_to_one=True)
    tested = detections(images, settings.predicates_per_pair, limit=settings.max_triplets)
    scores = Scores()
    for k in settings.predicates_per_pair:
        task = task_name("lu2016", settings.task, k)
        metrics: dict[str, float] = OrderedDict()
        for name, kind in kinds.items():
            for n, recall in zip(settings.topk, pooled(found[k, kind], truth, settings.topk)):
                metrics[f"{name} R@{n}"] = recall
        for name, kind in kinds.items() if unseen is not None else ():
            part = RelationTable(truth.image[unseen], truth.labels[unseen], truth.num_images)
            values = pooled(found[k, kind][unseen], part, settings.topk)
            metrics.update({f"zero-shot {name} R@{n}": x for n, x in zip(settings.topk, values)})
        scores.results[task] = metrics
        recall = recall_of_predicates(found[k, "relationship"], truth, settings)
        precision = precision_of_predicates(
            tested[k, "relationship"], truth, settings.num_predicates
        )
        scores.add_predicates(task, truth, settings, recall, precision)
    return scores


def recall_of_predicates(
    ranks: np.ndarray, truth: RelationTable, settings: Settings, topk: int | None = None
) -> np.ndarray:
    """(P,) pooled recall of each predicate at the largest n; NaN where there is none to find."""
    found = ranks < (topk or max(settings.topk, default=NEVER))
    total = np.bincount(truth.predicates, minlength=settings.num_predicates)
    hits = np.bincount(truth.predicates[found], minlength=settings.num_predicates)
    return 100.0 * np.divide(hits, total, out=np.full(len(total), np.nan), where=total > 0)
