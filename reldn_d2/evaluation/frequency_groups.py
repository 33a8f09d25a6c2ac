"""Head, body and tail: the predicates of a dataset by their frequency. P predicates."""

from collections.abc import Sequence

import numpy as np

__all__ = ["GROUPS", "by_frequency", "check_thresholds", "frequency_groups"]

GROUPS = ("head", "body", "tail")  # the most frequent first


def by_frequency(counts: np.ndarray, training_counts: np.ndarray | None) -> np.ndarray:
    """Return (P,) predicate ids, the most frequent first, equal ones by id.

    Args:
        counts: (P,) relations of the ground truth.
        training_counts: (P,) relations of the training set, which decide if they are known.
    """
    return np.argsort(-(counts if training_counts is None else training_counts), kind="stable")


def frequency_groups(
    counts: np.ndarray, training_counts: np.ndarray | None, thresholds: Sequence[int] = ()
) -> dict[str, list[int]] | None:
    """Return the ids of the predicates that the ground truth has, for each of :data:`GROUPS`.

    Args:
        counts, training_counts: see :func:`by_frequency`.
        thresholds: two numbers of relations in the training set: a predicate with at least the
            first belongs to the head, one with fewer than the second to the tail. Empty: thirds of
            the predicates that the ground truth has; if their number is not divisible by 3, the
            head and then the body have one more.

    Returns:
        None if there are thresholds, but the frequencies in training are unknown.
    """
    present = np.array([p for p in by_frequency(counts, training_counts) if counts[p]], np.int64)
    if not thresholds:
        return {name: x.tolist() for name, x in zip(GROUPS, np.array_split(present, 3))}
    if training_counts is None:
        return None
    high, low = thresholds
    frequency = training_counts[present]
    of_head, of_tail = frequency >= high, frequency < low
    masks = (of_head, ~of_head & ~of_tail, of_tail)
    return {name: present[mask].tolist() for name, mask in zip(GROUPS, masks)}


def check_thresholds(thresholds: Sequence[int], has_training_set: bool, dataset_name: str) -> None:
    """Raise if the limits between head, body and tail cannot be used.

    Args:
        thresholds: see :func:`frequency_groups`.
        has_training_set: whether the dataset's metadata names its training set.
        dataset_name: the dataset that is evaluated.

    Raises:
        ValueError: says what to set.
    """
    if not thresholds:
        return
    whole = all(isinstance(x, int) for x in thresholds)
    if len(thresholds) != 2 or not whole or not thresholds[0] > thresholds[1] > 0:
        raise ValueError(
            f"TEST.RELATIONS.GROUP_THRESHOLDS is {list(thresholds)}; expected two descending "
            "numbers of training relations, such as [10000, 500] (head from the first on, tail "
            "below the second), or none for thirds."
        )
    if not has_training_set:
        raise ValueError(
            "TEST.RELATIONS.GROUP_THRESHOLDS counts relations of the training set, but the "
            f"metadata of '{dataset_name}' names no train_dataset. Set it "
            f'(MetadataCatalog.get("{dataset_name}").train_dataset = "..."; on the command line '
            "of tools/evaluate_relations.py --train-dataset), or leave the thresholds out."
        )
