"""Import ``psg.json`` of OpenPSG: images of COCO with boxes, panoptic segments and relations.

Classes are the things and after them the stuff. The segments, in panoptic PNG files, are left out.
"""

from typing import Any

from ..coco import are_numbers
from ..io import read_json
from .relation_import import (
    Imported,
    ImportedImage,
    ImportOptions,
    RelationImport,
    require_list,
)

__all__ = ["read_psg"]

_LISTS = ("data", "thing_classes", "stuff_classes", "predicate_classes")
_IMAGE = ("file_name", "height", "width", "image_id", "annotations", "relations")
_UNUSED_IN_IMAGE = ("pan_seg_file_name", "segments_info", "coco_image_id")
_ANNOTATION = ("bbox", "bbox_mode", "category_id")
_XYXY, _XYWH = 0, 1  # the values of Detectron2's BoxMode
SPLITS = ("train", "test")


def read_psg(path: str, options: ImportOptions) -> Imported:
    """Read the file.

    With ``options.split``, only the images in ``test_image_ids`` ("test") or the others ("train").
    Images without relations are kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or an image, annotation or relation is invalid.
    """
    content = read_json(path, "psg.json")
    require_list(path, content, "psg.json of OpenPSG", _LISTS)
    classes = [*content["thing_classes"], *content["stuff_classes"]]
    predicates = content["predicate_classes"]
    if not all(isinstance(x, str) for x in (*classes, *predicates)):
        raise ValueError(f"{path}: a class or predicate is no text. Expected lists of names.")
    test_images = None
    if options.split is not None:
        require_list(path, content, "psg.json of OpenPSG", ["test_image_ids"])
        test_images = {str(x) for x in content["test_image_ids"]}
    imported = RelationImport(path, options, classes, predicates)
    for index, record in enumerate(content["data"]):
        image_id = record.get("image_id") if isinstance(record, dict) else None
        if test_images is not None and (str(image_id) in test_images) != (options.split == "test"):
            continue
        where = f"data[{index}] (image_id {image_id!r:.40})"
        with imported.record(where):
            imported.check_fields(record, _IMAGE, _UNUSED_IN_IMAGE)
            for key in ("annotations", "relations"):
                if not isinstance(record.get(key), list):
                    raise ValueError(f"its {key} are {record.get(key)!r:.60}; expected a list")
            values = [record.get(key) for key in ("file_name", "height", "width")]
            image = imported.add_image(image_id, *values)
            for place, annotation in enumerate(record["annotations"]):
                with imported.record(f"{where}, annotations[{place}]", image, place):
                    _read_annotation(imported, image, place, annotation, classes)
            for place, relation in enumerate(record["relations"]):
                with imported.record(f"{where}, relations[{place}]"):
                    _read_relation(imported, image, relation, predicates)
    return imported.finish()


def _read_annotation(
    imported: RelationImport, image: ImportedImage, key: int, annotation: Any, classes: list[str]
) -> None:
    imported.check_fields(annotation, _ANNOTATION)
    bbox, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if not are_numbers(bbox) or len(bbox) != 4:
        raise ValueError(f"bbox is {bbox!r:.80}; expected four numbers")
    if mode not in (_XYXY, _XYWH) or isinstance(mode, bool):
        raise ValueError(
            f"bbox_mode is {mode!r:.40}; expected 0 (x1, y1, x2, y2) or 1 (x, y, w, h)"
        )
    if mode == _XYWH:
        bbox = [*bbox[:2], bbox[0] + bbox[2], bbox[1] + bbox[3]]
    name = _name(annotation.get("category_id"), classes, "category_id")
    image.add_entity(key, imported.category(name), bbox)


def _read_relation(
    imported: RelationImport, image: ImportedImage, relation: Any, predicates: list[str]
) -> None:
    if not isinstance(relation, list) or len(relation) != 3:
        raise ValueError(f"it is {relation!r:.80}; expected [subject, object, predicate]")
    if any(type(x) is not int for x in relation):
        raise ValueError(f"it is {relation!r:.80}; expected three integers")
    subject, object_, predicate = relation
    name = _name(predicate, predicates, "predicate")
    imported.add_relation(image, subject, object_, name)


def _name(index: Any, names: list[str], what: str) -> str:
    if type(index) is not int or not 0 <= index < len(names):
        raise ValueError(f"{what} is {index!r:.40}; expected an integer from 0 to {len(names) - 1}")
    return names[index]
