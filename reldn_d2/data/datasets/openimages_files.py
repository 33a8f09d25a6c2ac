"""Read the CSV files of OpenImages' visual relationships and check them line by line."""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .io import Problems, read_csv, read_names, require_file
from .relationship_list import AnnotatedEntity, RelationshipList

__all__ = [
    "Vocabulary",
    "read_image_list",
    "read_openimages_relationships",
    "read_verified_labels",
]

logger = logging.getLogger(__name__)

_ATTRIBUTE_PREDICATE = "is"
_COORDINATES = ("XMin1", "XMax1", "YMin1", "YMax1", "XMin2", "XMax2", "YMin2", "YMax2")
_COLUMNS = ("ImageID", "LabelName1", "LabelName2", *_COORDINATES, "RelationshipLabel")
_LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")
_TOLERANCE = 0.01  # a normalized coordinate may be outside [0, 1] by this much; it is clipped


class Vocabulary(NamedTuple):
    """0-based ids of labels and predicates, in the order of the files."""

    classes: dict[str, int]
    class_names: list[str]
    attributes: dict[str, int]
    attribute_names: list[str]
    predicates: dict[str, int]
    classes_csv: str
    attributes_csv: str

    @classmethod
    def read(
        cls, classes_csv: str, attributes_csv: str | None, predicate_classes: Sequence[str]
    ) -> "Vocabulary":
        """Read the files of classes and attributes; see :func:`load_openimages_vrd`."""
        classes = read_names(classes_csv, "OpenImages classes (label, name)")
        attributes = {}
        if attributes_csv is not None:
            attributes = read_names(attributes_csv, "OpenImages attributes (label, name)")
        return cls(
            {label: index for index, label in enumerate(classes)},
            list(classes.values()),
            {label: index for index, label in enumerate(attributes)},
            list(attributes.values()),
            {name: index for index, name in enumerate(predicate_classes)},
            classes_csv,
            str(attributes_csv),
        )

    def names(self, attributes_as_relations: bool) -> dict[str, list[str]]:
        """Return the metadata of a dataset."""
        return {
            "thing_classes": self.class_names
            + (self.attribute_names if attributes_as_relations else []),
            "predicate_classes": list(self.predicates)
            + ([_ATTRIBUTE_PREDICATE] if attributes_as_relations else []),
            "attribute_classes": self.attribute_names,
        }


def read_image_list(path: str) -> list[str]:
    """Read image ids from a text file with one per line, with or without ``.jpg``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, or a line is not a single image id, or repeats one.
    """
    require_file(path, "The list of images")
    lines: dict[str, int] = {}
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, start=1):
            try:
                name = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                name = "\0"
            if not name or name.startswith("#"):
                continue
            name = name.removesuffix(".jpg")
            if not name.isprintable() or any(x in name for x in " ,/\\"):
                raise ValueError(
                    f"{path}, line {line_number}: {line!r:.80} is not an image id. Expected a "
                    "text file with one id per line, such as 0a1b2c3d4e5f6a7b."
                )
            if name in lines:
                raise ValueError(
                    f"{path}, line {line_number}: {name} is in line {lines[name]} already. Remove "
                    "one of them."
                )
            lines[name] = line_number
    if not lines:
        raise ValueError(f"{path}: the file lists no image. Expected one image id per line.")
    return list(lines)


