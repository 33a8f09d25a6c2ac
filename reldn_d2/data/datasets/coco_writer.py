"""Convert any dataset with relations to a COCO file with relations (see :mod:`.coco`)."""

import os
from collections.abc import Sequence
from typing import Any

from ...structures.scene_graph import boxes_xyxy

__all__ = ["to_relation_instances"]


def to_relation_instances(
    dataset_dicts: Sequence[dict[str, Any]],
    thing_classes: Sequence[str],
    predicate_classes: Sequence[str],
    image_root: str,
    attribute_classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of a COCO file with relations.

    Args:
        dataset_dicts: Detectron2's dicts with ``"relations"``.
        thing_classes: names of the entity classes.
        predicate_classes: names of the predicates.
        image_root: folder that ``file_name`` becomes relative to.
        attribute_classes: names of the attributes of entities, if any.

    Returns:
        What :func:`load_relation_instances` reads. Ids of categories, predicates and attributes
        start at 1; ``image_id`` is kept.
    """
    content: dict[str, Any] = {"images": [], "annotations": []}
    annotation_id = 0
    for record in dataset_dicts:
        first_id = annotation_id + 1
        image = {
            "id": record["image_id"],
            "file_name": os.path.relpath(record["file_name"], image_root),
            "height": record["height"],
            "width": record["width"],
            "relations": [
                [first_id + subject, first_id + object_, predicate + 1]
                for subject, object_, predicate in record.get("relations", ())
            ],
        }
        if "verified_labels" in record:
            image["verified_labels"] = [
                [category + 1, value] for category, value in record["verified_labels"].items()
            ]
        content["images"].append(image)
        boxes = boxes_xyxy(record["annotations"])
        for annotation, (x0, y0, x1, y1) in zip(record["annotations"], boxes.tolist(), strict=True):
            annotation_id += 1
            entry = {
                "id": annotation_id,
                "image_id": record["image_id"],
                "category_id": annotation["category_id"] + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": int(annotation.get("iscrowd", 0)),
            }
            if "segmentation" in annotation:
                entry["segmentation"] = _plain(annotation["segmentation"])
            if "keypoints" in annotation:  # COCO's are pixel indices, Detectron2's continuous
                values = enumerate(annotation["keypoints"])
                entry["keypoints"] = [v if i % 3 == 2 else v - 0.5 for i, v in values]
            if "attributes" in annotation:
                entry["attributes"] = [value + 1 for value in annotation["attributes"]]
            content["annotations"].append(entry)
    lists = {
        "categories": thing_classes,
        "predicates": predicate_classes,
        "attributes": attribute_classes,
    }
    for key, names in lists.items():
        if names or key != "attributes":
            content[key] = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    return content


def _plain(segmentation: Any) -> Any:
    """Return polygons, or an RLE object with its counts as text, because JSON has no bytes."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
        return {**segmentation, "counts": segmentation["counts"].decode("ascii")}
    return segmentation
