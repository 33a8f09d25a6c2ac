"""Statistics of a registered dataset: predicates given classes, frequencies, zero-shot triplets.

The counts are cached next to the data with a fingerprint of the annotations.
``python -m reldn_d2.data.statistics NAME`` prints them; ``--recount`` ignores the cache.

Shape shorthand: C entity classes, P predicates.
"""

import argparse
import hashlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tabulate import tabulate
from torch import Tensor

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..structures.name_matching import Renumbering
from ..utils.events import log_to_terminal
from ..utils.user_modules import add_module_argument, parse_and_import
from .dataset_dict import dicts_without_images
from .datasets.catalog import DATASET_ERRORS, require_dataset
from .datasets.io import cache_paths, write_cache
from .frequency import PairCounts, count_pairs, count_related_pairs

__all__ = [
    "RelationStatistics",
    "dataset_statistics",
    "fingerprint",
    "training_statistics_of",
    "zero_shot_triplets",
]

logger = logging.getLogger(__name__)

# Part of the fingerprint. Increment it when a loader or count_pairs gives other results for the
# same files: the cached statistics of all datasets are then counted again.
COUNTING_VERSION = 1

ClassTriplet = tuple[int, int, int]  # subject class, predicate, object class


@dataclass(frozen=True)
class RelationStatistics:
    """Counts of a dataset, with the names of its classes and predicates."""

    thing_classes: tuple[str, ...]
    predicate_classes: tuple[str, ...]
    counts: PairCounts
    num_images: int
    num_relations: int
    num_related_pairs: int  # ordered pairs of boxes with at least one relation
    num_apart_pairs: int  # those whose boxes do not overlap

    @property
    def predicate_counts(self) -> np.ndarray:
        """(P,) int64, number of relations per predicate."""
        return self.counts.relations.sum(axis=(0, 1))

    @property
    def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(C,) and (C,) int64, number of relations per class of the subject and of the object."""
        return self.counts.relations.sum(axis=(1, 2)), self.counts.relations.sum(axis=(0, 2))

    @property
    def predicate_frequencies(self) -> np.ndarray:
        """(P,) float64, share of each predicate among all relations; 0 if there are none."""
        return self.predicate_counts / max(self.predicate_counts.sum(), 1)

    @property
    def triplets(self) -> frozenset[ClassTriplet]:
        """The distinct (subject class, predicate, object class) of the relations."""
        rows = np.argwhere(self.counts.relations)[:, [0, 2, 1]]
        return frozenset(map(tuple, rows.tolist()))

    def table(self, overlap_filter: bool) -> Tensor:
        """Return (C, C, P + 1) int64 for the semantic module, "no relationship" last."""
        return self.counts.table(overlap_filter)

    def in_order_of(
        self,
        other: "RelationStatistics | Mapping[str, Sequence[str]]",
        owner: str,
        other_owner: str,
    ) -> "RelationStatistics":
        """Return the same counts with the ids of another list of classes and predicates.

        Args:
            other: statistics, or names by metadata field.
            owner, other_owner: whose counts and names these are, for messages.

        Raises:
            NameMismatchError: if the names differ by more than their order.
        """
        wanted = other if isinstance(other, Mapping) else vars(other)
        ids = Renumbering.between(vars(self), wanted, owner, other_owner)
        if not ids:
            return self
        old = ids.inverse()  # for each new id, where its counts are now
        classes = np.arange(len(self.thing_classes)) if old.classes is None else old.classes
        predicates = (
            np.arange(len(self.predicate_classes)) if old.predicates is None else old.predicates
        )
        return replace(
            self,
            thing_classes=tuple(self.thing_classes[i] for i in classes),
            predicate_classes=tuple(self.predicate_classes[i] for i in predicates),
            counts=PairCounts(
                self.counts.relations[np.ix_(classes, classes, predicates)],
                self.counts.pairs[np.ix_(classes, classes)],
                self.counts.overlapping[np.ix_(classes, classes)],
            ),
        )

    @classmethod
    def count(
        cls,
        dataset_dicts: Sequence[dict[str, Any]],
        thing_classes: Sequence[str],
        predicate_classes: Sequence[str],
    ) -> "RelationStatistics":
        """Count the annotations of dataset dicts.

        Raises:
            ValueError: if a category, predicate or index is out of range; names file and record.
        """
        return cls(
            tuple(thing_classes),
            tuple(predicate_classes),
            count_pairs(dataset_dicts, len(thing_classes), len(predicate_classes)),
            len(dataset_dicts),
            sum(len(record.get("relations", ())) for record in dataset_dicts),
            *count_related_pairs(dataset_dicts),
        )

    def description(self) -> dict[str, Any]:
        """Return the counts in plain types for a checkpoint, with only the triplets that occur."""
        rows = np.argwhere(self.counts.relations)
        counts = self.counts.relations[tuple(rows.T)]
        return {
            "num_images": self.num_images,
            "num_relations": self.num_relations,
            "predicate_counts": self.predicate_counts.tolist(),
            # subject class, object class, predicate, count
            "relation_counts": np.column_stack([rows, counts]).tolist(),
        }


def dataset_statistics(
    name: str, dataset_dicts: Sequence[dict[str, Any]] | None = None, recount: bool = False
) -> RelationStatistics:
    """Return the statistics of a registered dataset, from the cache if possible.

    They are cached in ``reldn_cache/NAME.statistics.npz`` next to the annotations (in Detectron2's
    cache folder if that is read-only), and the cache is valid while :func:`fingerprint` is the
    same. A dataset without annotation files is counted on every call.

    Args:
        name: name of the dataset.
        dataset_dicts: its dicts if they are loaded already; it is loaded when None.
        recount: ignore the cache.

    Raises:
        UnknownDatasetError: if there is no such dataset.
        ValueError: if its annotations are invalid, or it has no names.
    """
    require_dataset(name)
    mark = fingerprint(name)
    files = _cache_files(name) if mark else []
    cached = None if recount else _read(files, mark)
    if cached is not None:
        return cached
    metadata = MetadataCatalog.get(name)
    if dataset_dicts is None:
        dataset_dicts = dicts_without_images(name)
    fields = [metadata.get(field) for field in ("thing_classes", "predicate_classes")]
    if None in fields:
        raise ValueError(
            f"Dataset '{name}' has no thing_classes or no predicate_classes in its metadata: set "
            "both (datasets/README.md)."
        )
    statistics = RelationStatistics.count(dataset_dicts, *fields)
    if mark:
        _write(files, mark, statistics)
    return statistics


def training_statistics_of(
    names: Sequence[str], dataset_dicts: Mapping[str, Sequence[dict[str, Any]]] | None = None
) -> RelationStatistics:
    """Return the statistics of several datasets combined, in the first one's order of names.

    Args:
        names: names of the datasets.
        dataset_dicts: the dicts of those that are loaded already, by name.

    Raises:
        NameMismatchError: if they do not have the same classes and predicates.
    """
    loaded = dataset_dicts or {}
    parts = [dataset_statistics(name, loaded.get(name)) for name in names]
    if not parts:
        raise ValueError("No dataset to count: DATASETS.TRAIN is empty.")
    first = parts[0]
    owner = f"dataset '{names[0]}'"
    parts = [part.in_order_of(first, f"dataset '{x}'", owner) for x, part in zip(names, parts)]
    return RelationStatistics(
        first.thing_classes,
        first.predicate_classes,
        PairCounts(*(sum(arrays) for arrays in zip(*(part.counts for part in parts)))),
        sum(part.num_images for part in parts),
        sum(part.num_relations for part in parts),
        sum(part.num_related_pairs for part in parts),
        sum(part.num_apart_pairs for part in parts),
    )


def zero_shot_triplets(test: str, train: str | None = None) -> frozenset[ClassTriplet]:
    """Return the (subject class, predicate, object class) that only the test set has.

    Args:
        test: name of the test set.
        train: name of the training set; the ``train_dataset`` of the test set's metadata when None.

    Raises:
        ValueError: if there is no training set, or the two have different classes or predicates;
            another order is mapped.
    """
    train = train or MetadataCatalog.get(test).get("train_dataset")
    if train is None:
        raise ValueError(
            f"Zero-shot triplets of '{test}' need a training set: set train_dataset in its "
            "metadata."
        )
    of_test, of_train = dataset_statistics(test), dataset_statistics(train)
    of_train = of_train.in_order_of(of_test, f"dataset '{train}'", f"dataset '{test}'")
    return of_test.triplets - of_train.triplets


def fingerprint(name: str) -> str | None:
    """Return a hash of everything that the annotations of a registered dataset depend on.

    These are the content of its annotation files, its loader and the loader's options, its names,
    and ``COUNTING_VERSION``. For a function that was registered without
    :func:`.datasets.catalog.register_dataset`, the source file of the function counts as its
    loader.

    Returns:
        None if the statistics cannot be cached: the metadata has no ``annotation_files``, or the
        source of the function is unknown.

    Raises:
        FileNotFoundError: if one of the files is missing.
    """
    metadata = MetadataCatalog.get(name)
    files = list(metadata.get("annotation_files") or ())
    if not files:
        return None
    missing = [path for path in files if not PathManager.exists(path)]
    if missing:
        DatasetCatalog.get(name)  # its loader has the best message
        raise FileNotFoundError(f"Dataset '{name}' needs {missing[0]}, which does not exist.")
    if metadata.get("loader") is None:
        source = _source_file(DatasetCatalog[name])
        if source is None:
            return None
        files.append(source)
    digest = hashlib.sha256()
    fields = ("loader", "thing_classes", "predicate_classes")
    digest.update(json.dumps([COUNTING_VERSION, *map(metadata.get, fields)]).encode())
    for path in files:
        digest.update(b"\0file")
        with PathManager.open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _source_file(function: Callable[..., Any]) -> str | None:
    """Return the file that defines a function; None if there is none, as in an interactive run."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    path = getattr(code, "co_filename", "")
    return path if os.path.isfile(path) else None


