"""Import Label Studio's JSON export of rectangles with relations.

The export is a list of tasks, each with the image in ``data`` and one annotation, whose ``result``
has rectangles (``rectanglelabels``, in percent of the image) and relations between them. The labels
of a relation are its predicates.
"""

import os
import re
import urllib.parse
from typing import Any

from ..io import IMAGE_SUFFIXES, read_json
from .relation_import import (
    Imported,
    ImportedImage,
    ImportOptions,
    RelationImport,
    require_list,
)

__all__ = ["read_label_studio"]

_TASK = ("id", "data", "annotations")
_ANNOTATION = ("id", "result", "was_cancelled")
_RECTANGLE = ("id", "type", "value", "original_width", "original_height", "image_rotation")
_VALUE = ("x", "y", "width", "height", "rotation", "rectanglelabels")
_RELATION = ("type", "from_id", "to_id", "direction", "labels")
# Bookkeeping of Label Studio's versions, which says nothing about the image.
_UNUSED_IN_TASK = frozenset(
    "agreement agreement_selected allow_skip annotators annotations_ids annotations_results "
    "avg_lead_time cancelled_annotations comment_authors comment_authors_count comment_count "
    "comments completed_at created_at draft_exists drafts file_upload ground_truth inner_id "
    "is_labeled last_comment_updated_at locked_by meta overlap precomputed_agreement predictions "
    "predictions_model_versions predictions_results predictions_score project reviewed reviewers "
    "reviews_accepted reviews_rejected state storage_filename total_annotations "
    "total_predictions unresolved_comment_count updated_at updated_by".split()
)
_UNUSED_IN_ANNOTATION = frozenset(
    "bulk_created completed_by created_ago created_at created_username draft_created_at "
    "ground_truth honeypot import_id last_action last_created_by lead_time parent_annotation "
    "parent_prediction prediction project result_count reviews state task unique_id updated_at "
    "updated_by".split()
)
_UNUSED_IN_RESULT = frozenset(
    "from_name hidden item_index locked meta origin parentID readonly score to_name".split()
)
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")
_DIRECTIONS = ("right", "left", "bi")  # from -> to, to -> from, both


def read_label_studio(path: str, options: ImportOptions) -> Imported:
    """Read the file.

    The image's id is that of the task. Its file name is the last part of the URL or path in
    ``data`` or, for a file of the local storage, the path after ``?d=``; the prefix that an upload
    gets is removed unless ``options.image_root`` has the file with it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such export, or a task or result is invalid; names both.
    """
    content = read_json(path, "Label Studio's export")
    require_list(path, content, "Label Studio's JSON export")
    imported = RelationImport(path, options)
    for index, task in enumerate(content):
        identifier = task.get("id") if isinstance(task, dict) else None
        where = f"task {index} (id {identifier!r:.40})"
        with imported.record(where):
            imported.check_fields(task, _TASK, _UNUSED_IN_TASK)
            _read_task(imported, where, task)
    return imported.finish()


def _read_task(imported: RelationImport, where: str, task: dict[str, Any]) -> None:
    results = _results(imported, task)
    sizes = [
        (x.get("original_height"), x.get("original_width"))
        for x in results
        if isinstance(x, dict) and x.get("type") == "rectanglelabels"
    ]
    if any(size != sizes[0] for size in sizes):
        raise ValueError(f"its results have several image sizes: {sizes!r:.120}")
    size = sizes[0] if sizes else ()  # without rectangles the image tells
    name = _file_name(task.get("data"), imported.options.image_root)
    image = imported.add_image(task.get("id"), name, *size)
    for index, result in enumerate(results):
        if not isinstance(result, dict) or result.get("type") != "relation":
            key = result.get("id") if isinstance(result, dict) else None
            key = key if isinstance(key, str) else None
            with imported.record(f"{where}, result {index}", image, key):
                _read_rectangle(imported, image, key, result)
    for index, result in enumerate(results):
        if isinstance(result, dict) and result.get("type") == "relation":
            with imported.record(f"{where}, result {index}"):
                _read_relation(imported, image, result)


