"""Names of classes, predicates and entities in pictures, graphs, files and messages."""

import re
from collections.abc import Sequence

import numpy as np

__all__ = ["class_name", "name_entities", "one_line", "table_cell", "with_attributes"]

_ATTRIBUTES_SHOWN = 3
_BREAKS = re.compile(r"\s*[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]\s*")


def one_line(text: str) -> str:
    """Replace line breaks and tabs, with the spaces around them, by one space."""
    return _BREAKS.sub(" ", text).strip()


def class_name(index: int, names: Sequence[str], kind: str = "class") -> str:
    """Return the name of a class or predicate, or ``class 7`` if it has none."""
    return names[index] if 0 <= index < len(names) else f"{kind} {index}"


def table_cell(name: str) -> str:
    """Return a name as the text of one cell of a Markdown table.

    A ``|`` would start another cell and a line break another row.
    """
    return one_line(name).replace("|", "\\|")


def with_attributes(name: str, attributes: Sequence[str]) -> str:
    """Return the name of an entity with its first three attributes: ``cup 2 (red, wooden)``."""
    if not attributes:
        return name
    shown = [*attributes[:_ATTRIBUTES_SHOWN], *(["..."] if attributes[_ATTRIBUTES_SHOWN:] else [])]
    return f"{name} ({', '.join(shown)})"


def name_entities(
    boxes: np.ndarray, classes: Sequence[int], entities: Sequence[int], class_names: Sequence[str]
) -> dict[int, str]:
    """Name entities by class, with an ordinal from left to right if a class occurs repeatedly.

    Args:
        boxes: (R, 4).
        classes: (R,) class ids.
        entities: indices of the entities to name.
        class_names: names by class id, see :func:`class_name`.

    Returns:
        name by entity, such as ``cup 2``.
    """
    members: dict[int, list[int]] = {}
    for entity in entities:
        members.setdefault(int(classes[entity]), []).append(entity)
    names = {}
    for class_id, same_class in members.items():
        name = class_name(class_id, class_names)
        mark = "" if 0 <= class_id < len(class_names) else "#"  # "class 7 #2", not "class 7 2"
        same_class = sorted(
            same_class, key=lambda e: (boxes[e][0] + boxes[e][2], boxes[e][1] + boxes[e][3], e)
        )
        for ordinal, entity in enumerate(same_class, start=1):
            names[entity] = f"{name} {mark}{ordinal}" if len(same_class) > 1 else name
    return names
