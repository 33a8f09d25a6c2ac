"""What the importers share: the images of a file in another format, with the names they refer to.

An importer adds images, entities and relations; every record with a problem is named in one error,
or left out and counted.
"""

import logging
import math
import os
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ....structures.box_frames import expected_box, outside_problem
from ....structures.name_matching import NAME_FIELDS, Renumbering, require_unique_names
from ...dataset_dict import create_annotation, create_dataset_dict
from ..io import Problems, image_size

__all__ = ["ImportOptions", "Imported", "ImportedImage", "RelationImport", "require_list"]

logger = logging.getLogger(__name__)

_SLACK = 1.0  # pixels that a box may extend beyond its image; rounding does that


@dataclass(frozen=True)
class ImportOptions:
    """How to read a file in another format.

    Attributes:
        image_root: folder that the file names of images are relative to; read only where the
            file has no image sizes.
        classes: entity classes in the order of their ids; None takes the names of the file, in its
            order if it lists them and otherwise in alphabetical order.
        predicates: the predicates, likewise.
        attributes: the attributes of entities, likewise; read only from formats that have them.
        panoptic_root: ``psg``: folder of the panoptic PNG files, which give entities their masks;
            None reads none.
        image_data: Visual Genome's ``image_data.json``; None means the one next to the file.
        split: ``train`` or ``test`` of ``psg.json``; None means all images.
        ignore: names of fields that are not read.
        skip_invalid: leave out records with problems, and log their count, instead of raising.
    """

    image_root: str | None = None
    classes: Sequence[str] | None = None
    predicates: Sequence[str] | None = None
    attributes: Sequence[str] | None = None
    panoptic_root: str | None = None
    image_data: str | None = None
    split: str | None = None
    ignore: Collection[str] = ()
    skip_invalid: bool = False


class Imported(NamedTuple):
    """The content of a file: dataset dicts, whose ``file_name`` are relative, and the names."""

    dicts: list[dict[str, Any]]
    thing_classes: list[str]
    predicate_classes: list[str]
    attribute_classes: list[str]  # empty if the file has no attributes


_KINDS = dict(zip(NAME_FIELDS, ("class", "predicate", "attribute")))
_OPTIONS = dict(zip(NAME_FIELDS, ("--classes", "--predicates", "--attributes")))


class _NameIds:
    """Ids of names: of a given list, or of the names in the order in which they appear."""

    def __init__(self, field: str, names: Sequence[str] | None, owner: str) -> None:
        if names is not None:
            require_unique_names(names, field, owner)
        self.what = _KINDS[field]
        self.owner = owner
        self.is_fixed = names is not None
        self.ids = {name.strip(): index for index, name in enumerate(names or ())}

    def id_of(self, name: Any) -> int:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"the {self.what} is {name!r:.80}; expected a name")
        name = name.strip()
        if name not in self.ids:
            if self.is_fixed:
                raise ValueError(
                    f"the {self.what} {name!r:.80} is not one of the {len(self.ids)} of "
                    f"{self.owner}"
                )
            self.ids[name] = len(self.ids)
        return self.ids[name]

    def finish(self) -> tuple[list[str], list[int] | None]:
        """Return the names by final id, and the final id by the present one; None: no change."""
        names = list(self.ids)
        if self.is_fixed:
            return names, None
        position = {name: index for index, name in enumerate(sorted(names))}
        return sorted(names), [position[name] for name in names]


