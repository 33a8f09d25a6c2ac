"""Logging the relation head's training statistics next to Detectron2's line of losses."""

import logging

from detectron2.utils.events import EventWriter, get_event_storage

__all__ = ["RelationStatisticsPrinter"]

_PREFIX = "reldn/"


class RelationStatisticsPrinter(EventWriter):
    """Log one line of the scalars ``reldn/...`` whenever there are new ones.

    Detectron2's own printer only prints scalars with "loss" in their name; its JSON and
    TensorBoard writers write these scalars without help.
    """

    def __init__(self):
        self._logger = logging.getLogger(__name__)
        self._last_iteration = -1

    def write(self):
        storage = get_event_storage()
        scalars = {
            name[len(_PREFIX) :]: value
            for name, (value, iteration) in storage.latest().items()
            if name.startswith(_PREFIX) and iteration > self._last_iteration
        }
        if scalars:
            text = "  ".join(f"{name}: {value:.4g}" for name, value in scalars.items())
            self._logger.info(f" pairs: iter: {storage.iter}  {text}")
        self._last_iteration = storage.iter
