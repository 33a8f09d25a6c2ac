"""Comparison of an exported file's outputs with the eager model's.

Another library rounds differently, so entities or triplets whose scores are equal but for rounding
may change places, and at the end of the list one such triplet may replace another. That is no
error; everything else is.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

__all__ = ["Comparison", "compare_outputs"]

SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE = 0.05  # pixels
_EQUAL = 1e-5  # relative difference of scores that count as equal

Outputs = Mapping[str, np.ndarray]
Triplet = tuple[int, int, int]


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
        expected: of the eager model: ``pairs`` (K, 2), ``predicates`` (K,), ``scores`` (K,),
            ``predicate_scores`` (K,), and of a detector ``boxes`` (R, 4), ``classes`` (R,),
            ``box_scores`` (R,).
        found: of the file.
    """
    for name, values in expected.items():
        if found[name].shape != values.shape:
            shapes = f"{found[name].shape}, the eager model's {values.shape}"
            return Comparison(f"its {name} have the shape {shapes}")
        # NaN would pass below, because no comparison with it is true.
        if not (np.isfinite(found[name]).all() and np.isfinite(values).all()):
            return Comparison(f"its {name} or the eager model's are not all finite")
    same = {}  # entity of the file: entity of the eager model
    differences = [0.0]
    for i in range(len(found.get("boxes", ()))):
        candidates = np.flatnonzero(
            (np.abs(expected["boxes"] - found["boxes"][i]).max(axis=1) <= BOX_TOLERANCE)
            & (expected["classes"] == found["classes"][i])
        )
        free = [int(j) for j in candidates if j not in same.values()]
        if not free:
            box = np.round(found["boxes"][i], 1).tolist()
            return Comparison(f"the eager model finds no entity like {i}, {box}")
        same[i] = min(free, key=lambda j: abs(j - i))
        differences.append(abs(expected["box_scores"][same[i]] - found["box_scores"][i]))
    if (np.diff(found["scores"]) > 0).any():
        return Comparison("its scores are not in descending order")
    theirs = _triplets(expected, {})
    ours = _triplets(found, same)
    if len(ours) < len(theirs):
        return Comparison(f"it finds {len(ours)} different triplets, the eager model {len(theirs)}")
    shared = ours.keys() & theirs.keys()
    differences += [np.abs(ours[x] - theirs[x]).max() for x in shared]
    difference = float(max(differences))
    if difference > SCORE_TOLERANCE:
        return Comparison(f"a score differs by {difference:.1e} from the eager model's", difference)
    # Triplets that tie for the last place may replace each other, because rounding decides which of
    # them are within the limit. The eager model's scores of all others are unknown.
    scores = expected["scores"]
    new = [ours[x][0] for x in ours.keys() - shared]
    missing = [theirs[x][0] for x in theirs.keys() - shared]
    if any(abs(x - scores[-1]) > _EQUAL * scores[0] for x in new + missing):
        problem = f"{len(new)} of {len(ours)} triplets are not among the eager model's"
        return Comparison(problem, difference)
    return Comparison(None, difference, len(new))


def _triplets(outputs: Outputs, same: dict[int, int]) -> dict[Triplet, np.ndarray]:
    """Return both scores of each (subject, predicate, object), with entities renumbered."""
    scores = np.stack([outputs["scores"], outputs["predicate_scores"]], axis=1)
    return {
        (same.get(s, s), predicate, same.get(o, o)): score
        for (s, o), predicate, score in zip(
            outputs["pairs"].tolist(), outputs["predicates"].tolist(), scores
        )
    }
