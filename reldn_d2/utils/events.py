"""Logging: the relation head's training statistics, and logs that cannot be written."""

import logging
import os
import sys

from detectron2.utils.events import EventWriter, get_event_storage
from detectron2.utils.logger import setup_logger

__all__ = [
    "FailSafeWriter",
    "RelationStatisticsPrinter",
    "log_to_terminal",
    "report_log_errors_once",
]

_logger = logging.getLogger(__name__)
_PREFIX = "reldn/"


def log_to_terminal() -> None:
    """Print this package's log lines, once each, as the set-up of a command-line tool."""
    setup_logger(name="reldn_d2")  # does nothing if it was called before in this process
    logging.getLogger("reldn_d2").propagate = False


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


# The files of Detectron2's writers, in the run's output folder.
_FILES = {"JSONWriter": "metrics.json", "TensorboardXWriter": "events.out.tfevents.*"}


class FailSafeWriter(EventWriter):
    """Writer that logs one line if its file cannot be written, instead of ending the training.

    It tries again each time, because a full disk may have space later.
    """

    def __init__(self, writer: EventWriter, folder: str):
        """
        Args:
            writer: does the writing.
            folder: its output folder.
        """
        self._writer = writer
        self._file = os.path.join(folder, _FILES.get(type(writer).__name__, ""))
        self._failed = False

    def write(self) -> None:
        self._attempt(self._writer.write)

    def close(self) -> None:
        self._attempt(self._writer.close)

    def _attempt(self, call) -> None:
        try:
            call()
        except OSError as error:
            if not self._failed:
                _logger.error(
                    f"{self._file} cannot be written ({error.strerror or error}): training "
                    "continues, but this file is incomplete."
                )
            self._failed = True


def report_log_errors_once() -> None:
    """Let the log files of Detectron2's ``setup_logger`` report a full disk in one line.

    ``logging`` prints a traceback for every message that it cannot write.
    """
    reported: set[str] = set()  # the loggers share one file
    for name in ("detectron2", "fvcore", "reldn_d2"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(getattr(getattr(handler, "stream", None), "name", None), str):
                handler.handleError = _LogFileErrors(handler, reported)


class _LogFileErrors:
    """Replacement for a log handler's ``handleError``."""

    def __init__(self, handler: logging.StreamHandler, reported: set[str]):
        self._handler, self._reported = handler, reported

    def __call__(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logging.StreamHandler.handleError(self._handler, record)
        elif self._handler.stream.name not in self._reported:
            file, reason = self._handler.stream.name, error.strerror or error
            print(f"{file} cannot be written ({reason}).", file=sys.stderr)
            self._reported.add(file)
