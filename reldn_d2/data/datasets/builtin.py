"""The built-in data sets: one table of splits, and their registration.

Paths are relative to the folder named by the environment variable ``DETECTRON2_DATASETS``
("datasets" when it is not set). Registration reads no file: a data set has to be there only when it
is used.
"""

import os

from .toy_vrd import register_toy_vrd
from .vrd import register_vrd

__all__ = ["register_all_toy_vrd", "register_all_vrd"]

# name: (annotations, images, whether equal relationships of an image are merged)
_VRD_SPLITS = {
    "vrd_train": (
        "vrd/json_dataset/annotations_train.json",
        "vrd/sg_dataset/sg_train_images",
        True,
    ),
    "vrd_test": (
        "vrd/json_dataset/annotations_test.json",
        "vrd/sg_dataset/sg_test_images",
        False,  # The published recall counts every annotated relationship.
    ),
}

# name: split
_TOY_VRD_SPLITS = {"toy_vrd_train": "train", "toy_vrd_test": "test"}


def register_all_vrd(root: str) -> None:
    """Register the splits of VRD below ``root``."""
    for name, (json_file, image_root, merge_duplicates) in _VRD_SPLITS.items():
        register_vrd(
            name,
            os.path.join(root, json_file),
            os.path.join(root, image_root),
            merge_duplicates=merge_duplicates,
        )


def register_all_toy_vrd() -> None:
    """Register the splits of the toy set, which is drawn when it is first used."""
    for name, split in _TOY_VRD_SPLITS.items():
        register_toy_vrd(name, split)


_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_all_vrd(_root)
register_all_toy_vrd()
