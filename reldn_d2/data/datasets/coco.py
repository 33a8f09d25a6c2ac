"""Your own datasets: a COCO file with relations.

In addition to COCO's ``images``, ``annotations`` and ``categories`` the file has ``predicates``, a
list of ``{"id": 1, "name": "on"}``, and its images or its annotations have ``"relations"``: a list
of ``[subject annotation id, object annotation id, predicate id]``.
"""

import os
from collections.abc import Sequence
from typing import Any

import pycocotools.mask as mask_util

from detectron2.structures import BoxMode

from ..dataset_dict import create_dataset_dict
from .catalog import register_dataset
from .io import Problems, locate_images, no_garbage_collection, read_json

__all__ = [
    "are_numbers",
    "load_relation_instances",
    "locate_nested_images",
    "read_segmentation",
    "register_relation_instances",
]

_LISTS = ("images", "annotations", "categories", "predicates")
_LIMIT = 1e15  # larger than any sensible coordinate; rejects NaN and infinity too


@no_garbage_collection()
def load_relation_instances(
    json_file: str, image_root: str, merge_duplicates: bool = False
) -> list[dict[str, Any]]:
    """Load a COCO file with relations as Detectron2 dataset dicts.

    Args:
        json_file: the file.
        image_root: folder that its ``file_name`` are relative to.
        merge_duplicates: keep only one copy of equal relations of an image.

    Returns:
        One dict per image, also for images without annotations, in the order of the file. Ids of
        categories and predicates become 0-based, in the order of the ids.

    Raises:
        FileNotFoundError: if the file, the folder or an image is missing.
        ValueError: with the file and its first invalid record; all of them are in the error's
            ``problems``.
    """
    return _CocoReader(json_file).dataset_dicts(image_root, merge_duplicates)


def register_relation_instances(
    name: str,
    metadata: dict[str, Any],
    json_file: str,
    image_root: str,
    merge_duplicates: bool = False,
) -> None:
    """Register a COCO file with relations, like ``register_coco_instances`` for one without.

    Args:
        name: name of the dataset.
        metadata: further metadata; may be empty. Classes and predicates are read from the file on
            first access. ``evaluator_type`` defaults to "relation".
        json_file, image_root, merge_duplicates: see :func:`load_relation_instances`.
    """
    register_dataset(
        name,
        load_relation_instances,
        dict(json_file=json_file, image_root=image_root, merge_duplicates=merge_duplicates),
        annotation_files=[json_file],
        read_names=lambda: _CocoReader(json_file, names_only=True).names(),
        # For rescoring predictions and for counting, which need no images.
        load_annotations=lambda: _CocoReader(json_file).dataset_dicts(None, merge_duplicates),
        image_root=image_root,
        json_file=json_file,
        **{"evaluator_type": "relation", **metadata},
    )


