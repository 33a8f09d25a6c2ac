"""The thread that owns the model: what happens to images that fail, and to their memory."""

import gc
import math
import time
import weakref
from concurrent.futures import TimeoutError
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service needs FastAPI: pip install 'reldn_d2[serve]'")

from reldn_d2.data.prediction_input import ImageInput
from reldn_d2.serve.prediction_worker import PredictionWorker
from reldn_d2.serve.service_metrics import Metrics
from reldn_d2.utils.image_io import ImageError


def predict(predict_inputs, images, detector=None, deadline=math.inf) -> list:
    """Return the futures of images that wait for the worker together."""
    predictor = SimpleNamespace(
        predict_inputs=predict_inputs,
        read_input=lambda image, **found: ImageInput({"image": image}, "prdcls", None, {}),
    )
    worker = PredictionWorker(predictor, detector, 8, Metrics())
    futures = [worker.submit(x, deadline) for x in images]
    worker.start()
    worker.close()
    return futures


def test_worker_failed_batch_frees_its_memory_before_the_images_are_repeated():
    tensors = []

    def predict_inputs(inputs):
        if len(inputs) > 1:
            tensor = np.zeros(9)
            tensors.append(weakref.ref(tensor))
            raise MemoryError("the GPU has no memory for two images")
        assert tensors[0]() is None
        return [inputs[0].task]

    images = [ImageInput({}, task, None, {}) for task in ("sgdet", "sgcls")]
    assert [x.result() for x in predict(predict_inputs, images)] == ["sgdet", "sgcls"]


def test_worker_detector_runs_once_per_image_although_one_fails():
    seen = []

    def detector(rgb):
        seen.append(rgb.shape[0])
        if rgb.shape[0] == 5:
            raise ImageError("image: the detector cannot use it")
        return {}

    batches = []

    def predict_inputs(inputs):
        batches.append(len(inputs))
        return [x.record["image"].shape[0] for x in inputs]

    images = [np.zeros((height, 4, 3), np.uint8) for height in (4, 5, 6)]
    first, failed, last = predict(predict_inputs, images, detector)
    assert (first.result(), last.result()) == (4, 6)
    assert isinstance(failed.exception(), ImageError)
    assert seen == [4, 5, 6] and batches == [2]


def test_worker_errors_keep_no_image_in_memory():
    def detector(rgb):
        raise ImageError("image: the detector cannot use it")

    images = [np.zeros((4, 4, 3), np.uint8) for _ in range(3)]
    alive = [weakref.ref(x) for x in images]
    gc.disable()  # which would find cycles, but only now and then
    try:
        futures = predict(None, images, detector)
        assert all(isinstance(x.exception(), ImageError) for x in futures)
        del images, futures
        assert all(x() is None for x in alive)
    finally:
        gc.enable()


def test_worker_expired_image_is_not_predicted():
    image = ImageInput({}, "sgdet", None, {})
    (future,) = predict(None, [image], deadline=time.monotonic() - 1)
    assert isinstance(future.exception(), TimeoutError)
