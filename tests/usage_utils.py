"""A tiny checkpoint and a picture, for the tests of what users run."""

from pathlib import Path

import numpy as np
import torch
from model_utils import CLASSES, PREDICATES, small_config
from PIL import Image

import reldn_d2

from detectron2.modeling import build_model

OPTIONS = (
    *("TEST.RELATIONS.PREDICATES_PER_PAIR", [None], "INPUT.MIN_SIZE_TEST", 96),
    *("INPUT.MAX_SIZE_TEST", 128, "SEED", 1),
)


def write_checkpoint(folder: Path, *options) -> Path:
    """Write ``model_final.pth`` of a tiny RelDN that finds six entities in any image."""
    torch.manual_seed(0)
    cfg = small_config(*OPTIONS, *options)
    model = build_model(cfg)
    with torch.no_grad():  # classes and pairs that differ from each other
        model.relation_head.semantic.table.weight.normal_(0, 2)
        roi_heads = model.detector.model.roi_heads
        if hasattr(roi_heads, "box_predictor"):  # not with detections from files
            roi_heads.box_predictor.cls_score.weight.normal_(0, 0.5)
    reldn_d2.RelDNCheckpointer(
        model, str(folder), thing_classes=CLASSES, predicate_classes=PREDICATES, cfg=cfg
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
