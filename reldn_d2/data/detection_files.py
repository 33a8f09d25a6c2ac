"""Read detections from files, to use them instead of a detector.

Supported are COCO results (JSON), as Detectron2 and most detectors write them, and Detectron2's
``instances_predictions.pth``. Their boxes are XYWH in pixels of the original image.

Shape shorthand: K entity classes, Q detections of an image.
"""

import json
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.structures import Boxes, BoxMode, Instances

from ..structures.box_frames import outside_problem

__all__ = ["attach_detections", "load_detections", "transform_detections"]

logger = logging.getLogger(__name__)

_KEYS = ("image_id", "category_id", "bbox", "score")
_COCO_IDS = {x["id"] for x in COCO_CATEGORIES if x["isthing"]}
_FEWEST_COCO_IDS = 5  # different ones that make a file look like COCO's


def load_detections(
    path: str, num_classes: int, category_ids: Mapping[int, int] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Read a file of detections.

    Args:
        path: a COCO results file (``.json``) or Detectron2's ``instances_predictions.pth``.
        num_classes: K.
        category_ids: maps the ids in a JSON file to 0-based classes (the metadata's
            ``thing_dataset_id_to_contiguous_id``); None if they are 0-based already. The other
            format always has 0-based ids.

    Returns:
        Arrays by image id (a string): ``boxes`` (Q, 4) float32 XYXY, ``scores`` (Q,) float32 and
        ``classes`` (Q,) int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has neither format, or a record is invalid; names the record.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"Detection file '{path}' does not exist (DATASETS.DETECTION_FILES_TRAIN or _TEST)."
        )
    if path.endswith(".json"):
        with open(path) as file:
            records = json.load(file)
        if not isinstance(records, list):
            raise ValueError(
                f"{path} contains a {type(records).__name__}, not a list of detections. COCO "
                'results are [{"image_id", "category_id", "bbox": [x, y, width, height], '
                '"score"}, ...].'
            )
    else:
        records, category_ids = _read_predictions(path), None
    coco = ""
    if category_ids is None and path.endswith(".json") and _are_coco_ids(records):
        coco = (
            "These ids look like COCO's own (1 to 90, with gaps), which are neither 0-based nor "
            "this model's classes: map each to the 0-based id of the class with the same name."
        )
    rows: dict[str, list[tuple[Sequence[float], float, int]]] = {}
    for index, record in enumerate(records):
        where = f"{path}, detection {index}"
        category = _category_of(record, where, num_classes, category_ids, coco)
        row = (record["bbox"], record["score"], category)
        rows.setdefault(str(record["image_id"]), []).append(row)
    if coco:
        logger.warning(f"{path}: {coco}")
    return {image_id: _arrays(of_image) for image_id, of_image in rows.items()}


def _are_coco_ids(records: Sequence[Any]) -> bool:
    """Tell whether the category ids of records look like COCO's 80 ids between 1 and 90."""
    ids = {x.get("category_id") for x in records if isinstance(x, dict)}
    # Ids up to 80 alone may as well be 0-based. 1 is COCO's person, which few files lack.
    is_like_coco = ids <= _COCO_IDS and 1 in ids and max(ids) > 80
    return is_like_coco and len(ids) >= _FEWEST_COCO_IDS


def _read_predictions(path: str) -> list[dict[str, Any]]:
    """Return the detections of all images in ``instances_predictions.pth`` in one list."""
    try:
        images = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} contains more than numbers and text (e.g. proposals) and is not unpickled, "
            "because that can run code. Use the coco_instances_results.json that Detectron2 "
            "writes next to it."
        ) from error
    try:
        return [record for image in images for record in image["instances"]]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not Detectron2's instances_predictions.pth: expected a list of "
            '{"image_id", "instances": [...]}.'
        ) from error


def _category_of(
    record: Any,
    where: str,
    num_classes: int,
    category_ids: Mapping[int, int] | None,
    hint: str = "",
) -> int:
    """Return the 0-based class of a record; raise ValueError if the record is invalid.

    Args:
        record: of the file.
        where: the record, for messages.
        num_classes, category_ids: see :func:`load_detections`.
        hint: how to fix an id outside the classes, if that is known.
    """
    missing = [key for key in _KEYS if key not in record] if isinstance(record, dict) else _KEYS
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing in {str(record)[:100]}")
    category = record["category_id"]
    if category_ids is not None:
        if category not in category_ids:
            raise ValueError(
                f"{where}: category_id {category} is not in the dataset's "
                f"{sorted(category_ids)[:10]}... (thing_dataset_id_to_contiguous_id)."
            )
        category = category_ids[category]
    if not 0 <= category < num_classes:
        raise ValueError(
            f"{where}: category_id {category} is outside the {num_classes} classes of the dataset. "
            + (hint or "Ids are 0-based unless its metadata has thing_dataset_id_to_contiguous_id.")
        )
    box, score = record["bbox"], record["score"]
    if len(box) != 4 or not np.isfinite([*box, score]).all() or min(box[2:]) < 0:
        raise ValueError(
            f"{where}: box {box} and score {score}; expected finite numbers, the box as "
            "[x, y, width, height]."
        )
    return int(category)


