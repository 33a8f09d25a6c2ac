"""Load datasets of the real sizes: time and memory, and what a data loader's workers share.

The files are generated in the official formats: OpenImages' challenge with 375,000 rows for 54,000
images, Visual Genome and a COCO file with 108,000 images and 1.1 million relations. Each load runs
in a process of its own and is compared with parsing the same file without checking or converting
anything. The memory is the peak of the whole process, PyTorch included. If the CPU seconds are far
below the wall seconds, other processes used the CPUs or the disk was slow.
"""

import argparse
import csv
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reldn_d2  # noqa: F401  # isort: skip  registers the datasets
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from reldn_d2.data.datasets import (
    load_openimages_vrd,
    load_relation_instances,
    load_visual_genome,
    to_relation_instances,
)
from reldn_d2.data.datasets.openimages import OPENIMAGES_PREDICATES
from reldn_d2.data.datasets.visual_genome import VG_CLASSES, VG_PREDICATES

from detectron2.data import DatasetFromList

from .measure import in_fresh_process, print_table, resident_peak, time_once
from .synthetic import IMAGE_SIZE, draw_dataset

__all__ = ["add_arguments", "run"]

LINKS = 30_000  # file systems limit the names of one file to some ten thousand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the real sizes")
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary folder)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2, 4], help="worker counts of the data loader"
    )


def run(args: argparse.Namespace) -> None:
    """Generate the files, load them and print the tables."""
    num_images, num_rows = round(54_000 * args.scale), round(375_000 * args.scale)
    vg_images, num_relations = round(108_000 * args.scale), round(1_100_000 * args.scale)
    size = f"{num_rows:,} rows, {num_images:,} images"
    vg_size = f"{num_relations:,} relations, {vg_images:,} images"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        openimages = write_openimages(folder / "openimages", num_images, num_rows)
        dicts = draw_dataset(
            vg_images, num_relations, len(VG_CLASSES), len(VG_PREDICATES), boxes_per_image=(2, 23)
        )
        genome = write_visual_genome(folder / "vg", dicts)
        coco = write_coco(folder / "coco", dicts)
        cases = [
            (f"OpenImages, first time: {size}", load_openimages_vrd, openimages),
            (f"OpenImages, sizes cached: {size}", load_openimages_vrd, openimages),
            (f"Visual Genome, all splits: {vg_size}", _load_all_splits, genome),
            (f"Visual Genome, training split of {vg_size}", _load_train, genome),
            (f"COCO file with relations: {vg_size}", load_relation_instances, coco),
        ]
        rows = []
        for title, load, arguments in cases:
            wall, cpu, peak, serialized = in_fresh_process(_measure, load, arguments)
            plain = in_fresh_process(_measure_parsing, arguments)
            ratio = f"{cpu / plain:.1f} x"
            rows.append([title, wall, cpu, plain, ratio, peak / 2**30, serialized / 2**20])
        headers = ["load", "s", "CPU s", "parsing alone, CPU s", "load / parsing", "peak GiB"]
        print_table(rows, [*headers, "serialized MiB"])
        imports = in_fresh_process(_imports_peak) / 2**30
        print(f"\nOf the peak, {imports:.2f} GiB are needed by the imports.")
        rows = [
            [workers, *(f"{x / 2**20:.0f}" for x in in_fresh_process(_private, genome, workers))]
            for workers in args.workers
        ]
        title = "Private memory while a data loader reads Visual Genome's training split"
        print_table(rows, ["workers", "main process MiB", "MiB per worker"], title)


def _imports_peak() -> int:
    return resident_peak()  # after the imports of this module, unlike the function itself


def _measure(load: Callable[..., list], arguments: dict[str, Any]) -> tuple[float, ...]:
    """Return wall and CPU seconds of a load, its peak bytes, and bytes of serialized records."""
    dicts, (wall, cpu) = time_once(lambda: load(**arguments))
    peak = resident_peak()
    return wall, cpu, peak, DatasetFromList(dicts, copy=False)._lst.nbytes


def _measure_parsing(arguments: dict[str, Any]) -> float:
    """Return the CPU seconds of parsing the annotation files as they are."""
    return time_once(lambda: [_parse(x) for x in arguments.values() if os.path.isfile(str(x))])[
        1
    ].cpu


def _parse(path: str) -> Any:
    if path.endswith(".h5"):
        import h5py

        with h5py.File(path) as file:
            return [file[name][:].tolist() for name in file]
    with open(path, newline="", encoding="utf-8") as file:
        return json.load(file) if path.endswith(".json") else list(csv.reader(file))


def _load_all_splits(**files: Any) -> list[dict[str, Any]]:
    return [
        x for split in ("train", "val", "test") for x in load_visual_genome(**files, split=split)
    ]


def _load_train(**files: Any) -> list[dict[str, Any]]:
    return load_visual_genome(**files, split="train")


def _private(arguments: dict[str, Any], workers: int) -> tuple[float, float]:
    """Read each record once through a data loader; return the bytes that no process shares.

    Returns:
        Those of the main process, and the mean of the workers.
    """
    dataset = DatasetFromList(_load_train(**arguments), copy=False)
    loader = DataLoader(
        dataset,
        batch_size=64,
        num_workers=workers,
        collate_fn=lambda records: os.getpid(),
        shuffle=True,
        # As in training on Linux. This process was spawned, so its default would be "spawn".
        multiprocessing_context="fork" if workers else None,
    )
    pids, per_worker = set(), 0.0
    for index, pid in enumerate(loader):
        pids |= {pid} - {os.getpid()}
        if index == len(loader) - 2 * workers - 2:  # near the end, while all workers are alive
            per_worker = sum(map(_private_bytes, pids)) / max(len(pids), 1)
    return _private_bytes(os.getpid()), per_worker


