"""Visual Genome with 150 classes and 50 predicates, from ``VG-SGG.h5`` and its JSON files."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dataset_dict import create_annotation, create_dataset_dict
from .catalog import register_dataset
from .io import locate_images, no_garbage_collection
from .visual_genome_files import (
    TEST,
    TRAIN,
    Graphs,
    check_names,
    read_graphs,
    read_image_data,
    read_vg_names,
)

__all__ = [
    "VG_CLASSES",
    "VG_PREDICATES",
    "load_visual_genome",
    "read_vg_names",
    "register_visual_genome",
]

logger = logging.getLogger(__name__)

# fmt: off
VG_CLASSES = (
    "airplane", "animal", "arm", "bag", "banana", "basket", "beach", "bear", "bed", "bench",
    "bike", "bird", "board", "boat", "book", "boot", "bottle", "bowl", "box", "boy", "branch",
    "building", "bus", "cabinet", "cap", "car", "cat", "chair", "child", "clock", "coat",
    "counter", "cow", "cup", "curtain", "desk", "dog", "door", "drawer", "ear", "elephant",
    "engine", "eye", "face", "fence", "finger", "flag", "flower", "food", "fork", "fruit",
    "giraffe", "girl", "glass", "glove", "guy", "hair", "hand", "handle", "hat", "head",
    "helmet", "hill", "horse", "house", "jacket", "jean", "kid", "kite", "lady", "lamp",
    "laptop", "leaf", "leg", "letter", "light", "logo", "man", "men", "motorcycle", "mountain",
    "mouth", "neck", "nose", "number", "orange", "pant", "paper", "paw", "people", "person",
    "phone", "pillow", "pizza", "plane", "plant", "plate", "player", "pole", "post", "pot",
    "racket", "railing", "rock", "roof", "room", "screen", "seat", "sheep", "shelf", "shirt",
    "shoe", "short", "sidewalk", "sign", "sink", "skateboard", "ski", "skier", "sneaker", "snow",
    "sock", "stand", "street", "surfboard", "table", "tail", "tie", "tile", "tire", "toilet",
    "towel", "tower", "track", "train", "tree", "truck", "trunk", "umbrella", "vase",
    "vegetable", "vehicle", "wave", "wheel", "window", "windshield", "wing", "wire", "woman",
    "zebra",
)
VG_PREDICATES = (
    "above", "across", "against", "along", "and", "at", "attached to", "behind", "belonging to",
    "between", "carrying", "covered in", "covering", "eating", "flying in", "for", "from",
    "growing on", "hanging from", "has", "holding", "in", "in front of", "laying on",
    "looking at", "lying on", "made of", "mounted on", "near", "of", "on", "on back of", "over",
    "painted on", "parked on", "part of", "playing", "riding", "says", "sitting on",
    "standing on", "to", "under", "using", "walking in", "walking on", "watching", "wearing",
    "wears", "with",
)
# fmt: on

_FRAME = 1024  # long side of the frame of boxes_1024
_SLACK = 2.0  # pixels of that frame that a box may extend beyond its image due to rounding


@no_garbage_collection()
def load_visual_genome(
    h5_file: str,
    dicts_file: str,
    image_data_file: str,
    image_root: str | None,
    split: str,
    *,
    thing_classes: Sequence[str] = VG_CLASSES,
    predicate_classes: Sequence[str] = VG_PREDICATES,
    num_val_images: int = 5000,
    keep_images_without_relations: bool = True,
    merge_duplicates: bool = True,
) -> list[dict[str, Any]]:
    """Load a split of Visual Genome as Detectron2 dataset dicts with ``"relations"``.

    With the h5 file that has attributes, ``annotations[i]["attributes"]`` is the list of their
    0-based ids. Entities for which annotators named none lack the key: that says nothing about
    them. Boxes are scaled from the frame whose long side is 1024 to the image and clipped
    to it.

    Args:
        h5_file: ``VG-SGG.h5`` or ``VG-SGG-with-attri.h5``.
        dicts_file: ``VG-SGG-dicts.json`` or ``VG-SGG-dicts-with-attri.json``.
        image_data_file: ``image_data.json``, with or without the four corrupt images.
        image_root: folder ``VG_100K`` of the images, ``IMAGEID.jpg``; None skips locating them.
        split: "train", "val" or "test". The validation images are the first ``num_val_images``
            of the training images that have relations, as in Neural Motifs; "train" has the others.
        thing_classes: expected classes of ``dicts_file``.
        predicate_classes: expected predicates of ``dicts_file``.
        num_val_images: see ``split``.
        keep_images_without_relations: whether to keep or skip them.
        merge_duplicates: keep only one copy of equal relations of an image. Use it for training;
            published recall counts every copy.

    Returns:
        One dict per image. ``image_id`` is Visual Genome's, an int.

    Raises:
        FileNotFoundError: if a file, the folder or an image is missing.
        ImportError: if h5py is not installed.
        ValueError: if a file's content is not as expected.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"Visual Genome has no split {split!r}; use train, val or test.")
    names = read_vg_names(dicts_file)
    check_names(dicts_file, "label_to_idx", names["thing_classes"], thing_classes)
    check_names(dicts_file, "predicate_to_idx", names["predicate_classes"], predicate_classes)
    num_attributes = len(names.get("attribute_classes", ()))
    graphs = read_graphs(h5_file, len(thing_classes), len(predicate_classes), num_attributes)
    images = read_image_data(image_data_file, len(graphs.split), h5_file)

    has_relations = graphs.relations[:, 1] > graphs.relations[:, 0]
    chosen = np.flatnonzero(graphs.split == (TEST if split == "test" else TRAIN))
    if split != "test":
        validation = chosen[has_relations[chosen]][:num_val_images]
        chosen = validation if split == "val" else np.setdiff1d(chosen, validation)
    if not keep_images_without_relations:
        chosen = chosen[has_relations[chosen]]
    if not len(chosen):
        training, test = int(np.sum(graphs.split == TRAIN)), int(np.sum(graphs.split == TEST))
        raise ValueError(
            f"{h5_file}: no image for the split {split}; its `split` has {training} images for "
            f"training ({TRAIN}), the first {num_val_images} with relations being the validation "
            f"images, and {test} for test ({TEST})."
        )
    paths = [f"{images[index]['image_id']}.jpg" for index in chosen.tolist()]
    if image_root is not None:
        paths = locate_images(image_root, paths, "Visual Genome")
    counts = {"outside": 0, "duplicates": 0, "reflexive": 0}
    dicts = [
        _record(graphs, index, images[index], path, merge_duplicates, counts)
        for index, path in zip(chosen.tolist(), paths, strict=True)
    ]
    _report(h5_file, split, dicts, counts, merge_duplicates)
    return dicts


