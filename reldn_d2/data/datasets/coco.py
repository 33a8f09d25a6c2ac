"""Data sets of your own: a COCO file with relations.

Beside COCO's ``images``, ``annotations`` and ``categories`` the file has ``predicates``, a list of
``{"id": 1, "name": "on"}``, and its images or its annotations have ``"relations"``: a list of
``[subject annotation id, object annotation id, predicate id]``.
"""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.structures import BoxMode

from .catalog import register_dataset
from .coco_values import are_numbers, is_among, is_int, segmentation
from .io import Problems, find_images, no_garbage_collection, read_json

__all__ = [
    "load_relation_instances",
    "register_relation_instances",
]

_LISTS = ("images", "annotations", "categories", "predicates")


@no_garbage_collection()
def load_relation_instances(
    json_file: str, image_root: str, merge_duplicates: bool = False
) -> list[dict[str, Any]]:
    """Load a COCO file with relations as Detectron2 dataset dicts.

    Args:
        json_file: the file.
        image_root: folder that its ``file_name`` are relative to.
        merge_duplicates: keep one of several equal relations of an image.

    Returns:
        One dict an image, also for images without annotations, in the order of the file. Ids of
        categories and predicates become numbers from 0, in the order of the ids.

    Raises:
        FileNotFoundError: if the file, the folder or an image is missing.
        ValueError: with the file and the first record that is not as expected; all of them are in
            the error's ``problems``.
    """
    return _Reader(json_file).dataset_dicts(image_root, merge_duplicates)


def register_relation_instances(
    name: str,
    metadata: dict[str, Any],
    json_file: str,
    image_root: str,
    merge_duplicates: bool = False,
) -> None:
    """Register a COCO file with relations, as ``register_coco_instances`` does one without.

    Args:
        name: name of the data set.
        metadata: further metadata; may be empty. Classes and predicates are read from the file when
            they are first asked for. ``evaluator_type`` is "relation" unless given.
        json_file: see :func:`load_relation_instances`.
        image_root: see :func:`load_relation_instances`.
        merge_duplicates: see :func:`load_relation_instances`.
    """
    register_dataset(
        name,
        load_relation_instances,
        dict(json_file=json_file, image_root=image_root, merge_duplicates=merge_duplicates),
        annotation_files=[json_file],
        read_names=lambda: _Reader(json_file, names_only=True).names(),
        # For scoring predictions again and for counting, which need no images.
        load_annotations=lambda: _Reader(json_file).dataset_dicts(None, merge_duplicates),
        image_root=image_root,
        json_file=json_file,
        **{"evaluator_type": "relation", **metadata},
    )


