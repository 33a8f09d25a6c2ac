"""The exact best triplets of an image at test time (section 5), without scoring every pair.

Shapes: R entities of one image, P pairs, C predicates, K kept triplets (``topk``).

A triplet scores ``p_det(s) * p(pred | s, o) * p_det(o)``, so no triplet of a pair scores more than
the pair's bound ``p_det(s) * p_det(o)``. (p_det is the detector's score, or a power of it:
``TEST.RELATIONS.ENTITY_SCORE_EXPONENT``.) Pairs are scored in descending order of this bound. Once
the K-th best triplet so far scores more than the bound of every remaining pair, none of those pairs
can contribute, and their union boxes are never pooled.

(s, o) and (o, s) have the same bound and the same union box, so they are scored together and the
box is pooled once. No tighter bound is known: until the visual logits of a pair's union box are
computed, the logits of the other modules exclude nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from detectron2.structures import Instances

from ...structures.box_ops import boxes_overlap
from ...structures.relations import predicted_relations

__all__ = ["TopTriplets", "best_of_chunks", "best_triplets", "check_options", "pairs_by_bound"]

# Pairs in the first chunk, and growth from chunk to chunk up to the limit. A small first chunk
# suffices for most images; growing chunks keep the device busy when many pairs are needed.
FIRST_CHUNK, GROWTH = 256, 1.5

# Pairs (i < j) sorted at once. All pairs of up to 256 entities are sorted in one go; beyond that
# they are sorted in blocks, so that no table of R x R is ever made.
SORTED_PAIRS = 2**16

# Bounds are float64 and scores float32, so allow for rounding.
_ROUNDING = 1.0 + 2.0**-20
# Below this float32 is denormal: it has fewer digits, and _ROUNDING is no longer enough.
_SMALLEST_NORMAL = 2.0**-126

ScorePairs = Callable[[Tensor, Tensor], Tensor]
"""From (P,) subjects and (P,) objects to the (P, C) probabilities of their predicates."""

_Ranked = tuple[Tensor, Tensor, Tensor]
"""(K,) scores, (K,) triplet ids and (K,) predicate probabilities, best triplet first."""


class TopTriplets:
    """The K best triplets among the pairs seen so far, for each limit of predicates per pair.

    A triplet's id is ``pair_id * C + predicate``. Equal scores rank by id, so that the result does
    not depend on the order in which pairs are scored.
    """

    def __init__(self, predicates_per_pair: Sequence[int | None], topk: int, num_predicates: int):
        """
        Args:
            predicates_per_pair: for each value k the exact ``topk`` best triplets are kept among
                those whose predicate is one of the k best of its pair; None means no limit.
            topk: K, number of triplets kept.
            num_predicates: C.
        """
        # A limit of C or more predicates is no limit.
        self.limits = sorted(
            {num_predicates if k is None else min(k, num_predicates) for k in predicates_per_pair}
        )
        self.topk = topk
        self.num_predicates = num_predicates
        self._best: dict[int, _Ranked] = {}  # by limit

    def update(self, probabilities: Tensor, pair_scores: Tensor, pair_ids: Tensor) -> None:
        """Add the triplets of P further pairs.

        Args:
            probabilities: (P, C), without "no relationship".
            pair_scores: (P,), ``p_det(s) * p_det(o)``.
            pair_ids: (P,) int64, different for different pairs; the smaller id wins ties.
        """
        best_first = None
        for k in self.limits:
            if k == self.num_predicates:
                predicates = torch.arange(k, device=probabilities.device).expand_as(probabilities)
                kept = probabilities
            else:
                if best_first is None:  # sorted once for all limits
                    best_first = probabilities.argsort(dim=1, descending=True, stable=True)
                predicates = best_first[:, :k]
                kept = probabilities.gather(1, predicates)
            scores = kept * pair_scores[:, None]
            triplet_ids = pair_ids[:, None] * self.num_predicates + predicates
            self._merge(k, (scores.flatten(), triplet_ids.flatten(), kept.flatten()))

    def _merge(self, k: int, new: _Ranked) -> None:
        """Merge new triplets, in any order, into the K best of limit k.

        NaN scores are kept, so that whoever looks at the result notices them: ``~(scores < x)`` is
        true for NaN, unlike ``scores >= x``, and a descending sort puts NaN first.
        """
        scores = new[0]
        lowest_kept = self._lowest_kept(k)
        if lowest_kept is None and len(scores) > self.topk > 0:
            lowest_kept = scores.topk(self.topk).values[-1]
        if lowest_kept is not None:  # drop most triplets before sorting
            can_enter = ~(scores < lowest_kept)
            new = tuple(x[can_enter] for x in new)
        if k in self._best:
            new = tuple(torch.cat(old_and_new) for old_and_new in zip(self._best[k], new))
        scores, triplet_ids, probabilities = new
        order = _by_score_then_id(scores, triplet_ids)[: self.topk]
        self._best[k] = (scores[order], triplet_ids[order], probabilities[order])

    def _lowest_kept(self, k: int) -> Tensor | None:
        """Return the K-th best score of limit k; None while fewer than K triplets are kept."""
        if k not in self._best or len(self._best[k][0]) < self.topk or self.topk == 0:
            return None
        return self._best[k][0][-1]

    def threshold(self) -> float:
        """Return the score below which a further triplet changes nothing for any limit; 0 if none.

        This transfers one value from the device.
        """
        if self.topk == 0:
            return float("inf")
        lowest_kept = [self._lowest_kept(k) for k in self.limits]
        if not lowest_kept or any(x is None for x in lowest_kept):
            return 0.0
        lowest = float(torch.stack(lowest_kept).min())
        return lowest if lowest >= _SMALLEST_NORMAL else 0.0  # NaN gives 0 too

    def relations(self, num_entities: int, image_size: tuple[int, int]) -> Instances:
        """Return the triplets kept for any limit, best first; each triplet occurs once.

        Args:
            num_entities: R; the pair (s, o) has the id ``s * R + o``.
            image_size: (height, width) of the image that the entities' boxes refer to.

        Returns:
            Fields as in :func:`reldn_d2.structures.relations.predicted_relations`.
        """
        scores, triplet_ids, probabilities = (torch.cat(x) for x in zip(*self._best.values()))
        order = triplet_ids.argsort()
        triplet_ids = triplet_ids[order]
        is_new = torch.ones_like(triplet_ids, dtype=torch.bool)
        is_new[1:] = triplet_ids[1:] != triplet_ids[:-1]
        order, triplet_ids = order[is_new], triplet_ids[is_new]
        best_first = scores[order].argsort(descending=True, stable=True)
        order, triplet_ids = order[best_first], triplet_ids[best_first]

        pair_ids = torch.div(triplet_ids, self.num_predicates, rounding_mode="floor")
        subjects = torch.div(pair_ids, max(num_entities, 1), rounding_mode="floor")
        return predicted_relations(
            image_size,
            pairs=torch.stack([subjects, pair_ids - subjects * num_entities], dim=1),
            predicates=triplet_ids - pair_ids * self.num_predicates,
            scores=scores[order],
            predicate_scores=probabilities[order],
        )


def _by_score_then_id(scores: Tensor, triplet_ids: Tensor) -> Tensor:
    """Return the order of descending scores, equal ones by ascending id."""
    by_id = triplet_ids.argsort()
    return by_id[scores[by_id].argsort(descending=True, stable=True)]


def pairs_by_bound(
    scores: Tensor,
    boxes: Tensor | None,
    chunk: int,
    threshold: Callable[[], float] = lambda: 0.0,
    first_chunk: int = FIRST_CHUNK,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ordered pairs (i, j), i != j, in chunks of descending ``p_det(i) * p_det(j)``.

    (i, j) and (j, i) are in one chunk, unless chunks have one pair. With more than 256 entities the
    order is only roughly descending: pairs are sorted in blocks of ``SORTED_PAIRS``, first all
    pairs of the entities with the highest scores. The pairs that are left out are the same.

    Args:
        scores: (R,) float32 on the CPU.
        boxes: (R, 4) on the CPU to leave out pairs whose boxes do not overlap; None yields all.
        chunk: max pairs per chunk.
        threshold: called before each chunk; from then on, pairs whose bound is certainly below its
            result are left out.
        first_chunk: max pairs of the first chunk; each further one is ``GROWTH`` times as large. If
            all pairs of a chunk have the same bound, it is filled up to ``chunk`` with others of
            that bound, because none of them can end the search.

    Yields:
        (P,) subjects and (P,) objects, int64, P > 0.
    """
    # NaN counts as 1, so that entities with such a score are looked at.
    bounds_of = np.abs(np.nan_to_num(scores.double().numpy(), nan=1.0)).clip(max=1e30)
    best_first = np.argsort(-bounds_of, kind="stable")
    sorted_scores = bounds_of[best_first]
    sorted_boxes = None if boxes is None else boxes.numpy()[best_first]
    max_size, size = max(chunk // 2, 1), max(min(first_chunk, chunk) // 2, 1)
    num_entities = len(sorted_scores)
    num_rows = max(SORTED_PAIRS // max(num_entities, 1), 1)
    for row in range(0, num_entities - 1, num_rows):
        limit = threshold() / _ROUNDING
        if sorted_scores[row] * sorted_scores[row + 1] < limit:
            return  # no later pair has a larger bound
        pairs, bounds = _sorted_pairs(sorted_scores, sorted_boxes, row, num_rows)
        ascending = -bounds  # the order that searchsorted needs
        start = 0
        while start < (end := np.searchsorted(ascending, -limit, side="right")):
            num_equal = np.searchsorted(ascending, ascending[start], side="right") - start
            stop = min(start + min(max(size, num_equal), max_size), end)
            unordered = torch.from_numpy(best_first[pairs[start:stop]])
            both_orders = torch.stack([unordered, unordered.flip(1)], dim=1).view(-1, 2)
            for ordered in both_orders.split(chunk):
                yield ordered[:, 0], ordered[:, 1]
            start, size = stop, min(math.ceil(GROWTH * size), max_size)
            limit = threshold() / _ROUNDING


def _sorted_pairs(
    scores: np.ndarray, boxes: np.ndarray | None, row: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sort the pairs i < j with ``row <= i < row + num_rows`` by ``scores[i] * scores[j]``.

    Args:
        scores: (R,) float64, descending. Products of two values that were float32 are exact.
        boxes: (R, 4) to leave out pairs whose boxes do not overlap; None takes all pairs.
        row, num_rows: range of i.

    Returns:
        (P, 2) int64 pairs and (P,) products in descending order.
    """
    num_left = len(scores) - row
    first, second = np.triu_indices(min(num_rows, num_left), 1, num_left)
    first, second = first + row, second + row
    if boxes is not None:
        overlapping = boxes_overlap(boxes[first], boxes[second])
        first, second = first[overlapping], second[overlapping]
    bounds = scores[first] * scores[second]
    order = np.argsort(-bounds, kind="stable")
    return np.stack([first[order], second[order]], axis=1), bounds[order]


def best_of_chunks(
    chunks: Iterator[tuple[Tensor, Tensor]],
    best: TopTriplets,
    score_pairs: ScorePairs,
    scores: Tensor,
    image_size: tuple[int, int],
) -> tuple[Instances, int]:
    """Score pairs chunk by chunk and keep the best triplets.

    Args:
        chunks: (P,) subjects and (P,) objects each; no pair may occur twice.
        best: collects the triplets.
        score_pairs: called once per chunk.
        scores: (R,) float32 of the entities.
        image_size: (height, width).

    Returns:
        The relations, see :func:`reldn_d2.structures.relations.predicted_relations`, and the number
        of pairs that were scored.
    """
    device, num_entities, num_scored = scores.device, len(scores), 0
    no_pair = torch.zeros(0, dtype=torch.int64, device=device)
    best.update(scores.new_zeros((0, best.num_predicates)), scores.new_zeros(0), no_pair)
    for subjects, objects in chunks:
        subjects, objects = subjects.to(device), objects.to(device)
        # Rounding can push a softmax above 1, and then a score above the pair's bound.
        probabilities = score_pairs(subjects, objects).clamp(max=1.0)
        pair_scores = scores[subjects] * scores[objects]
        best.update(probabilities, pair_scores, subjects * num_entities + objects)
        num_scored += len(subjects)
    return best.relations(num_entities, image_size), num_scored


def best_triplets(
    score_pairs: ScorePairs,
    scores: Tensor,
    boxes: Tensor | None,
    image_size: tuple[int, int],
    *,
    num_predicates: int,
    predicates_per_pair: Sequence[int | None],
    topk: int,
    chunk: int,
    shortlist: Tensor | None = None,
) -> tuple[Instances, int]:
    """Find the exact best triplets of an image, scoring only the pairs that can contribute.

    The result equals that of scoring every pair, ties included, as long as no value is NaN. The
    memory is that of one chunk and of ``SORTED_PAIRS``. The device is synchronized once per chunk.

    Args:
        score_pairs: the costly part, called once per chunk.
        scores: (R,) of the entities.
        boxes: (R, 4) to leave out pairs whose boxes do not overlap; None takes all pairs.
        image_size: (height, width).
        num_predicates: C.
        predicates_per_pair, topk: see :class:`TopTriplets`.
        chunk: max pairs scored at once.
        shortlist: (P, 2) int64, the only pairs to score, each once; None takes all pairs.

    Returns:
        The relations, best first, and the number of pairs that were scored.
    """
    scores = scores.float()
    best = TopTriplets(predicates_per_pair, topk, num_predicates)
    if shortlist is not None:
        chunks = ((x[:, 0], x[:, 1]) for x in shortlist.split(chunk))
        return best_of_chunks(chunks, best, score_pairs, scores, image_size)
    chunks = pairs_by_bound(
        scores.detach().cpu(),
        None if boxes is None else boxes.detach().cpu(),
        chunk,
        threshold=best.threshold,
    )
    return best_of_chunks(chunks, best, score_pairs, scores, image_size)


def check_options(
    predicates_per_pair: tuple[int | None, ...],
    pair_chunk: int,
    max_visual_pairs: int,
    entity_score_exponent: float,
) -> None:
    """Raise a ValueError that names the config key of an invalid option."""
    if len(predicates_per_pair) == 0 or any(k is not None and k < 1 for k in predicates_per_pair):
        raise ValueError(
            f"TEST.RELATIONS.PREDICATES_PER_PAIR is {list(predicates_per_pair)}; expected at least "
            "one limit, each 1 or more, or None for no limit."
        )
    for key, value in (("PAIR_CHUNK", pair_chunk), ("MAX_VISUAL_PAIRS", max_visual_pairs)):
        if value < 1:
            raise ValueError(f"TEST.RELATIONS.{key} is {value}; expected 1 or more pairs.")
    if not 0 <= entity_score_exponent < math.inf:
        raise ValueError(
            f"TEST.RELATIONS.ENTITY_SCORE_EXPONENT is {entity_score_exponent}; expected a finite "
            "number of 0 or more."
        )