def _results(imported: RelationImport, task: dict[str, Any]) -> list[Any]:
    """Return the results of the task's annotation; of none, an empty list."""
    annotations = task.get("annotations")
    if not isinstance(annotations, list):
        raise ValueError(f"its annotations are {annotations!r:.60}; expected a list")
    for annotation in annotations:
        imported.check_fields(annotation, _ANNOTATION, _UNUSED_IN_ANNOTATION)
    annotations = [x for x in annotations if not x.get("was_cancelled")]
    if len(annotations) > 1:
        raise ValueError(
            f"it has {len(annotations)} annotations; expected one, so decide between them or merge "
            "them in Label Studio"
        )
    results = annotations[0].get("result") if annotations else []
    if not isinstance(results, list):
        raise ValueError(f"the result of its annotation is {results!r:.60}; expected a list")
    return results


def _file_name(data: Any, image_root: str | None) -> str:
    """Return the name of the image that a task's ``data`` names."""
    values = [x for x in data.values() if isinstance(x, str)] if isinstance(data, dict) else []
    images = [x for x in values if _path_of(x).lower().endswith(IMAGE_SUFFIXES)]
    if len(images) != 1:
        raise ValueError(
            f"its data is {data!r:.160}; expected one value with the path or URL of an image "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )
    name = _path_of(images[0])
    with_prefix = image_root is not None and os.path.exists(os.path.join(image_root, name))
    return name if with_prefix else _UPLOAD_PREFIX.sub("", name)


def _path_of(value: str) -> str:
    url = urllib.parse.urlparse(value)
    local = urllib.parse.parse_qs(url.query).get("d")
    return local[0] if local else os.path.basename(urllib.parse.unquote(url.path))


def _read_rectangle(
    imported: RelationImport, image: ImportedImage, key: str | None, result: Any
) -> None:
    if isinstance(result, dict) and result.get("type") != "rectanglelabels":
        raise ValueError(
            f"its type is {result.get('type')!r:.40}; expected rectanglelabels or relation"
        )
    imported.check_fields(result, _RECTANGLE, _UNUSED_IN_RESULT)
    if key is None:
        raise ValueError(f"its id is {result.get('id')!r:.40}; expected a text")
    value = result.get("value")
    imported.check_fields(value, _VALUE)
    if result.get("image_rotation") or value.get("rotation"):
        raise ValueError("the image or the rectangle is rotated; boxes have no angle")
    labels = value.get("rectanglelabels")
    if not isinstance(labels, list) or len(labels) != 1:
        raise ValueError(f"its rectanglelabels are {labels!r:.80}; expected one class")
    numbers = [value.get(key) for key in ("x", "y", "width", "height")]
    if any(type(x) not in (int, float) for x in numbers):
        raise ValueError(f"x, y, width and height are {numbers!r:.80}; expected percentages")
    x, y, width, height = (x / 100 for x in numbers)
    if min(x, y) < -0.01 or max(x + width, y + height) > 1.01:
        raise ValueError(f"x, y, width and height are {numbers}; expected percentages of the image")
    w, h = image.record["width"], image.record["height"]
    box = (max(x, 0) * w, max(y, 0) * h, min(x + width, 1) * w, min(y + height, 1) * h)
    image.add_entity(key, imported.category(labels[0]), box)


def _read_relation(imported: RelationImport, image: ImportedImage, result: dict[str, Any]) -> None:
    imported.check_fields(result, _RELATION, {"id", *_UNUSED_IN_RESULT})
    labels, direction = result.get("labels"), result.get("direction", "right")
    if not isinstance(labels, list) or not labels:
        raise ValueError(
            f"its labels are {labels!r:.60}; expected its predicates: choose them in Label Studio"
        )
    if direction not in _DIRECTIONS:
        raise ValueError(f"its direction is {direction!r:.40}; expected {', '.join(_DIRECTIONS)}")
    ends = (result.get("from_id"), result.get("to_id"))
    for label in labels:
        if direction in ("right", "bi"):
            imported.add_relation(image, *ends, label)
        if direction in ("left", "bi"):
            imported.add_relation(image, *reversed(ends), label)
