"""Weights that have one part per class or predicate; reordering those of a detector by name.

Shapes: K classes of the checkpoint, A anchors per location.

========================================  ==========================  ==============================
Weight and bias of                        first dimension             order
========================================  ==========================  ==============================
``roi_heads.box_predictor.cls_score``     K + 1                       classes, then background
``roi_heads.box_predictor.bbox_pred``     4 K (4: class-agnostic)     four deltas per class
``roi_heads.mask_head.predictor``         K (1: class-agnostic)       classes
``head.cls_score`` (RetinaNet)            A K                         K classes per anchor
========================================  ==========================  ==============================

A cascade has several box predictors: ``roi_heads.box_predictor.0`` and so on.

The relation head's weights are never reordered, because a model keeps the order of its checkpoint.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

__all__ = [
    "class_weights",
    "model_zoo_classes",
    "num_classes_of",
    "relation_weights",
    "take_classes",
]

_BOX_PREDICTOR = r"roi_heads\.box_predictor\.(\d+\.)?"
_SCORES = re.compile(_BOX_PREDICTOR + r"cls_score\.(weight|bias)")
_BOXES = re.compile(_BOX_PREDICTOR + r"bbox_pred\.(weight|bias)")
_MASKS = re.compile(r"roi_heads\.mask_head\.predictor\.(weight|bias)")
_DENSE_SCORES = re.compile(r"head\.cls_score\.(weight|bias)")

# Weights of the relation head that depend on which classes or predicates it has, by the field of
# their names: the frequency table, the class embeddings, the last layer of each module, and the
# relations of each class and predicate.
_TABLE = r"relation_head\.semantic\.table\.weight"
_COUNTS = r"relation_head\.prior\.predicate_counts"
_RELATION_WEIGHTS = {
    "thing_classes": re.compile(
        rf"{_TABLE}|relation_head\.joint\.(subject|object)_(embedding\.weight|relations)"
        r"|relation_head\.context\.class_embedding\.weight"
    ),
    "predicate_classes": re.compile(
        rf"{_TABLE}|{_COUNTS}|relation_head\.(spatial\.4|joint\.layers\.6|visual\.rest\.3"
        r"|visual\.(subject|object)_skip)\.(weight|bias)"
    ),
    "attribute_classes": re.compile(r"relation_head\.attribute_head\.classifier\.(weight|bias)"),
}

# Parts of RelDN's own head, whose other weights do not depend on names. Of the weights of other
# heads, classifiers and contexts nothing is known, so all of them count as dependent.
_KNOWN = re.compile(
    r"relation_head\.(semantic\.(table|counted)|spatial\.(\d|feature_version)"
    r"|joint\.(layers|(subject|object)_(embedding|context|relations))"
    r"|visual\.(first|rest|subject_skip|object_skip)|(subject|object|predicate)_box_head"
    r"|attribute_head|prior|context_to_(subject|object)"
    r"|context\.(class_embedding|position|vectors|encoder|to_right|to_left))(\.|$)"
)

# Detectron2's detectors trained on COCO, by its own scheme or by the address that it stands for.
_COCO_ZOO = re.compile(r"(detectron2://|https?://dl\.fbaipublicfiles\.com/detectron2/)COCO-")


def class_weights(state: Mapping[str, Any]) -> list[str]:
    """Return the names of a detector's weights that have one part per class."""
    patterns = (_SCORES, _BOXES, _MASKS, _DENSE_SCORES)
    return [name for name in state if any(pattern.fullmatch(name) for pattern in patterns)]


def relation_weights(state: Mapping[str, Any], field: str) -> list[str]:
    """Return the names of the relation head's weights that depend on the names of a field.

    Args:
        state: weights by name.
        field: ``thing_classes``, ``predicate_classes`` or ``attribute_classes``.
    """

    def is_dependent(name: str) -> bool:
        of_other_head = name.startswith("relation_head.") and not _KNOWN.match(name)
        is_unknown = of_other_head and field != "attribute_classes"  # the attribute head's alone
        return is_unknown or _RELATION_WEIGHTS[field].fullmatch(name) is not None

    return [name for name in state if is_dependent(name)]


def num_classes_of(state: Mapping[str, Any]) -> int | None:
    """Return K; None if the weights are not those of a known detector."""
    for name, value in state.items():
        if _SCORES.fullmatch(name):
            return len(value) - 1
        if _DENSE_SCORES.fullmatch(name) and "head.bbox_pred.bias" in state:
            return len(value) // (len(state["head.bbox_pred.bias"]) // 4)  # 4 deltas per anchor
    return None


def model_zoo_classes(path: str, num_classes: int | None) -> list[str] | None:
    """Return the class names of a detector of Detectron2's model zoo.

    Args:
        path: path or URL of the checkpoint.
        num_classes: K.

    Returns:
        COCO's 80 classes in Detectron2's order for ``detectron2://COCO-*``; None for other paths
        and other numbers of classes.
    """
    names = [x["name"] for x in COCO_CATEGORIES if x["isthing"]]
    return names if _COCO_ZOO.match(path) and num_classes == len(names) else None


def take_classes(state: dict[str, Tensor], indices: Sequence[int], num_classes: int) -> None:
    """Reorder the class weights of a detector, or take those of some classes; in place.

    Args:
        state: weights of the checkpoint by name.
        indices: for each class of the model its index in the checkpoint.
        num_classes: K.
    """
    for name in class_weights(state):
        value = state[name]
        if _SCORES.fullmatch(name):
            state[name] = value[[*indices, num_classes]]
        elif _DENSE_SCORES.fullmatch(name):
            # (A K, ...) -> (A, K, ...): the logits of an anchor are adjacent.
            by_anchor = value.reshape(-1, num_classes, *value.shape[1:])
            state[name] = by_anchor[:, list(indices)].flatten(0, 1)
        elif len(value) > (4 if _BOXES.fullmatch(name) else 1):  # else class-agnostic
            by_class = value.reshape(num_classes, -1, *value.shape[1:])
            state[name] = by_class[list(indices)].flatten(0, 1)