def _cache_files(name: str) -> list[str]:
    folder = os.path.dirname(os.path.abspath(MetadataCatalog.get(name).annotation_files[0]))
    return cache_paths(folder, f"{name}.statistics.npz")


def _write(files: Sequence[str], mark: str, statistics: RelationStatistics) -> None:
    rows = np.argwhere(statistics.counts.relations)
    content = {
        "fingerprint": np.array(mark),
        "thing_classes": np.array(statistics.thing_classes),
        "predicate_classes": np.array(statistics.predicate_classes),
        "totals": np.array(
            [
                statistics.num_images,
                statistics.num_relations,
                statistics.num_related_pairs,
                statistics.num_apart_pairs,
            ]
        ),
        "cells": rows,
        "relations": statistics.counts.relations[tuple(rows.T)],
        "pairs": statistics.counts.pairs,
        "overlapping": statistics.counts.overlapping,
    }
    path = write_cache(files, lambda file: np.savez_compressed(file, **content))
    if path is None:
        logger.warning("Could not cache the statistics. Is the disk full or read-only?")
    else:
        logger.info(f"Counted the statistics and cached them in {path}.")


def _read(files: Sequence[str], mark: str | None) -> RelationStatistics | None:
    """Return the statistics cached with the fingerprint ``mark``, or None."""
    for path in files:
        try:
            with np.load(path, allow_pickle=False) as content:
                if str(content["fingerprint"]) != mark:
                    continue
                classes = tuple(content["thing_classes"].tolist())
                predicates = tuple(content["predicate_classes"].tolist())
                relations = np.zeros((len(classes), len(classes), len(predicates)), np.int64)
                relations[tuple(content["cells"].T)] = content["relations"]
                counts = PairCounts(relations, content["pairs"], content["overlapping"])
                totals = content["totals"].tolist()
        except Exception:  # missing, or damaged in any way: count again
            continue
        return RelationStatistics(classes, predicates, counts, *totals)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the statistics, counting them if they are not cached; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m reldn_d2.data.statistics",
        description="Count a registered dataset, cache the counts next to it and print them.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="names of registered datasets")
    add_module_argument(parser)
    parser.add_argument("--recount", action="store_true", help="ignore cached counts")
    args = parse_and_import(parser, arguments)
    log_to_terminal()
    try:
        for name in args.names:
            require_dataset(name)
        for name in args.names:
            _print(name, dataset_statistics(name, recount=args.recount))
    except DATASET_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _print(name: str, statistics: RelationStatistics) -> None:
    counts = statistics.counts
    print(
        f"\n{name}: {statistics.num_images} images, {statistics.num_relations} relations, "
        f"{len(statistics.triplets)} distinct triplets; {counts.overlapping.sum()} of "
        f"{counts.pairs.sum()} ordered pairs of boxes overlap"
    )
    order = np.argsort(-statistics.predicate_counts, kind="stable")
    rows = [
        (statistics.predicate_classes[i], statistics.predicate_counts[i], f"{share:.2%}")
        for i, share in ((i, statistics.predicate_frequencies[i]) for i in order.tolist())
    ]
    print(tabulate(rows, headers=["predicate", "relations", "share"], tablefmt="pipe"))
    train = MetadataCatalog.get(name).get("train_dataset")
    if train is None:
        return
    unseen = zero_shot_triplets(name, train)
    cells = [(s, o, p) for s, p, o in unseen]
    count = int(counts.relations[tuple(np.array(cells).T)].sum()) if cells else 0
    print(f"zero-shot: {len(unseen)} triplets, {count} relations are unseen in {train}")


if __name__ == "__main__":
    sys.exit(main())
