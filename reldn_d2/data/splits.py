"""Drawing images such that every predicate keeps its share."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

__all__ = ["stratified_sample"]


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