def read_openimages_relationships(
    relations_csv: str,
    vocabulary: Vocabulary,
    image_ids: Sequence[str] | None = None,
    *,
    only_known: bool = False,
    attributes_as_relations: bool = False,
) -> dict[str, RelationshipList]:
    """Read only the rows, which needs no images. Boxes are relative to the image size.

    Args:
        relations_csv: see :func:`load_openimages_vrd`.
        vocabulary: ids of classes, attributes and predicates.
        image_ids: images to read; all when None.
        only_known: see :func:`load_openimages_vrd`.
        attributes_as_relations: see :func:`load_openimages_vrd`.

    Returns:
        Relationships by image id.

    Raises:
        ValueError: with file and line of the first invalid row; all of them are in the error's
            ``problems``.
    """
    problems = Problems()
    lists = {image_id: RelationshipList() for image_id in image_ids or ()}
    reader = _RowReader(relations_csv, vocabulary)
    unknown: list[str] = []
    unlisted = _UnlistedNames()
    without_attributes = rows = 0
    what = "relationships of OpenImages"
    for line, row in read_csv(relations_csv, _COLUMNS, what, problems):
        image_id, predicate = row[0], row[-1]
        if image_ids is not None and image_id not in lists:
            continue
        rows += 1
        is_attribute = predicate == _ATTRIBUTE_PREDICATE and predicate not in vocabulary.predicates
        if is_attribute and not vocabulary.attributes:
            without_attributes += 1
            continue
        try:
            subject, second, object_ = reader.read(line, row, is_attribute)
        except _UnknownName as error:
            unlisted.add(error)
            (unknown.append if only_known else problems.add)(str(error))
            continue
        except ValueError as error:
            problems.add(str(error))
            continue
        relationships = lists.get(image_id)
        if relationships is None:
            relationships = lists[image_id] = RelationshipList()
        if not is_attribute:
            relationships.add(subject, object_, second, f"line {line}")
            continue
        relationships.add_attribute(subject, second)
        if attributes_as_relations:
            attribute = AnnotatedEntity(len(vocabulary.classes) + second, subject.box)
            relationships.add(subject, attribute, len(vocabulary.predicates), f"line {line}")
    problems.raise_any()
    if rows and len(unknown) + without_attributes == rows:
        raise ValueError(unlisted.message(relations_csv, rows, without_attributes, vocabulary))
    if not lists:
        raise ValueError(f"{relations_csv}: the file has no relationship. Download it again.")
    _warn(relations_csv, reader.empty, "boxes without area are kept; training skips them")
    _warn(relations_csv, unknown, "rows with unlisted names were skipped (only_known)")
    if without_attributes:
        logger.warning(
            f"{relations_csv}: {without_attributes} rows with attributes ('is') were skipped, "
            "because no list of attributes was given (attributes_csv)."
        )
    return lists


def _warn(source: str, cases: Sequence[str], what: str) -> None:
    if cases:
        logger.warning(f"{source}: {len(cases)} {what}; the first: {cases[0]}")


class _UnknownName(ValueError):
    """A class, attribute or predicate that is not in the lists."""

    def __init__(self, message: str, what: str, name: str) -> None:
        super().__init__(message)
        self.what = what
        self.name = name


class _UnlistedNames:
    """The first names that are not in the lists, for the error when no row can be used."""

    _SHOWN = 5

    def __init__(self) -> None:
        self.met: dict[str, dict[str, None]] = {}  # by "class", "attribute", "predicate"; ordered

    def add(self, error: _UnknownName) -> None:
        """Remember a name."""
        names = self.met.setdefault(error.what, {})
        if len(names) <= self._SHOWN:
            names[error.name] = None

    def message(
        self, source: str, rows: int, without_attributes: int, vocabulary: Vocabulary
    ) -> str:
        """Say which names all rows have and which ones were expected."""
        expected = {
            "class": (vocabulary.classes, vocabulary.classes_csv),
            "attribute": (vocabulary.attributes, vocabulary.attributes_csv),
            "predicate": (vocabulary.predicates, "predicate_classes"),
        }
        parts = [
            f"met {what} {self._first(names)}; expected {self._first(expected[what][0])} "
            f"({len(expected[what][0])} in {expected[what][1]})"
            for what, names in self.met.items()
        ]
        if without_attributes:
            parts.append(
                f"{without_attributes} rows have attributes ('is'), and no list of attributes was "
                "given (attributes_csv)"
            )
        return (
            f"{source}: none of its {rows} rows can be used: {'; '.join(parts)}. Use the lists "
            "that belong to this file."
        )

    def _first(self, names: Iterable[str]) -> str:
        names = list(names)
        shown = ", ".join(f"'{name:.80}'" for name in names[: self._SHOWN])
        return f"{shown}, ..." if len(names) > self._SHOWN else shown


