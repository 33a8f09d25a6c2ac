"""Train and evaluate RelDN on every kind of detector, on the built-in dataset.

For each config of configs/Toy/Detectors and for the Faster R-CNN of configs/Toy: the detector is
trained, then RelDN on top of it, and both are evaluated. Prints AP50 of the detector and recall of
the relations per task.
"""

import argparse
import json
import shutil
from pathlib import Path

import reldn_d2
from reldn_d2.engine.defaults import RelDNTrainer

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from .measure import print_table

__all__ = ["add_arguments", "load_config", "read_metrics", "run", "train"]

PROJECT = Path(__file__).resolve().parents[2]
KINDS = (
    *("faster_rcnn_FPN", "mask_rcnn_FPN", "cascade_rcnn_FPN", "retinanet_FPN"),
    *("faster_rcnn_VGG16", "faster_rcnn_C4", "precomputed"),
)
COLUMNS = [(task, name) for task in ("sgdet", "sgcls", "prdcls") for name in ("R@n", "R@50")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.set_defaults(threads=1)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="default: all")
    parser.add_argument("--detector-iterations", type=int, default=150, help="of each detector")
    parser.add_argument("--iterations", type=int, default=150, help="of RelDN")
    parser.add_argument("--train-images", type=int, default=1000, help="the first N images")
    parser.add_argument("--test-images", type=int, default=100, help="the first N images")
    parser.add_argument("--output", type=Path, default=PROJECT / "output/toy/detectors")
    parser.add_argument("--reuse", action="store_true", help="reuse the detectors in --output")
    parser.add_argument("--options", nargs="*", default=[], help="KEY VALUE of the RelDN trainings")


def load_config(name: str, *options) -> CfgNode:
    """Load ``configs/NAME.yaml`` with ``KEY VALUE`` options on the CPU."""
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    options = ("MODEL.DEVICE", "cpu", *options)
    reldn_d2.merge_config(cfg, str(PROJECT / "configs" / f"{name}.yaml"), list(options))
    return cfg


def train(cfg: CfgNode) -> None:
    """Train from ``MODEL.WEIGHTS`` in an emptied ``OUTPUT_DIR``, and evaluate at the end."""
    shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    trainer = RelDNTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


def read_metrics(folder: Path, task: str) -> dict[str, float]:
    """Read all metrics of ``results_TASK.json``."""
    results = json.loads((folder / f"results_{task}.json").read_text())
    return {name: value for block in results.values() for name, value in block.items()}


def load_kind(kind: str, *options) -> CfgNode:
    """Load the config of a kind of detector."""
    name = "reldn" if kind == "faster_rcnn_FPN" else f"Detectors/{kind}"
    common = ["SEED", 1, "TEST.DETECTIONS_PER_IMAGE", 15]  # images have at most 13 entities
    return load_config(f"Toy/{name}", *options, *common)


def register_part(split: str, num_images: int, masks: bool = False) -> str:
    """Register the first images of a built-in split, its boxes also as masks for Mask R-CNN."""
    source = f"toy_vrd_{split}"
    name = f"{source}_{num_images}" + ("_masks" if masks else "")
    if name in DatasetCatalog.list():
        return name

    def load() -> list[dict]:
        dicts = DatasetCatalog.get(source)[:num_images]
        for record in dicts if masks else ():
            for annotation in record["annotations"]:
                x0, y0, x1, y1 = annotation["bbox"]
                annotation["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        return dicts

    DatasetCatalog.register(name, load)
    metadata = MetadataCatalog.get(source).as_dict()
    MetadataCatalog.get(name).set(**{key: x for key, x in metadata.items() if key != "name"})
    return name


def dataset_options(args: argparse.Namespace, masks: bool = False) -> list:
    """Return the config options that choose the first images of both splits."""
    return [
        *("DATASETS.TRAIN", (register_part("train", args.train_images, masks),)),
        *("DATASETS.TEST", (register_part("test", args.test_images, masks),)),
    ]


def train_detector(kind: str, args: argparse.Namespace) -> tuple[Path, float]:
    """Train the detector; return its checkpoint and AP50."""
    folder = args.output / kind / "detector"
    architecture = "RetinaNet" if kind == "retinanet_FPN" else "GeneralizedRCNN"
    options = ["MODEL.META_ARCHITECTURE", architecture, "OUTPUT_DIR", str(folder)]
    options += ["MODEL.WEIGHTS", "", "SOLVER.MAX_ITER", args.detector_iterations]
    options += dataset_options(args, masks=kind == "mask_rcnn_FPN")
    if not (args.reuse and (folder / "results_bbox.json").is_file()):
        train(load_kind(kind, *options))
    results = json.loads((folder / "results_bbox.json").read_text())
    return folder / "model_final.pth", results["bbox"]["AP50"]


def write_detections(args: argparse.Namespace) -> tuple[Path, float, list]:
    """Write the detections of the Faster R-CNN, which is trained if it does not exist.

    Returns:
        The detector's checkpoint, its AP50, and the config options that choose its files.
    """
    weights = args.output / "faster_rcnn_FPN/detector/model_final.pth"
    if not weights.is_file():
        train_detector("faster_rcnn_FPN", args)
    options = []
    for split, count in (("TRAIN", args.train_images), ("TEST", args.test_images)):
        folder = args.output / "detections" / split.lower()
        cfg = load_kind("faster_rcnn_FPN", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
        part = register_part(split.lower(), count)
        files = ["MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(folder), "DATASETS.TEST", (part,)]
        cfg.merge_from_list(files)
        ap50 = RelDNTrainer.evaluate_checkpoint(cfg)["bbox"]["AP50"]
        (path,) = folder.rglob("coco_instances_results.json")
        options += [f"DATASETS.DETECTION_FILES_{split}", (str(path),)]
    return weights, ap50, options


def run(args: argparse.Namespace) -> None:
    """Train and evaluate each kind; print the table again after each."""
    rows = []
    for kind in args.kinds:
        options, folder = [*args.options, *dataset_options(args)], args.output / kind / "reldn"
        if kind == "precomputed":
            weights, ap50, files = write_detections(args)
            options += files
        else:
            weights, ap50 = train_detector(kind, args)
        options += ["SOLVER.MAX_ITER", args.iterations, "OUTPUT_DIR", str(folder)]
        train(load_kind(kind, *options, "MODEL.WEIGHTS", str(weights)))  # evaluates SGDET
        options += ["MODEL.WEIGHTS", str(folder / "model_final.pth"), "TEST.RELATIONS.TASK"]
        for task in ("sgcls", "prdcls"):
            RelDNTrainer.evaluate_checkpoint(load_kind(kind, *options, task))
        metrics = [read_metrics(folder, task)[name] for task, name in COLUMNS]
        rows.append([kind, ap50, *metrics])
        columns = [f"{task.upper()} {name}" for task, name in COLUMNS]
        print_table(rows, ["detector", "AP50", *columns])
