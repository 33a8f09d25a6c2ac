"""RelDN on every kind of detector, trained and evaluated on the built-in data set.

For each config of configs/Toy/Detectors and for the Faster R-CNN of configs/Toy: the detector is
trained, RelDN on top of it, and both are evaluated. Prints AP50 of the detector, recall of the
relations by task, and seconds an iteration.
"""

import json
import shutil
import time
from pathlib import Path

import torch

import reldn_d2
from reldn_d2.engine.defaults import RelDNTrainer

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from .measure import describe, print_table

PROJECT = Path(__file__).resolve().parents[2]
DETECTORS = ("mask_rcnn_FPN", "cascade_rcnn_FPN", "faster_rcnn_C4", "faster_rcnn_VGG16")
KINDS = ("faster_rcnn_FPN", *DETECTORS, "retinanet_FPN", "precomputed")
TASKS = ("sgdet", "sgcls", "prdcls")


def add_arguments(parser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--detector-iterations", type=int, default=250)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--train-images", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=100)
    parser.add_argument("--output", type=Path, default=PROJECT / "output/toy/detectors")
    parser.add_argument("--reuse", action="store_true", help="take detectors that are there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--options", nargs="*", default=[], help="KEY VALUE of the RelDN trainings")


def _config(kind: str, *options) -> CfgNode:
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    name = "reldn" if kind == "faster_rcnn_FPN" else f"Detectors/{kind}"
    common = ["SEED", "1", "TEST.DETECTIONS_PER_IMAGE", "15"]  # at most 13 entities an image
    reldn_d2.merge_config(cfg, str(PROJECT / f"configs/Toy/{name}.yaml"), [*options, *common])
    return cfg


def _data_set(split: str, number: int, masks: bool = False) -> str:
    """The first images of the built-in set; with boxes as masks, which Mask R-CNN asks for."""
    source = f"toy_vrd_{split}"
    name = f"{source}_{number}" + ("_masks" if masks else "")
    if name in DatasetCatalog.list():
        return name

    def load():
        dicts = DatasetCatalog.get(source)[:number]
        for record in dicts if masks else ():
            for annotation in record["annotations"]:
                x0, y0, x1, y1 = annotation["bbox"]
                annotation["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        return dicts

    DatasetCatalog.register(name, load)
    known = MetadataCatalog.get(source).as_dict()
    MetadataCatalog.get(name).set(**{key: x for key, x in known.items() if key != "name"})
    return name


def _train(cfg: CfgNode):
    """Train from MODEL.WEIGHTS; the trainer and the seconds of an iteration."""
    shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    trainer = RelDNTrainer(cfg)
    trainer.resume_or_load(resume=False)
    start = time.perf_counter()
    trainer.train()
    spent = (time.perf_counter() - start) / cfg.SOLVER.MAX_ITER
    history = trainer.storage.history("time")
    return trainer, history.median(cfg.SOLVER.MAX_ITER) if len(history.values()) else spent


def _detector(kind: str, args) -> tuple:
    """Train the detector; its checkpoint, AP50 and seconds an iteration."""
    folder = args.output / kind / "detector"
    architecture = "RetinaNet" if kind == "retinanet_FPN" else "GeneralizedRCNN"
    options = ["MODEL.META_ARCHITECTURE", architecture, "OUTPUT_DIR", str(folder)]
    options += ["MODEL.WEIGHTS", "", "SOLVER.MAX_ITER", str(args.detector_iterations)]
    for split, number in (("train", args.train_images), ("test", args.test_images)):
        name = _data_set(split, number, masks=kind == "mask_rcnn_FPN")
        options += [f"DATASETS.{split.upper()}", f"('{name}',)"]
    if args.reuse and (folder / "results_bbox.json").is_file():
        seconds = float("nan")
    else:
        _, seconds = _train(_config(kind, *options))
    results = json.loads((folder / "results_bbox.json").read_text())
    return folder / "model_final.pth", results["bbox"]["AP50"], seconds


def _detections(args) -> tuple:
    """Detections of the Faster R-CNN in files, its checkpoint and its AP50."""
    weights = args.output / "faster_rcnn_FPN/detector/model_final.pth"
    if not weights.is_file():
        _detector("faster_rcnn_FPN", args)
    files = {}
    for split, number in (("train", args.train_images), ("test", args.test_images)):
        folder = args.output / "detections" / split
        cfg = _config("faster_rcnn_FPN", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
        options = ["MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(folder)]
        cfg.merge_from_list([*options, "DATASETS.TEST", (_data_set(split, number),)])
        results = RelDNTrainer.evaluate_checkpoint(cfg)
        (files[split],) = folder.rglob("coco_instances_results.json")
    return weights, results["bbox"]["AP50"], files


def run(args) -> None:
    """Train and evaluate each kind; print the table as it grows."""
    torch.set_num_threads(args.threads)
    rows = []
    for kind in args.kinds:
        options, detector_seconds = [*args.options], float("nan")
        for split, number in (("train", args.train_images), ("test", args.test_images)):
            options += [f"DATASETS.{split.upper()}", f"('{_data_set(split, number)}',)"]
        if kind == "precomputed":
            weights, ap50, files = _detections(args)
            for split, path in files.items():
                options += [f"DATASETS.DETECTION_FILES_{split.upper()}", f"('{path}',)"]
        else:
            weights, ap50, detector_seconds = _detector(kind, args)
        options += ["MODEL.WEIGHTS", str(weights), "SOLVER.MAX_ITER", str(args.iterations)]
        folder = args.output / kind / "reldn"
        _, seconds = _train(_config(kind, *options, "OUTPUT_DIR", str(folder)))
        options += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
        for task in TASKS[1:]:
            task_options = [*options, "OUTPUT_DIR", str(folder), "TEST.RELATIONS.TASK", task]
            RelDNTrainer.evaluate_checkpoint(_config(kind, *task_options))
        row = [kind, ap50, detector_seconds, seconds]
        for task in TASKS:
            results = json.loads((folder / f"results_{task}.json").read_text())
            metrics = {name: x for block in results.values() for name, x in block.items()}
            row += [metrics["R@n"], metrics["R@50"]]
        rows.append(row)
        heads = ["detector", "AP50", "s/it", "s/it RelDN"]
        heads += [f"{task.upper()} {metric}" for task in TASKS for metric in ("R@n", "R@50")]
        print_table(rows, heads, describe("cpu", args.threads))
