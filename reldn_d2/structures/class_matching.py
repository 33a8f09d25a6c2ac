"""Finding a model's classes by the names that anyone's detector uses, with a table of synonyms.

A name is looked up in this order; the first rule that applies decides:

1. the exact name;
2. the same name apart from case, spaces, hyphens and underscores: ``Traffic-Light``;
3. another name of the same thing (:data:`SAME_THING`): ``couch`` for a model with ``sofa``;
4. the more general name (:data:`MORE_GENERAL`): ``dining table`` for a model with ``table``.

A rule that fits several classes of the model does not decide between them: the name then counts as
unknown.
"""

import difflib
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

__all__ = ["MORE_GENERAL", "SAME_THING", "find_class", "leave_out_unknown", "similar_names"]

logger = logging.getLogger(__name__)

# Names of the same thing, in the vocabularies of COCO, Pascal VOC, OpenImages, LVIS and VRD.
SAME_THING = (
    ("airplane", "aeroplane"),
    ("bicycle", "bike"),
    ("cell phone", "mobile phone"),
    ("computer keyboard", "keyboard"),
    ("computer monitor", "monitor", "tv monitor"),
    ("computer mouse", "mouse"),
    ("couch", "sofa"),
    ("donut", "doughnut"),
    ("fire hydrant", "hydrant"),
    ("fridge", "refrigerator"),
    ("garbage can", "trash can", "waste container"),
    ("glasses", "eyeglasses", "spectacles"),
    ("motorcycle", "motorbike"),
    ("person", "human"),
    ("potted plant", "houseplant"),
    ("tap", "faucet"),
    ("television", "tv"),
)

# A name and the more general one that is used if the model does not have the first.
MORE_GENERAL = {
    "airplane": "plane",
    "aeroplane": "plane",
    "backpack": "bag",
    "boy": "person",
    "cell phone": "phone",
    "coffee table": "table",
    "dining table": "table",
    "football": "ball",
    "girl": "person",
    "handbag": "bag",
    "houseplant": "plant",
    "man": "person",
    "mobile phone": "phone",
    "potted plant": "plant",
    "sofa bed": "sofa",
    "sports ball": "ball",
    "television": "monitor",  # VRD and COCO have one class for both screens
    "tennis ball": "ball",
    "tv": "monitor",
    "woman": "person",
}


def _key(name: str) -> str:
    """Return what is compared: case, spaces, hyphens and underscores are ignored."""
    return re.sub(r"[\s_-]+", "", name.casefold())


_SAME = {_key(name): [_key(x) for x in group] for group in SAME_THING for name in group}
_GENERAL = {_key(name): _key(general) for name, general in MORE_GENERAL.items()}


@lru_cache(maxsize=16)
def _ids_by_key(names: tuple[str, ...]) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {}
    for class_id, name in enumerate(names):
        ids.setdefault(_key(name), []).append(class_id)
    return ids


@lru_cache(maxsize=4096)
def _find(name: str, names: tuple[str, ...]) -> int | None:
    """Look up a name; log once which class stands for a name that the model does not have."""
    if name in names:
        return names.index(name)
    ids, key = _ids_by_key(names), _key(name)
    same = [x for x in _SAME.get(key, []) if x != key]
    for keys in ([key], same, [_GENERAL[key]] if key in _GENERAL else []):
        found = [class_id for x in keys for class_id in ids.get(x, [])]
        if len(found) > 1:
            candidates = ", ".join(f"'{names[x]}'" for x in found)
            logger.warning(f"class '{name}' may be any of the model's {candidates}: not matched.")
            return None
        if found:
            logger.info(f"class '{name}' is taken as the model's '{names[found[0]]}'.")
            return found[0]
    return None


def find_class(name: str, names: Sequence[str]) -> int | None:
    """Return the id of the class that a name means; None if there is none, or not exactly one.

    Args:
        name: as a detector calls it.
        names: the model's class names by id.
    """
    return _find(name, tuple(names))


def similar_names(name: str, names: Sequence[str], min_ratio: float = 0.6) -> str:
    """Return up to three of the names that a misspelled one may mean, for messages; or "".

    Args:
        name: that the model does not have.
        names: the model's class names.
        min_ratio: of similarity, see ``difflib.get_close_matches``.
    """
    by_key = {_key(x): x for x in names}
    similar = difflib.get_close_matches(_key(name), by_key, n=3, cutoff=min_ratio)
    return " or ".join(f"'{by_key[key]}'" for key in similar)


def leave_out_unknown(
    entities: Mapping[str, Any],
    names: Sequence[str],
    where: str,
    reported: set[str] | None = None,
) -> tuple[dict[str, Any], dict[int, str]]:
    """Leave out the entities whose class name the model does not know, and log their count.

    Args:
        entities: ``boxes``, ``classes`` and ``scores`` of R entities; any of them may be missing or
            None. Classes that are ids and not names stay.
        names: the model's class names by id.
        where: image, for the log.
        reported: class names that were reported before; the new ones are added. Without new ones
            nothing is logged, so that a video does not repeat the same line for each frame.

    Returns:
        the other entities, and the class names of those left out by their index in ``entities``.
    """
    entities = dict(entities)
    classes = entities.get("classes")
    if not isinstance(classes, (list, tuple)) and not hasattr(classes, "tolist"):
        return entities, {}
    classes = classes.tolist() if hasattr(classes, "tolist") else list(classes)
    left_out = {
        index: name
        for index, name in enumerate(classes)
        if isinstance(name, str) and find_class(name, names) is None
    }
    values = {key: x for key, x in entities.items() if x is not None}
    # Lists of other lengths cannot be filtered by index; the checks that follow report them.
    if not left_out or any(
        not hasattr(x, "__len__") or len(x) != len(classes) for x in values.values()
    ):
        return entities, {}
    kept = [index for index in range(len(classes)) if index not in left_out]
    reported = set() if reported is None else reported
    counts = Counter(left_out.values())
    if counts.keys() - reported:
        reported.update(counts)
        # Strict: another detector's classes are names of other things, not misspelled ones.
        similar = {name: similar_names(name, names, min_ratio=0.8) for name in counts}
        shown = [
            f"{n} x {name}" + (f" (did you mean {similar[name]}?)" if similar[name] else "")
            for name, n in counts.most_common()
        ]
        logger.warning(
            f"{where}: left out {len(left_out)} of {len(classes)} boxes, whose classes the model "
            f"does not have: {', '.join(shown)}"
        )
    for key, x in values.items():
        is_list = isinstance(x, (list, tuple))
        entities[key] = [x[index] for index in kept] if is_list else x[kept]
    return entities, left_out
