"""JSON files in VRD's format, which RelDN's authors also released for other datasets.

The files map each image's file name to a list of relationships::

    {"predicate": 0, "subject": {"category": 0, "bbox": [ymin, ymax, xmin, xmax]}, "object": {...}}

In VRD's own files boxes are 1-based and inclusive. Here they become continuous: ``[xmin - 1, ymin -
1, xmax, ymax]``, so that a width is the file's ``xmax - xmin + 1`` and no "+1" is needed anywhere
else. Boxes in other files of this format are used as they are: continuous, 0-based.
"""

import logging
import os
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

from ..dataset_dict import create_dataset_dict
from .catalog import register_dataset
from .image_sizes import image_sizes
from .io import Problems, locate_images, no_garbage_collection, read_json
from .relationship_list import AnnotatedEntity, ImageAnnotations, RelationshipList, report_merging

__all__ = [
    "dicts_of",
    "load_relation_json",
    "parse_relation_json",
    "read_name_list",
    "register_relation_json",
]

logger = logging.getLogger(__name__)


def parse_relation_json(
    json_file: str,
    thing_classes: Sequence[str],
    predicate_classes: Sequence[str],
    *,
    what: str,
    one_based: bool = False,
    merge_duplicates: bool = True,
) -> dict[str, ImageAnnotations]:
    """Read only the annotations, which needs no images.

    The entities of an image are the distinct (category, box) of its subjects and objects in order
    of appearance, see :class:`~.relationship_list.RelationshipList`.

    Args:
        json_file: the file.
        thing_classes: names of the entity classes.
        predicate_classes: names of the predicates.
        what: name of the dataset, for messages.
        one_based: boxes are 1-based and inclusive, as in VRD's own files.
        merge_duplicates: keep only one copy of equal relationships of an image. Use it for
            training; published recall counts every copy.

    Returns:
        Annotations and relations by the image's file name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with file, image and index of the first invalid relationship; all of them are
            in the error's ``problems``.
    """
    content = read_json(json_file, f"{what} annotations")
    if not isinstance(content, dict):
        raise ValueError(
            f"{json_file}: expected an object {{file name: [relationship, ...]}}, found a "
            f"{type(content).__name__}."
        )
    reader = _RelationshipReader(len(thing_classes), len(predicate_classes), one_based)
    problems = Problems()
    lists: dict[str, RelationshipList] = {}
    for name, records in content.items():
        if not isinstance(records, list):
            problems.add(
                f"{json_file}: {name}: expected a list of relationships (empty if the image has "
                f"none), found {records!r:.80}."
            )
            continue
        lists[name] = relationships = RelationshipList()
        for index, record in enumerate(records):
            place = f"{name}, relationship {index}"
            try:
                relationships.add(*reader.read(record, f"{json_file}: {place}"), place)
            except ValueError as error:
                problems.add(str(error))
    problems.raise_any()
    report_merging(json_file, lists.values(), merge_duplicates)
    images = {name: x.finish(merge_duplicates) for name, x in lists.items()}
    total = sum(len(image.relations) for image in images.values())
    logger.info(f"{json_file}: {len(images)} images, {total} relations.")
    return images


def dicts_of(images: dict[str, ImageAnnotations]) -> list[dict[str, Any]]:
    """Convert annotations to dataset dicts without file names and sizes, which need images."""
    return [{"image_id": name, **image._asdict()} for name, image in images.items()]


@no_garbage_collection()
def load_relation_json(
    json_file: str,
    image_root: str,
    thing_classes: Sequence[str],
    predicate_classes: Sequence[str],
    *,
    what: str = "the dataset",
    **options: bool,
) -> list[dict[str, Any]]:
    """Load a file in VRD's format as Detectron2 dataset dicts with ``"relations"``.

    Args:
        json_file: e.g. ``rel_annotations_train.json``.
        image_root: folder of the images. An image with another suffix than annotated is accepted.
        thing_classes: names of the entity classes.
        predicate_classes: names of the predicates.
        what: name of the dataset, for messages.
        options: ``one_based`` and ``merge_duplicates`` of :func:`parse_relation_json`.

    Returns:
        One dict per image, also for images without relations. ``image_id`` is the file name in the
        annotations; sizes come from the image headers.

    Raises:
        FileNotFoundError: if a file, the folder or an image is missing.
        ValueError: if a file's content is not as expected.
    """
    images = parse_relation_json(json_file, thing_classes, predicate_classes, what=what, **options)
    paths = locate_images(image_root, list(images), what)
    sizes = image_sizes(image_root, paths, what)
    dicts = []
    outside: list[str] = []
    empty: list[str] = []
    for (name, (annotations, relations)), path, (height, width) in zip(
        images.items(), paths, sizes, strict=True
    ):
        for annotation in annotations:
            x0, y0, x1, y1 = annotation["bbox"]
            place = f"{annotation['bbox']} in {path} ({width}x{height})"
            if x1 > width or y1 > height or x0 < 0 or y0 < 0:
                outside.append(place)
            if x0 == x1 or y0 == y1:
                empty.append(place)
        dicts.append(create_dataset_dict(path, name, (height, width), annotations, relations))
    if empty:
        logger.warning(
            f"{json_file}: {len(empty)} boxes (XYXY) have no area, the first is {empty[0]}. They "
            "are kept; training skips them and their relations."
        )
    if outside:
        logger.warning(
            f"{json_file}: {len(outside)} boxes (XYXY) extend beyond their image, the first is "
            f"{outside[0]}. They are kept, and clipped in training. Are these the official images?"
        )
    return dicts


