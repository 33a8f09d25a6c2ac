"""OpenImages visual relationships, from the CSV files of the 2018 challenge and of V6."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from ..dataset_dict import create_dataset_dict
from .catalog import register_dataset
from .image_sizes import image_sizes, known_sizes
from .io import locate_images, no_garbage_collection
from .openimages_files import (
    Vocabulary,
    read_image_list,
    read_openimages_relationships,
    read_verified_labels,
)
from .relationship_list import report_merging

__all__ = ["OPENIMAGES_PREDICATES", "load_openimages_vrd", "register_openimages_vrd"]

logger = logging.getLogger(__name__)

_NOMINAL_SIZE = (1024, 1024)  # height and width

# Predicates between boxes; "is", between a box and its attribute, is handled separately.
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


@no_garbage_collection()
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
    images_needed: bool = True,
) -> list[dict[str, Any]]:
    """Load OpenImages relationships as Detectron2 dataset dicts with ``"relations"``.

    The entities of an image are the distinct (class, box) of its rows. Rows with ``is`` give their
    entity an attribute: ``annotations[i]["attributes"]`` is the list of attribute ids, 0-based.

    Args:
        relations_csv: ``challenge-2018-train-vrd.csv`` or ``oidv6-*-annotations-vrd.csv``.
        image_root: folder of the images, ``IMAGEID.jpg``.
        classes_csv: label and name of each entity class (``challenge-2018-classes-vrd.csv``).
        attributes_csv: label and name of each attribute
            (``challenge-2018-attributes-description.csv``); without it rows with ``is`` are
            skipped with a warning.
        labels_csv: image-level labels verified by people
            (``challenge-2018-train-vrd-labels.csv``). They become ``"verified_labels"``, a dict
            from the class to 1 (it is in the image) or 0 (it is not).
        image_list: text file with one image per line, see :func:`read_image_list`. Exactly these
            images are loaded, also those without relationships; default: all of ``relations_csv``.
        predicate_classes: names of the predicates, as in the file.
        only_known: skip rows with a class, attribute or predicate that is not in the lists, with a
            warning, because V6 has more of them than the challenge; otherwise they are errors.
        attributes_as_relations: rows with ``is`` become relations too: the attributes are classes
            after the entity classes, with the box of their entity, and ``is`` is the last
            predicate.
        merge_duplicates: keep only one copy of equal relationships of an image.
        images_needed: raise if an image is missing. Otherwise sizes may come from the cache of an
            earlier run, and an image of unknown size gets the nominal size 1024 x 1024 and the
            key ``"nominal_size"``: its boxes, which are annotated as fractions, are exact among
            themselves, but not in pixels of the image.

    Returns:
        One dict per image, in the order of ``image_list`` or of appearance.

    Raises:
        FileNotFoundError: if a file, the folder or an image is missing.
        ValueError: if a file's content is invalid, with file and line.
    """
    vocabulary = Vocabulary.read(classes_csv, attributes_csv, predicate_classes)
    image_ids = None if image_list is None else read_image_list(image_list)
    lists = read_openimages_relationships(
        relations_csv,
        vocabulary,
        image_ids,
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

    names = [f"{image_id}.jpg" for image_id in lists]
    paths, sizes = _paths_and_sizes(image_root, names, images_needed)
    dicts = []
    for (image_id, relationships), path, size in zip(lists.items(), paths, sizes, strict=True):
        entities = relationships.finish(merge_duplicates, scale=(size or _NOMINAL_SIZE)[::-1])
        record = create_dataset_dict(path, image_id, size or _NOMINAL_SIZE, *entities)
        if size is None:
            record["nominal_size"] = True
        if labels_csv is not None:
            record["verified_labels"] = labels.get(image_id, {})
        dicts.append(record)
    total = sum(len(record["relations"]) for record in dicts)
    logger.info(f"{relations_csv}: {len(dicts)} images, {total} relations.")
    return dicts


def _paths_and_sizes(
    image_root: str, names: Sequence[str], images_needed: bool
) -> tuple[list[str], Sequence[tuple[int, int] | None]]:
    """Return path and (height, width) of each image; see ``images_needed`` of the loader."""
    try:
        paths = locate_images(image_root, names, "OpenImages")
        return paths, image_sizes(image_root, paths, "OpenImages")
    except (OSError, ValueError):
        if images_needed:
            raise
    sizes = known_sizes(image_root, names)
    unknown = sum(size is None for size in sizes)
    if unknown:
        logger.info(
            f"{image_root}: {unknown} of {len(names)} images of OpenImages are missing, and their "
            "sizes are not cached. Their boxes are fractions of the image, so a nominal size of "
            f"{_NOMINAL_SIZE[1]} x {_NOMINAL_SIZE[0]} pixels is used."
        )
    return [os.path.join(image_root, name) for name in names], sizes


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
    """Register OpenImages relationships. No file is read before its first use.

    Args:
        name: name of the dataset.
        relations_csv, image_root, classes_csv, attributes_csv, options: arguments of
            :func:`load_openimages_vrd`.
        metadata: further metadata, such as ``train_dataset``.
    """
    arguments = dict(
        relations_csv=relations_csv,
        image_root=image_root,
        classes_csv=classes_csv,
        attributes_csv=attributes_csv,
        **options,
    )
    predicates = options.get("predicate_classes", OPENIMAGES_PREDICATES)

    def read_names() -> dict[str, list[str]]:
        vocabulary = Vocabulary.read(classes_csv, attributes_csv, predicates)
        return vocabulary.names(options.get("attributes_as_relations", False))

    files = (relations_csv, classes_csv, attributes_csv, options.get("image_list"))
    register_dataset(
        name,
        load_openimages_vrd,
        arguments,
        annotation_files=[path for path in files if path is not None],
        read_names=read_names,
        image_root=image_root,
        # For rescoring predictions, for counting and for models that read no pixels.
        load_annotations=lambda: load_openimages_vrd(**arguments, images_needed=False),
        **{"evaluator_type": "openimages_vrd", **(metadata or {})},
    )
