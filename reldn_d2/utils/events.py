"""The relation head's training statistics in the log, beside Detectron2's line of losses."""

import logging

from detectron2.utils.events import EventWriter, get_event_storage

__all__ = ["RelationStatisticsPrinter"]

_PREFIX = "reldn/"


class RelationStatisticsPrinter(EventWriter):
    """Writes a line of the scalars ``reldn/...`` whenever there are new ones.

    Detectron2's own printer takes only what has "loss" in its name; its JSON and TensorBoard
    writers take these scalars as they are.
    """

    def __init__(self):
        self._logger = logging.getLogger(__name__)
        self._last = -1

    def write(self):
        storage = get_event_storage()
        found = {
            name[len(_PREFIX) :]: value
            for name, (value, iteration) in storage.latest().items()
            if name.startswith(_PREFIX) and iteration > self._last
        }
        if found:
            numbers = "  ".join(f"{name}: {value:.4g}" for name, value in found.items())
            self._logger.info(f" pairs: iter: {storage.iter}  {numbers}")
        self._last = storage.iter
