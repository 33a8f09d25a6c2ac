"""The pickles that other programs write for their predictions, read without executing them.

==========  ================================  ====================================================
Format      File                              Content
==========  ================================  ====================================================
tang        ``eval_results.pytorch``          ``torch.save`` of ``{"predictions": [BoxList, ...]}``
motifs      a pickle                          list of dicts with ``pred_rel_inds``, ``rel_scores``
released    ``rel_detections.pkl``            list of dicts with ``prd_scores`` of each pair
==========  ================================  ====================================================

Shape shorthand: R boxes, K pairs, P predicates of one image.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..utils.safe_pickle import Record, read_pickle

__all__ = ["IMPORT_FORMATS", "PickledImage", "require_equal_lengths"]

_TANG_FIELDS = ("pred_labels", "pred_scores", "rel_pair_idxs", "pred_rel_scores")


class PickledImage(NamedTuple):
    """One image of a file."""

    boxes: np.ndarray  # (R, 4) XYXY
    classes: np.ndarray  # (R,) as in the file
    box_scores: np.ndarray  # (R,)
    pairs: np.ndarray  # (K, 2)
    predicate_scores: np.ndarray  # (K, P + 1), "no relationship" first
    frame: tuple[float, float] | None = None  # width and height of the boxes' frame; None: image
    name: str | None = None  # of the image's file
    num_true_boxes: int | None = None


def _read_tang(file: str) -> list[PickledImage]:
    content = read_pickle(file, records=("BoxList",))
    predictions = content.get("predictions") if isinstance(content, dict) else content
    truth = content.get("groundtruths") if isinstance(content, dict) else None
    if not isinstance(predictions, list):
        raise ValueError(
            f'{file}: found a {type(content).__name__}; expected {{"predictions": [BoxList, ...]}}.'
        )
    if not isinstance(truth, list) or len(truth) != len(predictions):
        truth = [None] * len(predictions)
    images = []
    for index, (prediction, true_boxes) in enumerate(zip(predictions, truth)):
        where = f"{file}, predictions[{index}]"
        fields = vars(prediction) if isinstance(prediction, Record) else {}
        extra = fields.get("extra_fields")
        _require(where, fields, ("bbox", "size", "mode"))
        _require(where, extra, _TANG_FIELDS)
        boxes = _array(fields["bbox"], "bbox", where, 4).astype(np.float64)
        if fields["mode"] == "xywh":  # as BoxList converts it: the last pixel belongs to the box
            boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - 1], axis=1)
        elif fields["mode"] != "xyxy":
            raise ValueError(f"{where}: mode is {fields['mode']!r:.40}; expected xyxy or xywh.")
        size = fields["size"]
        if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(x > 0 for x in size):
            raise ValueError(f"{where}: size is {size!r:.60}; expected (width, height).")
        true_boxes = vars(true_boxes).get("bbox") if isinstance(true_boxes, Record) else None
        images.append(
            PickledImage(
                boxes,
                *(_array(extra[key], key, where) for key in _TANG_FIELDS[:2]),
                *(_array(extra[key], key, where, 2) for key in _TANG_FIELDS[2:3]),
                _array(extra["pred_rel_scores"], "pred_rel_scores", where, None),
                frame=(float(size[0]), float(size[1])),
                num_true_boxes=len(true_boxes) if torch.is_tensor(true_boxes) else None,
            )
        )
    return images


def _read_motifs(file: str) -> list[PickledImage]:
    images = []
    for index, record in enumerate(_list_of_dicts(file)):
        where = f"{file}, image {index}"
        boxes = record.get("pred_boxes", record.get("boxes"))
        fields = {**record, "pred_boxes": boxes}
        keys = ("pred_boxes", "pred_classes", "obj_scores", "pred_rel_inds", "rel_scores")
        _require(where, fields, keys)
        columns = (4, 0, 0, 2, None)
        images.append(
            PickledImage(*(_array(fields[k], k, where, n) for k, n in zip(keys, columns)))
        )
    return images


def _read_released(file: str) -> list[PickledImage]:
    """Each pair has its own two boxes; equal boxes with the same class and score are one entity."""
    images = []
    for index, record in enumerate(_list_of_dicts(file)):
        where = f"{file}, image {index}"
        fields = {key.removeprefix("det_"): x for key, x in record.items() if isinstance(key, str)}
        ends = []
        for role in ("sbj", "obj"):
            # `sbj_boxes` as the file has it, or `det_boxes_sbj` as its evaluation calls it
            keys = []
            for what in ("boxes", "labels", "scores"):
                other = f"{what}_{role}"
                keys.append(other if other in fields else f"{role}_{what}")
            _require(where, fields, keys)
            boxes, *rest = (_array(fields[k], k, where, n) for k, n in zip(keys, (4, 0, 0)))
            require_equal_lengths(where, dict(zip(keys, (boxes, *rest))))
            ends.append(np.concatenate([boxes, *(x[:, None] for x in rest)], axis=1))
        key = next(
            (x for x in ("prd_scores_ttl", "prd_scores", "scores_prd") if x in fields), "prd_scores"
        )
        _require(where, fields, (key,))
        scores = _array(fields[key], key, where, None)
        require_equal_lengths(where, {"sbj_boxes": ends[0], "obj_boxes": ends[1], key: scores})
        entities, codes = np.unique(np.concatenate(ends), axis=0, return_inverse=True)
        entities = entities.astype(np.float64).reshape(-1, 6)
        pairs = codes.reshape(2, -1).T
        images.append(
            PickledImage(
                entities[:, :4],
                entities[:, 4].astype(np.int64),
                entities[:, 5],
                pairs,
                scores,
                name=fields["image"] if isinstance(fields.get("image"), str) else None,
            )
        )
    return images


IMPORT_FORMATS: dict[str, Callable[[str], list[PickledImage]]] = {
    "tang": _read_tang,
    "motifs": _read_motifs,
    "released": _read_released,
}


def _list_of_dicts(file: str) -> list[dict[str, Any]]:
    content = read_pickle(file)
    if not isinstance(content, list):
        raise ValueError(f"{file}: found a {type(content).__name__}; expected a list of images.")
    for index, record in enumerate(content):
        if not isinstance(record, dict):
            raise ValueError(f"{file}, image {index} is {record!r:.80}; expected a dict.")
    return content


def _require(where: str, fields: Any, keys: Sequence[str]) -> None:
    missing = [k for k in keys if not isinstance(fields, Mapping) or fields.get(k) is None]
    if missing:
        found = sorted(map(str, fields)) if isinstance(fields, Mapping) else []
        raise ValueError(
            f"{where}: no {', '.join(missing)}; it has {', '.join(found)[:200] or 'no fields'}. Is "
            "it a file of another format, or an evaluation without relations?"
        )


def require_equal_lengths(where: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if arrays, by name, differ in length."""
    if len({len(x) for x in arrays.values()}) > 1:
        found = ", ".join(f"{len(x)} {key}" for key, x in arrays.items())
        raise ValueError(f"{where}: {found}; expected as many of each.")


def _array(value: Any, name: str, where: str, columns: int | None = 0) -> np.ndarray:
    """Return an (L,) array, or (L, columns), where None means any number of columns."""
    if torch.is_tensor(value):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{where}: {name} is ragged ({error}).") from error
    if array.size == 0:
        width = array.shape[-1] if columns is None and array.ndim == 2 else columns or 0
        array = np.zeros((0,) if columns == 0 else (0, width))
    is_flat = columns == 0
    if (
        array.dtype.kind not in "iuf"
        or array.ndim != (1 if is_flat else 2)
        or (columns and array.shape[1] != columns)
    ):
        shape = "(n,)" if is_flat else f"(n, {columns or 'predicates + 1'})"
        raise ValueError(
            f"{where}: {name} has the shape {array.shape} and the type {array.dtype}; expected "
            f"numbers of the shape {shape}."
        )
    return array