class _Reader:
    """Checks and reads one file."""

    def __init__(self, json_file: str, names_only: bool = False) -> None:
        self.path = json_file
        self.content = read_json(json_file, "COCO file with relations")
        self.problems = Problems()
        # Ids of images and annotations with a problem: what refers to them is no other problem.
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
                    f"file with {', '.join(_LISTS)} (docs/own_data.md shows one)."
                )
        if "relations" in self.content:
            raise ValueError(
                f'{json_file}: a list "relations" stands beside "images", where it is not read. '
                "Put each relation into the entry of its image (docs/own_data.md shows how)."
            )
        self.categories = self._numbers("categories")
        self.predicates = self._numbers("predicates")
        self.attributes = self._numbers("attributes")
        if names_only:
            self.problems.raise_any()
            self.content = {key: self.content.get(key, []) for key in (*_LISTS[2:], "attributes")}

    def names(self) -> dict[str, Any]:
        """Metadata: names in the order of their numbers, and the numbers of the file's ids."""
        names = {"thing_dataset_id_to_contiguous_id": self.categories}
        for field, key, numbers in (
            ("thing_classes", "categories", self.categories),
            ("predicate_classes", "predicates", self.predicates),
            ("attribute_classes", "attributes", self.attributes),
        ):
            by_id = {entry["id"]: entry["name"] for entry in self.content.get(key, ())}
            names[field] = [by_id[identifier] for identifier in numbers]
        return names

    def dataset_dicts(self, image_root: str | None, merge_duplicates: bool) -> list[dict[str, Any]]:
        """See :func:`load_relation_instances`; None does not look for the images."""
        records: dict[Any, dict[str, Any]] = {}
        for number, image in enumerate(self.content["images"]):
            self._read_image(f"images[{number}]", image, records)
        # by id: image id and position among the annotations of the image
        places: dict[Any, tuple[Any, int]] = {}
        annotations = self.content["annotations"]
        holders = []  # annotations with relations
        for number, annotation in enumerate(annotations):
            self._read_annotation(number, annotation, records, places)
            if isinstance(annotation, dict) and "relations" in annotation:
                holders.append((number, annotation))
            annotations[number] = None  # large files need the memory
        for number, image in enumerate(self.content["images"]):
            self._read_relations(f"images[{number}]", image, records, places, None)
        for number, annotation in holders:
            where = f"annotations[{number}]"
            self._read_relations(where, annotation, records, places, annotation.get("id"))
        self.problems.raise_any()
        dicts = list(records.values())
        if not dicts:
            raise ValueError(f'{self.path}: "images" is empty. Expected at least one image.')
        names = [record["file_name"] for record in dicts]
        paths = names if image_root is None else _paths(image_root, names)
        for record, path in zip(dicts, paths, strict=True):
            record["file_name"] = path
            if merge_duplicates:
                record["relations"] = list(dict.fromkeys(record["relations"]))
        return dicts

    def _numbers(self, key: str) -> dict[Any, int]:
        """Contiguous number of each id of a list of names."""
        entries = self.content.get(key, [])
        ids: dict[int, str] = {}
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            where = f"{self.path}: {key}[{number}]"
            identifier = entry.get("id") if isinstance(entry, dict) else None
            name = entry.get("name") if isinstance(entry, dict) else None
            if not is_int(identifier) or not isinstance(name, str):
                self.problems.add(
                    f'{where} is {entry!r:.120}; expected {{"id": an integer, "name": a text}}.'
                )
            elif identifier in ids or name in ids.values():
                self.problems.add(f"{where} is {entry!r:.120}; its id or name stands there before.")
            else:
                ids[identifier] = name
        return {identifier: number for number, identifier in enumerate(sorted(ids))}

    def _read_image(self, where: str, image: Any, records: dict[Any, dict[str, Any]]) -> None:
        where = f"{self.path}: {where}"
        if not isinstance(image, dict):
            self.problems.add(f"{where} is {image!r:.120}; expected an object.")
            return
        identifier, name = image.get("id"), image.get("file_name")
        height, width = image.get("height"), image.get("width")
        if not (is_int(identifier) or isinstance(identifier, str)) or not isinstance(name, str):
            self.problems.add(
                f"{where}: expected id (an integer or a text) and file_name, found {image!r:.160}."
            )
        elif not all(is_int(x) and x > 0 for x in (height, width)):
            self.bad_images.add(identifier)
            self.problems.add(
                f"{where} ({name}): height is {height!r:.40} and width {width!r:.40}; expected "
                "integers, numbers of pixels above 0."
            )
        elif identifier in records:
            self.problems.add(f"{where} ({name}): another image has the id {identifier!r} as well.")
        else:
            records[identifier] = record = {
                "file_name": name,
                "image_id": identifier,
                "height": height,
                "width": width,
                "annotations": [],
                "relations": [],
            }
            self._read_labels(where, image, record)

    def _read_labels(self, where: str, image: dict[str, Any], record: dict[str, Any]) -> None:
        if "verified_labels" not in image:
            return
        record["verified_labels"] = {}
        labels = image["verified_labels"]
        for entry in labels if isinstance(labels, list) else [labels]:
            good = isinstance(entry, list) and len(entry) == 2 and entry[1] in (0, 1)
            if not good or self._lookup(entry[0], self.categories) is None:
                self.problems.add(
                    f"{where}: verified_labels has {entry!r:.80}; expected lists of [category id, "
                    "1 (it is in the image) or 0 (it is not)]."
                )
            else:
                record["verified_labels"][self.categories[entry[0]]] = entry[1]

    def _read_annotation(
        self,
        number: int,
        annotation: Any,
        records: dict[Any, dict[str, Any]],
        places: dict[Any, tuple[Any, int]],
    ) -> None:
        if not isinstance(annotation, dict) or not is_int(annotation.get("id")):
            self.problems.add(
                f"{self.path}: annotations[{number}] is {annotation!r:.120}; expected an object "
                "with an id, an integer."
            )
            return
        identifier = annotation["id"]
        try:
            record = self._lookup(annotation.get("image_id"), records)
            if record is None:
                if is_among(annotation.get("image_id"), self.bad_images):
                    self.bad_annotations.add(identifier)
                    return
                raise ValueError(
                    f"image_id is {annotation.get('image_id')!r:.60}: no such image (a text and an "
                    "integer are different ids)"
                )
            if identifier in places:
                raise ValueError("another annotation has this id as well")
            entry = self._entry(annotation)
        except ValueError as error:
            self.bad_annotations.add(identifier)
            self.problems.add(
                f"{self.path}: annotations[{number}] (id {identifier}): {error}. Mend or remove it."
            )
            return
        places[identifier] = (annotation["image_id"], len(record["annotations"]))
        record["annotations"].append(entry)

    def _entry(self, annotation: dict[str, Any]) -> dict[str, Any]:
        """The annotation as in a dataset dict, or a ValueError."""
        category = self._lookup(annotation.get("category_id"), self.categories)
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
            entry["segmentation"] = segmentation(annotation["segmentation"])
        if annotation.get("keypoints"):
            # COCO's are numbers of pixels; Detectron2's are continuous, as in its own reader.
            values = annotation["keypoints"]
            if not are_numbers(values) or len(values) % 3:
                raise ValueError(
                    f"keypoints are {values!r:.80}; expected three numbers each, [x, y, visibility]"
                )
            entry["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(values)]
        if "attributes" in annotation:
            wanted = annotation["attributes"]
            listed = isinstance(wanted, list)
            known = [self._lookup(x, self.attributes) for x in wanted] if listed else [None]
            if None in known:
                raise ValueError(
                    f"attributes are {wanted!r:.80}; expected a list of ids of the "
                    f"{len(self.attributes)} "
                    'of the list "attributes"'
                )
            entry["attributes"] = known
        return entry

    def _read_relations(
        self,
        where: str,
        holder: Any,
        records: dict[Any, dict[str, Any]],
        places: dict[Any, tuple[Any, int]],
        annotation_id: Any,
    ) -> None:
        """Relations of an image (``annotation_id`` None) or of an annotation, their subject."""
        relations = holder.get("relations", []) if isinstance(holder, dict) else []
        for number, relation in enumerate(
            relations if isinstance(relations, list) else [relations]
        ):
            if self.bad_annotations and self._is_told(relation):
                continue
            try:
                subject, object_, predicate = self._relation(relation, places)
                image_id = places[relation[0]][0]
                if annotation_id is None and image_id != holder.get("id"):
                    raise ValueError("its annotations are those of another image")
                if annotation_id is not None and relation[0] != annotation_id:
                    raise ValueError("it stands at an annotation that is not its subject")
            except ValueError as error:
                self.problems.add(
                    f"{self.path}: {where}, relation {number} is {relation!r:.80}: {error}. Mend "
                    "or remove it."
                )
                continue
            records[image_id]["relations"].append((subject, object_, predicate))

    def _is_told(self, relation: Any) -> bool:
        """Whether an end of it is an annotation of which a problem was told already."""
        ends = relation[:2] if isinstance(relation, list) else []
        return any(is_among(x, self.bad_annotations) for x in ends)

    def _relation(self, relation: Any, places: dict[Any, tuple[Any, int]]) -> tuple[int, int, int]:
        if not isinstance(relation, list) or len(relation) != 3:
            raise ValueError("expected [subject annotation id, object annotation id, predicate id]")
        subject = self._lookup(relation[0], places)
        object_ = self._lookup(relation[1], places)
        if subject is None or object_ is None:
            number, role = (0, "subject") if subject is None else (1, "object")
            raise ValueError(f"there is no annotation with the id {relation[number]!r} ({role})")
        if subject[0] != object_[0]:
            raise ValueError("subject and object are annotations of different images")
        if relation[0] == relation[1]:
            raise ValueError("it relates an annotation to itself")
        predicate = self._lookup(relation[2], self.predicates)
        if predicate is None:
            raise ValueError(
                f"there is no predicate with the id {relation[2]!r} among {len(self.predicates)}"
            )
        return subject[1], object_[1], predicate

    @staticmethod
    def _lookup(key: Any, table: dict[Any, Any]) -> Any:
        """The entry of ``key``; None if there is none, or ``key`` cannot be one (True is no 1)."""
        return table.get(key) if type(key) in (int, str) else None


def _paths(image_root: str, names: Sequence[str]) -> list[str]:
    """Paths of images that may lie in folders below ``image_root``."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(os.path.dirname(name), []).append(os.path.basename(name))
    found = {}
    for folder, files in folders.items():
        root = os.path.join(image_root, folder) if folder else image_root
        paths = find_images(root, files, "the data set")
        found.update(zip([os.path.join(folder, x) for x in files], paths, strict=True))
    return [found[os.path.join(os.path.dirname(x), os.path.basename(x))] for x in names]
