"""Share the detector's first stages with the predicate backbone: savings and cost.

Time and peak memory of a training step of ResNet-50-FPN, against a predicate backbone that shares
nothing ("same"). With --detector also recall and pairing accuracy on the built-in dataset after a
short training on a trained detector of configs/Toy/detector.yaml.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from reldn_d2.structures.relations import ground_truth_relations

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from .detectors import load_config, read_metrics, train
from .measure import peak_memory, print_table, time_calls

__all__ = ["add_arguments", "run"]

KINDS = {"same": ()}
for _stage in ("res2", "res3", "res4"):
    KINDS[f"shared until {_stage}"] = (
        *("MODEL.RELDN.PREDICATE_BACKBONE.KIND", "shared"),
        *("MODEL.RELDN.PREDICATE_BACKBONE.SHARE_UNTIL", _stage),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.set_defaults(threads=1)
    parser.add_argument(
        "--detector", help="checkpoint of configs/Toy/detector.yaml (default: no accuracy)"
    )
    parser.add_argument("--iterations", type=int, default=300, help="of the short trainings")
    parser.add_argument("--size", type=int, nargs=2, default=(320, 480), help="height and width")


def prepare_step(kind: str, size: tuple[int, int]) -> Callable[[], None]:
    """Return a training step of ResNet-50-FPN on two images with 16 entities each."""
    options = ("MODEL.WEIGHTS", "", "MODEL.RELDN.TRAIN_ENTITIES", "ground_truth", *KINDS[kind])
    cfg = load_config("VRD/reldn_R_50_FPN", *options)
    model, generator = build_model(cfg).train(), torch.Generator().manual_seed(0)
    height, width = size
    batch = []
    for _ in range(2):
        corner = torch.rand(16, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        instances = Instances(tuple(size))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + 0.3 * min(size)], dim=1))
        instances.gt_classes = torch.randint(0, 100, (16,), generator=generator)
        relations = ground_truth_relations([(i, i + 1, i) for i in range(8)], size)
        image = torch.rand(3, *size, generator=generator) * 255
        batch.append({"image": image, "instances": instances, "relations": relations})

    def step() -> None:
        model.zero_grad()
        with EventStorage():
            sum(model(batch).values()).backward()

    return step


def measure_accuracy(kind: str, args: argparse.Namespace) -> list[float]:
    """Train on the built-in dataset; return R@n and pairing accuracy of PRDCLS."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["MODEL.WEIGHTS", args.detector, "SOLVER.MAX_ITER", args.iterations, "SEED", 1]
        options += [*KINDS[kind], "OUTPUT_DIR", folder, "TEST.RELATIONS.TASK", "prdcls"]
        train(load_config("Toy/reldn", *options))
        metrics = read_metrics(Path(folder), "prdcls")
        return [metrics["R@n"], metrics["pairing_accuracy"]]


def run(args: argparse.Namespace) -> None:
    """Measure each kind and print the table."""
    times = time_calls({kind: prepare_step(kind, args.size) for kind in KINDS}, at_least=5.0)
    memory = {kind: peak_memory(prepare_step, kind, args.size) for kind in KINDS}
    rows = []
    for kind in KINDS:
        wall, cpu = times[kind]
        row = [kind, f"{wall:.2f}", f"{cpu:.2f}", f"{cpu / times['same'].cpu:.2f} x"]
        row += [f"{memory[kind]:.0f}", f"{memory[kind] / memory['same']:.2f} x"]
        if args.detector and kind != "shared until res4":  # the small network has no res5
            row += [f"{x:.1f}" for x in measure_accuracy(kind, args)]
        rows.append(row)
    headers = ["predicate backbone", "s per step", "CPU s per step", "CPU s / same"]
    headers += ["MiB per step", "MiB / same", "PRDCLS R@n", "PRDCLS pairing"]
    print_table(rows, headers)
