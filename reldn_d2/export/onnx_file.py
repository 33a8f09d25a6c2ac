"""Writing a graph as ONNX, for onnxruntime and other runtimes without PyTorch.

PyTorch has two ONNX exporters. The one based on ``torch.export`` stops in Detectron2's proposals
and box filtering, which branch on how many boxes are left; the one used here records the same trace
as TorchScript, for any number of boxes and any image size.
"""

import importlib.util
import inspect
import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.file_io import write_atomically
from .graphs import RELATION_NAMES, ExportedGraph
from .tracing import check_example, describe, tracing

__all__ = ["OPSET", "check_packages", "save_onnx"]

MAX_BYTES = 2**31 - 2**24  # of protobuf's messages, less some space for the graph
OPSET = 17  # 16 brought RoIAlign with half pixels, 17 layer normalization; onnxruntime 1.12 has it


def check_packages() -> None:
    """Raise an ImportError that says how to install them if a package for ONNX is missing."""
    missing = [x for x in ("onnx", "onnxruntime") if importlib.util.find_spec(x) is None]
    if missing:
        raise ImportError(
            f"ONNX files need {' and '.join(missing)}: pip install {' '.join(missing)} (or "
            '"reldn_d2[export]")'
        )


def save_onnx(
    graph: ExportedGraph,
    example: Sequence[Tensor],
    path: str | Path,
    thing_classes: Sequence[str] = (),
    predicate_classes: Sequence[str] = (),
    image_format: str = "BGR",
) -> None:
    """Trace a graph on an example and save it as ONNX with its names.

    The file's ``metadata_props`` are the entries of :func:`.tracing.describe`, each as JSON.

    Args:
        graph, example, path, thing_classes, predicate_classes, image_format: as for
            :func:`.torchscript_file.save_torchscript`.

    Raises:
        ImportError: if onnx or onnxruntime is not installed.
        ValueError: if the model is too large, finds no relation in the example, or PyTorch cannot
            express a part of it in ONNX.
        OSError: if the file cannot be written.
    """
    check_packages()
    import onnx

    weights = sum(x.numel() * x.element_size() for x in graph.weights())
    if weights >= MAX_BYTES:
        raise ValueError(
            f"the model has {weights / 1e9:.1f} GB of weights, and an ONNX file holds at most "
            "2 GB; use TorchScript"
        )
    check_example(graph, example)
    sizes = {
        name: {0: "relations" if name in RELATION_NAMES else "entities"}
        for name in graph.output_names
    }
    options: dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    stream = io.BytesIO()
    with tracing("ONNX"), _missing_operators(), redirect_stdout(io.StringIO()):
        torch.onnx.export(
            graph,
            tuple(example),
            stream,
            input_names=list(graph.input_names),
            output_names=list(graph.output_names),
            dynamic_axes={**sizes, **graph.dynamic_axes},
            opset_version=OPSET,
            **options,
        )
    stored = onnx.load_from_string(stream.getvalue())
    description = describe(graph, example, thing_classes, predicate_classes, image_format)
    onnx.helper.set_model_props(stored, {k: json.dumps(x) for k, x in description.items()})
    with write_atomically(path, "wb") as file:
        file.write(stored.SerializeToString())


@contextmanager
def _missing_operators() -> Iterator[None]:
    """Provide while the block runs what the exporter lacks: stable sorting, plain attention."""
    fused = getattr(torch.backends, "mha", None)  # a setting that older PyTorch does not have
    enabled = fused is not None and fused.get_fastpath_enabled()
    torch.onnx.register_custom_op_symbolic("aten::argsort", _argsort, OPSET)
    original = nn.TransformerEncoderLayer._sa_block
    nn.TransformerEncoderLayer._sa_block = _attend
    try:
        if enabled:
            fused.set_fastpath_enabled(False)
        yield
    finally:
        if enabled:
            fused.set_fastpath_enabled(True)
        nn.TransformerEncoderLayer._sa_block = original
        torch.onnx.unregister_custom_op_symbolic("aten::argsort", OPSET)


def _argsort(g: Any, values: Any, *options: Any) -> Any:
    """Express ``aten::argsort(values[, stable], dim, descending)`` as TopK of all values.

    Among equal values, TopK takes the one with the lower index first, as a stable sort does.
    """
    dim, descending = (x.node().t("value").item() for x in options[-2:])
    axis = g.op("Constant", value_t=torch.tensor([dim]))
    count = g.op("Gather", g.op("Shape", values), axis, axis_i=0)
    return g.op("TopK", values, count, axis_i=dim, largest_i=int(descending), outputs=2)[1]


def _attend(
    layer: nn.TransformerEncoderLayer,
    values: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool = False,
) -> Tensor:
    """Compute the self-attention of a layer; PyTorch's own writes the length into the graph.

    Args:
        layer: in eval mode, batch first.
        values: (N, L, H).
        mask, padding: (L, L) and (N, L) float, added to the logits; None for none.
        is_causal: has no effect without a mask.
    """
    attention = layer.self_attn
    heads, size = attention.num_heads, attention.head_dim
    projected = F.linear(values, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (
        x.reshape(x.shape[0], -1, heads, size).transpose(1, 2) for x in projected.chunk(3, dim=2)
    )
    logits = query @ key.transpose(2, 3) / math.sqrt(size)  # (N, heads, L, L)
    if mask is not None:
        logits = logits + mask
    if padding is not None:
        logits = logits + padding[:, None, None]
    attended = (logits.softmax(dim=3) @ value).transpose(1, 2)
    return attention.out_proj(attended.reshape(attended.shape[0], -1, heads * size))
