"""Config keys that reldn_d2 adds to Detectron2's."""

import difflib
import re
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN
from detectron2.utils.file_io import PathManager

__all__ = ["add_reldn_config", "merge_config"]


def add_reldn_config(cfg: CfgNode) -> None:
    """Add the keys of RelDN to a Detectron2 config, with the paper's values as defaults.

    Symbols behind a key are those of the paper. The detector itself is configured by
    Detectron2's own keys (``MODEL.BACKBONE``, ``MODEL.RPN``, ``MODEL.ROI_HEADS``, ...).

    Args:
        cfg: the result of :func:`detectron2.config.get_cfg`; changed in place.
    """
    _add_model(cfg)
    _add_relation_head(cfg)
    _add_solver_and_test(cfg)


def _add_model(cfg: CfgNode) -> None:
    cfg.MODEL.RELDN = CN()
    # Entry of ENTITY_DETECTOR_REGISTRY: who gives features, boxes and classes of entities. "auto"
    # finds the one for MODEL.ROI_HEADS.NAME (Faster, Mask, Cascade R-CNN, C4); others are named:
    # "RetinaNetDetector", "PrecomputedDetector".
    cfg.MODEL.RELDN.DETECTOR = "auto"
    # PrecomputedDetector: the checkpoint has a box head, which the relation box heads start from.
    cfg.MODEL.RELDN.PRECOMPUTED_BOX_HEAD = True
    # Entities that pairs are made of in training: "proposals" (the detector's proposals that match
    # a ground-truth box, and the ground-truth boxes) or "ground_truth" (these boxes alone: faster).
    cfg.MODEL.RELDN.TRAIN_ENTITIES = "proposals"
    cfg.MODEL.RELDN.ENTITY_IOU_THRESHOLD = 0.5  # a proposal matches a ground-truth box from here on
    cfg.MODEL.RELDN.ENTITIES_PER_IMAGE = 128  # at most so many entities of an image in training

    # conv_body_rel. "same": a second backbone of the detector's structure. "shared": the detector's
    # own frozen stages up to SHARE_UNTIL, then a copy of the later ones: less time and memory.
    # "other": MODEL.BACKBONE, MODEL.RESNETS, ... with OPTIONS (key, value, key, value, ...) on top.
    cfg.MODEL.RELDN.PREDICATE_BACKBONE = predicate = CN()
    predicate.KIND = "same"
    predicate.SHARE_UNTIL = "res3"
    predicate.OPTIONS = []
    predicate.WEIGHTS = ""  # of "other": a backbone's or a detector's checkpoint; empty: random

    cfg.MODEL.RELDN.LOAD = CN()  # how MODEL.WEIGHTS is read
    # Load the layers whose shapes match and leave the others as initialised, with a warning, where
    # the numbers of classes or predicates differ. Otherwise that is an error.
    cfg.MODEL.RELDN.LOAD.MATCHING_ONLY = False
    # Let files that hold Python objects be unpickled, which can run code: only for files you trust.
    # Tensors and arrays need no such permission.
    cfg.MODEL.RELDN.LOAD.ALLOW_PICKLE = False

    cfg.MODEL.VGG = CN()  # of build_vgg16_backbone
    cfg.MODEL.VGG.WIDTH = 64  # channels of the first block; 64 is VGG16
    cfg.MODEL.VGG.OUT_FEATURES = ["conv5"]  # stride 16

    # Files of detections in the place of a detector's, one for each data set: COCO results (.json)
    # or Detectron2's instances_predictions.pth, matched by image id (PrecomputedDetector).
    cfg.DATASETS.DETECTION_FILES_TRAIN = ()
    cfg.DATASETS.DETECTION_FILES_TEST = ()


def _add_relation_head(cfg: CfgNode) -> None:
    cfg.MODEL.ROI_RELATION_HEAD = head = CN()
    head.NAME = "RelDNHead"  # entry of ROI_RELATION_HEAD_REGISTRY
    head.NUM_PREDICATES = 9  # P, without "no relationship"
    head.IN_FEATURES = []  # feature maps to pool from; empty: MODEL.ROI_HEADS.IN_FEATURES
    head.POOLER_RESOLUTION = 0  # 0: that of the detector's box head
    head.POOLER_SAMPLING_RATIO = 2
    head.POOLER_TYPE = "ROIAlignV2"
    head.NO_FC7_RELU = True  # leave out the last ReLU of the three box heads, as released
    head.OVERLAP_FILTER = True  # only pairs whose boxes overlap, in training and at test

    head.SEMANTIC = CN()
    head.SEMANTIC.ENABLED = True  # f_sem
    head.SEMANTIC.FREEZE = False  # keep the counted log-frequencies as they are

    head.SPATIAL = CN()
    head.SPATIAL.ENABLED = True  # f_spt
    head.SPATIAL.HIDDEN_DIM = 64

    head.VISUAL = CN()  # f_vis, the sum of:
    head.VISUAL.SPO = True  # the MLP on <subject, predicate, object> vectors
    head.VISUAL.SUBJECT_SKIP = True  # the linear layer on the subject vector
    head.VISUAL.OBJECT_SKIP = True  # the linear layer on the object vector

    head.SAMPLING = CN()  # numbers of pairs an image (section 5)
    head.SAMPLING.PAIRS = 512  # of L0, at most
    head.SAMPLING.POSITIVE_PAIRS = 128  # of these, at most; released code: 2048 pairs, 512 positive
    head.SAMPLING.ANCHOR_POSITIVE_PAIRS = 128  # of L1-L3, for subjects and for objects, at most
    head.SAMPLING.ANCHOR_NEGATIVE_PAIRS = 128

    head.LOSS = CN()
    head.LOSS.LAMBDA_1 = 1.0  # lambda_1: class agnostic loss L1; 0 switches a loss off
    head.LOSS.LAMBDA_2 = 0.5  # lambda_2: entity class aware loss L2
    head.LOSS.LAMBDA_3 = 0.1  # lambda_3: predicate class aware loss L3
    head.LOSS.ALPHA_1 = 0.2  # alpha_1, alpha_2, alpha_3: the margins
    head.LOSS.ALPHA_2 = 0.2
    head.LOSS.ALPHA_3 = 0.2
    # "paper": means over anchors with a positive pair. "released_code": mean over all margins and
    # one zero.
    head.LOSS.NORMALIZATION = "paper"


