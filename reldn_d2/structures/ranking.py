"""Rank triplets and limit the predicates per pair: pure functions on numpy arrays.

Shapes: K triplets of one image.
"""

import numpy as np

__all__ = ["limit_predicates_per_pair", "rank_by_score", "rank_in_group"]


def rank_by_score(scores: np.ndarray) -> np.ndarray:
    """Return indices that sort ``scores`` in descending order; equal scores keep their order."""
    return np.argsort(-scores, kind="stable")


def rank_in_group(codes: np.ndarray) -> np.ndarray:
    """Return (K,) how many earlier elements have the same code, for each of (K,) integer codes.

    For example, [7, 5, 7, 7] gives [0, 0, 1, 2].
    """
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    is_first = np.ones(len(codes), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_first)
    rank = np.empty(len(codes), dtype=np.int64)
    rank[order] = np.arange(len(codes)) - starts[np.cumsum(is_first) - 1]
    return rank


def limit_predicates_per_pair(pairs: np.ndarray, limit: int | None) -> np.ndarray:
    """Select the first ``limit`` rows of every pair.

    Args:
        pairs: (K, 2) subject and object indices, in descending order of their triplets' scores.
        limit: predicates that a pair may have (k); None means no limit, and so does 0, which stood
            for it in files and settings written before.

    Returns:
        (K,) bool, True for the rows that stay.
    """
    if not limit or len(pairs) == 0:
        return np.ones(len(pairs), dtype=bool)
    codes = pairs[:, 0].astype(np.int64) * (int(pairs.max()) + 1) + pairs[:, 1]
    return rank_in_group(codes) < limit
