"""Prediction of many images: worker processes load them, the model takes batches of equal size."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from ..data.prediction_input import ImageInput
from ..predictor import RelationPredictor
from ..pretrained.image_detectors import ImageDetector
from ..structures.scene_graph import SceneGraph
from ..utils.image_io import ImageError
from .image_loading import (
    Entities,
    ImageLoading,
    LoadedImage,
    ReadingProcessDied,
    load_images,
    prefetched_images,
)
from .image_sources import ImageItem

__all__ = ["predict_images"]

logger = logging.getLogger(__name__)

# So many batches of images are looked through for those of the same size.
_BATCHES_AHEAD = 4

# A model that takes none of its first images is broken.
_MAX_FIRST_FAILURES = 3


def predict_images(
    predictor: RelationPredictor,
    images: Sequence[ImageItem],
    entities: Entities | ImageDetector,
    batch_size: int = 1,
    workers: int = 0,
) -> Iterator[tuple[ImageItem, SceneGraph | ImageError]]:
    """Predict images in order; an unusable one does not stop the others.

    Args:
        predictor: the model.
        images: to predict.
        entities: arguments ``boxes``, ... of the predictor for an image by its key, or a detector,
            which runs in this process.
        batch_size: max images per batch.
        workers: number of processes that read and prepare images; 0: this one does.

    Yields:
        each image, with its scene graph or the reason why it has none.

    Raises:
        ChildProcessError: worker processes die, whatever they read.
        Exception: of the model or the detector, if it fails for every image.
    """
    detector = entities if isinstance(entities, ImageDetector) else None
    detect = _ImageByImage(lambda batch: [_detect(predictor, detector, *x) for x in batch])
    predict = _ImageByImage(lambda batch: _predict_batch(predictor, batch))
    done, alone = 0, 0
    while done < len(images):
        loading = ImageLoading(
            images[done:], predictor.read_input, None if detector is not None else entities
        )
        loaded = load_images(loading, workers, batch_size, alone)
        if detector is not None:
            loaded = (
                x if isinstance(x.content, ImageError) else LoadedImage(x.image, *detect([x]))
                for x in loaded
            )
        try:
            for result in _predict_in_order(predict, loaded, batch_size):
                done += 1
                yield result
        except ReadingProcessDied as error:
            # The image that ended its process is one of those that were loaded ahead. They are more
            # than those that wait for the model, so the next death is of a later image.
            alone = _BATCHES_AHEAD * batch_size + prefetched_images(workers, batch_size)
            logger.warning(
                f"A process that reads images was killed ({error}). Its images are read again, "
                "each by a process of its own, to find the one that causes it."
            )


def _detect(
    predictor: RelationPredictor, detector: ImageDetector, image: ImageItem, rgb: torch.Tensor
) -> ImageInput:
    """Detect the entities of an image and prepare it for the model."""
    name = image.path if image.position is None else image.key
    pixels = rgb.numpy()
    return predictor.read_input(pixels, name, **detector(pixels))


def _predict_batch(
    predictor: RelationPredictor, batch: Sequence[tuple[ImageItem, ImageInput]]
) -> list[SceneGraph]:
    graphs = predictor.predict_inputs([x for _, x in batch])
    return [
        graph if image.position is not None else replace(graph, file_name=image.path)
        for (image, _), graph in zip(batch, graphs)
    ]


class _ImageByImage:
    """Runs a model on batches; if it fails, on one image after the other.

    If it fails for one image and not for another one that it had before, the image is the cause.
    """

    def __init__(self, run: Callable[[Sequence[tuple[ImageItem, Any]]], list[Any]]):
        """
        Args:
            run: returns a result for each (image, content) of a batch.
        """
        self._run = run
        self._good: tuple[ImageItem, Any] | None = None  # has a result
        self._first_failures = 0

    def __call__(self, batch: Sequence[tuple[ImageItem, Any]]) -> list[Any]:
        """Return the result of each image, or the ImageError that tells why it has none.

        Raises:
            Exception: of the model, if it fails for its first images, or for one that had a result.
        """
        if len(batch) > 1:
            with suppress(Exception):
                results = self._run(batch)
                self._good = batch[0]
                return results
        return [self._run_alone(*entry) for entry in batch]

    def _run_alone(self, image: ImageItem, content: Any) -> Any:
        try:
            (result,) = self._run([(image, content)])
        except ImageError as error:
            return error
        except Exception as error:
            if self._good is None and self._first_failures == _MAX_FIRST_FAILURES - 1:
                raise
            reason = f"the model fails: {type(error).__name__}: {' '.join(str(error).split())}"
            if isinstance(error, torch.cuda.OutOfMemoryError):
                reason = "the GPU has too little memory for this image"
        else:
            self._good = image, content
            return result
        # Outside of the handler, because the error holds the tensors of the image.
        if self._good is None:
            self._first_failures += 1
        else:
            self._run([self._good])
        return ImageError(f"{image.key}: {reason}")


def _predict_in_order(
    predict: "_ImageByImage", loaded: Iterable[LoadedImage], batch_size: int
) -> Iterator[tuple[ImageItem, SceneGraph | ImageError]]:
    """Predict the first image that waits, in one batch with the next ones of its size."""
    loaded = iter(loaded)
    waiting: deque[list] = deque()  # [image, input or result]
    while True:
        while len(waiting) < _BATCHES_AHEAD * batch_size:
            try:
                waiting.append(list(next(loaded)))
            except StopIteration:
                break
        if not waiting:
            return
        first = waiting[0][1]
        if isinstance(first, ImageInput):
            batch = [
                entry
                for entry in waiting
                if isinstance(entry[1], ImageInput) and entry[1].batch_key == first.batch_key
            ][:batch_size]
            for entry, result in zip(batch, predict(batch)):
                entry[1] = result
        while waiting and not isinstance(waiting[0][1], ImageInput):
            yield tuple(waiting.popleft())
