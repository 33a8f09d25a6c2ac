"""Loading data sets of the real sizes: seconds and memory, and what the workers of a loader share.

The files are generated in the official formats: OpenImages' challenge with 375,000 rows over 54,000
images, Visual Genome and a COCO file with 108,000 images and 1.1 million relations. Every load runs
in a process of its own; memory is that of the whole process at its peak, PyTorch included. CPU
seconds far below the seconds mean that other processes had the CPUs, or that the disk was slow.
"""

import argparse
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reldn_d2  # noqa: F401  # isort: skip  registers the data sets
import torch
from torch.utils.data import DataLoader

from reldn_d2.data.datasets import (
    load_openimages_vrd,
    load_relation_instances,
    load_visual_genome,
)
from reldn_d2.data.frequency import count_pairs

from detectron2.data import DatasetFromList

from . import _data_files as files
from .measure import describe, print_table

__all__ = ["add_arguments", "run"]

SECONDS, GIBIBYTES = 30.0, 2.0  # what a load may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--scale", type=float, default=1.0, help="share of the real sizes")
    parser.add_argument("--folder", type=Path, help="for the files; a temporary one by default")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4], help="of the loader")


def run(args: argparse.Namespace) -> None:
    """Generate, load and print."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        images, rows = round(54_000 * args.scale), round(375_000 * args.scale)
        vg_images, relations = round(108_000 * args.scale), round(1_100_000 * args.scale)
        openimages = files.write_openimages(folder / "openimages", images, rows)
        genome = files.write_visual_genome(folder / "vg", vg_images, relations)
        coco = files.write_coco(folder / "coco", vg_images, relations)
        size = f"{rows:,} rows, {images:,} images"
        vg_size = f"{relations:,} relations, {vg_images:,} images"
        cases = [
            ("nothing (imports alone)", _nothing, {}),
            (f"OpenImages, first time: {size}", _openimages, openimages),
            (f"OpenImages, sizes cached: {size}", _openimages, openimages),
            (f"Visual Genome, all splits at once: {vg_size}", _genome, genome),
            (f"Visual Genome, training split of {vg_size}", _genome_train, genome),
            (f"COCO file with relations: {vg_size}", _coco, coco),
        ]
        table = []
        for title, load, arguments in cases:
            result = _in_a_process(_measure, load, arguments)
            within = result["seconds"] < SECONDS and result["peak"] < GIBIBYTES * 2**30
            table.append(
                [
                    title,
                    f"{result['seconds']:.1f}",
                    f"{result['cpu_seconds']:.1f}",
                    f"{result['peak'] / 2**30:.2f}",
                    f"{result['serialised'] / 2**20:.0f}",
                    f"{result['count_seconds']:.1f}",
                    "yes" if within else "NO",
                ]
            )
        print_table(
            table,
            [
                "load",
                "s",
                "CPU s",
                "peak GiB",
                "serialised MiB",
                "counting CPU s",
                f"< {SECONDS:.0f} s and {GIBIBYTES:.0f} GiB",
            ],
            f"Loading, {describe('cpu', 2)}",
        )
        shared = [_in_a_process(_workers, genome, number) for number in args.workers]
        print_table(
            [
                [x["workers"], *(f"{x[key] / 2**20:.0f}" for key in ("main", "each"))]
                for x in shared
            ],
            ["workers", "main process MiB", "each worker MiB"],
            "Memory of its own (private pages) while a loader reads Visual Genome's training split",
        )


def _nothing() -> list[dict[str, Any]]:
    return []


def _openimages(**arguments: Any) -> list[dict[str, Any]]:
    return load_openimages_vrd(**arguments)


def _genome(**arguments: Any) -> list[dict[str, Any]]:
    splits = ("train", "val", "test")
    return [record for split in splits for record in load_visual_genome(**arguments, split=split)]


def _genome_train(**arguments: Any) -> list[dict[str, Any]]:
    return load_visual_genome(**arguments, split="train")


def _coco(**arguments: Any) -> list[dict[str, Any]]:
    return load_relation_instances(**arguments)


def _measure(load: Callable[..., list[dict[str, Any]]], arguments: dict[str, Any]) -> dict:
    """Seconds and peak memory of a load, then the size of its serialised list."""
    start, cpu_start = time.perf_counter(), time.process_time()
    dicts = load(**arguments)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = _peak_bytes()
    start = time.process_time()
    if dicts:
        count_pairs(dicts, 150, 50)
    count_seconds = time.process_time() - start
    serialised = DatasetFromList(dicts, copy=False)._lst.nbytes if dicts else 0
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak": peak,
        "count_seconds": count_seconds,
        "serialised": serialised,
    }


def _peak_bytes() -> int:
    """Largest resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would give that of the parent, if it was larger
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _private_bytes(pid: int) -> int:
    """Memory that a process shares with no other."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_"):
            total += int(line.split()[1]) * 1024
    return total


def _read(record: dict[str, Any]) -> dict[str, Any]:
    return {"pid": os.getpid(), "relations": len(record["relations"])}


def _workers(arguments: dict[str, Any], workers: int) -> dict[str, float]:
    """Read every record once through ``workers`` processes and see what memory is their own."""
    dicts = load_visual_genome(**arguments, split="train")
    dataset = DatasetFromList(dicts, copy=False)
    del dicts
    loader = DataLoader(
        _Mapped(dataset),
        batch_size=64,
        num_workers=workers,
        collate_fn=list,
        shuffle=True,
        # As in training on Linux; this process was spawned, and its default would be that.
        multiprocessing_context="fork" if workers else None,
    )
    iterator = iter(loader)
    pids, each = set(), 0.0
    for number, batch in enumerate(iterator):
        pids |= {item["pid"] for item in batch} - {os.getpid()}
        if number == len(loader) - 2 * workers - 2:  # near the end, while all of them live
            each = sum(map(_private_bytes, pids)) / max(len(pids), 1)
    return {"workers": workers, "main": _private_bytes(os.getpid()), "each": each}


class _Mapped(torch.utils.data.Dataset):
    """The records of another data set, in short."""

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _read(self.dataset[index])


def _child(connection: Any, function: Callable[..., dict], arguments: Any) -> None:
    logging.getLogger("reldn_d2").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    try:
        connection.send(function(*arguments))
    finally:
        connection.close()


def _in_a_process(function: Callable[..., dict], *arguments: Any) -> dict:
    """Call ``function`` in a fresh process of its own.

    Raises:
        RuntimeError: it failed; its error stands above.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_child, args=(sender, function, arguments)
    )
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed in its process.") from None
    finally:
        process.join()
