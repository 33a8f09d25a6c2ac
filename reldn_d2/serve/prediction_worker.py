"""One thread that owns the model and predicts what is waiting, in batches."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from typing import Any, NamedTuple

import numpy as np

from ..data.prediction_input import ImageInput
from ..predictor import RelationPredictor
from ..structures.scene_graph import SceneGraph
from ..utils.image_io import ImageError
from .request_reader import RequestError
from .service_metrics import Metrics

__all__ = ["PredictionWorker", "fail"]

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0  # for the current batch at shutdown, which no request waits for any more
Detector = Callable[[np.ndarray], dict[str, Any]]  # as reldn_d2.pretrained.load_detector gives it


def fail(future: Future, error: BaseException) -> None:
    """Set an exception without its traceback, which is logged unless the request is to blame.

    The frames of a traceback refer to images and to the future itself: this cycle would keep the
    images in memory until Python's garbage collector finds it.
    """
    if not isinstance(error, (ImageError, RequestError)):
        logger.error("a request failed", exc_info=error)
    error.__traceback__ = error.__context__ = error.__cause__ = None
    future.set_exception(error)


class _Job(NamedTuple):
    image: ImageInput | np.ndarray  # an (H, W, 3) RGB image if the detector has to find entities
    deadline: float  # of time.monotonic()
    future: "Future[SceneGraph]"


class PredictionWorker:
    """Predicts images in the order in which they come.

    Whatever has arrived while the model was busy becomes the next batch: nothing waits for a batch
    to fill up.
    """

    def __init__(
        self,
        predictor: RelationPredictor,
        detector: Detector | None,
        batch_size: int,
        metrics: Metrics,
    ):
        """
        Args:
            predictor: the model.
            detector: finds the entities of images without boxes; None if the model does.
            batch_size: most images per batch.
            metrics: gets the size and the seconds of each batch.
        """
        self.predictor = predictor
        self.detector = detector
        self.batch_size = batch_size
        self.metrics = metrics
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._started: float | None = None  # time.monotonic() at the start of the current batch
        self._thread = threading.Thread(target=self._run, name="prediction", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Predict what is waiting, then end the thread; give up on it if that takes too long."""
        self._jobs.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self.is_alive:
            logger.warning("the service ends while the model is still busy")

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def busy_seconds(self) -> float:
        """How long the current batch has taken so far; 0 if there is none."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def submit(self, image: ImageInput | np.ndarray, deadline: float) -> "Future[SceneGraph]":
        """Queue an image.

        Args:
            image: a prepared input, or an (H, W, 3) RGB image for the detector.
            deadline: a value of ``time.monotonic()``; an image that still waits then is not
                predicted, and its future raises TimeoutError.
        """
        job = _Job(image, deadline, Future())
        self._jobs.put(job)
        return job.future

    def _run(self) -> None:
        while self._predict_next():
            pass

    def _predict_next(self) -> bool:
        """Wait for images and predict a batch of them; return False after the last one."""
        batch: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            if job.future.set_running_or_notify_cancel():
                if time.monotonic() < job.deadline:
                    batch.append(job)
                else:
                    job.future.set_exception(TimeoutError())
            if len(batch) == self.batch_size or self._jobs.empty():
                break
            job = self._jobs.get()
        if batch:
            started = self._started = time.monotonic()
            self._answer(batch)
            self._started = None
            self.metrics.predicted(len(batch), time.monotonic() - started)
        return job is not None

    def _answer(self, batch: Sequence[_Job]) -> None:
        """Set the results of a batch; an image that fails does not fail the others."""
        inputs: list[tuple[_Job, ImageInput]] = []
        for job in batch:
            try:
                inputs.append((job, self._input(job.image)))
            except Exception as error:
                fail(job.future, error)
        # The images are repeated after the failed call has returned: its exception holds the
        # tensors of the batch, without which there may be enough memory for one image.
        if inputs and not self._predict(inputs):
            logger.info(f"a batch of {len(inputs)} images failed; each is predicted alone")
            for one in inputs:
                self._predict([one])

    def _predict(self, inputs: Sequence[tuple[_Job, ImageInput]]) -> bool:
        """Set the results of prepared images; return False if several of them have failed."""
        try:
            graphs = self.predictor.predict_inputs([x for _, x in inputs])
        except Exception as error:
            if len(inputs) > 1:
                return False
            fail(inputs[0][0].future, error)
            return True
        for (job, _), graph in zip(inputs, graphs):
            job.future.set_result(graph)
        return True

    def _input(self, image: ImageInput | np.ndarray) -> ImageInput:
        if isinstance(image, ImageInput):
            return image
        # The detector has classes that the model may not have.
        return self.predictor.read_input(image, unknown_classes="leave_out", **self.detector(image))
