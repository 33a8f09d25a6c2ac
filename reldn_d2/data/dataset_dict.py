"""Shared by all readers of dataset dicts.

A dataset dict is Detectron2's, plus ``"relations": [(subject_index, object_index, predicate_id),
...]``, 0-based, with indices into its ``"annotations"``.

An annotation may have ``"attributes"``, a list of 0-based ids of the metadata's
``attribute_classes``. The list is complete: attributes that are not in it do not apply. Nothing is
known about the attributes of an annotation without this key.
"""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..structures.relations import relation_problems

__all__ = [
    "annotation_problems",
    "check_annotations",
    "create_annotation",
    "create_dataset_dict",
    "dicts_without_images",
]

_KEYS = ("bbox", "bbox_mode", "category_id")


def create_dataset_dict(
    file_name: str,
    image_id: int | str,
    image_size: tuple[int, int],
    annotations: list[dict[str, Any]],
    relations: list[tuple[int, int, int]],
) -> dict[str, Any]:
    """Create a dataset dict; ``image_size`` is (height, width)."""
    return {
        "file_name": file_name,
        "image_id": image_id,
        "height": image_size[0],
        "width": image_size[1],
        "annotations": annotations,
        "relations": relations,
    }


def create_annotation(box: Sequence[float], category: int) -> dict[str, Any]:
    """Create the annotation of an entity from its XYXY box and 0-based class."""
    return {
        "bbox": list(box),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category,
        "iscrowd": 0,
    }


def check_annotations(
    dataset_dict: dict[str, Any],
    num_classes: int | None = None,
    num_predicates: int | None = None,
    where: str | None = None,
    num_attributes: int | None = None,
) -> None:
    """Raise if the annotations or relations of an image are invalid.

    Args:
        dataset_dict: dict of the image.
        num_classes: number of entity classes of the dataset; not checked when None.
        num_predicates: number of predicates of the dataset; not checked when None.
        where: image in the message; defaults to its ``"file_name"``.
        num_attributes: number of attributes of the dataset; attributes are not checked when None.

    Raises:
        ValueError: names the image and the record and says how to fix it.
    """
    problems = annotation_problems(dataset_dict, num_classes, num_predicates, where, num_attributes)
    for problem in problems:
        raise ValueError(problem)


def annotation_problems(
    dataset_dict: dict[str, Any],
    num_classes: int | None = None,
    num_predicates: int | None = None,
    where: str | None = None,
    num_attributes: int | None = None,
) -> Iterator[str]:
    """Yield everything that :func:`check_annotations` would raise, at most one per record."""
    where = where or str(dataset_dict.get("file_name", dataset_dict.get("image_id", "an image")))
    if "annotations" not in dataset_dict:
        yield (
            f'{where}: the dataset dict has no "annotations". For an image without entities use '
            "an empty list; to skip the image, remove its dict."
        )
        return
    annotations = dataset_dict["annotations"]
    for index, annotation in enumerate(annotations):
        missing = [key for key in _KEYS if key not in annotation]
        if missing:
            yield (
                f'{where}: annotation {index} has no "{missing[0]}"; it has {sorted(annotation)}. '
                "See docs/own_data.md for a complete example."
            )
            continue
        category = annotation["category_id"]
        if not isinstance(category, Integral):
            yield (
                f"{where}: annotation {index} has category_id {category!r:.60}; expected an "
                "integer of at least 0."
            )
        elif category < 0 or (num_classes is not None and category >= num_classes):
            yield (
                f"{where}: annotation {index} has category_id {category}, outside the "
                f"{num_classes} classes (0-based) of this dataset."
            )
        elif num_attributes is not None and "attributes" in annotation:
            problem = _attribute_problem(annotation["attributes"], num_attributes)
            if problem:
                yield f"{where}: annotation {index} has attributes {problem}"
    yield from relation_problems(
        dataset_dict.get("relations", ()), len(annotations), num_predicates, where
    )


def _attribute_problem(attributes: Any, num_attributes: int) -> str:
    """Return what is wrong with the attributes of an annotation; empty if nothing is."""
    if not isinstance(attributes, (list, tuple)) or not all(
        isinstance(x, Integral) and not isinstance(x, bool) for x in attributes
    ):
        return (
            f"{attributes!r:.80}; expected a list of 0-based integers. Leave the key out where the "
            "attributes are unknown."
        )
    outside = [x for x in attributes if not 0 <= x < num_attributes]
    if outside:
        return (
            f"{attributes!r:.80}, but {outside[0]} is outside the {num_attributes} names (0-based) "
            "of attribute_classes in the metadata of this dataset. Fix or remove it."
        )
    return ""


def dicts_without_images(dataset_name: str) -> list[dict[str, Any]]:
    """Return the dicts of a registered dataset, without reading images if possible.

    If loading a dataset reads images (for their sizes), its metadata can have
    ``load_annotations``, a function that returns the dicts without the keys that need images.
    """
    load = MetadataCatalog.get(dataset_name).get("load_annotations", None)
    return load() if load is not None else DatasetCatalog.get(dataset_name)
