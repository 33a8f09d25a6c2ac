"""VRD (Lu et al., ECCV 2016), from the official JSON files.

``annotations_{train,test}.json`` hold, for each image's file name, a list of relationships::

    {"predicate": 0, "subject": {"category": 0, "bbox": [ymin, ymax, xmin, xmax]}, "object": {...}}

Boxes there are 1-based and inclusive. Here they become continuous: ``[xmin - 1, ymin - 1, xmax,
ymax]``, so that a width is the file's ``xmax - xmin + 1`` and no "+1" is needed anywhere else.
"""

import logging
import math
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .files import find_image, image_size, read_json, require_path

__all__ = ["VRD_CLASSES", "VRD_PREDICATES", "load_vrd", "parse_vrd_annotations", "register_vrd"]

logger = logging.getLogger(__name__)

# fmt: off
VRD_CLASSES = (
    "person", "sky", "building", "truck", "bus", "table", "shirt", "chair", "car", "train",
    "glasses", "tree", "boat", "hat", "trees", "grass", "pants", "road", "motorcycle", "jacket",
    "monitor", "wheel", "umbrella", "plate", "bike", "clock", "bag", "shoe", "laptop", "desk",
    "cabinet", "counter", "bench", "shoes", "tower", "bottle", "helmet", "stove", "lamp", "coat",
    "bed", "dog", "mountain", "horse", "plane", "roof", "skateboard", "traffic light", "bush",
    "phone", "airplane", "sofa", "cup", "sink", "shelf", "box", "van", "hand", "shorts", "post",
    "jeans", "cat", "sunglasses", "bowl", "computer", "pillow", "pizza", "basket", "elephant",
    "kite", "sand", "keyboard", "plant", "can", "vase", "refrigerator", "cart", "skis", "pot",
    "surfboard", "paper", "mouse", "trash can", "cone", "camera", "ball", "bear", "giraffe",
    "tie", "luggage", "faucet", "hydrant", "snowboard", "oven", "engine", "watch", "face",
    "street", "ramp", "suitcase",
)
VRD_PREDICATES = (
    "on", "wear", "has", "next to", "sleep next to", "sit next to", "stand next to", "park next",
    "walk next to", "above", "behind", "stand behind", "sit behind", "park behind",
    "in the front of", "under", "stand under", "sit under", "near", "walk to", "walk",
    "walk past", "in", "below", "beside", "walk beside", "over", "hold", "by", "beneath", "with",
    "on the top of", "on the left of", "on the right of", "sit on", "ride", "carry", "look",
    "stand on", "use", "at", "attach to", "cover", "touch", "watch", "against", "inside",
    "adjacent to", "across", "contain", "drive", "drive on", "taller than", "eat", "park on",
    "lying on", "pull", "talk", "lean on", "fly", "face", "play with", "sleep on", "outside of",
    "rest on", "follow", "hit", "feed", "kick", "skate on",
)
# fmt: on


class _ImageAnnotations(NamedTuple):
    """Entities and relations of one image, as in a dataset dict."""

    annotations: list[dict[str, Any]]
    relations: list[tuple[int, int, int]]


def load_vrd(
    json_file: str, image_root: str, merge_duplicates: bool = True
) -> list[dict[str, Any]]:
    """Load a split of VRD as Detectron2 dataset dicts with ``"relations"``.

    Image sizes come from the image headers. ``objects.json`` and ``predicates.json`` beside
    ``json_file`` are checked against :data:`VRD_CLASSES` and :data:`VRD_PREDICATES`.

    Args:
        json_file: ``annotations_train.json`` or ``annotations_test.json``.
        image_root: folder of the images. An image that is there under another suffix only (the
            official test set has a GIF annotated as JPG) is taken.
        merge_duplicates: see :func:`parse_vrd_annotations`.

    Returns:
        One dict an image, also for images without relations. ``image_id`` is the file name in the
        annotations.

    Raises:
        FileNotFoundError: if a file, the folder or an image is missing.
        ValueError: if a file's content is not as expected.
    """
    images = parse_vrd_annotations(json_file, merge_duplicates)
    folder = os.path.dirname(json_file)
    _check_names(os.path.join(folder, "objects.json"), VRD_CLASSES)
    _check_names(os.path.join(folder, "predicates.json"), VRD_PREDICATES)
    listing = frozenset(PathManager.ls(require_path(image_root, "The image folder of VRD")))

    dicts = []
    outside: list[str] = []
    for name, (annotations, relations) in images.items():
        file_name = find_image(image_root, name, listing, "VRD")
        height, width = image_size(file_name)
        for annotation in annotations:
            if annotation["bbox"][2] > width or annotation["bbox"][3] > height:
                outside.append(f"{annotation['bbox']} in {file_name} ({width}x{height})")
        dicts.append(
            {
                "file_name": file_name,
                "image_id": name,
                "height": height,
                "width": width,
                "annotations": annotations,
                "relations": relations,
            }
        )
    if outside:
        logger.warning(
            f"{json_file}: {len(outside)} boxes (XYXY) reach beyond their image, the first is "
            f"{outside[0]}. They are kept, and clipped in training. Are these the official images?"
        )
    return dicts


def register_vrd(name: str, json_file: str, image_root: str, merge_duplicates: bool = True) -> None:
    """Register a split of VRD in Detectron2's catalogs. Reads no file before its first use.

    Args:
        name: name of the data set, e.g. "vrd_train".
        json_file: see :func:`load_vrd`.
        image_root: see :func:`load_vrd`.
        merge_duplicates: see :func:`load_vrd`.
    """
    DatasetCatalog.register(name, lambda: load_vrd(json_file, image_root, merge_duplicates))

    def load_annotations() -> list[dict[str, Any]]:
        """What needs no images, for scoring predictions again."""
        images = parse_vrd_annotations(json_file, merge_duplicates)
        return [{"image_id": name, **image._asdict()} for name, image in images.items()]

    MetadataCatalog.get(name).set(
        load_annotations=load_annotations,
        thing_classes=list(VRD_CLASSES),
        predicate_classes=list(VRD_PREDICATES),
        evaluator_type="vrd",
        json_file=json_file,
        image_root=image_root,
    )


