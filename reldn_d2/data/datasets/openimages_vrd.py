"""OpenImages visual relationships, from the CSV files of the challenge 2018 and of V6."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from .catalog import register_dataset
from .entities import Entity, RelationshipList, report_merging
from .files import Problems, find_images, read_csv, read_names, require_path
from .image_sizes import image_sizes

__all__ = [
    "OPENIMAGES_PREDICATES",
    "load_openimages_vrd",
    "read_image_list",
    "read_openimages_relationships",
    "read_verified_labels",
    "register_openimages_vrd",
]

logger = logging.getLogger(__name__)

# Between boxes; "is", between a box and its attribute, is none of them.
OPENIMAGES_PREDICATES = (
    "at",
    "on",
    "holds",
    "plays",
    "interacts_with",
    "wears",
    "inside_of",
    "under",
    "hits",
)
_ATTRIBUTE_PREDICATE = "is"
_COORDINATES = ("XMin1", "XMax1", "YMin1", "YMax1", "XMin2", "XMax2", "YMin2", "YMax2")
_COLUMNS = ("ImageID", "LabelName1", "LabelName2", *_COORDINATES, "RelationshipLabel")
_LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")
_ROUNDING = 0.01  # what a normalised coordinate may lie outside [0, 1]; it is clipped


class _Vocabulary(NamedTuple):
    """Numbers of names; the order of the files is that of the numbers."""

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
    ) -> "_Vocabulary":
        classes = read_names(classes_csv, "OpenImages classes: label, name")
        attributes = {}
        if attributes_csv is not None:
            attributes = read_names(attributes_csv, "OpenImages attributes: label, name")
        return cls(
            {label: number for number, label in enumerate(classes)},
            list(classes.values()),
            {label: number for number, label in enumerate(attributes)},
            list(attributes.values()),
            {name: number for number, name in enumerate(predicate_classes)},
            classes_csv,
            str(attributes_csv),
        )

    def names(self, attributes_as_relations: bool) -> dict[str, list[str]]:
        """Metadata of a data set."""
        return {
            "thing_classes": self.class_names
            + (self.attribute_names if attributes_as_relations else []),
            "predicate_classes": list(self.predicates)
            + ([_ATTRIBUTE_PREDICATE] if attributes_as_relations else []),
            "attribute_classes": self.attribute_names,
        }


def load_openimages_vrd(
    relations_csv: str,
    image_root: str,
    classes_csv: str,
    attributes_csv: str | None = None,
    *,
    labels_csv: str | None = None,
    image_list: str | None = None,
    predicate_classes: Sequence[str] = OPENIMAGES_PREDICATES,
    only_known: bool = False,
    attributes_as_relations: bool = False,
    merge_duplicates: bool = True,
) -> list[dict[str, Any]]:
    """Load OpenImages relationships as Detectron2 dataset dicts with ``"relations"``.

    The entities of an image are the distinct (class, box) of its rows. Rows with ``is`` give their
    entity an attribute: ``annotations[i]["attributes"]`` is the list of their numbers.

    Args:
        relations_csv: ``challenge-2018-train-vrd.csv`` or ``oidv6-*-annotations-vrd.csv``.
        image_root: folder of the images, ``IMAGEID.jpg``.
        classes_csv: label and name of each entity class (``challenge-2018-classes-vrd.csv``).
        attributes_csv: label and name of each attribute
            (``challenge-2018-attributes-description.csv``); without it rows with ``is`` are left
            out, which a warning says.
        labels_csv: image-level labels that people have verified
            (``challenge-2018-train-vrd-labels.csv``). They become ``"verified_labels"``, a dict
            from the class to 1 (it is in the image) or 0 (it is not).
        image_list: text file with an image a line, see :func:`read_image_list`: load these, also
            those without relationships. Without it, all images of ``relations_csv``.
        predicate_classes: names of the predicates as in the file.
        only_known: leave out, with a warning, rows with a class, attribute or predicate that is not
            in the lists, as V6 has more of them than the challenge; otherwise they are errors.
        attributes_as_relations: rows with ``is`` become relations as well: the attributes are
            further classes behind the others, with the box of their entity, and ``is`` is the last
            predicate.
        merge_duplicates: keep one of several equal relationships of an image.

    Returns:
        One dict an image, in the order of ``image_list`` or of appearance.

    Raises:
        FileNotFoundError: if a file, the folder or an image is missing.
        ValueError: if a file's content is not as expected, with file and line.
    """
    vocabulary = _Vocabulary.read(classes_csv, attributes_csv, predicate_classes)
    wanted = None if image_list is None else read_image_list(image_list)
    lists = read_openimages_relationships(
        relations_csv,
        vocabulary,
        wanted,
        only_known=only_known,
        attributes_as_relations=attributes_as_relations,
    )
    report_merging(relations_csv, lists.values(), merge_duplicates)
    if image_list is not None and not any(x.has_relations for x in lists.values()):
        raise ValueError(
            f"{image_list}: none of its {len(lists)} images has a relationship in {relations_csv}. "
            "Is it the list of another split?"
        )
    labels = {}
    if labels_csv is not None:
        labels = read_verified_labels(labels_csv, vocabulary.classes, lists)

    paths = find_images(image_root, [f"{image_id}.jpg" for image_id in lists], "OpenImages")
    sizes = image_sizes(image_root, paths, "OpenImages")
    dicts = []
    for (image_id, relationships), path, (height, width) in zip(
        lists.items(), paths, sizes, strict=True
    ):
        annotations, relations = relationships.finish(merge_duplicates, (width, height))
        record = {
            "file_name": path,
            "image_id": image_id,
            "height": height,
            "width": width,
            "annotations": annotations,
            "relations": relations,
        }
        if labels_csv is not None:
            record["verified_labels"] = labels.get(image_id, {})
        dicts.append(record)
    total = sum(len(record["relations"]) for record in dicts)
    logger.info(f"{relations_csv}: {len(dicts)} images, {total} relations.")
    return dicts


def register_openimages_vrd(
    name: str,
    relations_csv: str,
    image_root: str,
    classes_csv: str,
    attributes_csv: str | None = None,
    *,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Register OpenImages relationships in Detectron2's catalogs. Reads no file before its use.

    Args:
        name: name of the data set.
        relations_csv: see :func:`load_openimages_vrd`.
        image_root: see :func:`load_openimages_vrd`.
        classes_csv: see :func:`load_openimages_vrd`.
        attributes_csv: see :func:`load_openimages_vrd`.
        metadata: further metadata, such as ``train_dataset``.
        options: the keyword arguments of :func:`load_openimages_vrd`.
    """
    arguments = dict(
        relations_csv=relations_csv,
        image_root=image_root,
        classes_csv=classes_csv,
        attributes_csv=attributes_csv,
        **options,
    )
    predicates = options.get("predicate_classes", OPENIMAGES_PREDICATES)

    def read() -> dict[str, list[str]]:
        vocabulary = _Vocabulary.read(classes_csv, attributes_csv, predicates)
        return vocabulary.names(options.get("attributes_as_relations", False))

    files = (relations_csv, classes_csv, attributes_csv, options.get("image_list"))
    register_dataset(
        name,
        load_openimages_vrd,
        arguments,
        annotation_files=[path for path in files if path is not None],
        read_names=read,
        image_root=image_root,
        **{"evaluator_type": "openimages_vrd", **(metadata or {})},
    )


