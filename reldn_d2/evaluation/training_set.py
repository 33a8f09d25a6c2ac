"""The triplets of the training set and their frequencies, as an evaluation needs them."""

import logging
from typing import Any, NamedTuple

import numpy as np

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ..data.statistics import dataset_statistics

__all__ = ["TrainingTriplets", "same_names", "training_triplets"]

logger = logging.getLogger(__name__)
_cached: dict[str, tuple[Any, "TrainingTriplets"]] = {}


class TrainingTriplets(NamedTuple):
    """Distinct triplets of a data set, and the relations of each predicate."""

    labels: np.ndarray  # (T, 3) subject class, predicate, object class
    counts: np.ndarray  # (P,)


def same_names(metadata: Metadata, train_dataset: str) -> bool:
    """Return whether two data sets have the same classes and predicates; warn if not.

    Args:
        metadata: metadata of the data set that is evaluated.
        train_dataset: name of the training set; names that its metadata lacks are not compared.
    """
    if train_dataset not in DatasetCatalog:
        return True  # training_triplets warns about that
    for key in ("thing_classes", "predicate_classes"):
        own, other = (m.get(key, None) for m in (metadata, MetadataCatalog.get(train_dataset)))
        if own is not None and other is not None and list(own) != list(other):
            logger.warning(
                "The training set '%s' has other %s than '%s': zero-shot recall and the "
                "predicates' frequencies in training are left out.",
                train_dataset,
                key,
                metadata.name,
            )
            return False
    return True


def training_triplets(dataset_name: str) -> TrainingTriplets | None:
    """Return the triplets of a registered training set; warn and return None if unreadable.

    They are cached as long as the data set stays registered.
    """
    if dataset_name not in DatasetCatalog:
        logger.warning(
            "The training set '%s' is not registered: zero-shot recall and the predicates' "
            "frequencies in training are left out.",
            dataset_name,
        )
        return None
    loader = DatasetCatalog.data[dataset_name]
    if dataset_name in _cached and _cached[dataset_name][0] is loader:
        return _cached[dataset_name][1]
    try:
        statistics = dataset_statistics(dataset_name)
    except (OSError, ValueError) as error:  # optional: a failure here does not abort the evaluation
        logger.warning(
            "The training set '%s' cannot be read: zero-shot recall and the predicates' "
            "frequencies in training are left out. (%s)",
            dataset_name,
            error,
        )
        return None
    labels = np.array(sorted(statistics.triplets), dtype=np.int64).reshape(-1, 3)
    result = TrainingTriplets(labels, statistics.predicate_counts)
    _cached[dataset_name] = (loader, result)
    return result
