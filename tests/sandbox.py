"""A checkout of a user in small: the repository's scripts and configs, and every built-in dataset.

Run from this folder, configs and documented commands work unchanged: datasets are in the layout and
format of their official files, and downloads are already in Detectron2's cache.
"""

import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from data_files import HEADER, write_csv, write_json
from model_utils import ROOT
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import reldn_d2
from reldn_d2.data.datasets.openimages import OPENIMAGES_PREDICATES
from reldn_d2.data.datasets.visual_genome import (
    VG_CLASSES,
    VG_PREDICATES,
    load_visual_genome,
)
from reldn_d2.data.datasets.vrd import VRD_CLASSES, VRD_PREDICATES
from reldn_d2.modeling.backbone.vgg import TORCHVISION_NAMES

from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

WIDTH, HEIGHT = 96, 64
# Three entities of an image: the first two overlap, and so do the last two.
BOXES = [[4, 6, 40, 60], [24, 20, 70, 58], [50, 30, 92, 62]]
# Subject, object, predicate; the first pair has two predicates.
RELATIONS = [(0, 1, 0), (0, 1, 3), (1, 2, 1), (2, 1, 2)]

# Any model of the repository as a network that trains in milliseconds. The checkpoints of the
# detector and of RelDN on top of it fit each other, because both get these options.
NARROW = (
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.NUM_GROUPS", 1),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 2, "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.VGG.WIDTH", 4),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 60, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 60, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 6),
    *("INPUT.MIN_SIZE_TRAIN", (HEIGHT,), "INPUT.MAX_SIZE_TRAIN", WIDTH),
    *("INPUT.MIN_SIZE_TEST", HEIGHT, "INPUT.MAX_SIZE_TEST", WIDTH),
    *("DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2),
    *("SOLVER.REFERENCE_WORLD_SIZE", 0, "SEED", 1),
)


YAMLS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
LEAVES = [yaml for yaml in YAMLS if not yaml.rsplit("/", 1)[1].startswith("Base-")]


def merged(yaml: str | Path, *options) -> CfgNode:
    """The config of a YAML file, whose path is relative to the repository or absolute."""
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    reldn_d2.merge_config(cfg, str(ROOT / yaml), [str(x) for x in options])
    return cfg


# The config that writes a checkpoint, by OUTPUT_DIR/model_final.pth
PRODUCERS = {f"{merged(yaml).OUTPUT_DIR}/model_final.pth": yaml for yaml in LEAVES}


class Runner:
    """Calls ``main`` of train_net.py in a checkout, with a narrow network and two iterations."""

    def __init__(self, folder: Path):
        self.folder = folder
        spec = importlib.util.spec_from_file_location("train_net_in_sandbox", ROOT / "train_net.py")
        self.train_net = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.train_net)

    def __call__(self, yaml: str, *options, flags: Sequence[str] = ()):
        """Return the results of the evaluation; ``flags`` are those of Detectron2's parser."""
        values = [str(value) for value in (*NARROW, *options)]
        args = ["--config-file", yaml, *flags, *values]
        return self.train_net.main(default_argument_parser().parse_args(args))

    def provide(self, yaml: str, *options) -> None:
        """Make what a config starts from, unless an earlier run has: WEIGHTS, detection files."""
        cfg = merged(self.folder / yaml, *NARROW, *options)
        weights = cfg.MODEL.WEIGHTS
        if "://" in weights:
            file = cached_download(self.folder / "cache", weights)
            if not file.exists():
                write_backbone(file, cfg)
        elif weights and not (self.folder / weights).exists():
            if weights in PRODUCERS:
                self.provide(PRODUCERS[weights])
                self(PRODUCERS[weights])
            else:  # the detectors of configs/Toy/Detectors, trained as docs/detectors.md says
                kind = "RetinaNet" if "retinanet" in yaml else "GeneralizedRCNN"
                folder = weights.removesuffix("/model_final.pth")
                as_detector = ("MODEL.META_ARCHITECTURE", kind, "MODEL.WEIGHTS", "")
                self(yaml, *as_detector, "OUTPUT_DIR", folder)
        if cfg.DATASETS.DETECTION_FILES_TEST:
            both = str((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
            detector = ("MODEL.WEIGHTS", weights, "DATASETS.TEST", both)
            self(PRODUCERS[weights], *detector, flags=["--eval-only"])


def write_checkout(folder: Path) -> Path:
    """Link the repository's files into ``folder`` and write all datasets into its ``datasets/``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("configs", "demo", "docs", "reldn_d2", "tools", "train_net.py", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    datasets = folder / "datasets"
    datasets.mkdir()
    for path in (ROOT / "datasets").glob("*.*"):
        (datasets / path.name).symlink_to(path)
    _write_vrd(datasets / "vrd")
    _write_visual_genome(datasets / "vg")
    _write_openimages(datasets / "openimages_vrd")
    _write_released(datasets)
    _write_coco(datasets / "coco")
    return folder


def enter_checkout(folder: Path, monkeypatch) -> None:
    """Make a checkout the current folder, as small as its datasets, for the rest of a test."""
    from reldn_d2.data.datasets.toy import dataset as toy

    monkeypatch.chdir(folder)
    monkeypatch.setenv("FVCORE_CACHE", str(folder / "cache"))
    for split, (seed, _) in toy._SPLITS.items():
        monkeypatch.setitem(toy._SPLITS, split, (seed, 6))
    # Neural Motifs' 5,000 validation images would leave none of the few for training.
    monkeypatch.setitem(load_visual_genome.__wrapped__.__kwdefaults__, "num_val_images", 1)
    # Slow and of no effect on a run: a search for compilers, a conversion of the config for every
    # key that default_setup reads, and plots of 50 to 100 predicates.
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "")
    monkeypatch.setattr("detectron2.engine.defaults._try_get_key", _get_key)
    monkeypatch.setattr("reldn_d2.evaluation.per_predicate.PredicateTable.draw", lambda *args: None)


def _get_key(cfg: CfgNode | DictConfig, key: str, *other_names: str, default=None):
    if isinstance(cfg, DictConfig):
        found = (OmegaConf.select(cfg, name) for name in (key, *other_names))
        return next((x for x in found if x is not None), default)
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def write_images(folder: Path, names) -> list[str]:
    """Write distinct smooth pictures; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        small = np.random.default_rng(i).integers(0, 255, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(small).resize((WIDTH, HEIGHT), Image.BICUBIC).save(folder / name)
    return list(names)


def _relation_json(names, shift: int) -> dict:
    """VRD's format, ``[ymin, ymax, xmin, xmax]``; ``shift`` 1 makes it 1-based and inclusive."""

    def entity(i):
        x0, y0, x1, y1 = BOXES[i]
        return {"category": i, "bbox": [y0 + shift, y1, x0 + shift, x1]}

    relations = [
        {"subject": entity(s), "object": entity(o), "predicate": p} for s, o, p in RELATIONS
    ]
    return dict.fromkeys(names, relations)


def _write_vrd(folder: Path) -> None:
    annotations = folder / "json_dataset"
    annotations.mkdir(parents=True)
    write_json(annotations / "objects.json", list(VRD_CLASSES))
    write_json(annotations / "predicates.json", list(VRD_PREDICATES))
    for split in ("train", "test"):
        names = [f"{split}_{i}.jpg" for i in range(4)]
        write_images(folder / f"sg_dataset/sg_{split}_images", names)
        write_json(annotations / f"annotations_{split}.json", _relation_json(names, shift=1))


def _write_visual_genome(folder: Path) -> None:
    """Eight images: four for training, one of which becomes "val", and four for test."""
    count = 8
    scale = 1024 / WIDTH
    corners = np.tile(np.array(BOXES, float), (count, 1)) * scale
    boxes = np.concatenate(
        [corners[:, :2] + corners[:, 2:], 2 * (corners[:, 2:] - corners[:, :2])], 1
    )
    relations = np.array(RELATIONS)
    first_box = np.arange(count) * len(BOXES)
    first_relation = np.arange(count) * len(RELATIONS)
    arrays = {
        "split": np.array([0, 0, 0, 0, 2, 2, 2, 2], np.int32),
        "img_to_first_box": first_box.astype(np.int32),
        "img_to_last_box": (first_box + len(BOXES) - 1).astype(np.int32),
        "img_to_first_rel": first_relation.astype(np.int32),
        "img_to_last_rel": (first_relation + len(RELATIONS) - 1).astype(np.int32),
        "boxes_1024": np.round(boxes / 2).astype(np.int32),
        "boxes_512": np.round(boxes / 4).astype(np.int32),
        "labels": np.tile([[1], [2], [3]], (count, 1)).astype(np.int64),
        "relationships": np.concatenate([relations[:, :2] + i for i in first_box]).astype(np.int32),
        "predicates": np.tile(relations[:, 2:] + 1, (count, 1)).astype(np.int64),
    }
    attributes = np.zeros((count * len(BOXES), 10), np.int64)
    attributes[:, 0] = 1
    folder.mkdir()
    for suffix, more in (("", {}), ("-with-attri", {"attributes": attributes})):
        with h5py.File(folder / f"VG-SGG{suffix}.h5", "w") as file:
            for name, array in {**arrays, **more}.items():
                file[name] = array
        dicts = {}
        for key, names in (
            ("label", VG_CLASSES),
            ("predicate", VG_PREDICATES),
            ("attribute", ["old"]),
        ):
            dicts[f"{key}_to_idx"] = {name: i for i, name in enumerate(names, 1)}
            dicts[f"idx_to_{key}"] = {str(i): name for i, name in enumerate(names, 1)}
        write_json(folder / f"VG-SGG-dicts{suffix}.json", dicts)
    records = [{"image_id": i, "width": WIDTH, "height": HEIGHT} for i in range(1, count + 1)]
    write_json(folder / "image_data.json", records)
    write_images(folder / "VG_100K", [f"{i}.jpg" for i in range(1, count + 1)])


def _write_openimages(folder: Path) -> None:
    """The challenge's files, with 57 classes and all 9 predicates, and those of V6."""
    (folder / "lists").mkdir(parents=True)
    labels = [f"/m/{i:03}" for i in range(57)]
    write_csv(
        folder / "challenge-2018-classes-vrd.csv", [[x, f"Class {i}"] for i, x in enumerate(labels)]
    )
    write_csv(folder / "challenge-2018-attributes-description.csv", [["/m/a", "Wooden"]])
    box = [[x0 / WIDTH, x1 / WIDTH, y0 / HEIGHT, y1 / HEIGHT] for x0, y0, x1, y1 in BOXES]

    def rows(images):
        found = [
            [image, labels[s], labels[o], *box[s], *box[o], OPENIMAGES_PREDICATES[p]]
            for image in images
            for s, o, p in RELATIONS
        ]
        return [*found, [images[0], labels[0], "/m/a", *box[0], *box[0], "is"]]

    images = [f"{i:016x}" for i in range(8)]
    write_images(folder / "train", [f"{image}.jpg" for image in images])
    write_csv(folder / "challenge-2018-train-vrd.csv", rows(images), HEADER)
    verified = [[image, label, "1"] for image in images for label in labels[:3]]
    columns = ["ImageID", "LabelName", "Confidence"]
    write_csv(folder / "challenge-2018-train-vrd-labels.csv", verified, columns)
    for prefix in ("", "mini_"):
        (folder / f"lists/{prefix}train.txt").write_text("\n".join(images[:4]))
        (folder / f"lists/{prefix}val.txt").write_text("\n".join(images[4:]))
    for split in ("train", "validation", "test"):
        write_images(folder / split, [f"{image}.jpg" for image in images])
        write_csv(folder / f"oidv6-{split}-annotations-vrd.csv", rows(images), HEADER)


def _write_released(datasets: Path) -> None:
    """The authors' JSON files of OpenImages and Visual Genome."""
    folder = datasets / "openimages_v4"
    (folder / "rel").mkdir(parents=True)
    categories = [{"id": i, "name": f"Class {i}"} for i in range(57)]
    write_json(folder / "rel/detections_train.json", {"categories": categories})
    write_json(folder / "rel/rel_9_predicates.json", list(OPENIMAGES_PREDICATES))
    write_json(datasets / "vg/objects.json", list(VG_CLASSES))
    write_json(datasets / "vg/predicates.json", list(VG_PREDICATES))
    for split in ("train", "val"):
        names = write_images(folder / "train", [f"{split}_{i}.jpg" for i in range(4)])
        content = _relation_json(names, shift=0)
        write_json(folder / f"rel/rel_only_annotations_{split}.json", content)
        names = [f"{i}.jpg" for i in ((1, 2) if split == "train" else (5, 6))]
        write_json(datasets / f"vg/rel_annotations_{split}.json", _relation_json(names, shift=0))


def _write_coco(folder: Path) -> None:
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    things = [{"id": x["id"], "name": x["name"]} for x in COCO_CATEGORIES if x["isthing"]]
    for split in ("train2017", "val2017"):
        names = write_images(folder / split, [f"{i:012}.jpg" for i in range(1, 5)])
        images = [
            {"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for i, name in enumerate(names, 1)
        ]
        boxes = [
            {
                "id": 10 * image["id"] + i,
                "image_id": image["id"],
                "category_id": things[i]["id"],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            for image in images
            for i, (x0, y0, x1, y1) in enumerate(BOXES)
        ]
        (folder / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": boxes, "categories": things}
        write_json(folder / f"annotations/instances_{split}.json", content)


def write_detections(file: Path, dicts: list) -> Path:
    """Write the annotated boxes of a dataset as detections, in COCO's format of results."""
    detections = [
        {
            "image_id": record["image_id"],
            "category_id": entity["category_id"],
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "score": 0.9,
        }
        for record in dicts
        for entity in record["annotations"]
        for x0, y0, x1, y1 in [entity["bbox"]]
    ]
    write_json(file, detections)
    return file


def cached_download(cache: Path, url: str) -> Path:
    """Where Detectron2 keeps the file of a URL, of its own kinds too; raises for unknown names."""
    if url.startswith("catalog://"):
        url = ModelCatalog.get(url.removeprefix("catalog://"))
    url = url.replace("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
    # iopath's rule: the path of the URL below the cache folder
    return cache / url.split("://", 1)[1].split("/", 1)[1]


def write_backbone(file: Path, cfg: CfgNode) -> None:
    """Write an ImageNet backbone for the model of ``cfg``, in the format of the published file."""
    torch.manual_seed(0)
    state = build_model(cfg).state_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    if "vgg16" in file.name:
        names = {ours: theirs for theirs, ours in TORCHVISION_NAMES.items()}
        weights = {}
        for name, tensor in state.items():
            layer, _, what = name.rpartition(".")
            if layer in names:
                weights[f"{names[layer]}.{what}"] = tensor
        torch.save(weights, file)
        return
    prefix = "backbone.bottom_up."
    weights = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            # Random residual branches double the activations in each of 33 blocks; trained ones
            # with BatchNorm do not.
            scale = 0.01 if name.endswith(("stem.conv1.weight", "conv3.weight")) else 1.0
            weights[name.removeprefix(prefix)] = scale * tensor.numpy()
    content = {"model": weights, "__author__": "test", "matching_heuristics": True}
    file.write_bytes(pickle.dumps(content))
