"""Import Visual Genome's own ``relationships.json`` or ``scene_graphs.json``.

Names are the annotators' words: many thousands, in lower case here, and without the spaces around
them. Sizes come from ``image_data.json``; an image's file is ``IMAGEID.jpg``. Objects have
attributes in ``scene_graphs.json`` only. Synsets are left out.
"""

import os
from typing import Any

from ..io import read_json
from .relation_import import (
    Imported,
    ImportedImage,
    ImportOptions,
    RelationImport,
    require_list,
)

__all__ = ["read_raw_visual_genome"]

_IMAGE = ("image_id", "objects", "relationships")
_OBJECT = ("object_id", "x", "y", "w", "h", "name", "names", "attributes")
_RELATIONSHIP = ("predicate", "subject", "object", "subject_id", "object_id")
_UNUSED_IN_IMAGE = ("image_url", "attributes", "width", "height", "url")
_UNUSED_IN_OBJECT = ("synsets", "merged_object_ids")
_UNUSED_IN_RELATIONSHIP = ("relationship_id", "synsets")
_ENDS = ("subject", "object")


def read_raw_visual_genome(path: str, options: ImportOptions) -> Imported:
    """Read the file.

    Raises:
        FileNotFoundError: there is no such file, or no ``image_data.json``.
        ValueError: it is no such file, or an object or a relationship is invalid; names the image
            and the record.
    """
    content = read_json(path, "Visual Genome's relationships")
    require_list(path, content, "Visual Genome's relationships.json or scene_graphs.json")
    sizes = _read_sizes(
        options.image_data or os.path.join(os.path.dirname(path), "image_data.json")
    )
    imported = RelationImport(path, options)
    for index, graph in enumerate(content):
        content[index] = None  # large files need the memory
        image_id = graph.get("image_id") if isinstance(graph, dict) else None
        where = f"image {index} (image_id {image_id!r:.40})"
        with imported.record(where):
            imported.check_fields(graph, _IMAGE, _UNUSED_IN_IMAGE)
            if type(image_id) is not int or image_id not in sizes:
                raise ValueError("image_data.json has no image with this image_id")
            image = imported.add_image(image_id, f"{image_id}.jpg", *sizes[image_id])
            _read_graph(imported, where, image, graph)
    return imported.finish()


def _read_sizes(path: str) -> dict[int, tuple[int, int]]:
    """Return (height, width) by ``image_id``."""
    content = read_json(path, "image_data.json of Visual Genome, with the sizes (--image-data)")
    require_list(path, content, "image_data.json of Visual Genome")
    sizes = {}
    for index, record in enumerate(content):
        if not isinstance(record, dict) or type(record.get("image_id")) is not int:
            raise ValueError(f"{path}, image {index} is {record!r:.120}; expected an image_id.")
        sizes[record["image_id"]] = (record.get("height"), record.get("width"))
    return sizes


def _read_graph(
    imported: RelationImport, where: str, image: ImportedImage, graph: dict[str, Any]
) -> None:
    relationships = graph.get("relationships")
    if not isinstance(relationships, list) or not isinstance(graph.get("objects", []), list):
        raise ValueError('expected a list "relationships", and a list "objects" or none')
    for index, entity in enumerate(graph.get("objects", [])):
        key, place = _id_of(entity), f"{where}, objects[{index}]"
        with imported.record(place, image, key):
            _add_object(imported, place, image, entity)
    for index, relationship in enumerate(relationships):
        place = f"{where}, relationships[{index}]"
        with imported.record(place):
            imported.check_fields(relationship, _RELATIONSHIP, _UNUSED_IN_RELATIONSHIP)
            predicate = _word(relationship.get("predicate"))
            ends = [_end(imported, place, image, relationship, role) for role in _ENDS]
            imported.add_relation(image, *ends, predicate)


def _end(
    imported: RelationImport,
    place: str,
    image: ImportedImage,
    relationship: dict[str, Any],
    role: str,
) -> Any:
    """Return the id of the subject or object, which ``relationships.json`` repeats each time."""
    if role not in relationship:
        return relationship.get(f"{role}_id")
    entity = relationship[role]
    key = _id_of(entity)
    if key is None or key not in image.invalid:
        with imported.record(f"{place}, {role}", image, key):
            _add_object(imported, f"{place}, {role}", image, entity)
    return key


def _add_object(imported: RelationImport, where: str, image: ImportedImage, entity: Any) -> None:
    """Add an object unless the same one was added before."""
    imported.check_fields(entity, _OBJECT, _UNUSED_IN_OBJECT)
    key = _id_of(entity)
    if key is None:
        raise ValueError(f"its object_id is {entity.get('object_id')!r:.40}; expected an integer")
    names = entity.get("names")
    name = names[0] if isinstance(names, list) and names else entity.get("name")
    category = imported.category(_word(name))
    x, y, w, h = values = [entity.get(side) for side in ("x", "y", "w", "h")]
    if any(type(value) not in (int, float) for value in values):
        raise ValueError(f"x, y, w and h are {values!r:.80}; expected numbers")
    box = (x, y, x + w, y + h)
    if key not in image:
        added = image.add_entity(key, category, box)
        words = entity.get("attributes", [])
        words = [_word(x) for x in words] if isinstance(words, list) else words
        imported.add_attributes(where, added, words)
    elif (image[key]["category_id"], tuple(image[key]["bbox"])) != (category, box):
        raise ValueError(
            f"the object_id {key} has another name or box than before in this image: "
            f"{name!r:.40} {list(box)}"
        )


def _id_of(entity: Any) -> int | None:
    key = entity.get("object_id") if isinstance(entity, dict) else None
    return key if type(key) is int else None


def _word(text: Any) -> Any:
    return text.strip().lower() if isinstance(text, str) else text
