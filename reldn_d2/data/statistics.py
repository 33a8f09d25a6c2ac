"""What a registered data set counts: predicates given classes, frequencies, zero-shot triplets.

The counts are kept in a file beside the data, under a fingerprint of the annotations.
``python -m reldn_d2.data.statistics NAME`` prints them, and counts anew with ``--recount``.

Shorthand: C entity classes, P predicates.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from torch import Tensor

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..utils.file_io import write_atomically
from .dataset_dict import dicts_without_images
from .datasets.catalog import add_module_argument, import_modules, require_dataset
from .datasets.io import cache_paths
from .frequency import PairCounts, count_pairs

__all__ = [
    "RelationStatistics",
    "dataset_statistics",
    "fingerprint",
    "training_statistics_of",
    "zero_shot_triplets",
]

logger = logging.getLogger(__name__)

Triplet = tuple[int, int, int]


@dataclass(frozen=True)
class RelationStatistics:
    """Counts of a data set, with the names that its numbers stand for."""

    thing_classes: tuple[str, ...]
    predicate_classes: tuple[str, ...]
    counts: PairCounts
    num_images: int
    num_relations: int

    @property
    def predicate_counts(self) -> np.ndarray:
        """(P,) int64, relations of each predicate."""
        return self.counts.relations.sum(axis=(0, 1))

    @property
    def predicate_frequencies(self) -> np.ndarray:
        """(P,) float64, share of each predicate among all relations; 0 where there are none."""
        return self.predicate_counts / max(self.predicate_counts.sum(), 1)

    @property
    def triplets(self) -> frozenset[Triplet]:
        """The different (subject class, predicate, object class)."""
        rows = np.argwhere(self.counts.relations)[:, [0, 2, 1]]
        return frozenset(map(tuple, rows.tolist()))

    def table(self, overlap_filter: bool) -> Tensor:
        """(C, C, P + 1) int64 for the semantic module, "no relationship" last."""
        return self.counts.table(overlap_filter)

    @classmethod
    def count(
        cls,
        dataset_dicts: Sequence[dict[str, Any]],
        thing_classes: Sequence[str],
        predicate_classes: Sequence[str],
    ) -> "RelationStatistics":
        """Count the annotations of dataset dicts.

        Raises:
            ValueError: if a category, predicate or index is out of range, with file and record.
        """
        return cls(
            tuple(thing_classes),
            tuple(predicate_classes),
            count_pairs(dataset_dicts, len(thing_classes), len(predicate_classes)),
            len(dataset_dicts),
            sum(len(record.get("relations", ())) for record in dataset_dicts),
        )

    def description(self) -> dict[str, Any]:
        """As plain types and small, for a checkpoint: only the triplets that occur."""
        rows = np.argwhere(self.counts.relations)
        numbers = self.counts.relations[tuple(rows.T)]
        return {
            "num_images": self.num_images,
            "num_relations": self.num_relations,
            "predicate_counts": self.predicate_counts.tolist(),
            # subject class, object class, predicate, number of relations
            "relation_counts": np.column_stack([rows, numbers]).tolist(),
        }


def dataset_statistics(
    name: str, dataset_dicts: Sequence[dict[str, Any]] | None = None, recount: bool = False
) -> RelationStatistics:
    """Statistics of a registered data set, counted when they are not known yet.

    They are kept in ``reldn_cache/NAME.statistics.npz`` beside the annotations (in Detectron2's
    cache folder where that is read-only), and are used again only while :func:`fingerprint` is the
    same. Those of a data set without annotation files are counted each time.

    Args:
        name: of the data set.
        dataset_dicts: what it holds, where that is loaded already; it is loaded when None.
        recount: do not use what is kept.

    Raises:
        KeyError: if there is no such data set.
        ValueError: if its annotations are not as expected, or it has no names.
    """
    require_dataset(name)
    mark = fingerprint(name)
    places = _places(name) if mark else []
    known = None if recount else _read(places, mark)
    if known is not None:
        return known
    metadata = MetadataCatalog.get(name)
    if dataset_dicts is None:
        dataset_dicts = dicts_without_images(name)
    fields = [metadata.get(field) for field in ("thing_classes", "predicate_classes")]
    if None in fields:
        raise ValueError(
            f"Data set '{name}' has no thing_classes or no predicate_classes in its metadata: set "
            "both (datasets/README.md)."
        )
    statistics = RelationStatistics.count(dataset_dicts, *fields)
    if mark:
        _write(places, mark, statistics)
    return statistics


def training_statistics_of(names: Sequence[str]) -> RelationStatistics:
    """Statistics of several data sets taken together.

    Raises:
        ValueError: if they do not have the same classes and predicates.
    """
    parts = [dataset_statistics(name) for name in names]
    if not parts:
        raise ValueError("No data set to count: DATASETS.TRAIN is empty.")
    first = parts[0]
    for name, part in zip(names, parts, strict=True):
        if (part.thing_classes, part.predicate_classes) != (
            first.thing_classes,
            first.predicate_classes,
        ):
            raise ValueError(
                f"The data sets {names[0]} and {name} have different classes or predicates: they "
                "cannot be counted together."
            )
    return RelationStatistics(
        first.thing_classes,
        first.predicate_classes,
        PairCounts(*(sum(arrays) for arrays in zip(*(part.counts for part in parts)))),
        sum(part.num_images for part in parts),
        sum(part.num_relations for part in parts),
    )


def zero_shot_triplets(test: str, train: str | None = None) -> frozenset[Triplet]:
    """The (subject class, predicate, object class) of a test set that its training set lacks.

    Args:
        test: name of the test set.
        train: name of the training set; the ``train_dataset`` of the test set's metadata when None.

    Raises:
        ValueError: if no training set is known, or the two have different classes or predicates.
    """
    train = train or MetadataCatalog.get(test).get("train_dataset")
    if train is None:
        raise ValueError(
            f"Against which training set are triplets of '{test}' unseen? Set train_dataset in its "
            "metadata."
        )
    of_test, of_train = dataset_statistics(test), dataset_statistics(train)
    for field in ("thing_classes", "predicate_classes"):
        if getattr(of_test, field) != getattr(of_train, field):
            raise ValueError(
                f"The data sets {test} and {train} have different {field}: their triplets cannot "
                "be compared."
            )
    return of_test.triplets - of_train.triplets


def fingerprint(name: str) -> str | None:
    """What the annotations of a registered data set depend on, as a short text.

    It changes with the content of its annotation files, with the options of its loader, with its
    names, and with the code of this package's data sets.

    Returns:
        None for a data set that names no ``annotation_files`` in its metadata.

    Raises:
        FileNotFoundError: if one of the files is missing.
    """
    metadata = MetadataCatalog.get(name)
    files = metadata.get("annotation_files")
    if not files:
        return None
    missing = [path for path in files if not PathManager.exists(path)]
    if missing:
        DatasetCatalog.get(name)  # its loader says best what is missing
        raise FileNotFoundError(f"Data set '{name}' needs {missing[0]}, which does not exist.")
    digest = hashlib.sha256()
    fields = ("loader", "thing_classes", "predicate_classes")
    digest.update(json.dumps([metadata.get(field) for field in fields]).encode())
    code = Path(__file__).parent
    for path in [*sorted(map(str, code.rglob("*.py"))), *files]:
        digest.update(b"\0file")
        with PathManager.open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _places(name: str) -> list[str]:
    folder = os.path.dirname(os.path.abspath(MetadataCatalog.get(name).annotation_files[0]))
    return cache_paths(folder, f"{name}.statistics.npz")


def _write(places: Iterable[str], mark: str, statistics: RelationStatistics) -> None:
    rows = np.argwhere(statistics.counts.relations)
    for path in places:
        try:
            with write_atomically(path, "wb") as file:
                np.savez_compressed(
                    file,
                    fingerprint=np.array(mark),
                    thing_classes=np.array(statistics.thing_classes),
                    predicate_classes=np.array(statistics.predicate_classes),
                    numbers=np.array([statistics.num_images, statistics.num_relations]),
                    cells=rows,
                    relations=statistics.counts.relations[tuple(rows.T)],
                    pairs=statistics.counts.pairs,
                    overlapping=statistics.counts.overlapping,
                )
            logger.info(f"Statistics were counted and kept in {path}.")
            return
        except OSError:
            continue
    logger.warning("Statistics could not be kept: is the disk full or read-only?")


def _read(places: Iterable[str], mark: str | None) -> RelationStatistics | None:
    """What is kept under the fingerprint ``mark``; None if nothing is, or it is damaged."""
    for path in places:
        try:
            with np.load(path, allow_pickle=False) as content:
                if str(content["fingerprint"]) != mark:
                    continue
                classes = tuple(content["thing_classes"].tolist())
                predicates = tuple(content["predicate_classes"].tolist())
                relations = np.zeros((len(classes), len(classes), len(predicates)), np.int64)
                relations[tuple(content["cells"].T)] = content["relations"]
                counts = PairCounts(relations, content["pairs"], content["overlapping"])
                images, total = content["numbers"].tolist()
        except Exception:  # not there, or damaged in any way: counted again
            continue
        return RelationStatistics(classes, predicates, counts, images, total)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, and count if need be; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m reldn_d2.data.statistics",
        description="Count a registered data set, keep the counts beside it and print them.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="registered data sets")
    add_module_argument(parser)
    parser.add_argument("--recount", action="store_true", help="do not use what is kept")
    args = parser.parse_args(arguments)
    setup_logger(name="reldn_d2")
    try:
        import_modules(args.module)
        for name in args.names:
            _print(name, dataset_statistics(name, recount=args.recount))
    except (KeyError, ValueError, OSError, ImportError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    return 0


def _print(name: str, statistics: RelationStatistics) -> None:
    counts = statistics.counts
    print(
        f"\n{name}: {statistics.num_images} images, {statistics.num_relations} relations, "
        f"{len(statistics.triplets)} different triplets; of {counts.pairs.sum()} ordered pairs of "
        f"boxes {counts.overlapping.sum()} overlap"
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
    number = int(counts.relations[tuple(np.array(cells).T)].sum()) if cells else 0
    print(f"zero-shot: {len(unseen)} triplets, {number} relations are unseen in {train}")


if __name__ == "__main__":
    sys.exit(main())
