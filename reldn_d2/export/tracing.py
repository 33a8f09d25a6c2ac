"""Recording a graph for a file: what both formats share."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from detectron2.modeling.roi_heads import cascade_rcnn

from .graphs import ExportedGraph

__all__ = ["check_example", "describe", "tracing"]


@contextmanager
def tracing(file_format: str) -> Iterator[None]:
    """Prepare for tracing while the block runs: no gradients, none of the warnings.

    Args:
        file_format: its name, for error messages.

    Raises:
        ValueError: if PyTorch cannot express a part of the model in the format.
    """
    with torch.no_grad(), warnings.catch_warnings(), _without_gradient_scaling():
        # Tracing warns of every size that it writes into the graph; those are meant to be fixed.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        try:
            yield
        except (RuntimeError, TypeError) as error:
            reason = next((x for x in str(error).splitlines() if x.strip()), type(error).__name__)
            raise ValueError(
                f"torch {torch.__version__} cannot write this model as {file_format}: {reason}"
            ) from error


@contextmanager
def _without_gradient_scaling() -> Iterator[None]:
    """Skip Cascade R-CNN's scaling of gradients, a Python function that cannot be saved.

    It changes gradients only, never a value.
    """
    original = getattr(cascade_rcnn, "_ScaleGradient", None)
    if original is None:
        yield
        return
    cascade_rcnn._ScaleGradient = SimpleNamespace(apply=lambda values, scale: values)
    try:
        yield
    finally:
        cascade_rcnn._ScaleGradient = original


def check_example(graph: ExportedGraph, example: Sequence[Tensor]) -> None:
    """Check that an example runs through all parts of the graph: tracing records only what runs.

    Raises:
        ValueError: if the model finds no relation in it.
    """
    expected = dict(zip(graph.output_names, graph.model_outputs(*example)))
    num_relations = len(expected["pairs"])
    if "boxes" in expected and (len(expected["boxes"]) < 2 or num_relations == 0):
        raise ValueError(
            f"{len(expected['boxes'])} entities are found in the example image, with "
            f"{num_relations} relations; use an image that shows at least one relation"
        )
    if num_relations == 0:
        raise ValueError("the example has no relation; give at least two boxes")


def describe(
    graph: ExportedGraph,
    example: Sequence[Tensor],
    thing_classes: Sequence[str],
    predicate_classes: Sequence[str],
    image_format: str,
) -> dict[str, Any]:
    """Return what a user of the file must know.

    Returns:
        ``thing_classes`` and ``predicate_classes``: names by id; ``input``: shape of the first
        input, a name for each dimension of any size; ``inputs`` and ``outputs``: names;
        ``input_format``: order of the channels, RGB or BGR, of a model that reads pixels.
    """
    first = graph.input_names[0]
    axes = graph.dynamic_axes.get(first, {})
    return {
        "thing_classes": list(thing_classes),
        "predicate_classes": list(predicate_classes),
        "input": [axes.get(axis, size) for axis, size in enumerate(example[0].shape)],
        "inputs": list(graph.input_names),
        "outputs": list(graph.output_names),
        **({"input_format": image_format} if first == "image" else {}),
    }
