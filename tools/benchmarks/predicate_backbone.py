"""What sharing the detector's first stages with the predicate backbone saves, and what it costs.

Seconds and peak memory of a training step of ResNet-50-FPN, and recall of relations on the built-in
data set after a short training on a trained detector of configs/Toy/detector.yaml.
"""

import json
import tempfile
from pathlib import Path

import torch

import reldn_d2
from reldn_d2.engine.defaults import RelDNTrainer
from reldn_d2.structures.relations import ground_truth_relations

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from .measure import describe, peak_memory, print_table, seconds

PROJECT = Path(__file__).resolve().parents[2]
KINDS = {
    "same": (),
    **{
        f"shared until {stage}": (
            *("MODEL.RELDN.PREDICATE_BACKBONE.KIND", "shared"),
            *("MODEL.RELDN.PREDICATE_BACKBONE.SHARE_UNTIL", stage),
        )
        for stage in ("res2", "res3", "res4")
    },
}


def add_arguments(parser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--detector", help="a trained configs/Toy/detector.yaml; none: no recall")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--size", type=int, nargs=2, default=(320, 480), help="height and width")
    parser.add_argument("--threads", type=int, default=1)


def _config(yaml: str, *options) -> CfgNode:
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    reldn_d2.merge_config(cfg, str(PROJECT / "configs" / yaml), list(options))
    return cfg


def _step(kind: str, size):
    """A training step of ResNet-50-FPN on two images of 16 entities."""
    options = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *KINDS[kind])
    cfg = _config("VRD/reldn_R_50_FPN.yaml", *options, "MODEL.RELDN.TRAIN_ENTITIES", "ground_truth")
    model, generator = build_model(cfg).train(), torch.Generator().manual_seed(0)
    batch = []
    for _ in range(2):
        corner = torch.rand(16, 2, generator=generator) * torch.tensor([size[1], size[0]]) * 0.6
        instances = Instances(tuple(size))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + 0.3 * min(size)], dim=1))
        instances.gt_classes = torch.randint(0, 100, (16,), generator=generator)
        relations = ground_truth_relations([(i, i + 1, i) for i in range(8)], size)
        image = torch.rand(3, *size, generator=generator) * 255
        batch.append({"image": image, "instances": instances, "relations": relations})

    def step():
        model.zero_grad()
        with EventStorage():
            sum(model(batch).values()).backward()

    return step


def _recall(kind: str, args) -> list:
    """R@n and pairing accuracy of PRDCLS on the built-in data set."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["MODEL.WEIGHTS", args.detector, "SOLVER.MAX_ITER", args.iterations, "SEED", 1]
        options += [*KINDS[kind], "OUTPUT_DIR", folder, "TEST.RELATIONS.TASK", "prdcls"]
        trainer = RelDNTrainer(_config("Toy/reldn.yaml", *options))
        trainer.resume_or_load(resume=False)
        trainer.train()
        results = json.loads((Path(folder) / "results_prdcls.json").read_text())
        metrics = {name: value for block in results.values() for name, value in block.items()}
        return [metrics["R@n"], metrics["pairing_accuracy"]]


def run(args) -> None:
    """Measure each kind; print the table."""
    torch.set_num_threads(args.threads)
    rows = []
    for kind in KINDS:
        memory = peak_memory(_step, kind, args.size, threads=args.threads) / 2**20
        row = [kind, seconds(_step(kind, args.size), args.threads, 5.0), round(memory)]
        if args.detector and kind != "shared until res4":  # the small network has no res5
            row += _recall(kind, args)
        rows.append(row)
    heads = ["predicate backbone", "s a step", "MiB a step"]
    heads += ["PRDCLS R@n", "PRDCLS pairing"]
    print_table(rows, heads, describe("cpu", args.threads))