class _RowReader:
    """Checks and reads rows of a CSV file of relationships."""

    def __init__(self, source: str, vocabulary: Vocabulary) -> None:
        self.source = source
        self.vocabulary = vocabulary
        self.empty: list[str] = []  # boxes without area

    def read(
        self, line: int, row: Sequence[str], is_attribute: bool
    ) -> tuple[AnnotatedEntity, int, AnnotatedEntity | None]:
        """Return (subject, predicate, object), or (entity, attribute, None), from _COLUMNS."""
        names = self.vocabulary
        category = self._id(line, row[1], names.classes, "class", names.classes_csv)
        subject = AnnotatedEntity(category, self._box(line, row[3:7]))
        if is_attribute:
            files = names.attributes_csv
            return subject, self._id(line, row[2], names.attributes, "attribute", files), None
        category = self._id(line, row[2], names.classes, "class", names.classes_csv)
        predicate = self._id(line, row[-1], names.predicates, "predicate", "the predicates")
        return subject, predicate, AnnotatedEntity(category, self._box(line, row[7:11]))

    def _id(self, line: int, name: str, ids: dict[str, int], what: str, source: str) -> int:
        identifier = ids.get(name)
        if identifier is None:
            raise _UnknownName(
                f"{self.source}, line {line}: {what} {name!r:.80} is not one of the {len(ids)} "
                f"in {source}. Use the lists that belong to this file, or skip such rows "
                "(only_known).",
                what,
                name,
            )
        return identifier

    def _box(self, line: int, values: Sequence[str]) -> tuple[float, float, float, float]:
        try:
            x0, x1, y0, y1 = map(float, values)
        except ValueError:
            raise ValueError(
                f"{self.source}, line {line}: box {', '.join(values)!r:.120}; expected four "
                "numbers XMin, XMax, YMin, YMax."
            ) from None
        low, high = -_TOLERANCE, 1 + _TOLERANCE
        if not (low <= x0 <= x1 <= high and low <= y0 <= y1 <= high):
            raise ValueError(
                f"{self.source}, line {line}: box {', '.join(values)}; expected XMin <= XMax and "
                "YMin <= YMax between 0 and 1, relative to the image. Fix or remove this line."
            )
        x0, x1, y0, y1 = (min(max(value, 0.0), 1.0) for value in (x0, x1, y0, y1))
        if x0 == x1 or y0 == y1:
            self.empty.append(f"line {line}: {', '.join(values)}")
        return x0, y0, x1, y1


def read_verified_labels(
    labels_csv: str, classes: dict[str, int], image_ids: Iterable[str]
) -> dict[str, dict[int, int]]:
    """Read image-level labels verified by people.

    Args:
        labels_csv: see :func:`load_openimages_vrd`.
        classes: id of each label; other labels are skipped, because no box can have them.
        image_ids: images to read.

    Returns:
        For each image with labels: 1 or 0 by class.

    Raises:
        ValueError: with file and line of the first invalid row.
    """
    problems = Problems()
    selected = frozenset(image_ids)
    labels: dict[str, dict[int, int]] = {}
    what = "verified image-level labels of OpenImages"
    for line, (image_id, label, confidence) in read_csv(labels_csv, _LABEL_COLUMNS, what, problems):
        category = classes.get(label)
        if category is None or image_id not in selected:
            continue
        try:
            value = float(confidence)
        except ValueError:
            value = None
        if value not in (0.0, 1.0):
            problems.add(
                f"{labels_csv}, line {line}: Confidence is {confidence!r:.40}; expected 1 (a "
                "person has verified that the class is in the image) or 0 (that it is not)."
            )
            continue
        values = labels.setdefault(image_id, {})
        if values.setdefault(category, int(value)) != int(value):
            problems.add(
                f"{labels_csv}, line {line}: {label} is both 1 and 0 for image {image_id}. Remove "
                "one of the lines."
            )
    problems.raise_any()
    return labels
