"""Convert predictions that other programs have pickled to scene graphs of a dataset.

The files (:mod:`.pickled_predictions`) have no image ids: images are in the order of the dataset.
Scores of predicates have a first column for "no relationship".

Shape shorthand: R boxes, K pairs, P predicates of one image.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from detectron2.data import DatasetCatalog

from ..data.boxes_only import load_without_images
from ..data.datasets.catalog import dataset_names
from ..structures.name_matching import NAME_FIELDS, Renumbering
from ..structures.ranking import rank_by_score
from ..structures.scene_graph import SceneGraph
from ..utils.protocols import all_predicates_per_pair
from .pickled_predictions import IMPORT_FORMATS, PickledImage, require_equal_lengths

__all__ = ["import_predictions"]

logger = logging.getLogger(__name__)

_MOTIFS_LONG_SIDE = 1024  # of the frame of Neural Motifs' boxes
_ONE_PIXEL = 2.0  # of another frame, in pixels of the image


def import_predictions(
    file_format: str,
    file: str,
    dataset_name: str,
    *,
    class_names: Sequence[str] | None = None,
    predicate_names: Sequence[str] | None = None,
    first_class_id: int | None = None,
    long_side: int | None = None,
    topk: int = 100,
) -> Iterator[SceneGraph]:
    """Read a file of another program; yield its images with ids and names of a dataset.

    Args:
        file_format: one of :data:`IMPORT_FORMATS`.
        file: the pickle.
        dataset_name: registered dataset. The file has its images, or those of them that have
            relations, in its order; ``released`` names each image's file.
        class_names: classes in the order of the file's ids, without background; None means those
            of the dataset, in its order.
        predicate_names: the predicates, likewise.
        first_class_id: id of the first class; None means 1, after the background, or for
            ``released`` the one that its ids imply.
        long_side: long side of the frame of the boxes in ``motifs``; None means 1024, 0 the image
            itself.
        topk: triplets kept per image for each k of all protocols.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds other objects, another number of images, or an image does not
            fit; the message names the file and the image.
    """
    if file_format not in IMPORT_FORMATS:
        expected = ", ".join(IMPORT_FORMATS)
        raise ValueError(f"Unknown format {file_format!r}; expected one of {expected}.")
    if long_side is not None and file_format != "motifs":
        raise ValueError(f"long_side is an option of motifs files, not of {file_format} files.")
    names = dataset_names(dataset_name)
    given = dict(zip(NAME_FIELDS, (class_names, predicate_names)))
    renumbering = Renumbering.between(
        given, names, f"{file} (--classes, --predicates)", f"dataset '{dataset_name}'"
    )
    counts = [len(values or names.get(field) or ()) for field, values in given.items()]
    for field, count in zip(given, counts):
        if not count:
            raise ValueError(f"The metadata of dataset '{dataset_name}' lacks {field}.")
    images = IMPORT_FORMATS[file_format](file)
    if first_class_id is None:
        first_class_id = (
            1 if file_format != "released" else _first_class_id(file, images, counts[0])
        )
    if file_format == "motifs" and long_side is None:
        long_side = _MOTIFS_LONG_SIDE
    records = _records_of_images(file, images, dataset_name)
    for index, (image, record) in enumerate(zip(images, records, strict=True)):
        images[index] = None  # large files need the memory
        where = f"{file}, image {index} ({record['image_id']!r})"
        boxes = image.boxes * _scale(image, record, long_side, where)
        graph = _scene_graph(
            image._replace(boxes=boxes), record["image_id"], first_class_id, counts, topk, where
        )
        yield renumbering.scene_graph(graph) if renumbering else graph


# --------------------------------------------------------------------------- images and their ids


def _records_of_images(
    file: str, images: Sequence[PickledImage], dataset_name: str
) -> list[dict[str, Any]]:
    """Return the dataset's dict of each image."""
    records = load_without_images(dataset_name)
    if not all("height" in x and "width" in x for x in records):
        try:
            records = DatasetCatalog.get(dataset_name)
        except FileNotFoundError:
            pass  # the sizes are needed only for boxes in another frame
    if images and all(image.name for image in images):
        return _records_by_name(file, images, records, dataset_name)
    related = [record for record in records if record.get("relations")]
    for candidates, which in ((records, ""), (related, " that have relations")):
        if len(images) == len(candidates):
            logger.info(
                f"{file}: its {len(images)} images are the images of dataset "
                f"'{dataset_name}'{which}, in their order."
            )
            _check_true_boxes(file, images, candidates, dataset_name)
            return candidates
    raise ValueError(
        f"{file}: {len(images)} images, but dataset '{dataset_name}' has {len(records)}, "
        f"{len(related)} of which have relations. Images have no ids in this format, so their "
        "count must be one of the two: pass the dataset that was evaluated (--dataset)."
    )


def _records_by_name(
    file: str, images: Sequence[PickledImage], records: Sequence[dict[str, Any]], dataset_name: str
) -> list[dict[str, Any]]:
    by_stem = {_stem(str(x.get("file_name", x["image_id"]))): x for x in records}
    for index, image in enumerate(images):
        if _stem(image.name) not in by_stem:
            raise ValueError(
                f"{file}, image {index}: dataset '{dataset_name}' has no image "
                f"{os.path.basename(image.name)!r:.80}. Pass the dataset that was evaluated "
                "(--dataset)."
            )
    found = [by_stem[_stem(image.name)] for image in images]
    stems = [_stem(image.name) for image in images]
    if len(set(stems)) < len(stems) or len(by_stem) < len(records):
        raise ValueError(
            f"{file}: two images have the same file name, so they cannot be told apart."
        )
    return found


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path.replace("\\", "/")))[0]


