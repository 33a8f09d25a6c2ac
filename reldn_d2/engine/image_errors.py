"""Naming the image in errors about one image."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..utils.image_io import ImageError

__all__ = ["NameImageInErrors", "describe_images", "named_images"]


def describe_images(inputs: list[dict[str, Any]]) -> str:
    """List ids and files of a batch of mapped images."""
    return ", ".join(
        f"{x.get('image_id', '?')} ({x.get('file_name', 'no file name')})" for x in inputs
    )


class NameImageInErrors:
    """A mapper whose errors name the image's file; can be sent to loader workers."""

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]):
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        file = str(record.get("file_name", f"image {record.get('image_id', '?')}"))
        try:
            return self.mapper(record)
        except Exception as error:
            if file in str(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"{file}: {reason}") from error


@contextmanager
def named_images(model: nn.Module) -> Iterator[None]:
    """Name the images in errors of a model that predicts.

    Raises:
        RuntimeError: in place of any error of ``model``.
    """
    current: list[dict[str, Any]] = []
    handles = [
        model.register_forward_pre_hook(lambda module, inputs: current.extend(inputs[0])),
        model.register_forward_hook(lambda module, inputs, outputs: current.clear()),
    ]
    try:
        yield
    except Exception as error:
        if not current:  # not an error of the model
            raise
        raise RuntimeError(
            f"The evaluation failed at image {describe_images(current)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