def register_visual_genome(
    name: str,
    h5_file: str,
    dicts_file: str,
    image_data_file: str,
    image_root: str,
    split: str,
    *,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Register a split of Visual Genome. No file is read before its first use.

    Args:
        name: name of the dataset.
        h5_file, dicts_file, image_data_file, image_root, split, options: arguments of
            :func:`load_visual_genome`.
        metadata: further metadata, such as ``train_dataset``.
    """
    arguments = dict(
        h5_file=h5_file,
        dicts_file=dicts_file,
        image_data_file=image_data_file,
        image_root=image_root,
        split=split,
        **options,
    )
    names = {
        "thing_classes": list(options.get("thing_classes", VG_CLASSES)),
        "predicate_classes": list(options.get("predicate_classes", VG_PREDICATES)),
    }
    register_dataset(
        name,
        load_visual_genome,
        arguments,
        annotation_files=[h5_file, dicts_file, image_data_file],
        read_names=lambda: {**read_vg_names(dicts_file), **names},
        image_root=image_root,
        # For rescoring predictions and for counting, which need no images.
        load_annotations=lambda: load_visual_genome(**{**arguments, "image_root": None}),
        **{"evaluator_type": "scene_graph", **names, **(metadata or {})},
    )


def _record(
    graphs: Graphs,
    index: int,
    image: dict[str, int],
    path: str,
    merge_duplicates: bool,
    counts: dict[str, int],
) -> dict[str, Any]:
    """Return the dataset dict of one image; ``counts`` counts the fixes that were needed."""
    width, height = image["width"], image["height"]
    rows = slice(*graphs.boxes[index])
    center, size = graphs.xywh[rows, :2], graphs.xywh[rows, 2:]
    scale = max(width, height) / _FRAME
    boxes = np.concatenate([center - size / 2, center + size / 2], axis=1) * scale
    limits = np.array([width, height, width, height], dtype=np.float64)
    slack = _SLACK * scale
    counts["outside"] += int(((boxes < -slack) | (boxes > limits + slack)).any(axis=1).sum())
    boxes = np.clip(boxes, 0.0, limits)
    labels = graphs.labels[rows].tolist()
    annotations = list(map(create_annotation, boxes.tolist(), labels))
    if graphs.attributes is not None:
        for annotation, row in zip(annotations, graphs.attributes[rows].tolist(), strict=True):
            ids = dict.fromkeys(value - 1 for value in row if value > 0)
            if ids:
                annotation["attributes"] = list(ids)
    triplets = graphs.triplets[slice(*graphs.relations[index])].copy()
    triplets[:, :2] -= graphs.boxes[index, 0]
    relations = [tuple(triplet) for triplet in triplets.tolist() if triplet[0] != triplet[1]]
    unique = dict.fromkeys(relations)
    counts["reflexive"] += len(triplets) - len(relations)
    counts["duplicates"] += len(relations) - len(unique)
    relations = list(unique) if merge_duplicates else relations
    return create_dataset_dict(path, image["image_id"], (height, width), annotations, relations)


def _report(
    h5_file: str,
    split: str,
    dicts: Sequence[dict[str, Any]],
    counts: dict[str, int],
    merge_duplicates: bool,
) -> None:
    total = sum(len(record["relations"]) for record in dicts)
    logger.info(f"{h5_file}, {split}: {len(dicts)} images, {total} relations.")
    done = "merged" if merge_duplicates else "kept"
    for key, what in (
        ("outside", f"boxes extend more than {_SLACK} pixels beyond their image and were clipped"),
        ("duplicates", f"relations repeat another one of their image and were {done}"),
        ("reflexive", "relations of a box to itself were skipped"),
    ):
        if counts[key]:
            logger.warning(f"{h5_file}, {split}: {counts[key]} {what}.")
