"""The built-in datasets: one table of splits for each, and their registration.

Paths are relative to the folder named by the environment variable ``DETECTRON2_DATASETS``
("datasets" when it is not set). Registration reads no file, so a dataset has to be downloaded only
when it is used. See ``datasets/README.md`` for where the files come from.
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

# The last entry of a split is the training set of a test split, and None for a training split.
# Equal relationships of an image are merged for training only: published recall counts every copy.

# name: (annotations, images, training set)
_VRD_SPLITS = {
    "vrd_train": (
        "vrd/json_dataset/annotations_train.json",
        "vrd/sg_dataset/sg_train_images",
        None,
    ),
    "vrd_test": (
        "vrd/json_dataset/annotations_test.json",
        "vrd/sg_dataset/sg_test_images",
        "vrd_train",
    ),
}

# name: (h5 file, names, split, training set)
_VG_FILES = {
    "visual_genome": ("VG-SGG.h5", "VG-SGG-dicts.json"),
    "visual_genome_attributes": ("VG-SGG-with-attri.h5", "VG-SGG-dicts-with-attri.json"),
}
_VG_SPLITS = {
    f"{prefix}_{split}": (*files, split, None if split == "train" else f"{prefix}_train")
    for prefix, files in _VG_FILES.items()
    for split in ("train", "val", "test")
}

# name: (relationships, verified labels, images, list of images, training set)
_CHALLENGE = ("challenge-2018-train-vrd.csv", "challenge-2018-train-vrd-labels.csv", "train")
_OPENIMAGES_SPLITS = {
    "openimages_vrd_train": (*_CHALLENGE, "lists/train.txt", None),
    "openimages_vrd_val": (*_CHALLENGE, "lists/val.txt", "openimages_vrd_train"),
    "openimages_vrd_mini_train": (*_CHALLENGE, "lists/mini_train.txt", None),
    "openimages_vrd_mini_val": (*_CHALLENGE, "lists/mini_val.txt", "openimages_vrd_mini_train"),
    **{
        f"openimages_vrd_v6_{split}": (
            f"oidv6-{split}-annotations-vrd.csv",
            None,
            split,
            None,
            None if split == "train" else "openimages_vrd_v6_train",
        )
        for split in ("train", "validation", "test")
    },
}

# prefix: (annotations, classes, predicates, images, evaluator, name of the dataset in messages)
_RELEASED_FILES = {
    "openimages_vrd_released": (
        "openimages_v4/rel/rel_only_annotations_{split}.json",
        "openimages_v4/rel/detections_train.json",
        "openimages_v4/rel/rel_9_predicates.json",
        "openimages_v4/train",
        "openimages_vrd",
        "OpenImages",
    ),
    "visual_genome_released": (
        "vg/rel_annotations_{split}.json",
        "vg/objects.json",
        "vg/predicates.json",
        "vg/VG_100K",
        "scene_graph",
        "Visual Genome",
    ),
}


def _metadata(train_dataset: str | None) -> dict[str, str]:
    """Metadata of a test split: its zero-shot triplets are those that ``train_dataset`` lacks."""
    return {} if train_dataset is None else {"train_dataset": train_dataset}


def register_all_vrd(root: str) -> None:
    """Register the splits of VRD below ``root``."""
    for name, (json_file, image_root, train_dataset) in _VRD_SPLITS.items():
        register_vrd(
            name,
            os.path.join(root, json_file),
            os.path.join(root, image_root),
            merge_duplicates=train_dataset is None,
            **_metadata(train_dataset),
        )


def register_all_visual_genome(root: str) -> None:
    """Register the splits of Visual Genome, without and with attributes, below ``root``."""
    folder = os.path.join(root, "vg")
    for name, (h5_file, dicts_file, split, train_dataset) in _VG_SPLITS.items():
        register_visual_genome(
            name,
            os.path.join(folder, h5_file),
            os.path.join(folder, dicts_file),
            os.path.join(folder, "image_data.json"),
            os.path.join(folder, "VG_100K"),
            split,
            # Trained and counted without them, as in Neural Motifs and the released code.
            keep_images_without_relations=train_dataset is not None,
            merge_duplicates=train_dataset is None,
            metadata=_metadata(train_dataset),
        )


def register_all_openimages_vrd(root: str) -> None:
    """Register the splits of OpenImages, challenge 2018 and V6, below ``root``."""
    folder = os.path.join(root, "openimages_vrd")
    for name, split in _OPENIMAGES_SPLITS.items():
        relations, labels, images, image_list, train_dataset = split
        register_openimages_vrd(
            name,
            os.path.join(folder, relations),
            os.path.join(folder, images),
            os.path.join(folder, "challenge-2018-classes-vrd.csv"),
            os.path.join(folder, "challenge-2018-attributes-description.csv"),
            labels_csv=labels and os.path.join(folder, labels),
            image_list=image_list and os.path.join(folder, image_list),
            only_known="_v6_" in name,  # V6 has more classes and predicates than the challenge
            merge_duplicates=train_dataset is None,
            metadata=_metadata(train_dataset),
        )


def register_all_released(root: str) -> None:
    """Register the JSON files that RelDN's authors released, in their folders below ``root``."""
    for prefix, files in _RELEASED_FILES.items():
        *paths, evaluator_type, what = files
        for split in ("train", "val"):
            json_file, objects, predicates, images = (
                os.path.join(root, path.format(split=split)) for path in paths
            )
            train_dataset = None if split == "train" else f"{prefix}_train"
            register_relation_json(
                f"{prefix}_{split}",
                json_file,
                images,
                objects_file=objects,
                predicates_file=predicates,
                what=what,
                merge_duplicates=train_dataset is None,
                evaluator_type=evaluator_type,
                **_metadata(train_dataset),
            )


def register_all_toy_vrd() -> None:
    """Register the splits of the toy set, which is drawn on first use."""
    for split in ("train", "test"):
        register_toy_vrd(f"toy_vrd_{split}", split)


_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_all_vrd(_root)
register_all_visual_genome(_root)
register_all_openimages_vrd(_root)
register_all_released(_root)
register_all_toy_vrd()
