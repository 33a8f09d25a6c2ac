"""Import ``psg.json`` of OpenPSG: images of COCO with boxes, panoptic segments and relations.

Classes are the things and after them the stuff. The masks of the entities are in panoptic PNG
files, in which the color of a pixel is the id of its segment; they are read if their folder is
given.
"""

import os
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from ..coco import are_numbers, read_segmentation
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
_SEGMENTS = ("pan_seg_file_name", "segments_info")
_UNUSED_IN_IMAGE = ("coco_image_id",)
_ANNOTATION = ("bbox", "bbox_mode", "category_id", "segmentation")
_XYXY, _XYWH = 0, 1  # the values of Detectron2's BoxMode
SPLITS = ("train", "test")


def read_psg(path: str, options: ImportOptions) -> Imported:
    """Read the file.

    With ``options.split``, only the images in ``test_image_ids`` ("test") or the others ("train").
    Images without relations are kept. With ``options.panoptic_root`` each entity has the mask of
    its segment; otherwise an annotation's own ``segmentation``, if it has one.

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
            imported.check_fields(record, (*_IMAGE, *_SEGMENTS), _UNUSED_IN_IMAGE)
            for key in ("annotations", "relations"):
                if not isinstance(record.get(key), list):
                    raise ValueError(f"its {key} are {record.get(key)!r:.60}; expected a list")
            values = [record.get(key) for key in ("file_name", "height", "width")]
            image = imported.add_image(image_id, *values)
            for place, annotation in enumerate(record["annotations"]):
                with imported.record(f"{where}, annotations[{place}]", image, place):
                    _read_annotation(imported, image, place, annotation, classes)
            if options.panoptic_root is not None:
                with imported.record(f"{where}, segments_info"):
                    _add_masks(options.panoptic_root, image, record)
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
    mask = annotation.get("segmentation")
    mask = read_segmentation(mask) if mask else None
    entity = image.add_entity(key, imported.category(name), bbox)
    if mask is not None:
        entity["segmentation"] = mask


def _add_masks(root: str, image: ImportedImage, record: dict[str, Any]) -> None:
    """Give each entity of an image the mask of the segment at the same place of its list.

    Raises:
        ValueError: the list does not belong to the annotations, or the PNG file cannot be read or
            lacks a segment.
    """
    annotations, (name, segments) = record["annotations"], (record.get(key) for key in _SEGMENTS)
    valid = isinstance(segments, list) and all(
        isinstance(x, dict) and type(x.get("id")) is int for x in segments
    )
    if not valid or not isinstance(name, str):
        raise ValueError("masks need pan_seg_file_name and segments_info, objects with an id")
    if [x.get("category_id") for x in segments] != [
        x.get("category_id") if isinstance(x, dict) else None for x in annotations
    ]:
        raise ValueError("its categories are not those of the annotations, one by one")
    path = os.path.join(root, name)
    try:
        with Image.open(path) as file:
            colors = np.asarray(file.convert("RGB"), dtype=np.int64)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error
    if colors.shape[:2] != (record["height"], record["width"]):
        raise ValueError(f"{path} has {colors.shape[1]} x {colors.shape[0]} pixels, the image not")
    ids = colors @ np.array([1, 256, 256**2])
    for place, segment in enumerate(segments):
        if place not in image:
            continue  # the annotation was reported
        mask = ids == segment["id"]
        if not mask.any():
            raise ValueError(f"{path} has no pixel of the segment with the id {segment['id']}")
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        image[place]["segmentation"] = {**rle, "counts": rle["counts"].decode("ascii")}


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
