"""Values of a COCO file, checked; JSON has no types but Python's own, so ``type`` is enough."""

from typing import Any

import pycocotools.mask as mask_util

__all__ = ["are_numbers", "is_among", "is_int", "segmentation"]

_LIMIT = 1e15  # no sensible number is larger; NaN and infinity lie beyond any limit


def is_int(value: Any) -> bool:
    """Whether it is an integer; True is none."""
    return type(value) is int


def is_among(key: Any, ids: set[Any]) -> bool:
    """Whether it can be an id and is one of ``ids``."""
    return type(key) in (int, str) and key in ids


def are_numbers(values: Any) -> bool:
    """Whether it is a list of numbers that can be coordinates."""
    if type(values) is not list:
        return False
    for value in values:  # millions of boxes are read: all() would take twice as long
        if type(value) not in (int, float) or not -_LIMIT < value < _LIMIT:
            return False
    return True


def segmentation(value: Any) -> Any:
    """Polygons or RLE as Detectron2 takes them, or a ValueError."""
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        if are_numbers(size) and len(size) == 2 and all(is_int(x) and x > 0 for x in size):
            if isinstance(counts, str):
                return value
            if are_numbers(counts) and all(is_int(x) and x >= 0 for x in counts):
                return mask_util.frPyObjects(value, *size)
    elif isinstance(value, list) and all(
        are_numbers(polygon) and len(polygon) % 2 == 0 and len(polygon) >= 6 for polygon in value
    ):
        return value
    raise ValueError(
        f"segmentation is {value!r:.80}; expected polygons [x, y, x, y, x, y, ...] or an RLE "
        "object with size and counts"
    )
