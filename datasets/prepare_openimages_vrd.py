#!/usr/bin/env python
"""Download OpenImages' relationships and their images into ROOT/openimages_vrd.

Can be interrupted and run again: existing files are not downloaded again. Of the challenge, only
images with a relationship between two boxes are downloaded. tools/split_openimages_vrd.py creates
the lists of the splits, unless they exist: to use your own lists, put them into
ROOT/openimages_vrd/lists first.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if the package is not installed

from _prepare import PrepareError, Source, create_parser, fetch, fetch_many, run  # noqa: E402

import reldn_d2  # noqa: E402,F401  # isort: skip  before Detectron2
from reldn_d2.data.datasets.io import Problems, read_csv  # noqa: E402
from reldn_d2.data.datasets.openimages import OPENIMAGES_PREDICATES  # noqa: E402
from reldn_d2.data.datasets.openimages_files import read_image_list  # noqa: E402

_PAGE = "https://storage.googleapis.com/openimages/web"
_IMAGE_HOSTS = (
    "https://open-images-dataset.s3.amazonaws.com",
    "https://s3.amazonaws.com/open-images-dataset",  # the same storage under another host
)
_TRAIN = "challenge-2018-train-vrd.csv"
_COMMON = ("challenge-2018-classes-vrd.csv", "challenge-2018-attributes-description.csv")


def _source(page: str, path: str) -> Source:
    # The second address is the same storage under another host, which may be reachable when the
    # first is blocked.
    hosts = ("https://storage.googleapis.com", "https://commondatastorage.googleapis.com")
    return Source(f"{_PAGE}/{page}.html", tuple(f"{host}/openimages/{path}" for host in hosts))


SOURCES = {
    **{name: _source("challenge", f"challenge_2018/{name}") for name in _COMMON},
    **{
        name: _source("challenge", f"challenge_2018/train/{name}")
        for name in (_TRAIN, "challenge-2018-train-vrd-labels.csv")
    },
    **{
        name: _source("download_v6", f"v6/{name}")
        for name in (f"oidv6-{x}-annotations-vrd.csv" for x in ("train", "validation", "test"))
    },
}


def images_of(relations_csv: Path) -> list[str]:
    """Return the ids of the images that a dataset without a list of images has."""
    problems = Problems()
    predicates = (*OPENIMAGES_PREDICATES, "is")
    columns = ("ImageID", "RelationshipLabel")
    rows = read_csv(str(relations_csv), columns, "relationships of OpenImages", problems)
    images: dict[str, None] = {}
    others: dict[str, None] = {}
    for _, (image, label) in rows:
        if label in predicates:
            images[image] = None
        else:
            others[label] = None
    problems.raise_any()
    if not images:
        met = ", ".join(f"'{x}'" for x in list(others)[:5]) or "no row"
        raise ValueError(
            f"{relations_csv}: no row has one of the predicates {', '.join(predicates)}; met {met}"
            " instead. Is it another file of OpenImages?"
        )
    return list(images)


def main() -> None:
    """Download, create the lists and print the next step."""
    parser = create_parser(__doc__)
    parser.add_argument(
        "--set",
        choices=("challenge", "mini", "v6-validation", "v6-test", "v6-train"),
        default="challenge",
        help="mini: only the 4,500 and 1,000 images of the small splits; default: challenge",
    )
    parser.add_argument("--threads", type=int, default=16, help="number of parallel downloads")
    args = parser.parse_args()
    folder = args.root / "openimages_vrd"
    for name in _COMMON:
        fetch(SOURCES, name, folder, args.mirror)
    try:
        if args.set.startswith("v6"):
            split = args.set.removeprefix("v6-")
            table = fetch(SOURCES, f"oidv6-{split}-annotations-vrd.csv", folder, args.mirror)
            images = images_of(table)
        else:
            split = "train"
            images = _challenge_images(folder, args.set == "mini", args.mirror)
    except ValueError as error:
        raise PrepareError(str(error)) from error
    hosts = (args.mirror.rstrip("/"),) if args.mirror else _IMAGE_HOSTS
    addresses = {
        folder / split / f"{image}.jpg": tuple(f"{host}/{split}/{image}.jpg" for host in hosts)
        for image in images
    }
    fetch_many(addresses, f"{split} images", args.threads)
    name = {"challenge": "train", "mini": "mini_train"}.get(args.set, args.set.replace("-", "_"))
    print(
        f"All {len(images)} images are complete. Check them: "
        f"python -m reldn_d2.data.check openimages_vrd_{name}"
    )


def _challenge_images(folder: Path, mini: bool, mirror: str | None) -> list[str]:
    """Return the images of the lists, which are created if they do not exist."""
    table = fetch(SOURCES, _TRAIN, folder, mirror)
    fetch(SOURCES, "challenge-2018-train-vrd-labels.csv", folder, mirror)
    names = ("mini_train", "mini_val") if mini else ("train", "val")
    lists = [folder / "lists" / f"{name}.txt" for name in names]
    if not all(path.exists() for path in lists):
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
        import split_openimages_vrd

        command = ["--relations", str(table), "--output", str(folder / "lists")]
        if split_openimages_vrd.main(command):
            raise PrepareError("Could not create the lists of the splits.")
    return [image for path in lists for image in read_image_list(str(path))]


if __name__ == "__main__":
    sys.exit(run(main))
