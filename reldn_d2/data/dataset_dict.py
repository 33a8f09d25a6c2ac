"""What is common to all readers of dataset dicts.

A dataset dict is Detectron2's, plus ``"relations": [(subject_index, object_index, predicate_id),
...]``, 0-based, with indices into its ``"annotations"``.
"""

from collections.abc import Iterator
from numbers import Integral
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..structures.relations import relation_problems

__all__ = ["annotation_problems", "check_annotations", "dicts_without_images"]

_KEYS = ("bbox", "bbox_mode", "category_id")


def check_annotations(
    dataset_dict: dict[str, Any],
    num_classes: int | None = None,
    num_predicates: int | None = None,
    where: str | None = None,
) -> None:
    """Raise if the annotations or relations of an image cannot be used.

    Args:
        dataset_dict: the image's dict.
        num_classes: number of entity classes of the data set; not checked when None.
        num_predicates: number of predicates of the data set; not checked when None.
        where: names the image in the message; its ``"file_name"`` when None.

    Raises:
        ValueError: with the image, the record and the mend.
    """
    for problem in annotation_problems(dataset_dict, num_classes, num_predicates, where):
        raise ValueError(problem)


def annotation_problems(
    dataset_dict: dict[str, Any],
    num_classes: int | None = None,
    num_predicates: int | None = None,
    where: str | None = None,
) -> Iterator[str]:
    """All that :func:`check_annotations` would raise, at most one message a record."""
    where = where or str(dataset_dict.get("file_name", dataset_dict.get("image_id", "an image")))
    if "annotations" not in dataset_dict:
        yield (
            f'{where}: the dataset dict has no "annotations". For an image without entities give '
            "an empty list; to leave the image out, remove its dict."
        )
        return
    annotations = dataset_dict["annotations"]
    for number, annotation in enumerate(annotations):
        missing = [key for key in _KEYS if key not in annotation]
        if missing:
            yield (
                f'{where}: annotation {number} has no "{missing[0]}"; it has {sorted(annotation)}. '
                "docs/own_data.md shows a complete example."
            )
            continue
        category = annotation["category_id"]
        if not isinstance(category, Integral):
            yield (
                f"{where}: annotation {number} has category_id {category!r:.60}; expected an "
                "integer from 0 on."
            )
        elif category < 0 or (num_classes is not None and category >= num_classes):
            yield (
                f"{where}: annotation {number} has category_id {category}, outside the "
                f"{num_classes} classes (0-based) of this data set."
            )
    yield from relation_problems(
        dataset_dict.get("relations", ()), len(annotations), num_predicates, where
    )


def dicts_without_images(dataset_name: str) -> list[dict[str, Any]]:
    """Dicts of a registered data set; its images are read only if there is no way round that.

    Where loading a data set reads images (for their sizes), its metadata can have
    ``load_annotations``, a function that returns the dicts without what only the images tell.
    """
    load = MetadataCatalog.get(dataset_name).get("load_annotations", None)
    return load() if load is not None else DatasetCatalog.get(dataset_name)
