"""The best triplets of an image at test time (section 5), without computing every pair.

A triplet scores ``p_det(s) * p(pred | s, o) * p_det(o)``, so no triplet of a pair scores more than
the pair's bound ``p_det(s) * p_det(o)``. Pairs are visited in descending order of this bound; once
the worst of the best triplets found beats the bound of the pairs that remain, none of these can
come in, and their union boxes are never pooled.

(s, o) and (o, s) have one bound and one union box: they are visited together, the box is pooled
once. No tighter bound is used: what the semantic and the spatial module say of a pair bounds
nothing as long as the logits of its union box are not known.

Shapes: R entities of one image, P pairs, C predicates, K kept triplets.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "RankedTriplets",
    "TopTriplets",
    "best_of_chunks",
    "best_triplets",
    "exhaustive_triplets",
    "pairs_by_bound",
]

FIRST_CHUNK, GROWTH = 256, 1.5  # pairs, and the factor from chunk to chunk up to the limit
# The bound is worked out in float64, a score rounds in float32: never trust the last bits.
_ROUNDING = 1.0 + 2.0**-20
_SMALLEST = 2.0**-126  # below it float32 has fewer digits, and the above does not hold

ScorePairs = Callable[[Tensor, Tensor], Tensor]
"""From (P,) subjects and (P,) objects to the (P, C) probabilities of their predicates."""


@dataclass
class RankedTriplets:
    """K triplets in descending order of score; equal ones by subject, object and predicate.

    Attributes:
        pairs: (K, 2) int64, subject and object.
        predicates: (K,) int64.
        scores: (K,), ``p_det(s) * p(pred | s, o) * p_det(o)``.
        predicate_scores: (K,), ``p(pred | s, o)``.
        num_scored: of how many pairs the predicates were computed.
    """

    pairs: Tensor
    predicates: Tensor
    scores: Tensor
    predicate_scores: Tensor
    num_scored: int


class TopTriplets:
    """For each number k of predicates a pair, the K best triplets among the pairs seen so far."""

    def __init__(self, predicates_per_pair: Sequence[int], topk: int, num_predicates: int):
        """
        Args:
            predicates_per_pair: for each value k the exact ``topk`` best triplets are kept among
                those whose predicate is one of the k best of its pair; 0 stands for all predicates.
            topk: K.
            num_predicates: C.
        """
        # Numbers of predicates beyond C ask for the same triplets as all of them.
        self.ks = sorted({min(k or num_predicates, num_predicates) for k in predicates_per_pair})
        self.topk = topk
        self.num_predicates = num_predicates
        self._best: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def update(self, probabilities: Tensor, pair_scores: Tensor, pair_numbers: Tensor) -> None:
        """Take in P further pairs.

        Args:
            probabilities: (P, C), without "no relationship".
            pair_scores: (P,), ``p_det(s) * p_det(o)``.
            pair_numbers: (P,) int64, different for different pairs; ties go to the smaller one.
        """
        best_first = None
        for k in self.ks:
            if k == self.num_predicates:
                predicates = torch.arange(k, device=probabilities.device).expand_as(probabilities)
                of_pair = probabilities
            else:
                if best_first is None:
                    best_first = probabilities.argsort(dim=1, descending=True, stable=True)
                predicates = best_first[:, :k]
                of_pair = probabilities.gather(1, predicates)
            scores = of_pair * pair_scores[:, None]
            keys = pair_numbers[:, None] * self.num_predicates + predicates
            self._merge(k, scores.flatten(), keys.flatten(), of_pair.flatten())

    def _merge(self, k: int, scores: Tensor, keys: Tensor, probabilities: Tensor) -> None:
        """Keep the best of the new triplets and the old; NaN, which compares to nothing, stays."""
        found = (scores, keys, probabilities)
        least = self._least(k)
        if least is None and len(scores) > self.topk > 0:
            least = scores.topk(self.topk).values[-1]
        if least is not None:  # few are left to be sorted
            able = ~(scores < least)
            found = tuple(x[able] for x in found)
        if k in self._best:
            found = tuple(torch.cat(pair) for pair in zip(self._best[k], found))
        scores, keys, probabilities = found
        order = keys.argsort()
        order = order[scores[order].argsort(descending=True, stable=True)][: self.topk]
        self._best[k] = (scores[order], keys[order], probabilities[order])

    def _least(self, k: int) -> Tensor | None:
        """The score that a further triplet has to reach; None as long as any is welcome."""
        if k not in self._best or len(self._best[k][0]) < self.topk:
            return None
        return self._best[k][0][-1] if self.topk else None

    def threshold(self) -> float:
        """The score below which a further triplet changes nothing, whichever k; 0 if there is none.

        This fetches a number from the device.
        """
        if self.topk == 0:
            return float("inf")
        least = [self._least(k) for k in self.ks]
        if not least or any(x is None for x in least):
            return 0.0
        lowest = float(torch.stack(least).min())
        return lowest if lowest >= _SMALLEST else 0.0  # not if it is NaN

    def result(self, num_entities: int, num_scored: int) -> RankedTriplets:
        """The triplets of all k together, their pairs numbered ``subject * R + object``."""
        scores, keys, probabilities = (torch.cat(x) for x in zip(*self._best.values()))
        order = keys.argsort()
        keys = keys[order]
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        order, keys = order[first], keys[first]
        best_first = scores[order].argsort(descending=True, stable=True)
        order, keys = order[best_first], keys[best_first]
        numbers = torch.div(keys, self.num_predicates, rounding_mode="floor")
        subjects = torch.div(numbers, max(num_entities, 1), rounding_mode="floor")
        pairs = torch.stack([subjects, numbers - subjects * num_entities], dim=1)
        predicates = keys - numbers * self.num_predicates
        return RankedTriplets(pairs, predicates, scores[order], probabilities[order], num_scored)


class _Bands:
    """All pairs i < j of R descending scores, cut into bands of descending products.

    The memory is that of R numbers.
    """

    def __init__(self, scores: np.ndarray):
        """
        Args:
            scores: (R,) float64 in descending order, not negative. Products of two numbers that
                were float32 are exact in it.
        """
        self.scores = scores
        self.done = np.arange(1, len(scores) + 1)  # where each first's next band begins
        self.low = float("inf")  # no remaining pair's product is above it

    def _reach(self, low: float) -> np.ndarray:
        """(R,) where the seconds end whose product with each first is ``low`` or more."""
        if low <= 0:
            return np.full(len(self.scores), len(self.scores))
        with np.errstate(divide="ignore"):
            needed = low / self.scores
        # Both steps are monotonous in ``low``, so each pair falls into one band, whatever rounds.
        return np.maximum(np.searchsorted(-self.scores, -needed, side="right"), self.done)

    def next(self, number: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
        """Of each first, the range of seconds in the next band: begin (R,), end (R,).

        Args:
            number: pairs in the band at most. It has more only where equal products are more; then
                it has nothing but these.
            floor: leave out pairs whose product is below; all are left out from then on.
        """
        start, done = self.done, self.done.sum()
        if self.low == float("inf"):
            self.low = float(self.scores[0] ** 2)
        low, end = floor, self._reach(floor)
        if end.sum() - done > number:
            # Bisect, in steps of equal ratio, between too many pairs and too few.
            many, few = max(low, 1e-12 * self.low), self.low
            for _ in range(40):
                middle = float(np.sqrt(many * few))
                count = self._reach(middle).sum() - done
                if count > number:
                    many = middle
                    continue
                few = middle
                if count > number // 2:
                    break
            low, end = few, self._reach(few)
            if end.sum() == done:  # none but equal products, or ones far below all so far
                low, end = many, self._reach(many)
        self.low, self.done = low, end
        return start, end


def pairs_by_bound(
    scores: Tensor,
    boxes: Tensor | None,
    chunk: int,
    floor: Callable[[], float] = lambda: 0.0,
    first_chunk: int = FIRST_CHUNK,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ordered pairs (i, j), i != j, in chunks, roughly in descending order of ``p(i) * p(j)``.

    (i, j) and (j, i) come in one chunk, unless chunks have one pair. Nothing of size R x R is
    made: the memory is that of R numbers and of a chunk.

    Args:
        scores: (R,) float32 on the CPU.
        boxes: (R, 4) on the CPU to leave out pairs whose boxes do not overlap; None takes all.
        chunk: most pairs at once.
        floor: asked before each band of pairs; those whose product is certainly below it are left
            out.
        first_chunk: pairs of the first chunk at most; the next are ``GROWTH`` times as large. More
            pairs of equal products than that are visited in whole chunks, for no triplet of theirs
            can end the visit.

    Yields:
        (P,) subjects and (P,) objects, int64, P > 0.
    """
    values = np.abs(np.nan_to_num(scores.double().numpy(), nan=1.0)).clip(max=1e30)
    order = np.argsort(-values, kind="stable")
    bands = _Bands(values[order])
    size, found, looked_at = min(first_chunk, chunk), 0, 0
    while len(values) and bands.low > 0:
        limit = floor() / _ROUNDING
        if limit >= bands.low:
            return
        share = max(found / looked_at, 1 / 16) if looked_at else 1.0
        wanted = int(max(size // 2, 1) / share)  # each pair comes in both orders
        start, end = bands.next(wanted, limit)
        ends = (end - start).cumsum()
        if ends[-1] > wanted:
            wanted = int(max(chunk // 2, 1) / share)
        for begin in range(0, int(ends[-1]), wanted):
            number = np.arange(begin, min(begin + wanted, int(ends[-1])))
            first = np.searchsorted(ends, number, side="right")
            second = end[first] - (ends[first] - number)
            pairs = torch.from_numpy(np.stack([order[first], order[second]], axis=1))
            if boxes is not None:
                pairs = pairs[_overlap(boxes[pairs[:, 0]], boxes[pairs[:, 1]])]
            found, looked_at = found + len(pairs), looked_at + len(number)
            for part in pairs.split(max(chunk // 2, 1)):
                both = torch.stack([part, part.flip(1)], dim=1).reshape(-1, 2)
                for ordered in both.split(chunk):
                    if len(ordered):
                        yield ordered[:, 0], ordered[:, 1]
        size = min(math.ceil(GROWTH * size), chunk)


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """(P,) bool: two (P, 4) boxes have an area in common."""
    low = torch.maximum(first[:, :2], second[:, :2])
    high = torch.minimum(first[:, 2:], second[:, 2:])
    return ((high - low).clamp(min=0).prod(dim=1)) > 0


def best_of_chunks(
    chunks: Iterator[tuple[Tensor, Tensor]],
    best: TopTriplets,
    score_pairs: ScorePairs,
    scores: Tensor,
) -> RankedTriplets:
    """Score chunks of pairs, one after the other, and keep the best triplets.

    Args:
        chunks: (P,) subjects and (P,) objects each; no pair comes twice.
        best: takes the triplets in.
        score_pairs: called for chunk after chunk.
        scores: (R,) float32 of the entities.
    """
    device, num_entities, num_scored = scores.device, len(scores), 0
    nothing = scores.new_zeros(0)
    best.update(
        nothing.reshape(0, best.num_predicates),
        nothing,
        torch.zeros(0, dtype=torch.int64, device=device),
    )
    for subjects, objects in chunks:
        subjects, objects = subjects.to(device), objects.to(device)
        # Softmax may exceed 1 by a rounding; the bound counts on that it does not.
        probabilities = score_pairs(subjects, objects).clamp(max=1.0)
        pair_scores = scores[subjects] * scores[objects]
        best.update(probabilities, pair_scores, subjects * num_entities + objects)
        num_scored += len(subjects)
    return best.result(num_entities, num_scored)


def best_triplets(
    score_pairs: ScorePairs,
    scores: Tensor,
    boxes: Tensor | None,
    *,
    num_predicates: int,
    predicates_per_pair: Sequence[int],
    topk: int,
    chunk: int,
) -> RankedTriplets:
    """The exact best triplets of an image, computing only the pairs that can take part.

    The result equals that of :func:`exhaustive_triplets`, ties included, as long as no number is
    NaN; the memory is that of a chunk. There is one synchronisation with the device a chunk.

    Args:
        score_pairs: the costly part, called for chunk after chunk.
        scores: (R,) of the entities.
        boxes: (R, 4) to leave out pairs whose boxes do not overlap; None takes all pairs.
        num_predicates: C.
        predicates_per_pair, topk: see :class:`TopTriplets`.
        chunk: most pairs scored at once.
    """
    scores = scores.float()
    best = TopTriplets(predicates_per_pair, topk, num_predicates)
    chunks = pairs_by_bound(
        scores.detach().cpu(),
        None if boxes is None else boxes.detach().cpu(),
        chunk,
        floor=best.threshold,
    )
    return best_of_chunks(chunks, best, score_pairs, scores)


def exhaustive_triplets(
    score_pairs: ScorePairs,
    scores: Tensor,
    boxes: Tensor | None,
    *,
    num_predicates: int,
    predicates_per_pair: Sequence[int],
    topk: int,
    chunk: int,
) -> RankedTriplets:
    """As :func:`best_triplets`, computing every pair in the order of its number."""
    scores = scores.float()
    device, num_entities = scores.device, len(scores)
    candidates = ~torch.eye(num_entities, dtype=torch.bool, device=device)
    subjects, objects = candidates.nonzero(as_tuple=True)
    if boxes is not None:
        overlapping = _overlap(boxes[subjects], boxes[objects])
        subjects, objects = subjects[overlapping], objects[overlapping]
    best = TopTriplets(predicates_per_pair, topk, num_predicates)
    chunks = (x for x in zip(subjects.split(chunk), objects.split(chunk)) if len(x[0]))
    return best_of_chunks(chunks, best, score_pairs, scores)
