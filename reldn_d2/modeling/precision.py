"""Keeping boxes, scores and masks out of half precision.

Autocast computes a detector's maps and predictions in bfloat16 or float16. That is enough for
features, but bfloat16 rounds a coordinate between 512 and 1024 pixels to a multiple of 4, and NumPy
does not have it at all.
"""

from typing import Any

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

__all__ = ["at_least_float32"]

_HALF = (torch.bfloat16, torch.float16)


def at_least_float32(x: Any) -> Any:
    """Return tensors in half precision as float32, and everything else as it is.

    Args:
        x: a tensor, boxes, instances, or lists and dicts of them.
    """
    if isinstance(x, Tensor):
        return x.float() if x.dtype in _HALF else x
    if isinstance(x, Boxes):
        return Boxes(at_least_float32(x.tensor))
    if isinstance(x, Instances):
        return Instances(x.image_size, **at_least_float32(x.get_fields()))
    if isinstance(x, dict):
        return {name: at_least_float32(value) for name, value in x.items()}
    return [at_least_float32(value) for value in x] if isinstance(x, (list, tuple)) else x
