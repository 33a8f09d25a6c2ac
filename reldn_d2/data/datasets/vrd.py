"""VRD (Lu et al., ECCV 2016), from the official JSON files; see :mod:`.relation_json`."""

import os
from collections.abc import Sequence
from typing import Any

from .catalog import register_dataset
from .io import read_json
from .relation_json import dicts_of, load_relation_json, parse_relation_json
from .relationship_list import ImageAnnotations

__all__ = ["VRD_CLASSES", "VRD_PREDICATES", "load_vrd", "parse_vrd_annotations", "register_vrd"]

# fmt: off
VRD_CLASSES = (
    "person", "sky", "building", "truck", "bus", "table", "shirt", "chair", "car", "train",
    "glasses", "tree", "boat", "hat", "trees", "grass", "pants", "road", "motorcycle", "jacket",
    "monitor", "wheel", "umbrella", "plate", "bike", "clock", "bag", "shoe", "laptop", "desk",
    "cabinet", "counter", "bench", "shoes", "tower", "bottle", "helmet", "stove", "lamp", "coat",
    "bed", "dog", "mountain", "horse", "plane", "roof", "skateboard", "traffic light", "bush",
    "phone", "airplane", "sofa", "cup", "sink", "shelf", "box", "van", "hand", "shorts", "post",
    "jeans", "cat", "sunglasses", "bowl", "computer", "pillow", "pizza", "basket", "elephant",
    "kite", "sand", "keyboard", "plant", "can", "vase", "refrigerator", "cart", "skis", "pot",
    "surfboard", "paper", "mouse", "trash can", "cone", "camera", "ball", "bear", "giraffe",
    "tie", "luggage", "faucet", "hydrant", "snowboard", "oven", "engine", "watch", "face",
    "street", "ramp", "suitcase",
)
VRD_PREDICATES = (
    "on", "wear", "has", "next to", "sleep next to", "sit next to", "stand next to", "park next",
    "walk next to", "above", "behind", "stand behind", "sit behind", "park behind",
    "in the front of", "under", "stand under", "sit under", "near", "walk to", "walk",
    "walk past", "in", "below", "beside", "walk beside", "over", "hold", "by", "beneath", "with",
    "on the top of", "on the left of", "on the right of", "sit on", "ride", "carry", "look",
    "stand on", "use", "at", "attach to", "cover", "touch", "watch", "against", "inside",
    "adjacent to", "across", "contain", "drive", "drive on", "taller than", "eat", "park on",
    "lying on", "pull", "talk", "lean on", "fly", "face", "play with", "sleep on", "outside of",
    "rest on", "follow", "hit", "feed", "kick", "skate on",
)
# fmt: on

_FORMAT = {
    "thing_classes": VRD_CLASSES,
    "predicate_classes": VRD_PREDICATES,
    "what": "VRD",
    "one_based": True,
}


def load_vrd(
    json_file: str, image_root: str, merge_duplicates: bool = True
) -> list[dict[str, Any]]:
    """Load a split of VRD as Detectron2 dataset dicts with ``"relations"``.

    Image sizes come from the image headers. ``objects.json`` and ``predicates.json`` next to
    ``json_file`` are checked against :data:`VRD_CLASSES` and :data:`VRD_PREDICATES`.

    Args:
        json_file: ``annotations_train.json`` or ``annotations_test.json``.
        image_root: folder of the images. An image with another suffix than annotated is accepted
            (the official test set has a GIF annotated as JPG).
        merge_duplicates: see :func:`parse_vrd_annotations`.

    Returns:
        One dict per image, also for images without relations. ``image_id`` is the file name in the
        annotations.

    Raises:
        FileNotFoundError: if a file, the folder or an image is missing.
        ValueError: if a file's content is not as expected.
    """
    dicts = load_relation_json(json_file, image_root, **_FORMAT, merge_duplicates=merge_duplicates)
    for path, expected in zip(_name_files(json_file), (VRD_CLASSES, VRD_PREDICATES)):
        _check_names(path, expected)
    return dicts


def register_vrd(
    name: str,
    json_file: str,
    image_root: str,
    merge_duplicates: bool = True,
    **metadata: Any,
) -> None:
    """Register a split of VRD in Detectron2's catalogs. No file is read before its first use.

    Args:
        name: name of the dataset, e.g. "vrd_train".
        json_file, image_root, merge_duplicates: see :func:`load_vrd`.
        metadata: further metadata, such as ``train_dataset``.
    """
    register_dataset(
        name,
        load_vrd,
        dict(json_file=json_file, image_root=image_root, merge_duplicates=merge_duplicates),
        annotation_files=[json_file, *_name_files(json_file)],
        thing_classes=list(VRD_CLASSES),
        predicate_classes=list(VRD_PREDICATES),
        evaluator_type="vrd",
        json_file=json_file,
        image_root=image_root,
        load_annotations=lambda: dicts_of(parse_vrd_annotations(json_file, merge_duplicates)),
        **metadata,
    )


def parse_vrd_annotations(
    json_file: str, merge_duplicates: bool = True
) -> dict[str, ImageAnnotations]:
    """Read only the annotations, which needs no images.

    Args:
        json_file: ``annotations_train.json`` or ``annotations_test.json``.
        merge_duplicates: keep only one copy of equal relationships of an image. Use it for
            training; the published recall counts every copy, so the test split keeps them.

    Returns:
        Annotations and relations by the image's file name.
    """
    return parse_relation_json(json_file, **_FORMAT, merge_duplicates=merge_duplicates)


def _name_files(json_file: str) -> list[str]:
    folder = os.path.dirname(json_file)
    return [os.path.join(folder, "objects.json"), os.path.join(folder, "predicates.json")]


def _check_names(path: str, expected: Sequence[str]) -> None:
    """Raise if the names in a file are not the official ones, in the official order."""
    names = read_json(path, "VRD names")
    if not isinstance(names, list) or len(names) != len(expected):
        found = f"{len(names)} names" if isinstance(names, list) else type(names).__name__
        raise ValueError(
            f"{path}: expected the list of VRD's {len(expected)} names, found {found}."
        )
    for index, (name, official) in enumerate(zip(names, expected, strict=True)):
        if name != official:
            raise ValueError(
                f"{path}: name {index} is {name!r}, but in VRD it is {official!r}. Use the "
                "official file, or register your own dataset (datasets/README.md)."
            )