def read_image_list(path: str) -> list[str]:
    """Identifiers of images from a text file with one a line, with or without ``.jpg``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, or a line is not one identifier, or repeats one.
    """
    require_path(path, "The list of images")
    images: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                name = line.decode("utf-8").strip()
            except UnicodeDecodeError:
                name = "\0"
            if not name or name.startswith("#"):
                continue
            name = name.removesuffix(".jpg")
            if not name.isprintable() or any(x in name for x in " ,/\\"):
                raise ValueError(
                    f"{path}, line {number}: {line!r:.80} is not the identifier of an image. "
                    "Expected a text file with one identifier a line, such as 0a1b2c3d4e5f6a7b."
                )
            if name in images:
                raise ValueError(
                    f"{path}, line {number}: {name} stands in line {images[name]} already. Remove "
                    "one of them."
                )
            images[name] = number
    if not images:
        raise ValueError(f"{path}: no image in it. Expected one identifier of an image a line.")
    return list(images)


def read_openimages_relationships(
    relations_csv: str,
    vocabulary: _Vocabulary,
    wanted: Sequence[str] | None = None,
    *,
    only_known: bool = False,
    attributes_as_relations: bool = False,
) -> dict[str, RelationshipList]:
    """Read the rows alone; needs no images. Boxes are relative to the image's size.

    Args:
        relations_csv: see :func:`load_openimages_vrd`.
        vocabulary: numbers of the names.
        wanted: identifiers of the images to read; all when None.
        only_known: see :func:`load_openimages_vrd`.
        attributes_as_relations: see :func:`load_openimages_vrd`.

    Returns:
        Relationships by the identifier of the image.

    Raises:
        ValueError: with file and line of the first row that is not as expected; all of them are in
            the error's ``problems``.
    """
    problems = Problems()
    lists = {image_id: RelationshipList() for image_id in wanted or ()}
    rows = _RowReader(relations_csv, vocabulary)
    unknown: list[str] = []
    without_attributes = 0
    what = "relationships of OpenImages"
    for line, row in read_csv(relations_csv, _COLUMNS, what, problems):
        image_id, predicate = row[0], row[-1]
        if wanted is not None and image_id not in lists:
            continue
        is_attribute = predicate == _ATTRIBUTE_PREDICATE and predicate not in vocabulary.predicates
        if is_attribute and not vocabulary.attributes:
            without_attributes += 1
            continue
        try:
            subject, second, object_ = rows.read(line, row, is_attribute)
        except _UnknownName as error:
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
            attribute = Entity(len(vocabulary.classes) + second, subject.box)
            relationships.add(subject, attribute, len(vocabulary.predicates), f"line {line}")
    problems.raise_any()
    if not lists:
        raise ValueError(f"{relations_csv}: no relationship in it. Download the file again.")
    _warn(relations_csv, rows.empty, "boxes without area are kept; training leaves them out")
    _warn(relations_csv, unknown, "rows of other classes or predicates were left out, as asked for")
    if without_attributes:
        logger.warning(
            f"{relations_csv}: {without_attributes} rows with attributes ('is') were left out, for "
            "no list of attributes was given (attributes_csv)."
        )
    return lists


