#!/usr/bin/env python
r"""Create the image lists of the OpenImages splits: train, val, and the small "mini" ones.

Images with a relationship between two boxes are divided so that every predicate keeps its share and
occurs in every list; the mini lists are subsets of the full ones. The same seed gives the same
lists. Paper: 53,953 and 3,234 images, and 4,500 and 1,000 ("mini"); its own lists are not public.

Example::

    python tools/split_openimages_vrd.py \
        --relations $DETECTRON2_DATASETS/openimages_vrd/challenge-2018-train-vrd.csv \
        --output $DETECTRON2_DATASETS/openimages_vrd/lists
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # if the package is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  before Detectron2
import numpy as np
from tabulate import tabulate

from reldn_d2.data.datasets.io import Problems, read_csv
from reldn_d2.data.datasets.openimages import OPENIMAGES_PREDICATES
from reldn_d2.utils.file_io import write_atomically


def stratified_sample(
    predicates: Mapping[str, Iterable[int | str]], size: int, seed: int
) -> list[str]:
    """Draw images so that every predicate keeps its share and occurs at least once.

    Each image belongs to the stratum of its rarest predicate. From each stratum, images are drawn
    in proportion to its size (largest remainder method), and at least one.

    Args:
        predicates: the predicates of each image, by image id.
        size: number of images to draw.
        seed: the same seed draws the same images of the same data.

    Returns:
        Image ids in the order of ``predicates``.

    Raises:
        ValueError: if there are fewer images than ``size``, an image has no predicate, or there are
            more predicates than images to draw.
    """
    counts = Counter(predicate for values in predicates.values() for predicate in set(values))
    strata: dict[int | str, list[str]] = {}
    for image, values in predicates.items():
        if not values:
            raise ValueError(f"Image {image} has no predicate: remove it before drawing.")
        rarest = min(set(values), key=lambda predicate: (counts[predicate], str(predicate)))
        strata.setdefault(rarest, []).append(image)
    if not len(strata) <= size <= len(predicates):
        raise ValueError(
            f"Cannot draw {size} images: there are {len(predicates)} images, and each of "
            f"{len(strata)} predicates needs at least one."
        )
    names = sorted(strata, key=str)
    available = np.array([len(strata[name]) for name in names])
    counts_to_draw = _proportional_counts(available, size)
    rng = np.random.default_rng(seed)
    chosen = set()
    for name, count in zip(names, counts_to_draw.tolist(), strict=True):
        images = sorted(strata[name])  # so that the order of the file does not matter
        chosen.update(images[i] for i in rng.choice(len(images), count, replace=False))
    return [image for image in predicates if image in chosen]


def _proportional_counts(available: np.ndarray, size: int) -> np.ndarray:
    """Return integers in [1, available] that are proportional to it and sum to ``size``."""
    exact = available * size / available.sum()
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while counts.sum() < size:
        missing = np.where(counts < available, exact - counts, -np.inf)
        counts[missing.argmax()] += 1
    while counts.sum() > size:
        surplus = np.where(counts > 1, counts - exact, -np.inf)
        counts[surplus.argmax()] -= 1
    return counts


def read_predicates(relations_csv: str) -> dict[str, set[str]]:
    """Read the predicates between two boxes of each image, in the order of the file.

    Raises:
        ValueError: the file is invalid, or has no such predicate.
    """
    problems = Problems()
    predicates: dict[str, set[str]] = {}
    columns = ("ImageID", "RelationshipLabel")
    for _, (image, predicate) in read_csv(relations_csv, columns, "relationships", problems):
        if predicate in OPENIMAGES_PREDICATES:
            predicates.setdefault(image, set()).add(predicate)
    problems.raise_any()
    if not predicates:
        raise ValueError(
            f"{relations_csv}: no row has one of the predicates {', '.join(OPENIMAGES_PREDICATES)}."
        )
    return predicates


def make_lists(
    predicates: dict[str, set[str]], val: int, mini_train: int, mini_val: int, seed: int
) -> dict[str, list[str]]:
    """Return the image ids of each list."""
    lists = {"val": stratified_sample(predicates, val, seed)}
    chosen = set(lists["val"])
    lists["train"] = [image for image in predicates if image not in chosen]
    for name, size in (("train", mini_train), ("val", mini_val)):
        of_list = {image: predicates[image] for image in lists[name]}
        lists[f"mini_{name}"] = stratified_sample(of_list, size, seed + 1)
    return lists


def main(arguments: list[str] | None = None) -> int:
    """Write the lists, print the share of each predicate and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--relations", required=True, help="challenge-2018-train-vrd.csv")
    parser.add_argument("--output", type=Path, required=True, help="output folder of the lists")
    parser.add_argument(
        "--val", type=int, default=3234, help="images in val; all others are in train"
    )
    parser.add_argument("--mini-train", type=int, default=4500, help="images in mini_train")
    parser.add_argument("--mini-val", type=int, default=1000, help="images in mini_val")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        predicates = read_predicates(args.relations)
        lists = make_lists(predicates, args.val, args.mini_train, args.mini_val, args.seed)
        lists = {name: lists[name] for name in ("train", "val", "mini_train", "mini_val")}
        for name, images in lists.items():
            with write_atomically(str(args.output / f"{name}.txt")) as file:
                file.writelines(f"{image}\n" for image in images)
            print(args.output / f"{name}.txt", f"{len(images):,} images")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = []
    for predicate in OPENIMAGES_PREDICATES:
        shares = [
            sum(predicate in predicates[image] for image in images) / len(images)
            for images in (predicates, *lists.values())
        ]
        rows.append([predicate, *(f"{share:.2%}" for share in shares)])
    print("\nshare of the images with each predicate")
    print(tabulate(rows, headers=["predicate", "all", *lists], tablefmt="pipe"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