class ImportedImage:
    """Collects the entities and relations of one image.

    Attributes:
        record: the dataset dict.
        invalid: keys of entities that were reported; relations of them are not reported as well.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.invalid: set[Hashable] = set()
        self._indices: dict[Hashable, int] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._indices

    def __getitem__(self, key: Hashable) -> dict[str, Any]:
        """Return the annotation of an entity."""
        return self.record["annotations"][self._indices[key]]

    def add_entity(self, key: Hashable, category: int, box: Sequence[Any]) -> dict[str, Any]:
        """Add an entity; its key must be new.

        Args:
            key: identifies the entity in its image.
            category: class id.
            box: XYXY in pixels.

        Returns:
            the annotation, for further fields.

        Raises:
            ValueError: the key is used, or the box is not one within the image.
        """
        if key in self._indices:
            raise ValueError(f"another entity of the image has the id {key!r:.60} as well")
        if not all(_is_number(x) for x in box) or len(box) != 4:
            raise ValueError(f"the box is {list(box)!r:.80}; expected finite numbers")
        x0, y0, x1, y1 = map(float, box)
        height, width = self.record["height"], self.record["width"]
        if x1 <= x0 or y1 <= y0:
            raise ValueError(f"the box {[x0, y0, x1, y1]} (x1, y1, x2, y2) has no area")
        if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            raise ValueError(
                f"the box {[x0, y0, x1, y1]} (x1, y1, x2, y2) is outside the image of {width} x "
                f"{height} pixels. {expected_box()}"
            )
        self._indices[key] = len(self._indices)
        annotation = create_annotation((x0, y0, x1, y1), category)
        self.record["annotations"].append(annotation)
        return annotation

    def add_relation(self, subject: Hashable, object_: Hashable, predicate: int) -> bool:
        """Add a relation between two entities.

        Returns:
            False if one of them was reported as invalid; the relation is then left out.

        Raises:
            ValueError: there is no such entity, or it is related to itself.
        """
        for key, role in ((subject, "subject"), (object_, "object")):
            is_key = type(key) in (int, str, tuple)
            if not is_key or (key not in self._indices and key not in self.invalid):
                raise ValueError(f"its {role} is {key!r:.60}, which is no entity of the image")
        if subject == object_:
            raise ValueError(f"it relates the entity {subject!r:.60} to itself")
        if subject in self.invalid or object_ in self.invalid:
            return False
        self.record["relations"].append((self._indices[subject], self._indices[object_], predicate))
        return True


class RelationImport:
    """Collects the images of a file.

    Example::

        imported = RelationImport("relations.csv", ImportOptions())
        with imported.record("line 2"):
            image = imported.add_image("a.jpg", "a.jpg", height=40, width=60)
        result = imported.finish()
    """

    def __init__(
        self,
        source: str,
        options: ImportOptions,
        thing_classes: Sequence[str] | None = None,
        predicate_classes: Sequence[str] | None = None,
        attribute_classes: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            source: path of the file.
            options: see :class:`ImportOptions`.
            thing_classes, predicate_classes, attribute_classes: names in the order of the file, if
                it lists them.
        """
        self.source = source
        self.options = options
        self.problems = Problems()
        self.images: list[ImportedImage] = []
        self._seen: set[tuple[str, Any]] = set()
        self._lost_relations = 0
        self._classes = self._name_ids("thing_classes", options.classes, thing_classes)
        self._predicates = self._name_ids(
            "predicate_classes", options.predicates, predicate_classes
        )
        self._attributes = self._name_ids(
            "attribute_classes", options.attributes, attribute_classes
        )

    def _name_ids(
        self, field: str, given: Sequence[str] | None, listed: Sequence[str] | None
    ) -> _NameIds:
        if given is not None:
            return _NameIds(field, given, f"the list that was given ({_OPTIONS[field]})")
        return _NameIds(field, listed, self.source)

    @contextmanager
    def record(
        self, where: str, image: ImportedImage | None = None, key: Hashable = None
    ) -> Iterator[None]:
        """Collect a ValueError of the block as a problem of one record of the file.

        Args:
            where: the record, such as ``line 7``.
            image, key: the entity that the record describes, if any.
        """
        try:
            yield
        except ValueError as error:
            if image is not None and key not in image:
                image.invalid.add(key)
            # Errors of shared functions are sentences already.
            reason = str(error).rstrip().removesuffix(".")
            self.problems.add(f"{self.source}, {where}: {reason}. Fix or remove it.")

    def check_fields(self, record: Any, read: Sequence[str], unused: Collection[str] = ()) -> None:
        """Raise ValueError if a record is no object or has a field that is not known.

        Args:
            record: the record.
            read: fields that are read; they may be missing.
            unused: fields that the format has but the import does not read.
        """
        if not isinstance(record, dict):
            raise ValueError(f"found {record!r:.100}; expected an object with {', '.join(read)}")
        for field in record:
            if field not in read and field not in unused and field not in self.options.ignore:
                raise ValueError(
                    f"unknown field {field!r:.60} (value {record[field]!r:.60}); read are "
                    f"{', '.join(read)}. If it can be ignored, pass --ignore {field}"
                )

    def category(self, name: Any) -> int:
        """Return the id of a class; raise ValueError if it is not a known name."""
        return self._classes.id_of(name)

    def predicate(self, name: Any) -> int:
        """Return the id of a predicate; raise ValueError if it is not a known name."""
        return self._predicates.id_of(name)

    def add_attributes(self, where: str, entity: dict[str, Any], names: Any) -> None:
        """Give an entity the attributes that a record lists; unknown ones if it lists none.

        A problem is one of the attributes alone: without it the entity stays.

        Args:
            where: the record, see :meth:`record`.
            entity: the annotation.
            names: list of names; repetitions count once.
        """
        with self.record(f"{where}, attributes"):
            if not isinstance(names, list):
                raise ValueError(f"they are {names!r:.80}; expected a list")
        for name in names if isinstance(names, list) else ():
            with self.record(f"{where}, attributes"):
                attribute = self._attributes.id_of(name)
                ids = entity.setdefault("attributes", [])
                if attribute not in ids:
                    ids.append(attribute)

    def add_image(
        self, image_id: Any, file_name: Any, height: Any = None, width: Any = None
    ) -> ImportedImage:
        """Add an image.

        Args:
            image_id: an integer or a text.
            file_name: relative to ``options.image_root``.
            height, width: in pixels; both None reads them from the image.

        Raises:
            ValueError: wrong values, an image that was added before, or, without a size, one that
                cannot be read.
        """
        if type(image_id) not in (int, str):
            raise ValueError(f"the id of the image is {image_id!r:.60}; expected a number or text")
        if not isinstance(file_name, str) or not file_name:
            raise ValueError(f"the file name of the image is {file_name!r:.60}; expected a text")
        root = self.options.image_root
        if os.path.isabs(file_name):
            if root is None:
                raise ValueError(
                    f"{file_name} is an absolute path: pass the folder of the images (--image-root)"
                )
            file_name = os.path.relpath(file_name, root)
        for key in (("id", image_id), ("file name", file_name)):
            if key in self._seen:
                raise ValueError(f"another image has the {key[0]} {key[1]!r:.80} as well")
        if height is None and width is None:
            height, width = self._size(file_name)
        if not all(type(x) is int and x > 0 for x in (height, width)):
            raise ValueError(
                f"the height of the image is {height!r:.40} and its width {width!r:.40}; expected "
                "integers above 0"
            )
        self._seen |= {("id", image_id), ("file name", file_name)}
        image = ImportedImage(create_dataset_dict(file_name, image_id, (height, width), [], []))
        self.images.append(image)
        return image

    def _size(self, file_name: str) -> tuple[int, int]:
        if self.options.image_root is None:
            raise ValueError(
                "the size of the image is unknown: add its width and height, or pass the folder of "
                "the images (--image-root)"
            )
        return image_size(os.path.join(self.options.image_root, file_name))

    def add_relation(
        self, image: ImportedImage, subject: Hashable, object_: Hashable, predicate: Any
    ) -> None:
        """Add a relation with the name of its predicate; see :meth:`ImportedImage.add_relation`."""
        predicate_id = self.predicate(predicate)
        self._lost_relations += not image.add_relation(subject, object_, predicate_id)

    def finish(self) -> Imported:
        """Return the result.

        Raises:
            ValueError: there were problems, unless they are to be skipped, or nothing is left.
        """
        if not self.options.skip_invalid:
            self.problems.raise_any()
        elif self.problems.count:
            logger.warning(
                f"{self.source}: left out {self.problems.count} records with problems, and "
                f"{self._lost_relations} relations of such entities. The first: "
                f"{self.problems.messages[0]}"
            )
        self._check_frame()
        if not any(image.record["relations"] for image in self.images):
            raise ValueError(f"{self.source}: no relation in its {len(self.images)} images.")
        classes, new_classes = self._classes.finish()
        predicates, new_predicates = self._predicates.finish()
        attributes, new_attributes = self._attributes.finish()
        renumbering = Renumbering(new_classes, new_predicates, new_attributes)
        dicts = [renumbering.dataset_dict(image.record) for image in self.images]
        return Imported(dicts, classes, predicates, attributes)

    def _check_frame(self) -> None:
        """Raise ValueError if most boxes of the file lie mostly outside their images.

        If only parts of boxes do, that is a warning.
        """
        entities = [(x, image.record) for image in self.images for x in image.record["annotations"]]
        boxes = np.array([annotation["bbox"] for annotation, _ in entities]).reshape(-1, 4)
        sizes = np.array([(record["height"], record["width"]) for _, record in entities])
        sizes = sizes.reshape(-1, 2)
        problem = outside_problem(boxes, sizes)
        if problem is not None:
            record = entities[problem[0]][1]
            raise ValueError(f"{self.source}, image {record['file_name']}: {problem[1]}")
        beyond = np.maximum(-boxes[:, :2], boxes[:, 2:] - sizes[:, ::-1]).max(axis=1, initial=0)
        rows = np.flatnonzero(beyond > _SLACK)
        if len(rows):
            worst = int(beyond.argmax())
            logger.warning(
                f"{self.source}: {len(rows)} of {len(boxes)} boxes extend beyond their image, most "
                f"the box {boxes[worst].tolist()} (x1, y1, x2, y2) of image "
                f"{entities[worst][1]['file_name']}, by {beyond[worst]:.0f} pixels. They are kept, "
                "and clipped in training. Are these the images that were annotated?"
            )


def require_list(path: str, content: Any, what: str, keys: Sequence[str] = ()) -> None:
    """Raise unless content is a list or, with ``keys``, an object with these lists.

    Args:
        path: file of the content.
        content: what JSON has.
        what: the format, for the message.
        keys: lists that the object must have.

    Raises:
        ValueError: with what was found.
    """
    expected = f"an object with the lists {', '.join(keys)}" if keys else "a list"
    if not isinstance(content, dict if keys else list):
        raise ValueError(f"{path}: found a {type(content).__name__}; expected {what}: {expected}.")
    for key in keys:
        if not isinstance(content.get(key), list):
            raise ValueError(
                f'{path}: no list "{key}"; it has {sorted(content)!r:.200}. Expected {what}: '
                f"{expected}."
            )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
