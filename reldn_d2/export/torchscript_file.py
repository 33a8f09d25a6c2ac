"""Writing a graph as TorchScript, which needs torch and torchvision to run."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..utils.file_io import write_atomically
from .graphs import ExportedGraph
from .tracing import check_example, describe, tracing

__all__ = ["save_torchscript"]


def save_torchscript(
    graph: ExportedGraph,
    example: Sequence[Tensor],
    path: str | Path,
    thing_classes: Sequence[str] = (),
    predicate_classes: Sequence[str] = (),
    image_format: str = "BGR",
) -> None:
    """Trace a graph on an example and save it with its names.

    The file contains ``reldn.json`` as an extra file, see :func:`.tracing.describe`.

    Args:
        graph: to be saved.
        example: its inputs. The model must find at least one relation in it, so that tracing runs
            through all its parts.
        path: of the file.
        thing_classes, predicate_classes: names by id.
        image_format: order of the channels.

    Raises:
        ValueError: if the model finds no relation in the example, or PyTorch cannot express a part
            of it in TorchScript.
        OSError: if the file cannot be written.
    """
    check_example(graph, example)
    description = describe(graph, example, thing_classes, predicate_classes, image_format)
    stream = io.BytesIO()
    with tracing("TorchScript"):
        traced = torch.jit.trace(graph, tuple(example), check_trace=False)
        torch.jit.save(traced, stream, _extra_files={"reldn.json": json.dumps(description)})
    with write_atomically(path, "wb") as file:
        file.write(stream.getbuffer())