def _check_true_boxes(
    file: str, images: Sequence[PickledImage], records: Sequence[dict[str, Any]], dataset_name: str
) -> None:
    """Raise if the file's ground truth shows that its images are others, or in another order."""
    for index, (image, record) in enumerate(zip(images, records)):
        count = len(record.get("annotations", ()))
        if image.num_true_boxes is not None and image.num_true_boxes != count:
            raise ValueError(
                f"{file}: groundtruths[{index}] has {image.num_true_boxes} boxes, but image "
                f"{record['image_id']!r} of dataset '{dataset_name}' has {count}. The images are "
                "others, or in another order: pass the dataset that was evaluated (--dataset)."
            )


def _scale(
    image: PickledImage, record: dict[str, Any], long_side: int | None, where: str
) -> np.ndarray | float:
    """Return the factors from the frame of an image's boxes to its pixels."""
    if image.frame is None and not long_side:
        return 1.0
    if "width" not in record or "height" not in record:
        raise ValueError(
            f"{where}: the size of the image is unknown, but its boxes are in another frame. Put "
            "the images where the dataset expects them."
        )
    size = np.array([record["width"], record["height"]], dtype=np.float64)
    if image.frame is None:
        return size.max() / long_side
    scale = size / np.array(image.frame)
    if abs(scale[0] / scale[1] - 1) > 0.02 + 2 / min(image.frame):  # rounded sizes
        raise ValueError(
            f"{where}: its boxes are in an image of {image.frame[0]:g} x {image.frame[1]:g} "
            f"pixels, but the image has {size[0]:g} x {size[1]:g}. The images are others, or in "
            "another order: pass the dataset that was evaluated (--dataset)."
        )
    return np.concatenate([scale, scale])


# ------------------------------------------------------------------------------- ids and triplets


def _first_class_id(file: str, images: Sequence[PickledImage], num_classes: int) -> int:
    """Return whether class ids begin at 0 or 1, from the smallest and the largest of all."""
    ids = [x.classes for x in images if len(x.classes)]
    low, high = (min(map(np.min, ids)), max(map(np.max, ids))) if ids else (1, 1)
    if low >= 1 and high < num_classes:
        logger.warning(
            f"{file}: its class ids are {low} to {high}, so the first of {num_classes} classes may "
            "be 0 or 1; 1 is taken. Pass --first-class-id if it is 0."
        )
    return 0 if low < 1 else 1


def _scene_graph(
    image: PickledImage,
    image_id: Any,
    first_class_id: int,
    counts: Sequence[int],
    topk: int,
    where: str,
) -> SceneGraph:
    """Return the best triplets of an image, with 0-based ids."""
    num_classes, num_predicates = counts
    # Code that counts the last pixel ("+1") may write a box of one pixel as [x, y, x - 1, y - 1].
    low, high = image.boxes[:, :2], image.boxes[:, 2:]
    high = np.where((high < low) & (high >= low - _ONE_PIXEL), low, high)
    boxes = np.concatenate([low, high], axis=1)
    for name, ids in (("classes", image.classes), ("pairs", image.pairs)):
        if ids.dtype.kind == "f" and (ids != np.round(ids)).any():
            raise ValueError(f"{where}: {name} are not whole numbers; expected ids and indices.")
    classes = image.classes.astype(np.int64) - first_class_id
    wrong = classes[(classes < 0) | (classes >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"{where}: the class id {wrong[0] + first_class_id} is not one of {first_class_id} to "
            f"{num_classes - 1 + first_class_id}, the {num_classes} classes. Pass --first-class-id "
            "or --classes, or is it a file of another dataset?"
        )
    pairs, scores = image.pairs.astype(np.int64), image.predicate_scores
    require_equal_lengths(where, {"pairs": pairs, "rows of predicate scores": scores})
    require_equal_lengths(
        where, {"boxes": boxes, "classes": classes, "box scores": image.box_scores}
    )
    if len(pairs) and scores.shape[1] != num_predicates + 1:
        raise ValueError(
            f"{where}: {scores.shape[1]} scores per pair; expected {num_predicates + 1}, the first "
            f'for "no relationship", for {num_predicates} predicates. Pass --predicates, or is it '
            "a file of another dataset?"
        )
    if len(pairs) and (pairs.min() < 0 or pairs.max() >= len(boxes)):
        raise ValueError(f"{where}: a pair has an index outside its {len(boxes)} boxes.")
    # The same pair twice, or a box with itself, has no place in a ranking of triplets.
    _, first = np.unique(pairs, axis=0, return_index=True)
    rows = np.sort(first)
    rows = rows[pairs[rows, 0] != pairs[rows, 1]]
    pairs = pairs[rows]
    scores = scores[rows, 1:].astype(np.float64).reshape(len(rows), num_predicates)
    predicate_scores = scores
    scores = scores * image.box_scores[pairs].astype(np.float64).prod(axis=1)[:, None]
    # The best `topk` triplets for any k are of the `topk` pairs with the best single triplets.
    best = np.sort(rank_by_score(scores.max(axis=1, initial=-np.inf))[:topk])
    count = len(best)
    try:
        graph = SceneGraph.from_arrays(
            image_id,
            boxes,
            classes,
            image.box_scores,
            np.repeat(pairs[best], num_predicates, axis=0),
            np.tile(np.arange(num_predicates), count),
            scores[best].reshape(-1),
            predicate_scores[best].reshape(-1),
        )
    except ValueError as error:
        message = str(error).removeprefix(f"Prediction of image {image_id!r}: ")
        raise ValueError(f"{where}: {message}") from error
    # The imported triplets are the exact best ones for any protocol.
    return graph.reduced(all_predicates_per_pair(), topk)