class _CocoReader:
    """Checks and reads one file.

    Attributes:
        problems: all invalid records so far.
        records: dataset dicts by image id.
        annotation_index: image id, and index into the image's annotations, by annotation id.
        bad_images: ids of invalid images; annotations of them are not reported as well.
        bad_annotations: ids of invalid annotations; relations of them are not reported as well.
    """

    def __init__(self, json_file: str, names_only: bool = False) -> None:
        self.path = json_file
        self.content = read_json(json_file, "COCO file with relations")
        self.problems = Problems()
        self.records: dict[Any, dict[str, Any]] = {}
        self.annotation_index: dict[Any, tuple[Any, int]] = {}
        self.bad_images: set[Any] = set()
        self.bad_annotations: set[Any] = set()
        if not isinstance(self.content, dict):
            raise ValueError(
                f"{json_file}: expected an object with {', '.join(_LISTS)}, found a "
                f"{type(self.content).__name__}."
            )
        for key in _LISTS:
            if not isinstance(self.content.get(key), list):
                raise ValueError(
                    f'{json_file}: no list "{key}"; it has {sorted(self.content)}. Expected a COCO '
                    f"file with {', '.join(_LISTS)} (see docs/own_data.md for an example)."
                )
        if "relations" in self.content:
            raise ValueError(
                f'{json_file}: found a list "relations" next to "images", where it is not read. '
                "Put each relation into the entry of its image (docs/own_data.md shows how)."
            )
        self.categories = self._contiguous_ids("categories")
        self.predicates = self._contiguous_ids("predicates")
        self.attributes = self._contiguous_ids("attributes")
        if names_only:
            self.problems.raise_any()
            self.content = {key: self.content.get(key, []) for key in (*_LISTS[2:], "attributes")}

    def names(self) -> dict[str, Any]:
        """Return metadata: names in the order of their ids, and the 0-based ids of categories."""
        names = {"thing_dataset_id_to_contiguous_id": self.categories}
        for field, key, contiguous_ids in (
            ("thing_classes", "categories", self.categories),
            ("predicate_classes", "predicates", self.predicates),
            ("attribute_classes", "attributes", self.attributes),
        ):
            by_id = {entry["id"]: entry["name"] for entry in self.content.get(key, ())}
            names[field] = [by_id[identifier] for identifier in contiguous_ids]
        return names

    def dataset_dicts(self, image_root: str | None, merge_duplicates: bool) -> list[dict[str, Any]]:
        """See :func:`load_relation_instances`; with ``image_root`` None images are not located."""
        images, annotations = self.content["images"], self.content["annotations"]
        for index, image in enumerate(images):
            self._read_image(f"{self.path}: images[{index}]", image)
        annotations_with_relations = []
        for index, annotation in enumerate(annotations):
            self._read_annotation(f"{self.path}: annotations[{index}]", annotation)
            if isinstance(annotation, dict) and "relations" in annotation:
                annotations_with_relations.append((index, annotation))
            annotations[index] = None  # large files need the memory
        for index, image in enumerate(images):
            self._read_relations(f"images[{index}]", image, None)
        for index, annotation in annotations_with_relations:
            self._read_relations(f"annotations[{index}]", annotation, annotation.get("id"))
        self.problems.raise_any()
        dicts = list(self.records.values())
        if not dicts:
            raise ValueError(f'{self.path}: "images" is empty. Expected at least one image.')
        names = [record["file_name"] for record in dicts]
        paths = names if image_root is None else locate_nested_images(image_root, names)
        for record, path in zip(dicts, paths, strict=True):
            record["file_name"] = path
            if merge_duplicates:
                record["relations"] = list(dict.fromkeys(record["relations"]))
        return dicts

    def _contiguous_ids(self, key: str) -> dict[Any, int]:
        """Map each id of a list of names to its 0-based position in the order of the ids."""
        names: dict[int, str] = {}
        for index, entry in enumerate(_as_list(self.content.get(key, []))):
            where = f"{self.path}: {key}[{index}] is {entry!r:.120}"
            identifier = entry.get("id") if isinstance(entry, dict) else None
            name = entry.get("name") if isinstance(entry, dict) else None
            if not _is_int(identifier) or not isinstance(name, str):
                self.problems.add(f'{where}; expected {{"id": an integer, "name": a text}}.')
            elif identifier in names or name in names.values():
                self.problems.add(f"{where}; its id or name is used before.")
            else:
                names[identifier] = name
        return {identifier: position for position, identifier in enumerate(sorted(names))}

    def _read_image(self, where: str, image: Any) -> None:
        if not isinstance(image, dict):
            self.problems.add(f"{where} is {image!r:.120}; expected an object.")
            return
        identifier, name = image.get("id"), image.get("file_name")
        height, width = image.get("height"), image.get("width")
        if not _is_id(identifier) or not isinstance(name, str):
            self.problems.add(
                f"{where}: expected id (an integer or a text) and file_name, found {image!r:.160}."
            )
        elif not all(_is_int(x) and x > 0 for x in (height, width)):
            self.bad_images.add(identifier)
            self.problems.add(
                f"{where} ({name}): height is {height!r:.40} and width {width!r:.40}; expected "
                "integers above 0, in pixels."
            )
        elif identifier in self.records:
            self.problems.add(f"{where} ({name}): another image has the id {identifier!r} as well.")
        else:
            record = create_dataset_dict(name, identifier, (height, width), [], [])
            self.records[identifier] = record
            if "verified_labels" in image:
                record["verified_labels"] = self._verified_labels(where, image["verified_labels"])

    def _verified_labels(self, where: str, labels: Any) -> dict[int, int]:
        """Return 1 (in the image) or 0 (not in it) by class."""
        values = {}
        for label in _as_list(labels):
            valid = isinstance(label, list) and len(label) == 2 and label[1] in (0, 1)
            category = _lookup(label[0], self.categories) if valid else None
            if category is None:
                self.problems.add(
                    f"{where}: verified_labels has {label!r:.80}; expected lists of [category id, "
                    "1 (it is in the image) or 0 (it is not)]."
                )
            else:
                values[category] = label[1]
        return values

    def _read_annotation(self, where: str, annotation: Any) -> None:
        if not isinstance(annotation, dict) or not _is_int(annotation.get("id")):
            self.problems.add(
                f"{where} is {annotation!r:.120}; expected an object with an id, an integer."
            )
            return
        identifier, image_id = annotation["id"], annotation.get("image_id")
        record = _lookup(image_id, self.records)
        try:
            if record is None and _is_id(image_id) and image_id in self.bad_images:
                self.bad_annotations.add(identifier)
                return
            if record is None:
                raise ValueError(
                    f"image_id is {image_id!r:.60}: no such image (a text and an integer are "
                    "different ids)"
                )
            if identifier in self.annotation_index:
                raise ValueError("another annotation has this id as well")
            entry = self._convert_annotation(annotation)
        except ValueError as error:
            self.bad_annotations.add(identifier)
            self.problems.add(f"{where} (id {identifier}): {error}. Fix or remove it.")
            return
        self.annotation_index[identifier] = (image_id, len(record["annotations"]))
        record["annotations"].append(entry)

    def _convert_annotation(self, annotation: dict[str, Any]) -> dict[str, Any]:
        """Return the annotation as in a dataset dict."""
        category = _lookup(annotation.get("category_id"), self.categories)
        if category is None:
            raise ValueError(
                f"category_id is {annotation.get('category_id')!r:.60}; expected one of the "
                f"{len(self.categories)} ids of categories"
            )
        bbox = annotation.get("bbox")
        if not are_numbers(bbox) or len(bbox) != 4 or min(bbox[2:]) <= 0:
            raise ValueError(
                f"bbox is {bbox!r:.80}; expected four numbers [x, y, width, height] with a width "
                "and a height above 0"
            )
        entry = {
            "bbox": bbox,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": category,
            "iscrowd": annotation.get("iscrowd", 0),
        }
        if entry["iscrowd"] not in (0, 1):
            raise ValueError(f"iscrowd is {entry['iscrowd']!r:.40}; expected 0 or 1")
        if annotation.get("segmentation"):
            entry["segmentation"] = read_segmentation(annotation["segmentation"])
        if annotation.get("keypoints"):
            # COCO's are pixel indices; Detectron2's are continuous, as in its own reader.
            values = annotation["keypoints"]
            if not are_numbers(values) or len(values) % 3:
                raise ValueError(
                    f"keypoints are {values!r:.80}; expected three numbers each, [x, y, visibility]"
                )
            entry["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(values)]
        if "attributes" in annotation:
            ids = annotation["attributes"]
            is_list = isinstance(ids, list)
            attributes = [_lookup(x, self.attributes) for x in ids] if is_list else [None]
            if None in attributes:
                raise ValueError(
                    f"attributes are {ids!r:.80}; expected a list of ids of the "
                    f'{len(self.attributes)} of the list "attributes"'
                )
            entry["attributes"] = attributes
        return entry

    def _read_relations(self, where: str, holder: Any, annotation_id: Any) -> None:
        """Read the relations of an image (``annotation_id`` None), or of their subject."""
        relations = holder.get("relations", []) if isinstance(holder, dict) else []
        for index, relation in enumerate(_as_list(relations)):
            if self.bad_annotations and isinstance(relation, list):
                if any(_is_id(x) and x in self.bad_annotations for x in relation[:2]):
                    continue  # the annotation was reported
            try:
                triplet = self._convert_relation(relation)
                image_id = self.annotation_index[relation[0]][0]
                if annotation_id is None and image_id != holder.get("id"):
                    raise ValueError("its annotations are those of another image")
                if annotation_id is not None and relation[0] != annotation_id:
                    raise ValueError("it is listed at an annotation that is not its subject")
            except ValueError as error:
                self.problems.add(
                    f"{self.path}: {where}, relation {index} is {relation!r:.80}: {error}. Fix or "
                    "remove it."
                )
                continue
            self.records[image_id]["relations"].append(triplet)

    def _convert_relation(self, relation: Any) -> tuple[int, int, int]:
        """Return (subject index, object index, predicate id), 0-based."""
        if not isinstance(relation, list) or len(relation) != 3:
            raise ValueError("expected [subject annotation id, object annotation id, predicate id]")
        subject = _lookup(relation[0], self.annotation_index)
        object_ = _lookup(relation[1], self.annotation_index)
        if subject is None or object_ is None:
            index, role = (0, "subject") if subject is None else (1, "object")
            raise ValueError(f"there is no annotation with the id {relation[index]!r} ({role})")
        if subject[0] != object_[0]:
            raise ValueError("subject and object are annotations of different images")
        if relation[0] == relation[1]:
            raise ValueError("it relates an annotation to itself")
        predicate = _lookup(relation[2], self.predicates)
        if predicate is None:
            raise ValueError(
                f"there is no predicate with the id {relation[2]!r} among {len(self.predicates)}"
            )
        return subject[1], object_[1], predicate


def _is_int(value: Any) -> bool:
    """Return whether it is an integer. JSON has no subclasses of int, except bool."""
    return type(value) is int


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _lookup(key: Any, table: dict[Any, Any]) -> Any:
    """Return the entry of an id, or None. True is not the id 1."""
    return table.get(key) if type(key) in (int, str) else None


def _as_list(value: Any) -> list[Any]:
    """Wrap anything that is not a list, so that it is reported as an invalid entry."""
    return value if isinstance(value, list) else [value]


def are_numbers(values: Any) -> bool:
    """Return whether it is a list of numbers that can be coordinates."""
    if type(values) is not list:
        return False
    for value in values:  # all() would take twice as long, and files have millions of boxes
        if type(value) not in (int, float) or not -_LIMIT < value < _LIMIT:
            return False
    return True


def read_segmentation(value: Any) -> Any:
    """Return polygons or RLE in Detectron2's format."""
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        if are_numbers(size) and len(size) == 2 and all(_is_int(x) and x > 0 for x in size):
            if isinstance(counts, str):
                return value
            if are_numbers(counts) and all(_is_int(x) and x >= 0 for x in counts):
                return mask_util.frPyObjects(value, *size)
    elif isinstance(value, list) and all(
        are_numbers(polygon) and len(polygon) % 2 == 0 and len(polygon) >= 6 for polygon in value
    ):
        return value
    raise ValueError(
        f"segmentation is {value!r:.80}; expected polygons [x, y, x, y, x, y, ...] or an RLE "
        "object with size and counts"
    )


def locate_nested_images(image_root: str, names: Sequence[str]) -> list[str]:
    """Return the paths of images that may be in subfolders of ``image_root``."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(os.path.dirname(name), []).append(name)
    paths = {}
    for folder, members in by_folder.items():
        root = os.path.join(image_root, folder) if folder else image_root
        files = [os.path.basename(name) for name in members]
        paths.update(zip(members, locate_images(root, files, "the dataset"), strict=True))
    return [paths[name] for name in names]
