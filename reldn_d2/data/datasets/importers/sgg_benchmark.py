"""Import the COCO form of SGG-Benchmark, in which VG150, PSG and IndoorVG are published.

In addition to ``images``, ``annotations`` and ``categories`` the file has ``rel_categories``, the
predicates, and ``rel_annotations`` with ``subject_id`` and ``object_id``, which are ids of
annotations, and ``predicate_id``. Polygons and RLE masks are kept. If annotations have
``attributes``, these are names, or ids of the list ``att_categories`` of the file.
"""

from collections.abc import Sequence
from typing import Any

from ..coco import are_numbers, read_segmentation
from ..io import read_json
from .relation_import import (
    Imported,
    ImportedImage,
    ImportOptions,
    RelationImport,
    require_list,
)

__all__ = ["read_sgg_benchmark"]

_LISTS = ("images", "annotations", "categories", "rel_categories", "rel_annotations")
_IMAGE = ("id", "file_name", "height", "width")
_ANNOTATION = ("id", "image_id", "category_id", "bbox", "iscrowd", "segmentation", "attributes")
_ATTRIBUTES = "att_categories"
_RELATION = ("id", "subject_id", "object_id", "predicate_id", "image_id")
_CATEGORY = ("id", "name")
_UNUSED_IN_IMAGE = ("license", "coco_url", "flickr_url", "date_captured", "url")
_UNUSED_IN_ANNOTATION = ("area",)
_UNUSED_IN_CATEGORY = ("supercategory", "isthing", "color")
_BACKGROUND = ("__background__", "background")  # placeholders that no record refers to


def read_sgg_benchmark(path: str, options: ImportOptions) -> Imported:
    """Read the file. Ids of images are kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or a record is invalid; names the record.
    """
    content = read_json(path, "COCO file of SGG-Benchmark")
    require_list(path, content, "the COCO form of SGG-Benchmark", _LISTS)
    keys = ["categories", "rel_categories"]
    if _ATTRIBUTES in content:
        require_list(path, content, "the COCO form of SGG-Benchmark", [_ATTRIBUTES])
        keys.append(_ATTRIBUTES)
    names = {key: _names(path, content, key) for key in keys}
    imported = RelationImport(
        path,
        options,
        *([x for x in names[key].values() if x not in _BACKGROUND] for key in names),
    )
    images = _read_images(imported, content["images"])
    image_of: dict[Any, ImportedImage | None] = {}  # by id of the annotation; None: reported
    for index, annotation in enumerate(content["annotations"]):
        key = annotation.get("id") if isinstance(annotation, dict) else None
        key = key if type(key) is int else None
        where = f"annotations[{index}] (id {key!r:.40})"
        image = _get(images, annotation, "image_id") if isinstance(annotation, dict) else None
        with imported.record(where, image, key):
            image_of.setdefault(key, None)
            _read_annotation(imported, images, image_of, annotation, names["categories"])
            if "attributes" in annotation and image_of[key] is not None:
                attributes = _attribute_names(annotation["attributes"], names.get(_ATTRIBUTES, {}))
                imported.add_attributes(where, image_of[key][key], attributes)
    for index, relation in enumerate(content["rel_annotations"]):
        with imported.record(f"rel_annotations[{index}]"):
            _read_relation(imported, images, image_of, relation, names["rel_categories"])
    return imported.finish()


def _names(path: str, content: dict[str, Any], key: str) -> dict[int, str]:
    """Return the names by id, in the order of the ids."""
    names = {}
    for index, entry in enumerate(content[key]):
        fields = entry if isinstance(entry, dict) else {}
        identifier, name = fields.get("id"), fields.get("name")
        if type(identifier) is not int or not isinstance(name, str) or identifier in names:
            raise ValueError(
                f'{path}, {key}[{index}] is {entry!r:.120}; expected {{"id": an integer that no '
                'other entry has, "name": a text}.'
            )
        unknown = [x for x in fields if x not in (*_CATEGORY, *_UNUSED_IN_CATEGORY)]
        if unknown:
            raise ValueError(f"{path}, {key}[{index}]: unknown field {unknown[0]!r}. Remove it.")
        names[identifier] = name
    return dict(sorted(names.items()))


