"""Reads and prepares images in the worker processes of torch's DataLoader, while a model runs."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from detectron2.data import DatasetFromList

from ..data.prediction_input import ImageInput, InputReader
from ..utils.image_io import ImageError
from .image_sources import ImageItem, ImageReader

__all__ = [
    "Entities",
    "ImageLoading",
    "LoadedImage",
    "ReadingProcessDied",
    "load_images",
    "prefetched_images",
]

Entities = Callable[[str], Mapping[str, Any]]  # arguments ``boxes``, ... by key of the image

# Of a photo as a model with default options takes it.
_USUAL_SHAPE = (3, 800, 1333)


class ReadingProcessDied(RuntimeError):
    """A process that reads images was killed, perhaps by the image."""


class LoadedImage(NamedTuple):
    """An image as the model takes it, or as a detector takes it, or why it cannot be used."""

    image: ImageItem
    content: ImageInput | torch.Tensor | ImageError  # tensor: (H, W, 3) uint8 RGB


class ImageLoading(Dataset):
    """Loads images by index; can be pickled if its parts can."""

    def __init__(
        self, images: Sequence[ImageItem], read_input: InputReader, entities: Entities | None
    ):
        """
        Args:
            images: to load.
            read_input: of the model.
            entities: of an image by key; None to return pixels instead, for a detector in the main
                process.
        """
        # One block of bytes, because processes would each copy the list while they count references
        # to its elements.
        self.images = DatasetFromList(list(images), copy=False)
        self.read_input = read_input
        self.entities = entities
        self._read = ImageReader()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> LoadedImage:
        image = self.images[index]
        try:
            rgb = self._read(image)
            if self.entities is None:
                return LoadedImage(image, torch.from_numpy(rgb.copy()))  # Pillow's is read-only
            # Files have the message "PATH: ...", as in single predictions.
            name = image.path if image.position is None else image.key
            return LoadedImage(image, self.read_input(rgb, name, **self.entities(image.key)))
        except ImageError as error:
            return LoadedImage(image, error)


def prefetched_images(workers: int, batch_size: int) -> int:
    """Return how many images the worker processes load ahead together: two batches."""
    return workers * max(2, -(-2 * batch_size // workers)) if workers else 0


def load_images(
    loading: ImageLoading, workers: int, batch_size: int, first_alone: int = 0
) -> Iterator[LoadedImage]:
    """Load all images in order.

    Args:
        loading: the images.
        workers: number of processes; 0 loads in this one.
        batch_size: of the model.
        first_alone: so many of the first images are loaded in a process of their own, one after the
            other. One that ends its process is an error of this image.

    Raises:
        ReadingProcessDied: a worker process died, other than one with an image of its own.
        ChildProcessError: worker processes die, whatever they read.
    """
    first_alone = min(first_alone, len(loading))
    for index in range(first_alone):
        try:
            (loaded,) = _iterate(loading, range(index, index + 1), 1, 2)
        except ReadingProcessDied:
            _check_that_processes_work()
            image = loading.images[index]
            loaded = LoadedImage(
                image,
                ImageError(
                    f"{image.key}: the process that reads it is killed each time, perhaps because "
                    "it takes too much memory; replace or remove it"
                ),
            )
        yield loaded
    remaining = range(first_alone, len(loading))
    yield from _iterate(loading, remaining, workers, prefetched_images(workers, batch_size))


def _check_that_processes_work() -> None:
    """Raise ChildProcessError if a worker process dies that only passes on a blank image."""
    blank = torch.zeros(_USUAL_SHAPE, dtype=torch.uint8)
    try:
        list(_iterate([blank], range(1), 1, 2))
    except ReadingProcessDied as error:
        raise ChildProcessError(
            f"processes that read images are killed, whatever they read ({error}): give this "
            "program more memory (docs/bulk.md), or use --workers 0"
        ) from None


def _iterate(
    loading: Sequence | Dataset, indices: range, workers: int, prefetched: int
) -> Iterator[LoadedImage]:
    """Load some images with one DataLoader.

    Raises:
        ReadingProcessDied: a worker process died.
    """
    loader = DataLoader(
        Subset(loading, indices),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetched // workers if workers else None,
    )
    # A single image is awaited at once, so that its error can only be raised here.
    handler = signal.SIG_DFL if len(indices) == 1 else _take_death_handler()
    iterator = problem = None
    try:
        iterator = iter(loader)  # the first one of a process sets the handler
        handler = handler if len(indices) == 1 else _take_death_handler(handler)
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:
        if not workers or not _tells_of_death(error):
            raise
        problem = str(error)
        if not isinstance(error, RuntimeError):
            problem = f"the connection to a DataLoader worker failed: {error!r}"
    finally:
        del iterator  # else the handler would report the same process again
        if handler != signal.SIG_DFL:
            signal.signal(signal.SIGCHLD, handler)
    if problem is not None:
        raise ReadingProcessDied(problem)


def _take_death_handler(taken: Any = signal.SIG_DFL) -> Any:
    """Replace DataLoader's handler of dying processes by the default; return it to be set again.

    It raises at once, wherever the main thread is, perhaps while that writes a line. Without it, a
    death raises where the process's next image is awaited, a few seconds later.

    Args:
        taken: what an earlier call returned.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return taken  # there is no such handler
    handler = signal.getsignal(signal.SIGCHLD)
    if handler is None or handler == signal.SIG_DFL:  # None: not set by Python
        return taken
    return signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _tells_of_death(error: Exception) -> bool:
    """Whether an error of DataLoader says that a worker process died.

    Tensors come through a connection to their process. If it dies before they are received, the
    connection fails (``OSError``, ``EOFError``), perhaps before DataLoader notices the death. What
    a worker raises itself says "Caught ... in DataLoader worker process".
    """
    text = str(error)
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in text and ("exited unexpectedly" in text or "killed" in text)
    return "in DataLoader worker process" not in text
