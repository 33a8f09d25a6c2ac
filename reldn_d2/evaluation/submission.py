"""Write and read submissions of the OpenImages challenge's visual relationship track.

Two layouts are in use. The challenge's server takes one line per image::

    ImageId,PredictionString
    <id>,<score> <label1> <xmin1> <ymin1> <xmax1> <ymax1> <label2> <xmin2> ... <relation> ...

and the challenge's evaluation code one line per triplet, with the columns :data:`COLUMNS`.
Coordinates are divided by the image's width and height. Labels are OpenImages' identifiers
(``/m/04bcr3``). An attribute of an entity is a triplet too: with the predicate ``is``, the
attribute as second label, and the entity's box twice.
"""

import csv
import gzip
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from detectron2.data import MetadataCatalog

from ..data.dataset_dict import dicts_without_images
from ..structures.attributes import EntityAttributes
from ..structures.ranking import rank_in_group
from ..structures.scene_graph import ImageId, SceneGraph
from ..utils.file_io import write_atomically
from .attribute_evaluation import IS, attribute_relations

__all__ = ["COLUMNS", "LAYOUTS", "is_submission", "read_submission", "write_submission"]

logger = logging.getLogger(__name__)

COLUMNS = ("ImageID", "LabelName1", "LabelName2", "RelationshipLabel", "Score") + tuple(
    f"{side}{entity}" for entity in (1, 2) for side in ("XMin", "XMax", "YMin", "YMax")
)
_SERVER_COLUMNS = ("ImageId", "PredictionString")
_NUM_FIELDS = 12  # of a triplet in a PredictionString
# Position in a PredictionString's triplet of each column of COLUMNS from the second on.
_PLACES = (1, 6, 11, 0, 2, 4, 3, 5, 7, 9, 8, 10)
LAYOUTS = ("server", "table")


def is_submission(file: str) -> bool:
    """Return whether the file name is that of a submission rather than a predictions file."""
    return file.endswith((".csv", ".csv.gz"))


class _Names(NamedTuple):
    """Names of classes and predicates, and the images' sizes.

    In the files, attributes are further classes after ``num_classes``, and ``is`` is another
    predicate after ``num_predicates``.
    """

    classes: Sequence[str]
    predicates: Sequence[str]
    num_classes: int
    num_predicates: int
    sizes: dict[str, tuple[ImageId, float, float]]  # by str(image_id): the id, width, height


def _names(dataset_name: str, labels: Sequence[str] | None) -> _Names:
    metadata = MetadataCatalog.get(dataset_name)
    classes = labels or metadata.get("thing_labels", None) or metadata.get("thing_classes", None)
    predicates = metadata.get("predicate_classes", None)
    if classes is None or predicates is None:
        raise ValueError(
            f"The metadata of dataset '{dataset_name}' lacks thing_classes or predicate_classes."
        )
    known = metadata.get("thing_classes", None)
    attributes = metadata.get("attribute_classes", None) or []
    if IS in predicates:  # the dataset has its attributes as relations already
        attributes = []
    if known is not None and attributes and len(classes) == len(known) + len(attributes):
        classes, attributes = classes[: len(known)], classes[len(known) :]
    if known is not None and len(known) != len(classes):
        further = f", and optionally the {len(attributes)} attributes" if attributes else ""
        raise ValueError(
            f"{len(classes)} labels for the {len(known)} classes of dataset '{dataset_name}'; "
            f"expected one for each{further}, in their order."
        )
    num_classes, num_predicates = len(classes), len(predicates)
    if attributes:
        classes, predicates = [*classes, *attributes], [*predicates, IS]
    sizes = {}
    for record in dicts_without_images(dataset_name):
        image_id = record["image_id"]
        if "width" not in record or "height" not in record:
            raise ValueError(
                f"Dataset '{dataset_name}', image {image_id!r}: its size is unknown. A "
                "submission has normalized coordinates; put the images where the dataset expects "
                "them."
            )
        sizes[str(image_id)] = (image_id, float(record["width"]), float(record["height"]))
    for kind, names in (("class", classes), ("predicate", predicates)):
        if len(set(names)) != len(names):
            raise ValueError(f"Dataset '{dataset_name}' has two equal {kind} names.")
    return _Names(list(classes), list(predicates), num_classes, num_predicates, sizes)