def _arrays(rows: list[tuple[Sequence[float], float, int]]) -> dict[str, np.ndarray]:
    boxes = np.array([row[0] for row in rows], dtype=np.float64)
    return {
        "boxes": BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS).astype(np.float32),
        "scores": np.array([row[1] for row in rows], dtype=np.float32),
        "classes": np.array([row[2] for row in rows], dtype=np.int64),
    }


def attach_detections(
    dicts: Sequence[dict[str, Any]], dataset_name: str, path: str, num_classes: int
) -> list[dict[str, Any]]:
    """Add the detections of a file to dataset dicts as ``"detections"``, matched by image id.

    If no image id matches, as in a file with the names of the images in their place, images are
    matched by file name, without its folder.

    Args:
        dicts: dataset dicts of the dataset; not modified.
        dataset_name: for its metadata and for messages.
        path: see :func:`load_detections`.
        num_classes: K.

    Returns:
        The same dicts with ``"detections"``: arrays in the frame of the original image.

    Raises:
        ValueError: no image of the dataset has a detection; shows ids of both sides.
    """
    metadata = MetadataCatalog.get(dataset_name)
    ids = getattr(metadata, "thing_dataset_id_to_contiguous_id", None)
    detections = load_detections(path, num_classes, ids)
    keys = [str(x["image_id"]) for x in dicts]
    if not any(key in detections for key in keys):
        names = [os.path.basename(str(x.get("file_name", ""))) for x in dicts]
        keys = names if len(set(names)) == len(names) else keys
    without = [x["image_id"] for x, key in zip(dicts, keys) if key not in detections]
    if len(without) == len(dicts):
        raise ValueError(
            f"{path} has detections for none of the {len(dicts)} images of '{dataset_name}': its "
            f"image ids are {list(detections)[:3]}..., those of the dataset {without[:3]}..."
        )
    if without:
        logger.warning(
            f"{path} has no detection for {len(without)} of {len(dicts)} images of "
            f"'{dataset_name}', e.g. image {without[0]}: these images get no relations."
        )
    _check_frame(path, [(x, detections[key]) for x, key in zip(dicts, keys) if key in detections])
    unused = len(detections) - (len(dicts) - len(without))
    logger.info(
        f"{path} has {sum(len(x['scores']) for x in detections.values())} detections for "
        f"{len(detections)} images, {unused} of which are not in '{dataset_name}'."
    )
    no_detections = {
        "boxes": np.zeros((0, 4), np.float32),
        "scores": np.zeros(0, np.float32),
        "classes": np.zeros(0, np.int64),
    }
    return [{**x, "detections": detections.get(key, no_detections)} for x, key in zip(dicts, keys)]


def _check_frame(path: str, images: Sequence[tuple[dict[str, Any], dict[str, np.ndarray]]]) -> None:
    """Raise ValueError if most boxes of a file lie mostly outside their images.

    Args:
        path: the file.
        images: dataset dict and detections of each image; those of unknown size are not checked.
    """
    sized = [
        (record, found["boxes"])
        for record, found in images
        if "height" in record and "width" in record and not record.get("nominal_size")
    ]
    sizes = [(record["height"], record["width"]) for record, boxes in sized for _ in boxes]
    boxes = np.concatenate([np.zeros((0, 4)), *(boxes for _, boxes in sized)])
    problem = outside_problem(boxes, np.array(sizes), "xywh")
    if problem is not None:
        raise ValueError(f"{path}: {problem[1]}")


def transform_detections(
    detections: dict[str, np.ndarray], transforms: T.Transform, image_shape: Sequence[int]
) -> Instances:
    """Transform the detections of an image along with the image.

    Args:
        detections: ``boxes`` (Q, 4), ``scores`` (Q,), ``classes`` (Q,).
        transforms: transforms that were applied to the image.
        image_shape: (height, width) of the transformed image.

    Returns:
        ``Instances`` in the frame of the transformed image with ``pred_boxes``, ``scores`` and
        ``pred_classes``; boxes are clipped, and empty ones are dropped.
    """
    result = Instances(tuple(image_shape))
    boxes = transforms.apply_box(detections["boxes"].astype(np.float64)).astype(np.float32)
    result.pred_boxes = Boxes(torch.from_numpy(boxes.reshape(-1, 4)))
    result.pred_boxes.clip(result.image_size)
    result.scores = torch.from_numpy(detections["scores"].copy())
    result.pred_classes = torch.from_numpy(detections["classes"].copy())
    return result[result.pred_boxes.nonempty()]
