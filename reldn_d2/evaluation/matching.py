"""Which predicted triplets find which annotated relations.

Shapes: K predicted triplets, M annotated relations, Q candidates (a triplet and a relation of one
image with equal labels that overlap enough, in the order of :meth:`.batches.Batch.candidates`).
Triplets of an image are in descending order of their scores.
"""

import numpy as np

from ..structures.ranking import rank_in_group
from ..structures.scene_graph import SceneGraph
from ..utils.protocols import PROTOCOL_REGISTRY, Protocol
from .batches import NEVER, Batch

__all__ = [
    "best_candidates",
    "counted_relations",
    "counted_triplets",
    "find_relations",
    "first_ranks",
    "match_one_to_one",
    "match_relations",
]


def first_ranks(
    triplets: np.ndarray, relations: np.ndarray, ranks: np.ndarray, num_relations: int
) -> np.ndarray:
    """Return the best rank of the triplets that match a relation.

    Args:
        triplets, relations: (Q,) each, which triplet matches which relation.
        ranks: (K,) rank of each triplet in its image, from 0.
        num_relations: M.

    Returns:
        (M,) ranks, :data:`NEVER` where nothing matches.
    """
    found = np.full(num_relations, NEVER, dtype=np.int64)
    np.minimum.at(found, relations, ranks[triplets])
    return found


def best_candidates(
    triplets: np.ndarray, relations: np.ndarray, overlaps: np.ndarray, num_triplets: int
) -> np.ndarray:
    """Return (K,) the best-overlapping relation of each triplet, whether free or not, or -1.

    Args:
        triplets, relations, overlaps: (Q,) each, the candidates. Of equal overlaps the first
            relation is taken.
        num_triplets: K.
    """
    matches = np.full(num_triplets, -1, dtype=np.int64)
    # Assigned from the worst to the best overlap: the last assignment to an index stays.
    worst_first = np.lexsort((-overlaps, triplets))[::-1]
    matches[triplets[worst_first]] = relations[worst_first]
    return matches


def match_one_to_one(
    triplets: np.ndarray,
    relations: np.ndarray,
    overlaps: np.ndarray,
    codes: np.ndarray,
    num_relations: int,
) -> np.ndarray:
    """Match greedily: in rank order each triplet takes its best-overlapping *free* relation.

    Triplets with different codes never compete for a relation. Therefore the first triplets of all
    codes are matched at once, then all second ones, and so on, instead of one triplet at a time.

    Args:
        triplets, relations, overlaps: (Q,) each, the candidates.
        codes: (K,) the triplets' codes (:attr:`.batches.Batch.codes`).
        num_relations: M.

    Returns:
        (K,) the relation that each triplet takes, or -1. Of equal overlaps the first relation is
        taken. The match of a triplet depends on earlier ones only, so the result for the best n
        triplets is the first n rows.
    """
    matches = np.full(len(codes), -1, dtype=np.int64)
    involved, own = np.unique(triplets, return_inverse=True)
    turn = rank_in_group(codes[involved])[own.reshape(-1)]
    order = np.lexsort((-overlaps, triplets, turn))
    triplets, relations, turn = triplets[order], relations[order], turn[order]
    taken = np.zeros(num_relations, dtype=bool)
    bounds = np.searchsorted(turn, np.arange(turn[-1] + 2 if len(turn) else 1))
    for start, end in zip(bounds[:-1], bounds[1:]):
        free = start + np.flatnonzero(~taken[relations[start:end]])
        rows, columns = triplets[free], relations[free]
        is_best = np.ones(len(rows), dtype=bool)
        is_best[1:] = rows[1:] != rows[:-1]
        matches[rows[is_best]] = columns[is_best]
        taken[columns[is_best]] = True
    return matches


