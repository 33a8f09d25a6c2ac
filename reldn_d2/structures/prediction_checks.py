"""Checks of the arrays of a prediction, which come from models and from anyone's files.

Shapes: R entities, K relations of one image. Boxes are XYXY in absolute pixels.
"""

from typing import Any

import numpy as np

__all__ = ["check_attributes", "check_entities", "check_relations"]


def check_entities(
    boxes: Any, classes: Any, box_scores: Any, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (R, 4) float64 boxes, (R,) int32 classes and (R,) float64 scores.

    Args:
        boxes, classes, box_scores: arrays or lists.
        where: file and image, for messages.

    Raises:
        ValueError: shapes, types or lengths that do not fit, a box with x2 < x1 or y2 < y1, or a
            value that is not finite.
    """
    boxes = _array(boxes, "boxes", where, float, 4)
    classes = _array(classes, "classes", where, int)
    box_scores = _array(box_scores, "box scores", where, float)
    if not len(boxes) == len(classes) == len(box_scores):
        raise ValueError(
            f"{where}: {len(boxes)} boxes, {len(classes)} classes and {len(box_scores)} box "
            "scores; each box needs one class and one score."
        )
    inverted = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(axis=1))
    if len(inverted):
        raise ValueError(
            f"{where}: box {inverted[0]} is {boxes[inverted[0]].tolist()}, which ends before it "
            "begins. Boxes are [x1, y1, x2, y2] in pixels; convert [x, y, width, height] or "
            "[y1, x1, y2, x2], and sort the corners."
        )
    return boxes, classes, box_scores


def check_relations(
    pairs: Any, predicates: Any, scores: Any, predicate_scores: Any, num_boxes: int, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return (K, 2) int32 pairs, (K,) int32 predicates and (K,) float64 scores of both kinds.

    Args:
        pairs, predicates, scores: arrays or lists.
        predicate_scores: array or list, or None where unknown.
        num_boxes: R.
        where: file and image, for messages.

    Raises:
        ValueError: shapes, types or lengths that do not fit, an index outside the boxes, a value
            that is not finite, a pair of an entity with itself, or a triplet that is listed twice.
    """
    pairs = _array(pairs, "pairs", where, int, 2)
    predicates = _array(predicates, "predicates", where, int)
    scores = _array(scores, "scores", where, float)
    if not len(pairs) == len(predicates) == len(scores):
        raise ValueError(
            f"{where}: {len(pairs)} pairs, {len(predicates)} predicates and {len(scores)} triplet "
            "scores; each triplet needs one of each."
        )
    if predicate_scores is not None:
        predicate_scores = _array(predicate_scores, "predicate scores", where, float)
        if len(predicate_scores) != len(scores):
            raise ValueError(
                f"{where}: {len(predicate_scores)} predicate scores for {len(scores)} triplets."
            )
    outside = np.flatnonzero(((pairs < 0) | (pairs >= num_boxes)).any(axis=1))
    if len(outside):
        raise ValueError(
            f"{where}: pair {outside[0]} is {tuple(pairs[outside[0]].tolist())}, but there are "
            f"{num_boxes} boxes. Pairs are 0-based indices into the image's boxes: if boxes were "
            "dropped after the pairs were made, remap the pairs."
        )
    _check_distinct(pairs, predicates, num_boxes, where)
    return pairs, predicates, scores, predicate_scores


def check_attributes(
    ids: Any, scores: Any, num_entities: int, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return entity, id and score of the L predicted attributes of an image, (L,) each.

    Args:
        ids: for each entity the list of its attributes.
        scores: for each entity the list of their scores.
        num_entities: R.
        where: file and image, for messages.

    Raises:
        ValueError: lists that do not fit together, an attribute that an entity has twice, a
            negative id, or a score outside [0, 1].
    """
    for name, lists in (("attributes", ids), ("attribute scores", scores)):
        valid = isinstance(lists, (list, tuple)) and all(
            isinstance(x, (list, tuple)) for x in lists
        )
        if not valid or len(lists) != num_entities:
            raise ValueError(
                f"{where}: {name} are {lists!r:.60}; expected one list for each of the "
                f"{num_entities} boxes, [] for a box without."
            )
    lengths = [len(x) for x in ids]
    if lengths != [len(x) for x in scores]:
        raise ValueError(f"{where}: attributes and attribute scores differ in length.")
    entities = np.repeat(np.arange(num_entities), lengths)
    flat_ids = _array([x for part in ids for x in part], "attributes", where, int)
    flat_scores = _array([x for part in scores for x in part], "attribute scores", where, float)
    outside = np.flatnonzero((flat_scores < 0) | (flat_scores > 1))
    if len(outside):
        raise ValueError(
            f"{where}: an attribute of box {entities[outside[0]]} has the score "
            f"{flat_scores[outside[0]]}; expected a probability from 0 to 1."
        )
    if flat_ids.size and flat_ids.min() < 0:
        raise ValueError(f"{where}: attribute {flat_ids.min()} is negative; ids are 0-based.")
    for entity, part in enumerate(ids):
        if len(set(part)) < len(part):
            raise ValueError(
                f"{where}: the attributes {list(part)!r:.60} of box {entity} list one of them "
                "twice. List each once, with its best score."
            )
    return entities, flat_ids, flat_scores


def _check_distinct(pairs: np.ndarray, predicates: np.ndarray, num_boxes: int, where: str) -> None:
    """Raise if an entity is related to itself or a triplet is listed twice.

    A second copy is a false positive in average precision, and takes a rank of recall.
    """
    itself = np.flatnonzero(pairs[:, 0] == pairs[:, 1])
    if len(itself):
        raise ValueError(
            f"{where}: triplet {itself[0]} (subject {pairs[itself[0], 0]}, predicate "
            f"{predicates[itself[0]]}, object {pairs[itself[0], 1]}) relates an entity to itself. "
            "Subject and object are different entities; leave such triplets out."
        )
    codes = (predicates.astype(np.int64) * num_boxes + pairs[:, 0]) * num_boxes + pairs[:, 1]
    distinct, first = np.unique(codes, return_index=True)
    if len(distinct) < len(codes):
        is_copy = np.ones(len(codes), dtype=bool)
        is_copy[first] = False
        copy = int(np.argmax(is_copy))
        original = int(np.argmax(codes == codes[copy]))
        raise ValueError(
            f"{where}: triplet {copy} (subject {pairs[copy, 0]}, predicate {predicates[copy]}, "
            f"object {pairs[copy, 1]}) is listed before as triplet {original}, and {is_copy.sum()} "
            "of the image's triplets are such copies. List each once, with its best score."
        )


def _array(values: Any, name: str, where: str, kind: type, width: int = 0) -> np.ndarray:
    """Return an (L,) or (L, width) array, int32 or finite float64.

    Raises:
        ValueError: another shape or type, or NaN or infinity.
    """
    shape = {0: "a flat list", 2: "a list of [subject, object]", 4: "a list of [x1, y1, x2, y2]"}[
        width
    ]
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{where}: {name} differ in length; expected {shape}.") from error
    if array.size == 0:
        array = array.reshape((0, width) if width else (0,)).astype(kind)
    if array.ndim != (2 if width else 1) or (width and array.shape[1] != width):
        raise ValueError(f"{where}: {name} have the shape {array.shape}; expected {shape}.")
    if array.dtype.kind not in ("iu" if kind is int else "iuf"):
        wanted = "integers (0-based)" if kind is int else "numbers"
        raise ValueError(f"{where}: {name} are {str(array.tolist()):.60}; expected {wanted}.")
    if kind is int:
        limits = np.iinfo(np.int32)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise ValueError(f"{where}: {name} have values beyond 32 bits.")
        return array.astype(np.int32)
    array = array.astype(np.float64)
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        raise ValueError(
            f"{where}: NaN or infinite {name}, the first at index {int(wrong[0, 0])}. The model "
            "has diverged (lower the learning rate, check the losses) or its checkpoint is broken; "
            "in a file, leave out entries without a finite value."
        )
    return array
