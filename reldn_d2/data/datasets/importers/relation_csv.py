"""Import a CSV file with one relation per row.

The columns are those of :data:`COLUMNS`, in any order, and optionally ``width`` and ``height`` of
the image. Boxes are absolute pixels, continuous. The entities of an image are its distinct
(class, box) combinations. A row without predicate and object adds an entity without a relation,
and one that names only an image adds that image.
"""

from ..io import csv_rows, read_csv
from .relation_import import Imported, ImportedImage, ImportOptions, RelationImport

__all__ = ["COLUMNS", "read_relation_csv"]

_SIDES = ("x1", "y1", "x2", "y2")
_WHAT = "relations, one per row"
COLUMNS = (
    *("image", "subject", *(f"subject_{side}" for side in _SIDES)),
    *("predicate", "object", *(f"object_{side}" for side in _SIDES)),
)
_SIZE = ("width", "height")

_Entity = tuple[str, tuple[float, ...], int]  # class, box, 1 for a second entity with both


def read_relation_csv(path: str, options: ImportOptions) -> Imported:
    """Read the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or unknown, or a row is invalid; names the line.
    """
    _, header = next(csv_rows(path, _WHAT), (1, list(COLUMNS)))
    unknown = [x for x in header if x not in (*COLUMNS, *_SIZE, *options.ignore)]
    if unknown:
        raise ValueError(
            f"{path}, line 1: unknown column {unknown[0]!r}; known are {', '.join(COLUMNS)} and "
            f"{', '.join(_SIZE)}. If it can be ignored, pass --ignore {unknown[0]}."
        )
    sized = any(x in header for x in _SIZE)
    columns = (*COLUMNS, *(_SIZE if sized else ()))
    imported = RelationImport(path, options)
    images: dict[str, ImportedImage | None] = {}  # None: invalid and reported
    for line, values in read_csv(path, columns, _WHAT, imported.problems):
        row = dict(zip(columns, (value.strip() for value in values)))
        name = row["image"]
        if name not in images:
            images[name] = None
            with imported.record(f"line {line}"):
                size = [_pixels(row[x], x) for x in reversed(_SIZE)] if sized else []
                images[name] = imported.add_image(name, name, *size)
        image = images[name]
        if image is None:
            continue
        with imported.record(f"line {line}"):
            if sized and any(_pixels(row[x], x) != image.record[x] for x in _SIZE):
                raise ValueError(
                    f"the size {row['width']} x {row['height']} of image {name!r:.80} is "
                    f"{image.record['width']} x {image.record['height']} in an earlier row"
                )
            _add_row(imported, image, row)
    return imported.finish()


def _add_row(imported: RelationImport, image: ImportedImage, row: dict[str, str]) -> None:
    """Add the entities and the relation of a row."""
    subject = _entity(row, "subject")
    object_ = _entity(row, "object")
    if object_ is None and not row["predicate"]:
        if subject is not None:
            _add_entity(imported, image, subject)
        return
    if subject is None or object_ is None or not row["predicate"]:
        empty = [x for x in ("subject", "predicate", "object") if not row[x]]
        raise ValueError(
            f"no {', '.join(empty)}; expected subject, predicate and object, the subject alone, or "
            "none of them"
        )
    imported.predicate(row["predicate"])  # check the names before anything of the row is added
    imported.category(object_[0])
    if object_ == subject:  # two entities of one group, which one box is around
        object_ = (*object_[:2], 1)
    for entity in (subject, object_):
        _add_entity(imported, image, entity)
    imported.add_relation(image, subject, object_, row["predicate"])


def _entity(row: dict[str, str], role: str) -> _Entity | None:
    """Return the entity of one end; None if all its columns are empty."""
    sides = [row[f"{role}_{side}"] for side in _SIDES]
    if not row[role] and not any(sides):
        return None
    if not row[role]:
        raise ValueError(f"the {role} has a box but no class")
    return row[role], tuple(_number(x, role, side) for x, side in zip(sides, _SIDES)), 0


def _number(text: str, role: str, side: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{role}_{side} is {text!r:.40}; expected a number") from None


def _add_entity(imported: RelationImport, image: ImportedImage, entity: _Entity) -> None:
    if entity not in image:
        image.add_entity(entity, imported.category(entity[0]), entity[1])


def _pixels(text: str, column: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{column} is {text!r:.40}; expected an integer above 0, in pixels")
    return int(text)