def _add_solver_and_test(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "SGD"  # or "AdamW"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # lr factor of predicate backbone and relation box heads
    # The best checkpoint is kept as model_best.pth: by this metric of the evaluation, such as
    # "relations_sgdet/R@n"; empty: none. It needs TEST.EVAL_PERIOD.
    cfg.SOLVER.BEST_CHECKPOINT = CN()
    cfg.SOLVER.BEST_CHECKPOINT.METRIC = ""
    cfg.SOLVER.BEST_CHECKPOINT.MODE = "max"  # or "min"

    cfg.TEST.RELATIONS = CN()
    # sgdet: everything predicted; sgcls: boxes given; prdcls: boxes and classes given.
    cfg.TEST.RELATIONS.TASK = "sgdet"
    cfg.TEST.RELATIONS.TOPK = 100  # triplets kept of an image
    # How relations are scored (docs/evaluation.md): lu2016, motifs, openimages, released or
    # relations; empty: the protocol of the data set's tables in the paper.
    cfg.TEST.RELATIONS.PROTOCOL = ""
    cfg.TEST.RELATIONS.RECALL_AT = []  # the n of R@n, each at most TOPK; empty: the protocol's
    # k: the predicates of a pair that may be kept; 0: all. With several values the output holds the
    # exact top TOPK of each. Empty: those that the protocols of DATASETS.TEST ask for.
    cfg.TEST.RELATIONS.PREDICATES_PER_PAIR = []
    cfg.TEST.RELATIONS.PAIR_CHUNK = 2048  # pairs scored at once: bounds the memory


def _all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys.extend(_all_keys(value, prefix + key + "."))
    return keys


def merge_config(
    cfg: CfgNode, config_file: str | None = None, opts: Sequence[str] | None = None
) -> None:
    """Merge a YAML file and ``KEY VALUE`` options into ``cfg``, with errors that help.

    Args:
        cfg: config with the keys of :func:`add_reldn_config`; changed in place.
        config_file: a YAML file, or none.
        opts: ``[key, value, key, value, ...]``.

    Raises:
        FileNotFoundError: there is no such file, or none that it is based on.
        KeyError: an unknown key; the message names the source and the nearest known keys.
        ValueError: ``opts`` has a key without a value.
    """
    opts = list(opts or [])
    if len(opts) % 2:
        raise ValueError(f"Options come as KEY VALUE pairs, but '{opts[-1]}' has no value: {opts}")
    if config_file and not PathManager.isfile(config_file):
        raise FileNotFoundError(
            f"No config file '{config_file}'. Paths are relative to the current folder; the "
            "project's configs are under configs/."
        )
    try:
        source = config_file
        if config_file:
            cfg.merge_from_file(config_file)
        source = "the command line"
        cfg.merge_from_list(_floats_written_as_integers(cfg, opts))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No file '{error.filename}', which _BASE_ in {config_file} or in one of its bases "
            "names. Such paths are relative to the file that names them."
        ) from error
    except (KeyError, AssertionError) as error:
        match = re.search(r"[Nn]on-existent (?:config )?key: ([\w.]+)", str(error))
        if match is None:
            raise
        raise KeyError(_unknown_key_message(cfg, match.group(1), source)) from error


def _floats_written_as_integers(cfg: CfgNode, opts: list[str]) -> list[str]:
    """``KEY 0`` for a key whose value is a float means ``KEY 0.0``; yacs would refuse it."""
    result = list(opts)
    for i in range(0, len(opts), 2):
        node = cfg
        for part in str(opts[i]).split("."):
            node = node.get(part) if isinstance(node, CfgNode) else None
        if isinstance(node, float) and re.fullmatch(r"[+-]?\d+", str(opts[i + 1])):
            result[i + 1] = f"{opts[i + 1]}.0"
    return result


def _unknown_key_message(cfg: CfgNode, key: str, source: str | None) -> str:
    known = _all_keys(cfg)
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    leaf = key.rsplit(".", 1)[-1]
    near += [k for k in known if k.rsplit(".", 1)[-1] == leaf and k not in near][:3]
    hint = f"Did you mean {', '.join(near)}?" if near else "See reldn_d2/config.py for the keys."
    return f"Unknown config key {key} in {source}. {hint}"
