"""Score a dataset by a protocol: one pass over its images for all metrics."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..utils.protocols import Protocol
from .batches import NEVER, Batch, ImagePair, RelationTable, batches
from .confusion import ConfusionCounter
from .matching import best_candidates, counted_relations, find_relations, first_ranks
from .metrics import ScoredTriplets
from .per_predicate import PredicateTable
from .protocol_metrics import Matches, Settings, block_name, measure

__all__ = ["Results", "Scores", "match_images", "score"]

Results = dict[str, dict[str, float]]


@dataclass
class Scores:
    """Results and, for each block of the protocol, its predicates one by one."""

    results: Results = field(default_factory=OrderedDict)
    predicates: dict[str, PredicateTable] = field(default_factory=OrderedDict)
    anything_matched: bool = False  # whether any triplet matches any relation


def score(images: Sequence[ImagePair], protocol: Protocol, settings: Settings) -> Scores:
    """Score every image of a dataset, in its order.

    Args:
        images: ground truth and prediction of every image.
        protocol: the rules.
        settings: what is scored.

    Returns:
        A block of results per k, ``{"lu2016_<task>_k<k>": metrics}``, and the accuracies of
        :mod:`.confusion` in that block or one of their own.
    """
    matches_by_k, anything_matched = match_images(images, protocol, settings)
    scores = Scores(anything_matched=anything_matched)
    confusions: Results = OrderedDict()
    for k, matches in matches_by_k.items():
        block = measure(matches, settings, protocol)
        name = block_name(protocol.name, settings.task, k)
        scores.results[name] = block.metrics
        scores.predicates[name] = PredicateTable(
            names=tuple(settings.predicate_names),
            counts=np.bincount(matches.truth.predicates, minlength=settings.num_predicates),
            training_counts=settings.training_counts,
            recall=block.recall,
            recall_at=max(settings.recall_at, default=0),
            average_precision=block.average_precision,
            group_thresholds=settings.group_thresholds,
        )
        if not matches.confusion.keys() <= block.metrics.keys():
            confusions[block_name("confusion", settings.task, k)] = matches.confusion
    scores.results.update(confusions)
    return scores


def match_images(
    images: Sequence[ImagePair], protocol: Protocol, settings: Settings
) -> tuple[dict[int | None, Matches], bool]:
    """Match every image in one pass.

    Returns:
        For each k what the metrics need; and whether any triplet matches any relation.
    """
    images = [(counted_relations(truth, protocol), predicted) for truth, predicted in images]
    ks = settings.predicates_per_pair
    confusion = ConfusionCounter(ks, settings.topk or 100)
    parts = {k: _Parts(k, protocol, settings) for k in ks}
    truths: list[RelationTable] = []
    anything_matched, num_relations = False, 0
    for batch in batches(images):
        tested = _tested_against(batch, protocol, num_relations)
        for part in parts.values():
            part.add(batch, tested)
        confusion.add(batch)
        anything_matched = anything_matched or len(batch.candidates()[0]) > 0
        truths.append(batch.truth)
        num_relations += len(batch.gt_pairs)
    truth = RelationTable.concatenate(truths)
    unseen = settings.unseen(truth.labels) if protocol.zero_shot else None
    # Pairs that were not scored are no rivals: PREDDET would have perfect accuracies.
    reports = {k: {} if settings.task == "preddet" else confusion.report(k) for k in ks}
    matches = {k: part.matches(truth, unseen, reports[k]) for k, part in parts.items()}
    return matches, anything_matched


def _tested_against(batch: Batch, protocol: Protocol, num_relations: int) -> dict[str, np.ndarray]:
    """Return by overlap (K,) the relation that average precision tests each triplet against.

    It is an index into the dataset's relations, ``num_relations`` of which are in the batches
    before; -1 if there is none.
    """
    result = {}
    for overlap in protocol.precision_overlaps:
        candidates = batch.candidates(overlap, protocol.strict_precision)
        match = best_candidates(*candidates, len(batch.image))
        result[overlap] = np.where(match >= 0, match + num_relations, -1)
    return result


class _Parts:
    """The matches for one k, batch by batch."""

    def __init__(self, predicates_per_pair: int | None, protocol: Protocol, settings: Settings):
        self.k, self.protocol = predicates_per_pair, protocol
        self.topk = NEVER if settings.topk is None else settings.topk
        # lu2016 has phrase recall, but not where boxes and classes are given.
        given = settings.task in ("prdcls", "preddet")
        overlaps = ("relationship",) if given else protocol.recall_overlaps
        self.ranks: dict[str, list[np.ndarray]] = {overlap: [] for overlap in overlaps}
        self.triplets: dict[str, list[tuple[np.ndarray, ...]]] = {
            overlap: [] for overlap in protocol.precision_overlaps
        }

    def add(self, batch: Batch, tested: dict[str, np.ndarray]) -> None:
        """Take a batch and its :func:`_tested_against`."""
        protocol = self.protocol
        ranks = batch.ranks(self.k, batch.judgeable(protocol.verified_labels))
        limited = np.where(ranks < self.topk, ranks, NEVER)
        # The challenge's recall counts the true positives of its average precision, which has a
        # limit per image; the n of R@n limits all other recalls.
        of_recall = limited if protocol.matching == "true_positives" else ranks
        for overlap, parts in self.ranks.items():
            triplets, relations = find_relations(batch, protocol.matching, overlap, of_recall)
            parts.append(first_ranks(triplets, relations, ranks, len(batch.gt_pairs)))
        counted = limited != NEVER
        for overlap, columns in self.triplets.items():
            rows = (batch.scores, batch.labels[:, 1], tested[overlap])
            columns.append(tuple(row[counted] for row in rows))

    def matches(
        self,
        truth: RelationTable,
        unseen: np.ndarray | None,
        confusion: "OrderedDict[str, float]",
    ) -> Matches:
        """Join all batches."""
        no_integers = np.zeros(0, dtype=np.int64)
        return Matches(
            truth=truth,
            ranks={o: np.concatenate([no_integers, *parts]) for o, parts in self.ranks.items()},
            triplets={
                overlap: ScoredTriplets(
                    *map(np.concatenate, zip((np.zeros(0), no_integers, no_integers), *columns))
                )
                for overlap, columns in self.triplets.items()
            },
            unseen=unseen,
            confusion=confusion,
        )
