#!/usr/bin/env python
"""Make the lists of images of the OpenImages splits: train, val, and the small "mini" ones.

Images with a relationship between two boxes are divided such that every predicate keeps its share
and occurs in every list; the mini lists are parts of the full ones. The same seed makes the same
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  before Detectron2
import numpy as np
from tabulate import tabulate

from reldn_d2.data.datasets.io import Problems, read_csv
from reldn_d2.data.datasets.openimages import OPENIMAGES_PREDICATES
from reldn_d2.utils.file_io import write_atomically


def stratified_sample(
    predicates: Mapping[str, Iterable[int | str]], size: int, seed: int
) -> list[str]:
    """Draw images such that the predicates occur in proportion, and each at least once.

    Each image stands for the rarest of its predicates. From the images of each predicate as many
    are drawn as its share asks for (by largest remainders), and at least one.

    Args:
        predicates: the predicates in each image, by the image's identifier.
        size: number of images to draw.
        seed: the same seed draws the same images of the same data.

    Returns:
        Identifiers in the order of ``predicates``.

    Raises:
        ValueError: if there are fewer images than asked for, an image without a predicate, or more
            predicates than images to draw.
    """
    counts = Counter(predicate for values in predicates.values() for predicate in set(values))
    strata: dict[int | str, list[str]] = {}
    for image, values in predicates.items():
        if not values:
            raise ValueError(f"Image {image} has no predicate: leave it out before drawing.")
        rarest = min(set(values), key=lambda predicate: (counts[predicate], str(predicate)))
        strata.setdefault(rarest, []).append(image)
    if not len(strata) <= size <= len(predicates):
        raise ValueError(
            f"{size} images cannot be drawn: there are {len(predicates)}, and each of "
            f"{len(strata)} predicates needs one of its own."
        )
    names = sorted(strata, key=str)
    available = np.array([len(strata[name]) for name in names])
    wanted = _shares(available, size)
    draw = np.random.default_rng(seed)
    chosen = set()
    for name, number in zip(names, wanted.tolist(), strict=True):
        images = sorted(strata[name])  # so that the order of the file does not matter
        chosen.update(images[i] for i in draw.choice(len(images), number, replace=False))
    return [image for image in predicates if image in chosen]


def _shares(available: np.ndarray, size: int) -> np.ndarray:
    """Integers of the sum ``size`` in proportion to ``available``, at least 1 and at most that."""
    exact = available * size / available.sum()
    wanted = np.maximum(np.floor(exact).astype(int), 1)
    while wanted.sum() < size:
        missing = np.where(wanted < available, exact - wanted, -np.inf)
        wanted[missing.argmax()] += 1
    while wanted.sum() > size:
        surplus = np.where(wanted > 1, wanted - exact, -np.inf)
        wanted[surplus.argmax()] -= 1
    return wanted


def read_predicates(relations_csv: str) -> dict[str, set[str]]:
    """The predicates between two boxes in each image, in the order of the file.

    Raises:
        ValueError: the file is not as expected, or has no such predicate.
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
    """Identifiers of the images of each list."""
    lists = {"val": stratified_sample(predicates, val, seed)}
    chosen = set(lists["val"])
    lists["train"] = [image for image in predicates if image not in chosen]
    for name, size in (("train", mini_train), ("val", mini_val)):
        part = {image: predicates[image] for image in lists[name]}
        lists[f"mini_{name}"] = stratified_sample(part, size, seed + 1)
    return lists


def main(arguments: list[str] | None = None) -> int:
    """Write the lists and print the shares; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--relations", required=True, help="challenge-2018-train-vrd.csv")
    parser.add_argument("--output", type=Path, required=True, help="folder for the lists")
    parser.add_argument("--val", type=int, default=3234, help="images; the others are train")
    parser.add_argument("--mini-train", type=int, default=4500, help="images")
    parser.add_argument("--mini-val", type=int, default=1000, help="images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        predicates = read_predicates(args.relations)
        lists = make_lists(predicates, args.val, args.mini_train, args.mini_val, args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lists = {name: lists[name] for name in ("train", "val", "mini_train", "mini_val")}
    for name, images in lists.items():
        with write_atomically(str(args.output / f"{name}.txt")) as file:
            file.writelines(f"{image}\n" for image in images)
        print(args.output / f"{name}.txt", f"{len(images):,} images")
    rows = []
    for predicate in OPENIMAGES_PREDICATES:
        shares = [
            sum(predicate in predicates[image] for image in images) / len(images)
            for images in (predicates, *lists.values())
        ]
        rows.append([predicate, *(f"{share:.2%}" for share in shares)])
    print("\nshare of the images that have a predicate")
    print(tabulate(rows, headers=["predicate", "all", *lists], tablefmt="pipe"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