def write_submission(
    dataset_name: str,
    predictions: Iterable[SceneGraph],
    file: str,
    layout: str = "server",
    labels: Sequence[str] | None = None,
) -> None:
    """Write predictions as a submission, atomically.

    Args:
        dataset_name: registered dataset with ``width`` and ``height`` of its images.
        predictions: of its images; missing images get a line without triplets.
        file: the CSV file.
        layout: ``server`` or ``table``, see above.
        labels: OpenImages' identifiers of the classes, and after them, if they are known, those of
            the attributes; default: the metadata's ``thing_labels``, or ``thing_classes`` if it has
            none. Attributes without identifiers have their names.

    Raises:
        ValueError: an unknown layout, an image that the dataset lacks, or names with blanks.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    names = _names(dataset_name, labels)
    ends = names.classes[: names.num_classes]
    blank = [name for name in (*ends, *names.predicates) if len(name.split()) != 1]
    blank_attributes = [x for x in names.classes[names.num_classes :] if len(x.split()) != 1]
    if layout == "server" and blank:
        raise ValueError(
            f"{blank[0]!r} has a space, which separates the fields of the server's layout. Use "
            "OpenImages' identifiers of the classes (labels, or thing_labels in the metadata), "
            'name predicates like "inside_of", or write the layout "table".'
        )
    missing = dict(names.sizes)
    with write_atomically(file) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_SERVER_COLUMNS if layout == "server" else COLUMNS)
        for prediction in predictions:
            key = str(prediction.image_id)
            if key not in names.sizes:
                raise ValueError(f"Dataset '{dataset_name}' has no image {key!r}.")
            missing.pop(key, None)
            if layout == "server" and blank_attributes and prediction.attributes is not None:
                raise ValueError(
                    f"The attribute {blank_attributes[0]!r} has a space, which separates the "
                    "fields of the server's layout. Give the identifiers of the attributes after "
                    'those of the classes (labels), or write the layout "table".'
                )
            counts = (names.num_classes, names.num_predicates)
            rows = _rows(attribute_relations(prediction, *counts), names)
            if layout == "server":
                writer.writerow((key, " ".join(" ".join(row) for row in rows)))
            else:
                writer.writerows([key, *(row[place] for place in _PLACES)] for row in rows)
        if layout == "server":
            writer.writerows((key, "") for key in missing)


def _rows(prediction: SceneGraph, names: _Names) -> Iterator[list[str]]:
    """Yield the fields of a PredictionString for each triplet."""
    _, width, height = names.sizes[str(prediction.image_id)]
    boxes = (prediction.boxes / np.array([width, height, width, height])).tolist()
    classes = prediction.classes.tolist()
    for subject, object_, predicate, score in prediction.rows():
        yield [
            repr(score),
            names.classes[classes[subject]],
            *map(repr, boxes[subject]),
            names.classes[classes[object_]],
            *map(repr, boxes[object_]),
            names.predicates[predicate],
        ]


def read_submission(
    dataset_name: str, file: str, labels: Sequence[str] | None = None
) -> Iterator[SceneGraph]:
    """Read a submission of either layout, plain or gzipped; equal scores rank as listed.

    Coordinates become absolute pixels again: exactly those that :func:`write_submission` was given
    if they were single-precision numbers, as a model's are.

    Args:
        dataset_name: registered dataset that the submission is for.
        file: the CSV file.
        labels: as for :func:`write_submission`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is wrong; the message names it and says how to fix it.
    """
    names = _names(dataset_name, labels)
    rows_of: dict[str, list[Sequence[str]]] = {}  # of a table, whose lines may be in any order
    lines: dict[str, int] = {}
    num_copies = 0
    with _open_text(file) as stream, _long_fields():
        reader = csv.reader(stream)
        header = tuple(x.strip() for x in next(reader, ()))
        if header not in (_SERVER_COLUMNS, COLUMNS):
            raise ValueError(
                f"{file}, line 1: the columns are {', '.join(header)[:80]!r}; expected "
                f"{','.join(_SERVER_COLUMNS)} or {','.join(COLUMNS)}."
            )
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if len(row) != len(header):
                raise ValueError(
                    f"{where}: {len(row)} fields instead of {len(header)}. The line is cut off or "
                    "has too many commas; write the file again."
                )
            image = row[0]
            if image not in names.sizes:
                raise ValueError(
                    f"{where}: dataset '{dataset_name}' has no image {image!r}. Name the dataset "
                    "that the submission is for."
                )
            if header == COLUMNS:
                fields = [row[1 + _PLACES.index(place)] for place in range(_NUM_FIELDS)]
                rows_of.setdefault(image, []).append(fields)
            else:
                if image in lines:
                    raise ValueError(f"{where}: image {image!r} is in line {lines[image]} as well.")
                prediction, copies = _prediction(_split(row[1], where), where, names, image)
                num_copies += copies
                yield prediction
            lines.setdefault(image, reader.line_num)
    for image, rows in rows_of.items():
        where = f"{file}, line {lines[image]} and others"
        prediction, copies = _prediction(rows, where, names, image)
        num_copies += copies
        yield prediction
    if num_copies:
        logger.warning(
            "%s lists %d triplets again, with the same boxes, classes and predicate. The challenge "
            "counts such copies as false positives; list each once.",
            file,
            num_copies,
        )


def _split(text: str, where: str) -> list[Sequence[str]]:
    """Return the triplets of a PredictionString."""
    parts = text.split()
    if len(parts) % _NUM_FIELDS:
        raise ValueError(
            f"{where}: {len(parts)} parts, not a multiple of the {_NUM_FIELDS} of a triplet. The "
            "line is cut off or a name has a space; write it again."
        )
    return [parts[i : i + _NUM_FIELDS] for i in range(0, len(parts), _NUM_FIELDS)]


def _prediction(
    triplets: Sequence[Sequence[str]], where: str, names: _Names, image: str
) -> tuple[SceneGraph, int]:
    """Return the prediction of an image and how many of its triplets are copies of another one."""
    image_id, width, height = names.sizes[image]
    where = f"{where} (image {image!r})"
    try:
        scores = [float(t[0]) for t in triplets]
        corners = [[float(x) for part in (t[2:6], t[7:11]) for x in part] for t in triplets]
    except ValueError as error:
        raise ValueError(f"{where}: {error}. Scores and coordinates are numbers.") from error
    scale = np.array([width, height] * 2)
    boxes = _snap(np.asarray(corners).reshape(-1, 4) * scale)
    labels = [label for t in triplets for label in (t[1], t[6])]
    classes = _ids(labels, names.classes, "class", where)
    predicates = _ids([t[11] for t in triplets], names.predicates, "predicate", where)
    is_attribute = predicates == names.num_predicates
    _check_attributes(triplets, classes.reshape(-1, 2), boxes, is_attribute, names, where)
    # Equal boxes of one class become one entity again. The challenge also scores a triplet whose
    # two boxes are equal, and each copy of a triplet: their objects become entities of their own;
    # for a copy of an attribute the entity itself does.
    _, index = np.unique(np.column_stack([classes, boxes]), axis=0, return_inverse=True)
    subjects, objects = index.reshape(-1, 2).astype(np.int64).T
    codes = (subjects * len(boxes) + objects) * len(names.predicates) + predicates
    copies = rank_in_group(codes)
    of_object = np.where(is_attribute, 0, copies + (subjects == objects))
    extra = np.column_stack([np.where(is_attribute, copies, 0), of_object]).reshape(-1)
    keys = np.column_stack([classes, boxes, extra])
    is_end = np.column_stack([np.ones(len(triplets), bool), ~is_attribute]).reshape(-1)
    entities, index = np.unique(keys[is_end], axis=0, return_inverse=True)
    ends = np.full(len(keys), -1)
    ends[is_end] = index.reshape(-1)
    pairs, scores = ends.reshape(-1, 2), np.asarray(scores, dtype=np.float64)
    attributes = None
    if len(names.predicates) > names.num_predicates:
        order = np.argsort(-scores, kind="stable")
        order = order[is_attribute[order]]
        ids = classes.reshape(-1, 2)[order, 1] - names.num_classes
        attributes = EntityAttributes(pairs[order, 0], ids, scores[order])
    try:
        graph = SceneGraph.from_arrays(
            image_id,
            entities[:, 1:5],
            entities[:, 0].astype(np.int64),
            np.ones(len(entities)),
            pairs[~is_attribute],
            predicates[~is_attribute],
            scores[~is_attribute],
            attributes=attributes,
        )
        return graph, int((copies > 0).sum())
    except ValueError as error:
        message = str(error).removeprefix(f"Prediction of image {image_id!r}: ")
        raise ValueError(f"{where}: {message}") from error


def _check_attributes(
    triplets: Sequence[Sequence[str]],
    classes: np.ndarray,
    boxes: np.ndarray,
    is_attribute: np.ndarray,
    names: _Names,
    where: str,
) -> None:
    """Raise if an attribute and ``is`` are not together, or such a triplet has two boxes.

    Args:
        triplets: K triplets of an image, as in the file.
        classes: (K, 2) labels of subject and object.
        boxes: (2 K, 4).
        is_attribute: (K,) bool, the predicate is ``is``.
        names, where: of the dataset; file, line and image.
    """
    wrong = (classes[:, 1] >= names.num_classes) != is_attribute
    wrong |= classes[:, 0] >= names.num_classes
    if wrong.any():
        row = triplets[int(wrong.argmax())]
        raise ValueError(
            f"{where}: {row[1]} {row[11]} {row[6]}: an attribute is the second label of '{IS}' "
            "and of no other relation."
        )
    moved = is_attribute & (boxes[::2] != boxes[1::2]).any(axis=1)
    if moved.any():
        row = triplets[int(moved.argmax())]
        raise ValueError(
            f"{where}: {row[1]} {row[11]} {row[6]} has two different boxes. Both are the entity's: "
            "write the same coordinates twice."
        )
    scores = np.array([float(t[0]) for t in triplets])
    if not np.isfinite(scores[is_attribute]).all():
        raise ValueError(f"{where}: NaN or infinite scores of attributes. Leave such triplets out.")


def _ids(labels: Sequence[str], names: Sequence[str], kind: str, where: str) -> np.ndarray:
    id_of = {name: i for i, name in enumerate(names)}
    unknown = [label for label in labels if label not in id_of]
    if unknown:
        raise ValueError(
            f"{where}: {kind} {unknown[0]!r} is not one of the dataset's ({', '.join(names[:3])}, "
            "...). Write the identifiers that the dataset uses."
        )
    return np.asarray([id_of[label] for label in labels], dtype=np.int64)


def _snap(pixels: np.ndarray) -> np.ndarray:
    """Undo the rounding of division and multiplication of numbers that were float32 before."""
    single = pixels.astype(np.float32).astype(np.float64)
    return np.where(np.abs(single - pixels) <= 4 * np.spacing(np.abs(pixels)), single, pixels)


def _open_text(file: str) -> Any:
    if file.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")


@contextmanager
def _long_fields() -> Iterator[None]:
    """Allow a PredictionString that is longer than the csv module's default limit."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)
