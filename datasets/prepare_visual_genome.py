#!/usr/bin/env python
"""Download and unpack Visual Genome into ROOT/vg. Can be interrupted and run again.

Files and archives that exist in ROOT/vg are not downloaded again. The images of both archives are
unpacked into one folder, VG_100K.
"""

import sys
from pathlib import Path, PurePosixPath

from _prepare import Source, create_parser, fetch, require, run, unpack

_GRAPHS_PAGE = "https://github.com/danfeiX/scene-graph-TF-release, data_tools/README.md"
_HOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
_IMAGES = "https://cs.stanford.edu/people/rak248/VG_100K_2"


def _graphs(name: str) -> Source:
    hosts = ("http://svl.stanford.edu/projects", "http://cvgl.stanford.edu")
    return Source(_GRAPHS_PAGE, tuple(f"{host}/scene-graph/dataset/{name}" for host in hosts))


SOURCES = {
    "VG-SGG.h5": _graphs("VG-SGG.h5"),
    "VG-SGG-dicts.json": _graphs("VG-SGG-dicts.json"),
    "image_data.json.zip": Source(
        _HOME,
        (
            "https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset/image_data.json.zip",
            "http://visualgenome.org/static/data/dataset/image_data.json.zip",
        ),
        hint=(
            " image_data.json itself works too; another copy is "
            "http://svl.stanford.edu/projects/scene-graph/VG/image_data.json"
        ),
    ),
    "images.zip": Source(_HOME, (f"{_IMAGES}/images.zip",)),
    "images2.zip": Source(_HOME, (f"{_IMAGES}/images2.zip",)),
}


def main() -> None:
    """Download, unpack and print the next step."""
    parser = create_parser(__doc__)
    parser.add_argument("--no-images", action="store_true", help="download only the annotations")
    args = parser.parse_args()
    folder = args.root / "vg"
    for name in ("VG-SGG.h5", "VG-SGG-dicts.json"):
        fetch(SOURCES, name, folder, args.mirror)

    image_data = folder / "image_data.json"
    if not image_data.exists():
        archive = fetch(SOURCES, "image_data.json.zip", folder, args.mirror)
        unpack(archive, lambda member: image_data if member.endswith("image_data.json") else None)
        require([image_data], archive.name)
    if args.no_images:
        print("The annotations of Visual Genome are complete.")
        return

    def target_path(member: str) -> Path | None:
        path = PurePosixPath(member)
        return folder / "VG_100K" / path.name if path.suffix == ".jpg" else None

    for name in ("images.zip", "images2.zip"):
        if not unpack(fetch(SOURCES, name, folder, args.mirror), target_path):
            require([folder / "VG_100K" / "*.jpg"], name)
    print("Visual Genome is complete. Check it: python -m reldn_d2.data.check visual_genome_train")


if __name__ == "__main__":
    sys.exit(run(main))
