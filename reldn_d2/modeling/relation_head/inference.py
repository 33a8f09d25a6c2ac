"""Ranking of triplets at test time (section 5).

Shapes: P pairs, C predicates, K kept triplets.
"""

from typing import List, Tuple

import torch
from torch import Tensor

__all__ = ["rank_triplets"]


def rank_triplets(
    predicate_probabilities: Tensor,
    pair_scores: Tensor,
    predicates_per_pair: List[int],
    topk: int,
) -> Tuple[Tensor, Tensor, Tensor]:
    """The best triplets by ``p_det(s) * p(pred | s, o) * p_det(o)``.

    Args:
        predicate_probabilities: (P, C), without "no relationship".
        pair_scores: (P,), ``p_det(s) * p_det(o)``.
        predicates_per_pair: for each value k the exact ``topk`` best triplets are kept among those
            whose predicate is one of the k best of its pair; 0 stands for all predicates.
        topk: how many for each k.

    Returns:
        (K,) pair index, (K,) predicate and (K,) score, in descending order of the score.
    """
    num_pairs, num_predicates = predicate_probabilities.shape
    scores = (predicate_probabilities * pair_scores[:, None]).flatten()
    kept = torch.zeros_like(scores, dtype=torch.bool)
    if num_pairs:
        best_first = predicate_probabilities.argsort(dim=1, descending=True, stable=True)
        rank = best_first.argsort(dim=1).flatten()
        for k in predicates_per_pair:
            allowed = scores if k == 0 else scores.masked_fill(rank >= k, -1.0)
            best, index = allowed.topk(min(topk, len(allowed)))
            kept[index[~(best < 0)]] = True
    chosen = kept.nonzero().squeeze(1)
    chosen = chosen[scores[chosen].argsort(descending=True, stable=True)]
    pairs = torch.div(chosen, num_predicates, rounding_mode="floor")
    return pairs, chosen % num_predicates, scores[chosen]