def _warn(source: str, cases: Sequence[str], what: str) -> None:
    if cases:
        logger.warning(f"{source}: {len(cases)} {what}; the first: {cases[0]}")


class _UnknownName(ValueError):
    """A class, attribute or predicate that is not in the lists."""


class _RowReader:
    """Checks and reads rows of a CSV file of relationships."""

    def __init__(self, source: str, vocabulary: _Vocabulary) -> None:
        self.source = source
        self.vocabulary = vocabulary
        self.empty: list[str] = []  # boxes without area

    def read(
        self, line: int, row: Sequence[str], is_attribute: bool
    ) -> tuple[Entity, int, Entity | None]:
        """(subject, predicate, object), or (entity, attribute, None), of the values of _COLUMNS."""
        known = self.vocabulary
        category = self._number(line, row[1], known.classes, "class", known.classes_csv)
        subject = Entity(category, self._box(line, row[3:7]))
        if is_attribute:
            files = known.attributes_csv
            return subject, self._number(line, row[2], known.attributes, "attribute", files), None
        category = self._number(line, row[2], known.classes, "class", known.classes_csv)
        predicate = self._number(line, row[-1], known.predicates, "predicate", "the predicates")
        return subject, predicate, Entity(category, self._box(line, row[7:11]))

    def _number(self, line: int, name: str, numbers: dict[str, int], what: str, where: str) -> int:
        number = numbers.get(name)
        if number is None:
            raise _UnknownName(
                f"{self.source}, line {line}: {what} {name!r:.80} is not one of the {len(numbers)} "
                f"in {where}. Use the lists that belong to this file, or leave such rows out "
                "(only_known)."
            )
        return number

    def _box(self, line: int, values: Sequence[str]) -> tuple[float, float, float, float]:
        try:
            x0, x1, y0, y1 = map(float, values)
        except ValueError:
            raise ValueError(
                f"{self.source}, line {line}: box {', '.join(values)!r:.120}; expected four "
                "numbers XMin, XMax, YMin, YMax."
            ) from None
        low, high = -_ROUNDING, 1 + _ROUNDING
        if not (low <= x0 <= x1 <= high and low <= y0 <= y1 <= high):
            raise ValueError(
                f"{self.source}, line {line}: box {', '.join(values)}; expected XMin <= XMax and "
                "YMin <= YMax between 0 and 1, as shares of the image. Mend or remove this line."
            )
        x0, x1, y0, y1 = (min(max(value, 0.0), 1.0) for value in (x0, x1, y0, y1))
        if x0 == x1 or y0 == y1:
            self.empty.append(f"line {line}: {', '.join(values)}")
        return x0, y0, x1, y1


def read_verified_labels(
    labels_csv: str, classes: dict[str, int], wanted: Sequence[str]
) -> dict[str, dict[int, int]]:
    """Image-level labels that people have verified.

    Args:
        labels_csv: see :func:`load_openimages_vrd`.
        classes: number of each label; others are left out, for no box can have them.
        wanted: identifiers of the images to read.

    Returns:
        For each image that has any: 1 or 0 by class.

    Raises:
        ValueError: with file and line of the first row that is not as expected.
    """
    problems = Problems()
    wanted = frozenset(wanted)
    labels: dict[str, dict[int, int]] = {}
    what = "verified image-level labels of OpenImages"
    for line, (image_id, label, confidence) in read_csv(
        labels_csv, _LABEL_COLUMNS, what, problems
    ):
        category = classes.get(label)
        if category is None or image_id not in wanted:
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
        known = labels.setdefault(image_id, {})
        if known.setdefault(category, int(value)) != int(value):
            problems.add(
                f"{labels_csv}, line {line}: {label} is both 1 and 0 for image {image_id}. Remove "
                "one of the lines."
            )
    problems.raise_any()
    return labels