def find_relations(
    batch: Batch, matching: str, overlap: str, ranks: np.ndarray, strict: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return which triplets find which relations, for recall.

    Args:
        batch: K triplets and M relations.
        matching: see :class:`reldn_d2.utils.protocols.Protocol`.
        overlap: one of :data:`reldn_d2.utils.protocols.OVERLAPS`.
        ranks: (K,) of :meth:`.batches.Batch.ranks`; triplets with :data:`NEVER` find nothing.
        strict: the overlap must be > 0.5 instead of >= 0.5.

    Returns:
        (F,) triplet and (F,) relation of each find.
    """
    triplets, relations, overlaps = batch.candidates(overlap, strict)
    used = ranks[triplets] != NEVER
    triplets, relations, overlaps = triplets[used], relations[used], overlaps[used]
    if matching == "many_to_many":
        return triplets, relations
    num_relations = len(batch.gt_pairs)
    if matching == "one_to_one":
        match = match_one_to_one(triplets, relations, overlaps, batch.codes[0], num_relations)
        finders = np.flatnonzero(match >= 0)
        return finders, match[finders]
    match = best_candidates(triplets, relations, overlaps, len(ranks))
    tested = np.flatnonzero(match >= 0)
    first = first_ranks(tested, match[tested], ranks, num_relations)
    finders = tested[ranks[tested] == first[match[tested]]]
    return finders, match[finders]


def counted_relations(truth: SceneGraph, protocol: Protocol) -> SceneGraph:
    """Return the ground truth with the relations that a protocol counts.

    Where it counts distinct relations, a relation that is annotated twice counts once.
    """
    counted = _counted(truth, protocol)
    return truth if len(counted) == len(truth.pairs) else truth.select(counted)


def _counted(truth: SceneGraph, protocol: Protocol) -> np.ndarray:
    """Return the indices of the relations that count, in ascending order."""
    if not protocol.distinct_relations:
        return np.arange(len(truth.pairs))
    subjects, objects, predicates = truth.relations.astype(np.int64).T
    codes = (predicates * len(truth.boxes) + subjects) * len(truth.boxes) + objects
    return np.sort(np.unique(codes, return_index=True)[1])


def counted_triplets(
    predicted: SceneGraph,
    truth: SceneGraph,
    protocol: Protocol,
    predicates_per_pair: int | None,
    topk: int,
) -> SceneGraph:
    """Return the ``topk`` best triplets of one image among those that a protocol counts.

    Args:
        predicted: K triplets in descending order of their scores.
        truth: ground truth of the image.
        protocol: a protocol that ignores triplets ranks the others only.
        predicates_per_pair: a pair's best k predicates count; None means no limit.
        topk: most triplets returned.
    """
    batch = Batch([(truth, predicted)])
    ranks = batch.ranks(predicates_per_pair, batch.judgeable(protocol.verified_labels))
    return predicted.select(np.flatnonzero(ranks < topk))


def match_relations(
    predicted: SceneGraph,
    truth: SceneGraph,
    protocol: Protocol | str,
    predicates_per_pair: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return hits and found relations of one image, as a protocol counts them for recall.

    Args:
        predicted: K triplets in descending order of their scores, all of which count.
        truth: M annotated relations.
        protocol: the protocol or its name.
        predicates_per_pair: a pair's best k predicates count; None means no limit.

    Returns:
        (K,) bool, the triplets that find a relation, and (M,) bool, the relations that are found.
        Where the protocol counts a repeated relation once (:func:`counted_relations`), its
        repetitions are never found.
    """
    if isinstance(protocol, str):
        protocol = PROTOCOL_REGISTRY[protocol]
    counted = _counted(truth, protocol)
    batch = Batch([(truth.select(counted), predicted)])
    ranks = batch.ranks(predicates_per_pair, batch.judgeable(protocol.verified_labels))
    triplets, relations = find_relations(batch, protocol.matching, "relationship", ranks)
    hits = np.zeros(len(predicted.pairs), dtype=bool)
    hits[triplets] = True
    found = np.zeros(len(truth.pairs), dtype=bool)
    found[counted[relations]] = True
    return hits, found
