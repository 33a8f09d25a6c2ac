"""What an evaluation has to know of the training set: its triplets, and how frequent they are."""

import logging
from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy as np

from detectron2.data import DatasetCatalog

from .records import load_ground_truth

__all__ = ["TrainingTriplets", "training_triplets"]

logger = logging.getLogger(__name__)
_known: Dict[str, Tuple[Any, "TrainingTriplets"]] = {}


class TrainingTriplets(NamedTuple):
    """Distinct triplets of a data set, and the relations of each predicate."""

    labels: np.ndarray  # (T, 3) subject class, predicate, object class
    counts: np.ndarray  # (P,)


def training_triplets(dataset_name: str, num_predicates: int) -> Optional[TrainingTriplets]:
    """Triplets of a registered training set; None, with a warning, where its files are missing.

    They are remembered for as long as the data set stays registered.
    """
    if dataset_name not in DatasetCatalog:
        logger.warning(
            "The training set '%s' is not registered: zero-shot recall and the predicates' "
            "frequencies in training are left out.",
            dataset_name,
        )
        return None
    loader = DatasetCatalog.data[dataset_name]
    if dataset_name in _known and _known[dataset_name][0] is loader:
        return _known[dataset_name][1]
    try:
        images = load_ground_truth(dataset_name)
    except OSError as error:
        logger.warning(
            "The training set '%s' cannot be read: zero-shot recall and the predicates' "
            "frequencies in training are left out. (%s)",
            dataset_name,
            error,
        )
        return None
    labels = np.concatenate(
        [np.zeros((0, 3), dtype=np.int64), *(gt.labels for gt in images.values())]
    )
    counts = np.bincount(labels[:, 1], minlength=num_predicates)
    result = TrainingTriplets(np.unique(labels, axis=0), counts)
    _known[dataset_name] = (loader, result)
    return result
