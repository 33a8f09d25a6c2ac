#!/usr/bin/env python
"""Download and unpack VRD into ROOT/vrd. Can be interrupted and run again.

Archives that exist in ROOT/vrd are not downloaded again.
"""

import sys
from pathlib import Path, PurePosixPath

from _prepare import Source, create_parser, drive_file, fetch, require, run, unpack

_HOME = "https://cs.stanford.edu/people/ranjaykrishna/vrd"
_IMAGES_ID = "0Byvt-AfX75o1SVBTWFlPRGZGTXc"
SOURCES = {
    "json_dataset.zip": Source(f"{_HOME}/", (f"{_HOME}/json_dataset.zip",)),
    "sg_dataset.zip": Source(
        f"{_HOME}/ and https://github.com/GriffinLiang/vrd-dsr, which names another copy",
        (
            drive_file(_IMAGES_ID),
            # The official address, which has not answered since 2021.
            "http://imagenet.stanford.edu/internal/jcjohns/scene_graphs/sg_dataset.zip",
        ),
        hint=(
            " If Google Drive refuses: pip install gdown, then in that folder "
            f"gdown {_IMAGES_ID} -O sg_dataset.zip"
        ),
    ),
}
_NAMES = ("annotations_train.json", "annotations_test.json", "objects.json", "predicates.json")
_FOLDERS = ("sg_train_images", "sg_test_images")


def main() -> None:
    """Download, unpack and print the next step."""
    args = create_parser(__doc__).parse_args()
    folder = args.root / "vrd"

    def annotations(member: str) -> Path | None:
        name = PurePosixPath(member).name
        return folder / "json_dataset" / name if name in _NAMES else None

    def images(member: str) -> Path | None:
        path = PurePosixPath(member)
        if path.parent.name not in _FOLDERS or path.name.startswith("."):
            return None
        return folder / "sg_dataset" / path.parent.name / path.name

    for archive, target_path in (("json_dataset.zip", annotations), ("sg_dataset.zip", images)):
        unpack(fetch(SOURCES, archive, folder, args.mirror), target_path)
    require([folder / "json_dataset" / name for name in _NAMES], "json_dataset.zip")
    require([folder / "sg_dataset" / name for name in _FOLDERS], "sg_dataset.zip")
    print("VRD is complete. Check it: python -m reldn_d2.data.check vrd_train")


if __name__ == "__main__":
    sys.exit(run(main))