def parse_vrd_annotations(
    json_file: str, merge_duplicates: bool = True
) -> dict[str, _ImageAnnotations]:
    """Read the annotations alone; needs no images.

    The entities of an image are the distinct (category, box) of its subjects and objects in order
    of appearance. A few relationships have one and the same category and box at both ends ("person
    next to person" over one group). A relation of an entity to itself cannot be enumerated or
    evaluated as a pair, so their object is a second entity with that category and box: the same two
    boxes that the published protocol scores.

    Args:
        json_file: ``annotations_train.json`` or ``annotations_test.json``.
        merge_duplicates: keep one of several equal relationships of an image. Right for training;
            the published recall counts each of them, so the test split keeps them.

    Returns:
        Annotations and relations by the image's file name.
    """
    content = read_json(json_file, "VRD annotations")
    if not isinstance(content, dict):
        raise ValueError(
            f"{json_file}: expected an object {{file name: [relationship, ...]}}, found a "
            f"{type(content).__name__}."
        )
    images = {}
    duplicates: list[str] = []
    reflexive: list[str] = []
    for name, records in content.items():
        if not isinstance(records, list):
            raise ValueError(
                f"{json_file}: {name}: expected a list of relationships (empty if the image has "
                f"none), found {records!r:.80}."
            )
        entities: dict[tuple, int] = {}
        relations: dict[tuple[int, int, int], int] = {}
        for number, record in enumerate(records):
            place = f"{name}, relationship {number}"
            subject, object_, predicate = _parse_relationship(record, f"{json_file}: {place}")
            if subject == object_:
                reflexive.append(place)
            first = entities.setdefault((*subject, 0), len(entities))
            second = entities.setdefault((*object_, int(subject == object_)), len(entities))
            triplet = (first, second, predicate)
            if triplet in relations:
                duplicates.append(place)
            relations[triplet] = 1 if merge_duplicates else relations.get(triplet, 0) + 1
        images[name] = _ImageAnnotations(
            annotations=[_annotation(category, box) for category, box, _ in entities],
            relations=[triplet for triplet, times in relations.items() for _ in range(times)],
        )
    _report(json_file, images, duplicates, merge_duplicates, reflexive)
    return images


def _report(
    json_file: str,
    images: dict[str, _ImageAnnotations],
    duplicates: Sequence[str],
    merge_duplicates: bool,
    reflexive: Sequence[str],
) -> None:
    total = sum(len(image.relations) for image in images.values())
    logger.info(f"{json_file}: {len(images)} images, {total} relations.")
    if duplicates:
        done = "merged" if merge_duplicates else "kept"
        logger.warning(
            f"{json_file}: {len(duplicates)} relationships repeat an earlier one of their image "
            f"exactly and were {done}; the first: {duplicates[0]}."
        )
    if reflexive:
        logger.warning(
            f"{json_file}: {len(reflexive)} relationships have the same category and box at both "
            "ends; their object became an entity of its own with this category and box. The "
            f"first: {reflexive[0]}."
        )


def _parse_relationship(record: Any, where: str) -> tuple[tuple, tuple, int]:
    """Subject and object as (category, box in continuous XYXY), and the predicate."""
    subject = _parse_entity(_get(record, "subject", where), f"{where}, subject")
    object_ = _parse_entity(_get(record, "object", where), f"{where}, object")
    predicate = _get(record, "predicate", where)
    _check_index(predicate, "predicate", VRD_PREDICATES, where)
    return subject, object_, predicate


def _parse_entity(entity: Any, where: str) -> tuple[int, tuple]:
    category = _get(entity, "category", where)
    _check_index(category, "category", VRD_CLASSES, where)
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
    if not (1 <= xmin <= xmax < math.inf and 1 <= ymin <= ymax < math.inf):
        raise ValueError(
            f"{where}: bbox is {bbox}; expected [ymin, ymax, xmin, xmax], 1-based and inclusive, "
            "with 1 <= ymin <= ymax and 1 <= xmin <= xmax. Mend or remove this relationship."
        )
    return category, (float(xmin - 1), float(ymin - 1), float(xmax), float(ymax))


def _get(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f'{where}: no "{key}" in {record!r:.200}. Mend or remove it.')
    return record[key]


def _check_index(value: Any, what: str, names: Sequence[str], where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(names):
        raise ValueError(
            f"{where}: {what} is {value!r:.80}; expected an integer from 0 to {len(names) - 1}."
        )


def _annotation(category: int, box: Sequence[float]) -> dict[str, Any]:
    return {
        "bbox": list(box),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category,
        "iscrowd": 0,
    }


def _check_names(path: str, expected: Sequence[str]) -> None:
    """Raise if the names in a file are not the official ones, in their order."""
    names = read_json(path, "VRD names")
    if not isinstance(names, list) or len(names) != len(expected):
        found = f"{len(names)} names" if isinstance(names, list) else type(names).__name__
        raise ValueError(
            f"{path}: expected the list of VRD's {len(expected)} names, found {found}."
        )
    for index, (name, wanted) in enumerate(zip(names, expected, strict=True)):
        if name != wanted:
            raise ValueError(
                f"{path}: name {index} is {name!r}, but in VRD it is {wanted!r}. Use the official "
                "file, or register a data set of your own (datasets/README.md)."
            )
