"""The metrics of each protocol; :mod:`reldn_d2.utils.protocols` has its rules of matching.

A function per protocol turns the matches for one k into the metrics of one block of results, and
gives the recall and the average precision (AP) of each predicate. P predicates, M relations.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import numpy as np

from ..utils.protocols import OVERLAPS, Protocol
from .batches import NEVER, RelationTable
from .frequency_groups import GROUPS, frequency_groups
from .metrics import (
    ScoredTriplets,
    harmonic_mean,
    image_recall,
    information,
    mean_of_defined,
    pooled_recall,
    predicate_image_recall,
    predicate_pooled_recall,
    within_own_number,
)

__all__ = ["Block", "METRICS", "Matches", "Settings", "block_name", "measure"]

_SUFFIXES = dict(zip(OVERLAPS, ("rel", "phr")))


@dataclass(frozen=True)
class Settings:
    """What is scored, and how; the same for all protocols."""

    predicate_names: Sequence[str]
    task: str = "sgdet"
    predicates_per_pair: tuple[int | None, ...] = (None,)  # each k has results of its own
    recall_at: tuple[int, ...] = (20, 50, 100)  # the n of R@n
    topk: int | None = 100  # triplets per image that count in average precision; None: all
    seen_triplets: np.ndarray | None = None  # (T, 3) labels in the training set, if known
    training_counts: np.ndarray | None = None  # (P,) relations in the training set, if known
    group_thresholds: tuple[int, ...] = ()  # of head and tail; empty: thirds

    @property
    def num_predicates(self) -> int:
        """P."""
        return len(self.predicate_names)

    def unseen(self, labels: np.ndarray) -> np.ndarray | None:
        """Return (M,) bool, whether the training set lacks (M, 3) labels; None if unknown."""
        if self.seen_triplets is None:
            return None
        both = np.concatenate([self.seen_triplets, labels]).astype(np.int64)
        _, codes = np.unique(both, axis=0, return_inverse=True)
        codes = codes.reshape(-1)
        count = len(self.seen_triplets)
        return ~np.isin(codes[count:], codes[:count])

    def groups(self, truth: RelationTable) -> dict[str, list[int]] | None:
        """Return the predicates of head, body and tail, see :func:`.frequency_groups`."""
        counts = np.bincount(truth.predicates, minlength=self.num_predicates)
        return frequency_groups(counts, self.training_counts, self.group_thresholds)


@dataclass(frozen=True)
class Matches:
    """What the images of a dataset give for one k."""

    truth: RelationTable
    ranks: dict[str, np.ndarray]  # by overlap: (M,) rank at which each relation is found
    triplets: dict[str, ScoredTriplets]  # by overlap, for average precision
    unseen: np.ndarray | None  # (M,) bool: a zero-shot relation; None if not asked for or unknown
    confusion: "OrderedDict[str, float]"  # see :mod:`.confusion`

    def largest_recall(self, settings: Settings) -> np.ndarray:
        """Return (P,) pooled recall of each predicate at the largest n."""
        found = self.ranks["relationship"] < max(settings.recall_at, default=NEVER)
        return predicate_pooled_recall(found, self.truth, settings.num_predicates)


class Block(NamedTuple):
    """Metrics for one k."""

    metrics: "OrderedDict[str, float]"
    recall: np.ndarray  # (P,) at the largest n
    average_precision: np.ndarray  # (P,)


def block_name(protocol: str, task: str, predicates_per_pair: int | None) -> str:
    """Return the key of a block of results, such as ``lu2016_sgdet_k10``."""
    k = predicates_per_pair
    suffix = "" if k is None else f"_k{k}"
    if protocol == "motifs":
        suffix = {1: "_graph_constraint", None: "_no_constraint"}.get(k, suffix)
    return f"{protocol}_{task}{suffix}"


def _lu2016(matches: Matches, settings: Settings) -> Block:
    """Lu et al., "Visual Relationship Detection with Language Priors" (2016).

    ``relationship R@n`` and ``phrase R@n``, and with ``zero-shot`` in front over the relations
    whose labels the training set lacks, found by the same matches. Where boxes and classes are
    given there are no phrases, and recall is called ``predicate R@n``: Lu et al.'s predicate
    detection is PREDDET, which scores the annotated pairs only; PRDCLS scores all pairs. A relation
    that is annotated twice must be predicted twice to be found twice.
    """
    names = {"relationship": "relationship", "phrase": "phrase"}
    if settings.task in ("prdcls", "preddet"):
        names = {"predicate": "relationship"}
    truth, unseen, recall_at = matches.truth, matches.unseen, settings.recall_at
    metrics: OrderedDict[str, float] = OrderedDict()
    for name, overlap in names.items():
        recalls = pooled_recall(matches.ranks[overlap], truth, recall_at)
        metrics.update({f"{name} R@{n}": recall for n, recall in zip(recall_at, recalls)})
    for name, overlap in names.items() if unseen is not None else ():
        part = RelationTable(truth.image[unseen], truth.labels[unseen], truth.num_images)
        recalls = pooled_recall(matches.ranks[overlap][unseen], part, recall_at)
        metrics.update({f"zero-shot {name} R@{n}": r for n, r in zip(recall_at, recalls)})
    precision = matches.triplets["relationship"].average_precision(truth, settings.num_predicates)
    return Block(metrics, matches.largest_recall(settings), precision)


def _motifs(matches: Matches, settings: Settings) -> Block:
    """Zellers et al., "Neural Motifs" (2018), over images with relations.

    ``R@n``: the share found in an image, averaged over images. ``mR@n``: the same for each
    predicate over the images that have it, averaged over the predicates of the ground truth.
    ``F1@n``: their harmonic mean. ``zR@n``: the same as R@n over the relations whose labels the
    training set lacks, averaged over the images that have such relations. ``relative R``,
    ``relative mR``: R@n and mR@n, n being the number of relations of each image.
    ``information R@n``: a relation counts with the bits of its predicate, ``-log2`` of its share in
    the training set. ``head mR@n``, ``body mR@n``, ``tail mR@n``: mR@n of the predicates of one
    group. An image without predictions counts 0.
    """
    truth, unseen, ranks = matches.truth, matches.unseen, matches.ranks["relationship"]
    recall_at, num_predicates = settings.recall_at, settings.num_predicates
    metrics: OrderedDict[str, float] = OrderedDict()
    recalls = {n: predicate_image_recall(ranks < n, truth, num_predicates) for n in recall_at}
    for n in recall_at:
        metrics[f"R@{n}"] = image_recall(ranks < n, truth.image)
    for n in recall_at:
        metrics[f"mR@{n}"] = mean_of_defined(recalls[n])
    for n in recall_at:
        metrics[f"F1@{n}"] = harmonic_mean(metrics[f"R@{n}"], metrics[f"mR@{n}"])
    for n in recall_at if unseen is not None else ():
        metrics[f"zR@{n}"] = image_recall(ranks[unseen] < n, truth.image[unseen])
    within = within_own_number(ranks, truth.image)
    metrics["relative R"] = image_recall(within, truth.image)
    metrics["relative mR"] = mean_of_defined(predicate_image_recall(within, truth, num_predicates))
    if settings.training_counts is not None:
        weights = information(settings.training_counts)[truth.predicates]
        for n in recall_at:
            metrics[f"information R@{n}"] = image_recall(ranks < n, truth.image, weights)
    groups = settings.groups(truth)
    for name in GROUPS if groups is not None else ():
        for n in recall_at:
            metrics[f"{name} mR@{n}"] = mean_of_defined(recalls[n][groups[name]])
    recall = recalls.get(max(recall_at, default=0), np.full(num_predicates, np.nan))
    precision = matches.triplets["relationship"].average_precision(truth, settings.num_predicates)
    return Block(metrics, recall, precision)


def _openimages(matches: Matches, settings: Settings) -> Block:
    """The OpenImages challenge 2018/2019, for relationships (``rel``) and phrases (``phr``).

    ``R@n``: the true positives for relationships among the n best triplets of their image, over all
    relations. ``mAP``: mean over the predicates of the ground truth. ``pooled_AP``: AP of all
    predicates' triplets in one list (the challenge's code names it weightedAP). ``score = 0.2 R@50
    + 0.4 mAP_rel + 0.4 mAP_phr``. ``openimages`` and ``openimages_text`` differ only in the
    triplets that they ignore.
    """
    precision = _precisions(matches, settings)
    metrics = _pooled_recalls(matches, settings.recall_at)
    for overlap, suffix in _SUFFIXES.items():
        metrics[f"mAP_{suffix}"] = mean_of_defined(precision[overlap])
    for overlap, suffix in _SUFFIXES.items():
        triplets = matches.triplets[overlap]
        metrics[f"pooled_AP_{suffix}"] = triplets.pooled_average_precision(matches.truth)
    metrics["score"] = _score(matches, metrics, "mAP")
    _add_precisions(metrics, precision, settings)
    return Block(metrics, matches.largest_recall(settings), precision["relationship"])


def _released(matches: Matches, settings: Settings) -> Block:
    """The authors' released code, which scores 2 predicates per pair and 100 triplets per image.

    ``R@n``: pooled over the dataset. ``mAP``: mean over all predicates of the dataset; one that
    the ground truth lacks counts 0. ``wmAP``: AP weighted by the predicate's share of the ground
    truth. ``score``: as in the challenge; ``score_wtd``: with wmAP in place of mAP.
    """
    truth = matches.truth
    share = np.bincount(truth.predicates, minlength=settings.num_predicates)
    share = share / share.sum() if len(truth.image) else np.full(len(share), np.nan)
    precision = _precisions(matches, settings)
    if len(truth.image):
        precision = {overlap: np.nan_to_num(values) for overlap, values in precision.items()}
    metrics = _pooled_recalls(matches, settings.recall_at)
    for overlap, suffix in _SUFFIXES.items():
        metrics[f"mAP_{suffix}"] = float(precision[overlap].mean())
        metrics[f"wmAP_{suffix}"] = float((share * precision[overlap]).sum())
    metrics["score"] = _score(matches, metrics, "mAP")
    metrics["score_wtd"] = _score(matches, metrics, "wmAP")
    _add_precisions(metrics, precision, settings)
    return Block(metrics, matches.largest_recall(settings), precision["relationship"])


def _relations(matches: Matches, settings: Settings) -> Block:
    """Datasets without a protocol of their own, among them the built-in one.

    ``R@n``: each image may give as many triplets as it has relations; ``R@20``, ...: it may give
    that many; pooled over the dataset. ``mAP``: mean over the predicates of the ground truth;
    ``AP-<predicate>``, named as Detectron2 names results per category; and the accuracies of
    :mod:`.confusion`. A relation that is annotated twice counts once.
    """
    precision = matches.triplets["relationship"].average_precision(
        matches.truth, settings.num_predicates
    )
    metrics = _pooled_recalls(matches, ("n", *settings.recall_at))
    metrics["mAP"] = mean_of_defined(precision)
    metrics.update(matches.confusion)
    for name, value in zip(settings.predicate_names, precision.tolist()):
        metrics[f"AP-{name}"] = value
    return Block(metrics, matches.largest_recall(settings), precision)


METRICS: dict[str, Callable[[Matches, Settings], Block]] = {
    "lu2016": _lu2016,
    "motifs": _motifs,
    "openimages": _openimages,
    "released": _released,
    "relations": _relations,
}


def measure(matches: Matches, settings: Settings, protocol: Protocol) -> Block:
    """Return the metrics of a protocol, its own or a built-in set.

    Raises:
        ValueError: a protocol's own function returns something else than numbers by name.
    """
    if isinstance(protocol.metrics, str):
        return METRICS[protocol.metrics](matches, settings)
    values = protocol.metrics(matches, settings)
    if not isinstance(values, Mapping) or not all(
        isinstance(name, str) and isinstance(value, (Real, np.number))
        for name, value in values.items()
    ):
        raise ValueError(
            f"Protocol '{protocol.name}': its metrics return {values!r}; expected a dict of "
            'numbers by name, such as {"R@50": 12.3}.'
        )
    metrics = OrderedDict((name, float(value)) for name, value in values.items())
    precision = matches.triplets["relationship"].average_precision(
        matches.truth, settings.num_predicates
    )
    return Block(metrics, matches.largest_recall(settings), precision)


def _pooled_recalls(matches: Matches, recall_at: Sequence[int | str]) -> "OrderedDict[str, float]":
    recalls = pooled_recall(matches.ranks["relationship"], matches.truth, recall_at)
    return OrderedDict((f"R@{n}", recall) for n, recall in zip(recall_at, recalls))


def _precisions(matches: Matches, settings: Settings) -> dict[str, np.ndarray]:
    return {
        overlap: triplets.average_precision(matches.truth, settings.num_predicates)
        for overlap, triplets in matches.triplets.items()
    }


def _score(matches: Matches, metrics: dict[str, float], mean: str) -> float:
    (recall,) = pooled_recall(matches.ranks["relationship"], matches.truth, [50])
    return 0.2 * recall + 0.4 * metrics[f"{mean}_rel"] + 0.4 * metrics[f"{mean}_phr"]


def _add_precisions(
    metrics: dict[str, float], precision: dict[str, np.ndarray], settings: Settings
) -> None:
    """Add the AP of each predicate, named as Detectron2 names results per category."""
    for overlap, suffix in _SUFFIXES.items():
        for name, value in zip(settings.predicate_names, precision[overlap].tolist()):
            metrics[f"AP_{suffix}-{name}"] = value
