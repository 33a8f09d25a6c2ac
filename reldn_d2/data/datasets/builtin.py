"""The built-in data sets: one table of splits for each, and their registration.

Paths are relative to the folder named by the environment variable ``DETECTRON2_DATASETS``
("datasets" when it is not set). Registration reads no file: a data set has to be there only when it
is used. ``datasets/README.md`` says where the files come from.
"""

import os

from .openimages import register_openimages_vrd
from .relation_json import register_relation_json
from .toy.dataset import register_toy_vrd
from .visual_genome import register_visual_genome
from .vrd import register_vrd

__all__ = [
    "register_all_openimages_vrd",
    "register_all_released",
    "register_all_toy_vrd",
    "register_all_visual_genome",
    "register_all_vrd",
]

# Equal relationships of an image are merged for training only: published recall counts each.

# name: (annotations, images, whether equal relationships are merged, training set)
_VRD_SPLITS = {
    "vrd_train": (
        "vrd/json_dataset/annotations_train.json",
        "vrd/sg_dataset/sg_train_images",
        True,
        None,
    ),
    "vrd_test": (
        "vrd/json_dataset/annotations_test.json",
        "vrd/sg_dataset/sg_test_images",
        False,
        "vrd_train",
    ),
}

# name: (h5 file, names, split, whether equal relations are merged, training set)
_VG_SPLITS = {
    f"{prefix}_{split}": (
        h5_file,
        dicts_file,
        split,
        split == "train",
        None if split == "train" else f"{prefix}_train",
    )
    for prefix, h5_file, dicts_file in (
        ("visual_genome", "VG-SGG.h5", "VG-SGG-dicts.json"),
        (
            "visual_genome_attributes",
            "VG-SGG-with-attri.h5",
            "VG-SGG-dicts-with-attri.json",
        ),
    )
    for split in ("train", "val", "test")
}

# name: (relationships, verified labels, images, list of images, merged, training set)
_CHALLENGE = ("challenge-2018-train-vrd.csv", "challenge-2018-train-vrd-labels.csv", "train")
_OPENIMAGES_SPLITS = {
    "openimages_vrd_train": (*_CHALLENGE, "lists/train.txt", True, None),
    "openimages_vrd_val": (*_CHALLENGE, "lists/val.txt", False, "openimages_vrd_train"),
    "openimages_vrd_mini_train": (*_CHALLENGE, "lists/mini_train.txt", True, None),
    "openimages_vrd_mini_val": (
        *_CHALLENGE,
        "lists/mini_val.txt",
        False,
        "openimages_vrd_mini_train",
    ),
    **{
        f"openimages_vrd_v6_{split}": (
            f"oidv6-{split}-annotations-vrd.csv",
            None,
            split,
            None,
            split == "train",
            None if split == "train" else "openimages_vrd_v6_train",
        )
        for split in ("train", "validation", "test")
    },
}

# name: (annotations, classes, predicates, images, merged, training set, evaluator)
_OI_NAMES = (
    "openimages_v4/rel/detections_train.json",
    "openimages_v4/rel/rel_9_predicates.json",
)
_VG_NAMES = ("vg/objects.json", "vg/predicates.json")
_RELEASED_SPLITS = {
    "openimages_vrd_released_train": (
        "openimages_v4/rel/rel_only_annotations_train.json",
        *_OI_NAMES,
        "openimages_v4/train",
        True,
        None,
        "openimages_vrd",
    ),
    "openimages_vrd_released_val": (
        "openimages_v4/rel/rel_only_annotations_val.json",
        *_OI_NAMES,
        "openimages_v4/train",
        False,
        "openimages_vrd_released_train",
        "openimages_vrd",
    ),
    "visual_genome_released_train": (
        "vg/rel_annotations_train.json",
        *_VG_NAMES,
        "vg/VG_100K",
        True,
        None,
        "scene_graph",
    ),
    "visual_genome_released_val": (
        "vg/rel_annotations_val.json",
        *_VG_NAMES,
        "vg/VG_100K",
        False,
        "visual_genome_released_train",
        "scene_graph",
    ),
}

# name: split
_TOY_VRD_SPLITS = {"toy_vrd_train": "train", "toy_vrd_test": "test"}


def _against(train_dataset: str | None) -> dict[str, str]:
    """Metadata of a test set: which triplets are unseen is said against ``train_dataset``."""
    return {} if train_dataset is None else {"train_dataset": train_dataset}


def register_all_vrd(root: str) -> None:
    """Register the splits of VRD below ``root``."""
    for name, (json_file, image_root, merge_duplicates, train) in _VRD_SPLITS.items():
        register_vrd(
            name,
            os.path.join(root, json_file),
            os.path.join(root, image_root),
            merge_duplicates=merge_duplicates,
            **_against(train),
        )


def register_all_visual_genome(root: str) -> None:
    """Register the splits of Visual Genome, without and with attributes, below ``root``."""
    folder = os.path.join(root, "vg")
    for name, (h5_file, dicts_file, split, merge_duplicates, train) in _VG_SPLITS.items():
        register_visual_genome(
            name,
            os.path.join(folder, h5_file),
            os.path.join(folder, dicts_file),
            os.path.join(folder, "image_data.json"),
            os.path.join(folder, "VG_100K"),
            split,
            merge_duplicates=merge_duplicates,
            metadata=_against(train),
        )


def register_all_openimages_vrd(root: str) -> None:
    """Register the splits of OpenImages, challenge 2018 and V6, below ``root``."""
    folder = os.path.join(root, "openimages_vrd")
    for name, split in _OPENIMAGES_SPLITS.items():
        relations, labels, images, image_list, merge_duplicates, train = split
        register_openimages_vrd(
            name,
            os.path.join(folder, relations),
            os.path.join(folder, images),
            os.path.join(folder, "challenge-2018-classes-vrd.csv"),
            os.path.join(folder, "challenge-2018-attributes-description.csv"),
            labels_csv=labels and os.path.join(folder, labels),
            image_list=image_list and os.path.join(folder, image_list),
            only_known="_v6_" in name,  # V6 has more classes and predicates than the challenge
            merge_duplicates=merge_duplicates,
            metadata=_against(train),
        )


def register_all_released(root: str) -> None:
    """Register the JSON files that RelDN's authors released, in their folders below ``root``."""
    for name, split in _RELEASED_SPLITS.items():
        json_file, objects, predicates, images, merge_duplicates, train, evaluator = split
        register_relation_json(
            name,
            os.path.join(root, json_file),
            os.path.join(root, images),
            objects_file=os.path.join(root, objects),
            predicates_file=os.path.join(root, predicates),
            what="OpenImages" if "openimages" in name else "Visual Genome",
            merge_duplicates=merge_duplicates,
            evaluator_type=evaluator,
            **_against(train),
        )


def register_all_toy_vrd() -> None:
    """Register the splits of the toy set, which is drawn when it is first used."""
    for name, split in _TOY_VRD_SPLITS.items():
        register_toy_vrd(name, split)


_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_all_vrd(_root)
register_all_visual_genome(_root)
register_all_openimages_vrd(_root)
register_all_released(_root)
register_all_toy_vrd()
