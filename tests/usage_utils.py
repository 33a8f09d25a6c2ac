"""A tiny checkpoint and a picture, for the tests of what users run."""

from pathlib import Path

import numpy as np
import torch
from model_utils import CLASSES, PREDICATES, small_config
from PIL import Image

import reldn_d2
from reldn_d2.data.datasets.vrd import VRD_CLASSES, VRD_PREDICATES

from detectron2.modeling import build_model

OPTIONS = (
    *("TEST.RELATIONS.PREDICATES_PER_PAIR", [None], "INPUT.MIN_SIZE_TEST", 96),
    *("INPUT.MAX_SIZE_TEST", 128, "SEED", 1),
)


def write_checkpoint(
    folder: Path, *options, thing_classes=CLASSES, predicate_classes=PREDICATES
) -> Path:
    """Write ``model_final.pth`` of a tiny RelDN that finds six entities in any image."""
    torch.manual_seed(0)
    cfg = small_config(*OPTIONS, *options)
    model = build_model(cfg)
    with torch.no_grad():  # classes and pairs that differ from each other
        table = model.relation_head.semantic.table.weight
        table[: len(CLASSES) ** 2].normal_(0, 2)  # few rows, so that files of 100 classes are small
        roi_heads = getattr(model.detector.model, "roi_heads", None)
        if hasattr(roi_heads, "box_predictor"):  # not with detections from files
            roi_heads.box_predictor.cls_score.weight.normal_(0, 0.5)
    counts = torch.arange(model.relation_head.num_predicates) + 1  # as counted in training
    model.relation_head.set_predicate_counts(counts)
    reldn_d2.RelDNCheckpointer(
        model,
        str(folder),
        thing_classes=thing_classes,
        predicate_classes=predicate_classes,
        cfg=cfg,
    ).save("model_final")
    return folder / "model_final.pth"


def picture(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    """Return smooth random colors, (height, width, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC))


def write_precomputed_checkpoint(folder: Path) -> Path:
    """Write a checkpoint of a model that was trained on detections from files."""
    return write_checkpoint(
        folder,
        *("MODEL.RELDN.DETECTOR", "PrecomputedDetector", "DATASETS.TEST", ()),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05),
    )


def write_boxes_checkpoint(folder: Path) -> Path:
    """Write a checkpoint with VRD's names of a model that reads boxes and classes only."""
    return write_checkpoint(
        folder,
        *("MODEL.RELDN.DETECTOR", "PrecomputedDetector", "DATASETS.TEST", ("vrd_test",)),
        *("MODEL.RELDN.PRECOMPUTED_BOX_HEAD", False, "MODEL.ROI_HEADS.NUM_CLASSES", 100),
        *("MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", 70),
        *("MODEL.ROI_RELATION_HEAD.VISUAL.SPO", False),
        *("MODEL.ROI_RELATION_HEAD.VISUAL.SUBJECT_SKIP", False),
        *("MODEL.ROI_RELATION_HEAD.VISUAL.OBJECT_SKIP", False),
        *("OUTPUT_DIR", str(folder), "DATASETS.DETECTION_FILES_TEST", (f"{folder}/x.json",)),
        thing_classes=VRD_CLASSES,
        predicate_classes=VRD_PREDICATES,
    )


def write_coco_detector(folder: Path) -> tuple[Path, Path]:
    """Write YAML and weights of a narrow Faster R-CNN with COCO's 80 classes and random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.WEIGHTS", "")
    options += ("MODEL.ROI_HEADS.NUM_CLASSES", 80, "TEST.DETECTIONS_PER_IMAGE", 20)
    cfg = small_config(*options, "DATASETS.TEST", ("coco_2017_val",))
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.bias)  # many classes, low scores
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "config.yaml", folder / "model_final.pth"
