"""What every protocol is given, and what it gives back."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .batches import RelationTable
from .per_predicate import PredicateTable

__all__ = ["Results", "Scores", "Settings", "task_name"]

Results = dict[str, dict[str, float]]


def task_name(rule: str, task: str, predicates_per_pair: int) -> str:
    """Key of a block of results: ``lu2016_sgdet_k10``; without limit k, ``relations_prdcls``."""
    return f"{rule}_{task}" + (f"_k{predicates_per_pair}" if predicates_per_pair else "")


@dataclass(frozen=True)
class Settings:
    """What is scored, and how; the same for all protocols."""

    predicate_names: Sequence[str]
    task: str = "sgdet"
    predicates_per_pair: tuple[int, ...] = (0,)  # each k has results of its own; 0: all
    topk: tuple[int, ...] = (20, 50, 100)  # the n of R@n
    max_triplets: int = 100  # an image's triplets in average precision; 0: all
    seen_triplets: np.ndarray | None = None  # (T, 3) labels in the training set, if known
    training_counts: np.ndarray | None = None  # (P,) relations of it, if known

    @property
    def num_predicates(self) -> int:
        """P."""
        return len(self.predicate_names)

    def unseen(self, labels: np.ndarray) -> np.ndarray | None:
        """(M,) bool, whether the training set lacks these (M, 3) labels; None: it is not known."""
        if self.seen_triplets is None:
            return None
        both = np.concatenate([self.seen_triplets, labels]).astype(np.int64)
        _, codes = np.unique(both, axis=0, return_inverse=True)
        codes = codes.reshape(-1)
        count = len(self.seen_triplets)
        return ~np.isin(codes[count:], codes[:count])


@dataclass
class Scores:
    """Results, and for each of their blocks the predicates one by one."""

    results: Results = field(default_factory=OrderedDict)
    predicates: dict[str, PredicateTable] = field(default_factory=OrderedDict)

    def add_predicates(
        self,
        task: str,
        truth: RelationTable,
        settings: Settings,
        recall: np.ndarray,
        precision: np.ndarray,
    ) -> None:
        """Keep (P,) recall at the largest n and (P,) average precision for the block ``task``."""
        self.predicates[task] = PredicateTable(
            names=tuple(settings.predicate_names),
            counts=np.bincount(truth.predicates, minlength=settings.num_predicates),
            training_counts=settings.training_counts,
            recall=recall,
            recall_at=max(settings.topk, default=0),
            average_precision=precision,
        )
