"""Find the operations of a call that make the host wait for a device.

On a GPU, torch reports them itself (``torch.cuda.set_sync_debug_mode``). On the CPU nothing waits,
so this module watches for the operations that would wait on a GPU: those that read values on the
host, and those whose output has a size that depends on values.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import reldn_d2

import detectron2

__all__ = ["count_host_reads"]

_PACKAGES = [Path(package.__file__).parent for package in (reldn_d2, detectron2)]
_SIZE_DEPENDS_ON_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "nms")
# item, bool, int, float and is_nonzero read a value by _local_scalar_dense.
_READ_A_VALUE = ("_local_scalar_dense", "equal", "allclose")
_READ_A_TENSOR = ("tolist", "numpy", "cpu")


def _source() -> str:
    """Name the innermost function of the package or of Detectron2 on the stack."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        for package in _PACKAGES:
            # A comprehension counts for its function, as in Python 3.12.
            if path.is_relative_to(package) and not frame.name.startswith("<"):
                return f"{path.relative_to(package.parent).as_posix()}:{frame.name}"
    return "elsewhere"


class _Dispatched(TorchDispatchMode):
    """Count operators whose output size depends on values, and single values that are read."""

    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.rpartition("::")[2]
        if name in (*_SIZE_DEPENDS_ON_VALUES, *_READ_A_VALUE):
            self.found[_source()] += 1
        elif name in ("index", "index_put", "index_put_"):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            self.found.update([_source()] * len(masks))
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            if isinstance(args[-1], Tensor):
                self.found[_source()] += 1
        return function(*args, **kwargs)


class _Called(TorchFunctionMode):
    """Count methods that read a whole tensor on the host."""

    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in _READ_A_TENSOR and args and isinstance(args[0], Tensor):
            self.found[_source()] += 1
        return function(*args, **(kwargs or {}))


def count_host_reads(call: Callable[[], Any], device: str) -> Counter:
    """Run a call and count its synchronizations by the function that causes them.

    Args:
        call: without arguments; on a GPU it must have run before, so that libraries are loaded.
        device: cpu or cuda.

    Returns:
        ``path:function`` with the path from the package's folder, and how often.
    """
    found: Counter = Counter()
    if not device.startswith("cuda"):
        with _Called(found), _Dispatched(found):
            call()
        return found

    def record(message, category, filename, lineno, file=None, line=None):
        if "synchroniz" in str(message):
            found[_source()] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = record
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return found
