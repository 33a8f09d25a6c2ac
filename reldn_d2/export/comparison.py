"""Comparison of an exported file's outputs with the eager model's.

Another library rounds differently, so entities or triplets whose scores are equal but for rounding
may change places. That is no error; everything else is.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

__all__ = ["Comparison", "compare_outputs"]

SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE = 0.05  # pixels
_EQUAL = 1e-5  # relative difference of scores that count as equal

Outputs = Mapping[str, np.ndarray]


class Comparison(NamedTuple):
    """What differs.

    Attributes:
        problem: one sentence; None if the outputs are the same.
        difference: largest difference of any score.
        exchanged: number of triplets that were replaced by others with equal scores.
    """

    problem: str | None
    difference: float = 0.0
    exchanged: int = 0


def compare_outputs(expected: Outputs, found: Outputs) -> Comparison:
    """Compare the outputs for one image, by name.

    Args:
        expected: of the eager model: ``pairs`` (K, 2), ``predicates`` (K,), ``scores`` (K,), and
            of a detector ``boxes`` (R, 4), ``classes`` (R,), ``box_scores`` (R,).
        found: of the file.
    """
    same = {}  # entity of the file: entity of the eager model
    difference = 0.0
    if "boxes" in expected:
        if len(found["boxes"]) != len(expected["boxes"]):
            counts = len(found["boxes"]), len(expected["boxes"])
            return Comparison("it finds %d entities, the eager model %d" % counts)
        for i in range(len(found["boxes"])):
            candidates = np.flatnonzero(
                (np.abs(expected["boxes"] - found["boxes"][i]).max(axis=1) <= BOX_TOLERANCE)
                & (expected["classes"] == found["classes"][i])
            )
            free = [int(j) for j in candidates if j not in same.values()]
            if not free:
                box = np.round(found["boxes"][i], 1).tolist()
                return Comparison(f"the eager model finds no entity like {i}, {box}")
            same[i] = min(free, key=lambda j: abs(j - i))
            score = expected["box_scores"][same[i]]
            difference = max(difference, float(abs(score - found["box_scores"][i])))
    if len(found["pairs"]) != len(expected["pairs"]):
        counts = len(found["pairs"]), len(expected["pairs"])
        return Comparison("it finds %d relations, the eager model %d" % counts)
    theirs = _triplets(expected, {})
    ours = _triplets(found, same)
    difference = max([difference, *(abs(ours[x] - theirs[x]) for x in ours.keys() & theirs.keys())])
    if difference > SCORE_TOLERANCE:
        return Comparison(f"a score differs by {difference:.1e} from the eager model's", difference)
    new = sorted(ours[x] for x in ours.keys() - theirs.keys())
    missing = sorted(theirs[x] for x in theirs.keys() - ours.keys())
    limit = _EQUAL * max(theirs.values(), default=0.0)
    if any(abs(a - b) > limit for a, b in zip(new, missing)):
        problem = f"{len(new)} of {len(ours)} triplets are not among the eager model's"
        return Comparison(problem, difference)
    return Comparison(None, difference, len(new))


def _triplets(outputs: Outputs, same: dict[int, int]) -> dict[tuple[int, int, int], float]:
    """Return the score of each (subject, predicate, object), with entities renumbered."""
    pairs, predicates = outputs["pairs"].tolist(), outputs["predicates"].tolist()
    return {
        (same.get(s, s), predicate, same.get(o, o)): score
        for (s, o), predicate, score in zip(pairs, predicates, outputs["scores"].tolist())
    }
