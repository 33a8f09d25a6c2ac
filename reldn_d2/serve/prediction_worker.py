"""One thread that owns the model and predicts what is waiting, in batches."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from ..data.prediction_input import ImageInput
from ..predictor import RelationPredictor
from ..structures.scene_graph import SceneGraph
from .service_metrics import Metrics

__all__ = ["PredictionWorker"]

logger = logging.getLogger(__name__)

Detector = Callable[[np.ndarray], dict[str, Any]]  # as reldn_d2.pretrained.load_detector gives it


class _Job(NamedTuple):
    image: ImageInput | np.ndarray  # an (H, W, 3) RGB image if the detector has to find entities
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
        self._thread = threading.Thread(target=self._run, name="prediction", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Predict what is waiting, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, image: ImageInput | np.ndarray) -> "Future[SceneGraph]":
        """Queue a prepared input, or an (H, W, 3) RGB image for the detector."""
        job = _Job(image, Future())
        self._jobs.put(job)
        return job.future

    def _run(self) -> None:
        job = self._jobs.get()
        while job is not None:
            batch: list[_Job] = []
            while job is not None:
                # A request that has timed out has cancelled its future.
                if job.future.set_running_or_notify_cancel():
                    batch.append(job)
                if len(batch) == self.batch_size or self._jobs.empty():
                    break
                job = self._jobs.get()
            if batch:
                started = time.perf_counter()
                self._answer(batch)
                self.metrics.predicted(len(batch), time.perf_counter() - started)
            if job is not None:
                del batch  # not kept while the thread waits
                job = self._jobs.get()

    def _answer(self, batch: Sequence[_Job]) -> None:
        """Set the results of a batch; an image that fails does not fail the others."""
        try:
            graphs = self.predictor.predict_inputs([self._input(job.image) for job in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            logger.info(f"a batch of {len(batch)} images failed; each is predicted alone")
            for job in batch:
                self._answer([job])
            return
        for job, graph in zip(batch, graphs):
            job.future.set_result(graph)

    def _input(self, image: ImageInput | np.ndarray) -> ImageInput:
        if isinstance(image, ImageInput):
            return image
        # The detector has classes that the model may not have.
        return self.predictor.read_input(image, unknown_classes="leave_out", **self.detector(image))