def register_relation_json(
    name: str,
    json_file: str,
    image_root: str,
    *,
    objects_file: str | None = None,
    predicates_file: str | None = None,
    what: str = "the dataset",
    merge_duplicates: bool = True,
    **metadata: Any,
) -> None:
    """Register a file in VRD's format with 0-based boxes, and the files with its names.

    Args:
        name: name of the dataset.
        json_file: see :func:`load_relation_json`.
        image_root: see :func:`load_relation_json`.
        objects_file: JSON list of the entity classes, or a COCO file with them as ``categories``;
            ``objects.json`` next to ``json_file`` when None.
        predicates_file: JSON list of the predicates; ``predicates.json`` in that folder when None.
        what: see :func:`load_relation_json`.
        merge_duplicates: see :func:`load_relation_json`.
        metadata: ``evaluator_type`` ("relation" unless given) and further metadata.
    """
    folder = os.path.dirname(json_file)
    objects_file = objects_file or os.path.join(folder, "objects.json")
    predicates_file = predicates_file or os.path.join(folder, "predicates.json")

    def read_names() -> dict[str, list[str]]:
        return {
            "thing_classes": read_name_list(objects_file, "entity classes"),
            "predicate_classes": read_name_list(predicates_file, "predicates"),
        }

    def load(**arguments: Any) -> list[dict[str, Any]]:
        return load_relation_json(**arguments, **read_names())

    def load_annotations() -> list[dict[str, Any]]:
        return dicts_of(
            parse_relation_json(
                json_file, **read_names(), what=what, merge_duplicates=merge_duplicates
            )
        )

    register_dataset(
        name,
        load,
        dict(
            json_file=json_file,
            image_root=image_root,
            what=what,
            merge_duplicates=merge_duplicates,
        ),
        annotation_files=[json_file, objects_file, predicates_file],
        read_names=read_names,
        json_file=json_file,
        image_root=image_root,
        load_annotations=load_annotations,
        **{"evaluator_type": "relation", **metadata},
    )


def read_name_list(path: str, what: str) -> list[str]:
    """Read names from a JSON list, or from the ``categories`` of a COCO file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a list of distinct names.
    """
    names = read_json(path, what)
    if isinstance(names, dict) and isinstance(names.get("categories"), list):
        categories = names["categories"]
        if all(isinstance(x, dict) and {"id", "name"} <= x.keys() for x in categories):
            names = [x["name"] for x in sorted(categories, key=lambda x: x["id"])]
    if not isinstance(names, list) or not names or not all(isinstance(x, str) for x in names):
        raise ValueError(f"{path}: expected a list of names ({what}), found {names!r:.80}.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: {what}: {repeated[0]!r} is listed more than once.")
    return names


class _RelationshipReader:
    """Checks and reads single relationships of the file."""

    def __init__(self, num_classes: int, num_predicates: int, one_based: bool) -> None:
        self.num_classes = num_classes
        self.num_predicates = num_predicates
        self.one_based = one_based

    def read(self, record: Any, where: str) -> tuple[AnnotatedEntity, AnnotatedEntity, int]:
        """Return subject, object and predicate; raise ValueError if the record is invalid."""
        subject = self._entity(_get(record, "subject", where), f"{where}, subject")
        object_ = self._entity(_get(record, "object", where), f"{where}, object")
        return subject, object_, _get_id(record, "predicate", self.num_predicates, where)

    def _entity(self, entity: Any, where: str) -> AnnotatedEntity:
        category = _get_id(entity, "category", self.num_classes, where)
        bbox = _get(entity, "bbox", where)
        if (
            not isinstance(bbox, list)
            or len(bbox) != 4
            or any(isinstance(value, bool) or not isinstance(value, Real) for value in bbox)
        ):
            raise ValueError(
                f"{where}: bbox is {bbox!r:.80}; expected four numbers [ymin, ymax, xmin, xmax]."
            )
        ymin, ymax, xmin, xmax = bbox
        low, rule = -sys.float_info.max, "with ymin <= ymax and xmin <= xmax"
        if self.one_based:
            low, rule = 1, "1-based and inclusive, with 1 <= ymin <= ymax and 1 <= xmin <= xmax"
        high = sys.float_info.max
        if not (low <= xmin <= xmax <= high and low <= ymin <= ymax <= high):
            raise ValueError(
                f"{where}: bbox is {bbox}; expected [ymin, ymax, xmin, xmax], {rule}. Fix or "
                "remove this relationship."
            )
        if self.one_based:
            xmin, ymin = xmin - 1, ymin - 1
        return AnnotatedEntity(category, (float(xmin), float(ymin), float(xmax), float(ymax)))


def _get(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f'{where}: no "{key}" in {record!r:.200}. Fix or remove it.')
    return record[key]


def _get_id(record: Any, key: str, count: int, where: str) -> int:
    value = _get(record, key, where)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(
            f"{where}: {key} is {value!r:.80}; expected an integer from 0 to {count - 1}."
        )
    return value
