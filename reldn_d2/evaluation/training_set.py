"""The triplets of the training set and their frequencies, as an evaluation needs them."""

import logging
from typing import Any, NamedTuple

import numpy as np

from detectron2.data import DatasetCatalog

from ..data.datasets.catalog import dataset_names
from ..data.statistics import RelationStatistics, dataset_statistics

__all__ = ["TrainingTriplets", "training_triplets"]

logger = logging.getLogger(__name__)
_cached: dict[str, tuple[Any, RelationStatistics]] = {}


class TrainingTriplets(NamedTuple):
    """Distinct triplets of a dataset, and the relations of each predicate."""

    labels: np.ndarray  # (T, 3) subject class, predicate, object class
    counts: np.ndarray  # (P,)


def training_triplets(train_dataset: str, dataset_name: str) -> TrainingTriplets | None:
    """Return the triplets of a training set; warn and return None if they cannot be used.

    Args:
        train_dataset: name of the training set. Its statistics stay in memory as long as it stays
            registered.
        dataset_name: the dataset that is evaluated; the result has its ids. Names that either
            metadata lacks are not compared.
    """
    try:
        if train_dataset not in DatasetCatalog:
            raise ValueError("It is not registered.")
        version = (DatasetCatalog.data[train_dataset], dataset_names(train_dataset))
        if train_dataset not in _cached or _cached[train_dataset][0] != version:
            _cached[train_dataset] = (version, dataset_statistics(train_dataset))
        statistics = _cached[train_dataset][1].in_order_of(
            dataset_names(dataset_name), f"dataset '{train_dataset}'", f"dataset '{dataset_name}'"
        )
    except (OSError, ValueError) as error:  # optional: a failure here does not abort the evaluation
        logger.warning(
            "The training set '%s' cannot be used: zero-shot recall and the predicates' "
            "frequencies in training are left out. (%s)",
            train_dataset,
            error,
        )
        return None
    labels = np.array(sorted(statistics.triplets), dtype=np.int64).reshape(-1, 3)
    return TrainingTriplets(labels, statistics.predicate_counts)