def _private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def write_openimages(folder: Path, num_images: int, num_rows: int) -> dict[str, Any]:
    """Write the files of the challenge 2018: few boxes per image, an eighth of rows attributes.

    Returns:
        The keyword arguments of :func:`load_openimages_vrd`.
    """
    num_classes, num_attributes = 57, 5
    labels = [f"/m/{index:05x}" for index in range(num_classes)]
    attributes = [f"/m/{index:05x}" for index in range(900, 900 + num_attributes)]
    header = "ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2"
    rows: list[list] = [[*header.split(","), "RelationshipLabel"]]
    verified: list[tuple] = [("ImageID", "LabelName", "Confidence")]
    height, width = IMAGE_SIZE
    dicts = draw_dataset(num_images, num_rows, num_classes, len(OPENIMAGES_PREDICATES), (4, 5))
    for record in dicts:
        image_id = record["file_name"].removesuffix(".jpg")
        verified += [(image_id, labels[index], index % 2) for index in (3, 8, 21, 40)]
        names = [labels[x["category_id"]] for x in record["annotations"]]
        boxes = [
            [
                round(x0 / width, 6),
                round(x1 / width, 6),
                round(y0 / height, 6),
                round(y1 / height, 6),
            ]
            for x0, y0, x1, y1 in (x["bbox"] for x in record["annotations"])
        ]
        for subject, object_, predicate in record["relations"]:
            ends = [names[subject], names[object_]], OPENIMAGES_PREDICATES[predicate]
            if len(rows) % 8 == 0:  # an attribute of the subject
                object_ = subject
                ends = [names[subject], attributes[len(rows) % num_attributes]], "is"
            rows.append([image_id, *ends[0], *boxes[subject], *boxes[object_], ends[1]])
    names = {
        "classes": [(label, f"class {label}") for label in labels],
        "attributes": [(label, f"attribute {label}") for label in attributes],
    }
    tables = {"relations": rows, "labels": verified, **names}
    image_root = _write_images(folder / "images", dicts)
    files = {f"{name}_csv": str(folder / f"{name}.csv") for name in tables}
    for path, table in zip(files.values(), tables.values()):
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table)
    return {**files, "image_root": image_root}


def write_visual_genome(folder: Path, dicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Write ``VG-SGG.h5``, its names, ``image_data.json`` and the images.

    Returns:
        The keyword arguments of :func:`load_visual_genome`.
    """
    import h5py

    image_root = _write_images(folder / "VG_100K", dicts)
    annotations = [x for record in dicts for x in record["annotations"]]
    corners = np.array([x["bbox"] for x in annotations])
    size = corners[:, 2:] - corners[:, :2]
    box_counts = np.array([len(x["annotations"]) for x in dicts])
    relation_counts = np.array([len(x["relations"]) for x in dicts])
    relations = np.array([x for record in dicts for x in record["relations"]])
    first_box = np.cumsum(box_counts) - box_counts
    boxes = np.concatenate([corners[:, :2] + size / 2, size], axis=1)  # center and size
    arrays = {
        "split": np.where(np.random.default_rng(0).random(len(dicts)) < 0.7, 0, 2).astype(np.int32),
        "boxes_1024": boxes.astype(np.int32),
        "boxes_512": (boxes / 2).astype(np.int32),
        "labels": np.array([[x["category_id"] + 1] for x in annotations]),
        "predicates": relations[:, 2:] + 1,
        "relationships": relations[:, :2] + np.repeat(first_box, relation_counts)[:, None],
    }
    for kind, counts in (("box", box_counts), ("rel", relation_counts)):
        first = np.cumsum(counts) - counts
        arrays[f"img_to_first_{kind}"] = np.where(counts, first, -1)
        arrays[f"img_to_last_{kind}"] = np.where(counts, first + counts - 1, -1)
    with h5py.File(folder / "VG-SGG.h5", "w") as file:
        file.update(arrays)
    names = {"label_to_idx": VG_CLASSES, "predicate_to_idx": VG_PREDICATES}
    ids = {key: {name: i for i, name in enumerate(x, 1)} for key, x in names.items()}
    records = [
        {"image_id": x["image_id"], "width": x["width"], "height": x["height"], "url": "https://x"}
        for x in dicts
    ]
    return {
        "h5_file": str(folder / "VG-SGG.h5"),
        "dicts_file": _write_json(folder / "VG-SGG-dicts.json", ids),
        "image_data_file": _write_json(folder / "image_data.json", records),
        "image_root": image_root,
        "num_val_images": min(5000, len(dicts) // 20),
    }


def write_coco(folder: Path, dicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a COCO file with relations and the images.

    Returns:
        The keyword arguments of :func:`load_relation_instances`.
    """
    image_root = _write_images(folder / "images", dicts)
    content = to_relation_instances(dicts, VG_CLASSES, VG_PREDICATES, image_root="")
    return dict(json_file=_write_json(folder / "relations.json", content), image_root=image_root)


def _write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def _write_images(folder: Path, dicts: list[dict[str, Any]]) -> str:
    """Write each record's image; the names are hard links to a few JPEG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, record in enumerate(dicts):
        path = folder / record["file_name"]
        path.unlink(missing_ok=True)
        if index % LINKS == 0:
            source = path
            Image.new("RGB", IMAGE_SIZE[::-1], (90, 120, 150)).save(path)
        else:
            os.link(source, path)
    return str(folder)