def _read_images(imported: RelationImport, records: Sequence[Any]) -> dict[Any, Any]:
    """Return the images by id; None for those that were reported."""
    images: dict[Any, ImportedImage | None] = {}
    for index, record in enumerate(records):
        identifier = record.get("id") if isinstance(record, dict) else None
        with imported.record(f"images[{index}] (id {identifier!r:.40})"):
            imported.check_fields(record, _IMAGE, _UNUSED_IN_IMAGE)
            if type(identifier) in (int, str):
                images.setdefault(identifier, None)
            values = [record.get(key) for key in ("file_name", "height", "width")]
            images[identifier] = imported.add_image(identifier, *values)
    return images


def _get(table: dict[Any, Any], record: dict[str, Any], field: str) -> Any:
    """Return the entry that a field refers to; None if there is none."""
    key = record.get(field)
    return table.get(key) if type(key) in (int, str) else None


def _read_annotation(
    imported: RelationImport,
    images: dict[Any, Any],
    image_of: dict[Any, Any],
    annotation: Any,
    names: dict[int, str],
) -> None:
    imported.check_fields(annotation, _ANNOTATION, _UNUSED_IN_ANNOTATION)
    key, image_id = annotation.get("id"), annotation.get("image_id")
    if type(key) is not int:
        raise ValueError("its id is no integer")
    image = _get(images, annotation, "image_id")
    if image is None:
        if type(image_id) in (int, str) and image_id in images:
            return  # the image was reported
        raise ValueError(f"there is no image with the image_id {image_id!r:.60}")
    if image_of.get(key) is not None:
        raise ValueError("another annotation has this id as well")
    bbox = annotation.get("bbox")
    if not are_numbers(bbox) or len(bbox) != 4:
        raise ValueError(f"bbox is {bbox!r:.80}; expected four numbers [x, y, width, height]")
    category = _get(names, annotation, "category_id")
    if category is None:
        raise ValueError(f"there is no category with the id {annotation.get('category_id')!r:.60}")
    iscrowd = annotation.get("iscrowd", 0)
    if iscrowd not in (0, 1):
        raise ValueError(f"iscrowd is {iscrowd!r:.40}; expected 0 or 1")
    mask = annotation.get("segmentation")
    mask = read_segmentation(mask) if mask else None
    x, y, width, height = bbox
    image_of[key] = image
    entity = image.add_entity(key, imported.category(category), (x, y, x + width, y + height))
    entity["iscrowd"] = int(iscrowd)
    if mask is not None:
        entity["segmentation"] = mask


def _attribute_names(attributes: Any, names: dict[int, str]) -> Any:
    """Return the names of attributes that are ids; names and anything else as they are."""
    if not isinstance(attributes, list):
        return attributes
    return [names.get(x, x) if type(x) is int else x for x in attributes]


def _read_relation(
    imported: RelationImport,
    images: dict[Any, Any],
    image_of: dict[Any, Any],
    relation: Any,
    names: dict[int, str],
) -> None:
    imported.check_fields(relation, _RELATION)
    for role in ("subject_id", "object_id"):
        if _get(image_of, relation, role) is None:
            if type(relation.get(role)) is int and relation[role] in image_of:
                return  # the annotation or its image was reported
            raise ValueError(f"{role} is {relation.get(role)!r:.60}, which is no annotation's id")
    image = image_of[relation["subject_id"]]
    if image is not image_of[relation["object_id"]]:
        raise ValueError("subject and object are annotations of different images")
    if "image_id" in relation and _get(images, relation, "image_id") is not image:
        raise ValueError(
            f"its image_id {relation['image_id']!r:.60} is not that of its annotations"
        )
    predicate = _get(names, relation, "predicate_id")
    if predicate is None:
        raise ValueError(
            f"there is no entry of rel_categories with the id {relation.get('predicate_id')!r:.60}"
        )
    imported.add_relation(image, relation["subject_id"], relation["object_id"], predicate)
