"""Prediction of many images: worker processes load them, the model takes batches of equal size."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

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
        ReadingProcessDied: worker processes die, whatever they read.
    """
    detector = entities if isinstance(entities, ImageDetector) else None
    done, alone = 0, 0
    while done < len(images):
        start = done
        loading = ImageLoading(
            images[done:], predictor.read_input, None if detector is not None else entities
        )
        loaded = load_images(loading, workers, batch_size, alone)
        if detector is not None:
            loaded = (_detect(predictor, detector, x) for x in loaded)
        try:
            for result in _predict_in_order(predictor, loaded, batch_size):
                done += 1
                yield result
        except ReadingProcessDied as error:
            if done - start < alone:  # each image had a process of its own
                raise
            # The image that ended its process is one of those that were loaded ahead.
            alone = _BATCHES_AHEAD * batch_size + prefetched_images(workers, batch_size)
            logger.warning(
                f"A process that reads images was killed ({error}). Its images are read again, "
                "each by a process of its own, to find the one that causes it."
            )


def _detect(
    predictor: RelationPredictor, detector: ImageDetector, loaded: LoadedImage
) -> LoadedImage:
    """Detect the entities of an image and prepare it for the model."""
    image, rgb = loaded
    if isinstance(rgb, ImageError):
        return loaded
    name = image.path if image.position is None else image.key
    try:
        pixels = rgb.numpy()
        return LoadedImage(image, predictor.read_input(pixels, name, **detector(pixels)))
    except ImageError as error:
        return LoadedImage(image, error)


def _predict_in_order(
    predictor: RelationPredictor, loaded: Iterable[LoadedImage], batch_size: int
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
            for entry, result in zip(batch, _predict_batch(predictor, batch)):
                entry[1] = result
        while waiting and not isinstance(waiting[0][1], ImageInput):
            yield tuple(waiting.popleft())


def _predict_batch(
    predictor: RelationPredictor, batch: Sequence[Sequence]
) -> list[SceneGraph | ImageError]:
    """Predict (image, input) in one batch; if it fails, one by one."""
    problem = None
    try:
        graphs = predictor.predict_inputs([x for _, x in batch])
        return [
            graph if image.position is not None else replace(graph, file_name=image.path)
            for (image, _), graph in zip(batch, graphs)
        ]
    except ImageError as error:
        problem = error
    except torch.cuda.OutOfMemoryError:
        image = batch[0][0]
        problem = ImageError(f"{image.key}: the GPU has too little memory for this image")
    # Outside of the handlers, which hold the tensors of the batch.
    if len(batch) == 1:
        return [problem]
    return [result for entry in batch for result in _predict_batch(predictor, [entry])]
