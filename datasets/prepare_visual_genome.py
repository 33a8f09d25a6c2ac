#!/usr/bin/env python
"""Download and unpack Visual Genome into ROOT/vg. Can be interrupted and run again.

Files and archives that exist in ROOT/vg are not downloaded again. The images of both archives are
unpacked into one folder, VG_100K.
"""

import sys
from pathlib import Path, PurePosixPath

from _prepare import create_parser, fetch, require, run, unpack

_GRAPHS = "http://svl.stanford.edu/projects/scene-graph/dataset"
_IMAGES = "https://cs.stanford.edu/people/rak248/VG_100K_2"
_DATA = "https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset"
URLS = {
    "VG-SGG.h5": f"{_GRAPHS}/VG-SGG.h5",
    "VG-SGG-dicts.json": f"{_GRAPHS}/VG-SGG-dicts.json",
    "image_data.json.zip": f"{_DATA}/image_data.json.zip",
    "images.zip": f"{_IMAGES}/images.zip",
    "images2.zip": f"{_IMAGES}/images2.zip",
}


def main() -> None:
    """Download, unpack and print the next step."""
    parser = create_parser(__doc__)
    parser.add_argument("--no-images", action="store_true", help="download only the annotations")
    args = parser.parse_args()
    folder = args.root / "vg"
    for name in ("VG-SGG.h5", "VG-SGG-dicts.json"):
        fetch(URLS, name, folder, args.mirror)

    image_data = folder / "image_data.json"
    if not image_data.exists():
        archive = fetch(URLS, "image_data.json.zip", folder, args.mirror)
        unpack(archive, lambda member: image_data if member.endswith("image_data.json") else None)
        require([image_data], archive.name)
    if args.no_images:
        print("The annotations of Visual Genome are complete.")
        return

    def target_path(member: str) -> Path | None:
        path = PurePosixPath(member)
        return folder / "VG_100K" / path.name if path.suffix == ".jpg" else None

    for name in ("images.zip", "images2.zip"):
        if not unpack(fetch(URLS, name, folder, args.mirror), target_path):
            require([folder / "VG_100K" / "*.jpg"], name)
    print("Visual Genome is complete. Check it: python -m reldn_d2.data.check visual_genome_train")


if __name__ == "__main__":
    sys.exit(run(main))
