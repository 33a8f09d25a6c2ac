"""Config keys that reldn_d2 adds to Detectron2's, and merging files and options into a config."""

import difflib
import functools
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager

from .utils.base_configs import meta_architectures
from .utils.config_keys import (
    ConfigKeyError,
    add_registered_keys,
    all_keys,
    register_config_keys,
    unknown_keys_message,
)
from .utils.config_values import Options, list_options, wrong_value_message
from .utils.included_configs import find_config_file
from .utils.lazy_configs import is_lazy_config

__all__ = [
    "ConfigKeyError",
    "UnknownKeyError",
    "add_reldn_config",
    "load_config",
    "merge_config",
    "merge_saved_config",
    "reads_pixels",
    "register_config_keys",
]

logger = logging.getLogger(__name__)


class UnknownKeyError(ValueError):
    """A config key that does not exist; the message names its source and similar keys."""


def add_reldn_config(cfg: CfgNode) -> None:
    """Add the keys of RelDN to a Detectron2 config, with the paper's values as defaults.

    The keys of your own modules (:func:`register_config_keys`) are added as well.

    Symbols behind a key are those of the paper. The detector itself is configured by
    Detectron2's own keys (``MODEL.BACKBONE``, ``MODEL.RPN``, ``MODEL.ROI_HEADS``, ...).

    Args:
        cfg: the result of :func:`detectron2.config.get_cfg`; changed in place.

    Raises:
        ConfigKeyError: a registered function sets a key that exists already, or fails.
    """
    _add_model(cfg)
    _add_relation_head(cfg)
    _add_attribute_head(cfg)
    _add_data_solver_and_test(cfg)
    add_registered_keys(cfg)


def _add_model(cfg: CfgNode) -> None:
    cfg.MODEL.RELDN = CN()
    # Entry of ENTITY_DETECTOR_REGISTRY, which provides features, boxes and classes of entities.
    # "auto" chooses by the detector's meta-architecture and MODEL.ROI_HEADS.NAME (Faster, Mask,
    # Cascade R-CNN, C4, RetinaNet). "PrecomputedDetector" must be named; with it and the visual
    # module off, no image is read.
    cfg.MODEL.RELDN.DETECTOR = "auto"
    # MODEL.META_ARCHITECTURE of the detector. Empty: that of the YAML file that the config is based
    # on (merge_config sets it), or else recognized by the feature maps that its heads read.
    cfg.MODEL.RELDN.DETECTOR_META_ARCHITECTURE = ""
    # A LazyConfig (.py file, or its name in Detectron2's model zoo) whose `model` is the detector;
    # it replaces Detectron2's keys. MODEL.WEIGHTS is its checkpoint. Loading it runs its code.
    cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG = ""
    # Changes of that file, such as ["model.roi_heads.num_classes=9"].
    cfg.MODEL.RELDN.DETECTOR_LAZY_OVERRIDES = []
    # PrecomputedDetector: the checkpoint has a box head, which the relation box heads start from.
    cfg.MODEL.RELDN.PRECOMPUTED_BOX_HEAD = True
    # Entities that training pairs are made of: "proposals" (the detector's proposals that match a
    # ground-truth box, plus the ground-truth boxes) or "ground_truth" (only these: faster).
    cfg.MODEL.RELDN.TRAIN_ENTITIES = "proposals"
    # Minimum IoU between a proposal and its ground-truth box.
    cfg.MODEL.RELDN.ENTITY_IOU_THRESHOLD = 0.5
    cfg.MODEL.RELDN.ENTITIES_PER_IMAGE = 128  # max entities per image in training

    # How the model is computed (docs/speed.md). The frozen detector's precision: empty is that of
    # the trained part (SOLVER.AMP), or "float32", "bf16". Also applies at test time.
    cfg.MODEL.RELDN.DETECTOR_PRECISION = ""
    # Compute frozen stages with equal weights in both backbones once. Same values.
    cfg.MODEL.RELDN.SHARE_FROZEN_STAGES = True
    # In training, fold FrozenBatchNorm into its convolution. Same up to rounding.
    cfg.MODEL.RELDN.FOLD_NORMALIZATION = True
    # In training on the CPU, compute the predicate FPN's finest map only where it is pooled. Same
    # up to rounding.
    cfg.MODEL.RELDN.MAPS_ON_DEMAND = True
    # In training on the CPU, keep freed memory for the next step. Same values.
    cfg.MODEL.RELDN.KEEP_FREED_MEMORY = True

    cfg.MODEL.RELDN.PREDICATE_BACKBONE = predicate = CN()  # conv_body_rel
    # "same": a second backbone of the detector's structure. "shared": the detector's own frozen
    # stages up to SHARE_UNTIL, then a copy of the later ones, which takes less time and memory.
    # "other": MODEL.BACKBONE, MODEL.RESNETS, ..., overridden by OPTIONS (key, value, key, ...).
    predicate.KIND = "same"
    predicate.SHARE_UNTIL = "res3"
    predicate.OPTIONS = []
    # Checkpoint of a backbone or detector for KIND "other"; empty means random init.
    predicate.WEIGHTS = ""

    cfg.MODEL.RELDN.LOAD = CN()  # how MODEL.WEIGHTS is read
    # If the config has other classes or predicates than the checkpoint: load the layers that fit
    # and warn that the others keep their initial weights. False raises an error. RelDN's detector
    # is not trained, so it must be loaded completely in either case.
    cfg.MODEL.RELDN.LOAD.MATCHING_ONLY = False
    # Unpickle files that hold Python objects. That can run code: only for files that you trust.
    # Tensors and arrays need no such permission.
    cfg.MODEL.RELDN.LOAD.ALLOW_PICKLE = False

    cfg.MODEL.VGG = CN()  # build_vgg16_backbone
    cfg.MODEL.VGG.WIDTH = 64  # channels of the first block; 64 is VGG16
    cfg.MODEL.VGG.OUT_FEATURES = ["conv5"]  # stride 16


def _add_relation_head(cfg: CfgNode) -> None:
    cfg.MODEL.ROI_RELATION_HEAD = head = CN()
    head.NAME = "RelDNHead"  # entry of ROI_RELATION_HEAD_REGISTRY
    head.PREDICTOR = "RelDNPredictor"  # entry of RELATION_PREDICTOR_REGISTRY, used by RelDNHead
    head.NUM_PREDICATES = 9  # P, without "no relationship"
    head.IN_FEATURES = []  # feature maps to pool from; empty: MODEL.ROI_HEADS.IN_FEATURES
    head.POOLER_RESOLUTION = 0  # 0: that of the detector's box head
    head.POOLER_SAMPLING_RATIO = 2
    head.POOLER_TYPE = "ROIAlignV2"
    head.NO_FC7_RELU = True  # leave out the last ReLU of the three box heads, as released
    # Dropout after fc6 in the three box heads, in training; read by VGG16BoxHead.
    head.FC6_DROPOUT = 0.5
    # Leave out pairs of detected boxes, in training pairs of proposals, that do not overlap. Pairs
    # of given boxes (SGCLS, PRDCLS) and pairs with a ground-truth box in training are all used. The
    # configs of the released experiments switch it on; in SGDET, related pairs whose boxes do not
    # overlap are then never predicted.
    head.OVERLAP_FILTER = False

    head.SEMANTIC = CN()
    head.SEMANTIC.ENABLED = True  # f_sem
    head.SEMANTIC.FREEZE = False  # do not train the counted log-frequencies
    # Datasets that the frequencies are counted on; empty: DATASETS.TRAIN.
    head.SEMANTIC.COUNT_DATASETS = ()

    head.SPATIAL = CN()
    head.SPATIAL.ENABLED = True  # f_spt
    head.SPATIAL.HIDDEN_DIM = 64

    # One network on both classes and both boxes of a pair; not in the paper. It can replace the
    # semantic and the spatial module, or add its logits to theirs.
    head.JOINT = CN()
    head.JOINT.ENABLED = False
    head.JOINT.EMBEDDING_DIM = 48  # values per class, as a subject and as an object
    head.JOINT.HIDDEN_DIM = 256  # units of each of the two hidden layers
    head.JOINT.DROPOUT = 0.3  # of the hidden units, in training
    head.JOINT.EMBEDDING_STD = 0.1  # standard deviation of the embeddings at the start
    # At test time, the embedding of a class with n training relations as a subject (object) keeps
    # the share n / (n + this), and the mean embedding has the other: rare classes then rely on what
    # all classes have in common.
    head.JOINT.EMBEDDING_SHRINKAGE = 0.0

    head.VISUAL = CN()  # f_vis, the sum of:
    head.VISUAL.SPO = True  # the MLP on <subject, predicate, object> vectors
    head.VISUAL.SUBJECT_SKIP = True  # the linear layer on the subject vector
    head.VISUAL.OBJECT_SKIP = True  # the linear layer on the object vector

    # A vector per entity that knows of the image's other entities; not in the paper. The visual
    # module adds it to the vectors of subjects and objects, the joint module reads it as it is.
    head.CONTEXT = CN()
    # Entry of ENTITY_CONTEXT_REGISTRY ("TransformerContext", "LSTMContext"); "none" is RelDN.
    head.CONTEXT.NAME = "none"
    head.CONTEXT.LAYERS = 2
    head.CONTEXT.HEADS = 4  # TransformerContext: attention heads, a divisor of HIDDEN_DIM
    head.CONTEXT.HIDDEN_DIM = 256  # values per contextual vector
    head.CONTEXT.DROPOUT = 0.1  # in training

    head.SAMPLING = CN()  # max pairs per image (section 5)
    head.SAMPLING.NAME = "RelDNPairSampler"  # entry of PAIR_SAMPLER_REGISTRY
    head.SAMPLING.PAIRS = 512  # for L0; released code: 2048
    head.SAMPLING.POSITIVE_PAIRS = 128  # positive ones among them; released code: 512
    head.SAMPLING.ANCHOR_POSITIVE_PAIRS = 128  # for L1-L3, each for subjects and for objects
    head.SAMPLING.ANCHOR_NEGATIVE_PAIRS = 128

    head.LOSS = CN()
    # Entries of RELATION_LOSS_REGISTRY; their losses are added up.
    head.LOSS.NAMES = ["PredicateLoss", "ContrastiveLosses"]
    # "images": L0 is the mean over images of the mean over an image's pairs. "pairs": the mean over
    # the pairs of all images of the batch, so that images with more pairs count more.
    head.LOSS.L0_MEAN = "images"
    # beta of class-balanced weights of L0 (Cui et al. 2019): the larger, the more rare predicates
    # count; 0.0 is off, 0.9 to 0.999 are common.
    head.LOSS.CLASS_BALANCED_BETA = 0.0
    head.LOSS.LAMBDA_1 = 1.0  # lambda_1: class agnostic loss L1; 0 switches a loss off
    head.LOSS.LAMBDA_2 = 0.5  # lambda_2: entity class aware loss L2
    head.LOSS.LAMBDA_3 = 0.1  # lambda_3: predicate class aware loss L3
    head.LOSS.ALPHA_1 = 0.2  # alpha_1, alpha_2, alpha_3: the margins
    head.LOSS.ALPHA_2 = 0.2
    head.LOSS.ALPHA_3 = 0.2
    # "paper": means over anchors that have a positive pair. "released_code": mean over all margins
    # and one zero.
    head.LOSS.NORMALIZATION = "paper"


def _add_attribute_head(cfg: CfgNode) -> None:
    # Attributes of entities, such as "wooden", from the entity vectors of the relation head's
    # visual module; not in the paper.
    cfg.MODEL.ROI_ATTRIBUTE_HEAD = head = CN()
    head.ENABLED = False
    head.NUM_ATTRIBUTES = 5  # A, that of the OpenImages challenge
    head.HIDDEN_DIM = 256  # units of the hidden layer; 0: one linear layer
    head.LOSS_WEIGHT = 1.0  # factor of the binary cross-entropy over known entities


def _add_data_solver_and_test(cfg: CfgNode) -> None:
    # Files of detections that replace a detector (PrecomputedDetector), one per dataset: COCO
    # results (.json) or Detectron2's instances_predictions.pth, matched by image id or, if no id
    # matches, by file name.
    cfg.DATASETS.DETECTION_FILES_TRAIN = ()
    cfg.DATASETS.DETECTION_FILES_TEST = ()

    # DATALOADER.SAMPLER_TRAIN can also be "RepeatFactorByPredicateSampler": images with predicates
    # that fewer than a share of REPEAT_THRESHOLD of the images have are repeated. In these images
    # relations of frequent predicates are dropped with up to this probability (gamma_d of bi-level
    # sampling, Li et al. 2021).
    cfg.DATALOADER.RELATION_DROP_RATE = 0.0

    cfg.SOLVER.OPTIMIZER = "SGD"  # or "AdamW"
    # lr factor of the predicate backbone and the predicate box head; the subject and the object box
    # head learn at the full rate.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # The best checkpoint is kept as model_best.pth. METRIC is a result of the evaluation, such as
    # "relations_sgdet/R@n"; empty keeps none. It needs TEST.EVAL_PERIOD.
    cfg.SOLVER.BEST_CHECKPOINT = CN()
    cfg.SOLVER.BEST_CHECKPOINT.METRIC = ""
    cfg.SOLVER.BEST_CHECKPOINT.MODE = "max"  # or "min"

    cfg.TEST.RELATIONS = CN()
    # sgdet: everything predicted; sgcls: boxes given; prdcls: boxes and classes given; preddet: the
    # annotated pairs given too.
    cfg.TEST.RELATIONS.TASK = "sgdet"
    cfg.TEST.RELATIONS.TOPK = 100  # triplets kept per image
    # How relations are scored (docs/evaluation.md): lu2016, motifs, openimages,
    # openimages_text, released, relations, or one in PROTOCOL_REGISTRY of your own; empty: the
    # protocol of the dataset's tables in the paper.
    cfg.TEST.RELATIONS.PROTOCOL = ""
    cfg.TEST.RELATIONS.RECALL_AT = []  # the n of R@n, each at most TOPK; empty: the protocol's
    # Head, body and tail of the predicates: [10000, 500] puts those with at least 10,000 relations
    # in the training set into the head and those with fewer than 500 into the tail; empty: thirds.
    cfg.TEST.RELATIONS.GROUP_THRESHOLDS = []
    # k: max predicates kept per pair; None means no limit. With several values the output holds
    # the exact top TOPK of each. Empty: the values that any protocol needs are kept, and those of
    # the protocol are evaluated.
    cfg.TEST.RELATIONS.PREDICATES_PER_PAIR = []
    # tau of logit adjustment: raise rare predicates by their frequency in training; 0.0 is off, 1.0
    # scores all predicates as if they were equally frequent.
    cfg.TEST.RELATIONS.LOGIT_ADJUSTMENT = 0.0
    cfg.TEST.RELATIONS.PAIR_CHUNK = 2048  # pairs scored at once: bounds the memory
    # With given boxes (sgcls, prdcls) of an image with more pairs, that is more than 200 boxes, the
    # visual module is applied to this many pairs: those that the other modules score best.
    cfg.TEST.RELATIONS.MAX_VISUAL_PAIRS = 40_000
    # A triplet's score is p_det(s)^x * p(pred | s, o) * p_det(o)^x. The paper's x is 1; a larger
    # one ranks pairs of certain detections higher. No effect if all scores are 1 (prdcls, preddet).
    cfg.TEST.RELATIONS.ENTITY_SCORE_EXPONENT = 1.0


def reads_pixels(cfg: CfgNode) -> bool:
    """Tell whether an enabled module of the relation head reads pixels: the visual one does.

    Without it, a model whose boxes are not detected but come from files or ground truth
    (``PrecomputedDetector``) needs no images at all.
    """
    visual = cfg.MODEL.ROI_RELATION_HEAD.VISUAL
    return visual.SPO or visual.SUBJECT_SKIP or visual.OBJECT_SKIP


def load_config(config_file: str | None = None, opts: Options | None = None) -> CfgNode:
    """Build a config with RelDN's keys from a file and options; see :func:`merge_config`."""
    cfg = get_cfg()
    add_reldn_config(cfg)
    merge_config(cfg, config_file, opts)
    return cfg


def merge_config(cfg: CfgNode, config_file: str | None = None, opts: Options | None = None) -> None:
    """Merge a YAML file and ``KEY VALUE`` options into ``cfg``, with helpful errors.

    Args:
        cfg: config with the keys of :func:`add_reldn_config`; changed in place.
        config_file: a YAML file, an included one such as ``configs/VRD/reldn_boxes.yaml``, or none.
        opts: ``[key, value, key, value, ...]`` or ``{key: value, ...}``.

    Raises:
        FileNotFoundError: if the file or one that it is based on does not exist.
        UnknownKeyError: if a key does not exist.
        ValueError: if ``opts`` has a key without a value, or a value is not valid.
    """
    opts = list_options(opts)
    late = [x for x in opts[::2] if str(x).startswith("--")]
    if late:
        raise ValueError(f"{late[0]} comes after a KEY VALUE pair; write it before all of them.")
    assignment = next((x for x in opts[::2] if "=" in str(x)), None)
    if assignment:
        raise ValueError(
            f"Options are KEY VALUE pairs, but '{assignment}' has no value; write "
            f"{' '.join(str(assignment).split('=', 1))}, without ="
        )
    config_file = find_config_file(config_file) if config_file else config_file
    if len(opts) % 2:
        raise ValueError(f"Options are KEY VALUE pairs, but '{opts[-1]}' has no value: {opts}")
    if config_file and not PathManager.isfile(config_file):
        raise FileNotFoundError(
            f"No config file '{config_file}', neither below the current folder nor among the "
            "project's configs, such as configs/VRD/reldn_boxes.yaml."
        )
    if config_file and is_lazy_config(config_file):
        raise ValueError(
            f"{config_file} is a LazyConfig, not a YAML file. If it describes a detector, name it "
            "in MODEL.RELDN.DETECTOR_LAZY_CONFIG of a RelDN YAML (docs/detectors.md); if its "
            "model is RelDN, train with tools/lazyconfig_train_net.py (reldn-lazy-train)."
        )
    source = config_file or "the command line"
    try:
        if config_file:
            cfg.merge_from_file(config_file)
            _remember_detector(cfg, config_file)
        source = "the command line"
        cfg.merge_from_list(_write_floats_as_floats(cfg, opts))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No file '{error.filename}', which {config_file} or one of its bases names as _BASE_. "
            "Such paths are relative to the file that names them."
        ) from error
    except (KeyError, AssertionError) as error:
        match = re.search(r"[Nn]on-existent (?:config )?key: ([\w.]+)", str(error))
        if match is None:
            raise
        raise UnknownKeyError(_unknown_key_message(cfg, match.group(1), source)) from error
    except ValueError as error:
        raise ValueError(wrong_value_message(cfg, error, source)) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{config_file} or one of its bases is not valid YAML: {reason}"
        ) from error
    relations = cfg.TEST.RELATIONS
    limits = _read_predicates_per_pair(relations.PREDICATES_PER_PAIR)
    if limits != relations.PREDICATES_PER_PAIR:
        relations.PREDICATES_PER_PAIR = limits


def _remember_detector(cfg: CfgNode, config_file: str) -> None:
    """Keep the detector's ``META_ARCHITECTURE``, which a config of RelDN overrides in its base."""
    if cfg.MODEL.RELDN.DETECTOR_META_ARCHITECTURE:
        return
    others = (x for x in meta_architectures(config_file) if not _is_reldn(x))
    cfg.MODEL.RELDN.DETECTOR_META_ARCHITECTURE = next(others, "")


def _is_reldn(name: str) -> bool:
    """Tell whether a meta-architecture is RelDN, or a subclass that has been registered."""
    if name == "RelDN" or name not in META_ARCH_REGISTRY:
        return name == "RelDN"
    parents = getattr(META_ARCH_REGISTRY.get(name), "__mro__", ())
    return any(x.__name__ == "RelDN" for x in parents)


def merge_saved_config(
    cfg: CfgNode, saved: str, source: str, owners: Mapping[str, str] | None = None
) -> None:
    """Merge the config of a checkpoint into ``cfg``.

    Args:
        cfg: config with the keys of :func:`add_reldn_config`; changed in place.
        saved: YAML, as :class:`.DetectorCheckpointer` writes it.
        source: the checkpoint's file, for error messages.
        owners: who had registered its own keys, see :func:`.config_keys.key_owners`.

    Raises:
        UnknownKeyError: it has keys that no imported module registers.
        ValueError: a value is of another type than the key's.
    """
    theirs = CfgNode.load_cfg(saved)
    message = unknown_keys_message(cfg, theirs, owners or {}, source)
    if message is not None:
        raise UnknownKeyError(message)
    try:
        cfg.merge_from_other_cfg(theirs)
    except ValueError as error:
        message = wrong_value_message(cfg, error, "its config")
        raise ValueError(
            f"{source}: {message}. The key's default had another type when that was written."
        ) from error


def _read_predicates_per_pair(values: Iterable[Any]) -> list[int | None]:
    """Read values of ``TEST.RELATIONS.PREDICATES_PER_PAIR``, also those of version 0.1.

    Args:
        values: positive integers, or None (in YAML also the word) for no limit; 0 meant no limit
            before and is still read so, with a warning.

    Raises:
        ValueError: if a value is not one of these.
    """
    limits: list[int | None] = []
    for value in values:
        if value in (None, "None", "null"):
            limits.append(None)
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            limits.append(value or None)
        else:
            raise ValueError(
                f"TEST.RELATIONS.PREDICATES_PER_PAIR has the value {value!r}; expected positive "
                "integers, or None for no limit."
            )
        if value == 0:
            _warn_about_zero()
    return limits


@functools.cache
def _warn_about_zero() -> None:  # cached: once per process
    logger.warning(
        "TEST.RELATIONS.PREDICATES_PER_PAIR has the value 0, which is read as None (no limit). "
        "Write None instead."
    )


def _write_floats_as_floats(cfg: CfgNode, opts: list[str]) -> list[str]:
    """Replace ``KEY 0`` by ``KEY 0.0`` if the key's value is a float; yacs would refuse it."""
    result = list(opts)
    for i in range(0, len(opts), 2):
        node = cfg
        for part in str(opts[i]).split("."):
            node = node.get(part) if isinstance(node, CfgNode) else None
        if isinstance(node, float) and re.fullmatch(r"[+-]?\d+", str(opts[i + 1])):
            result[i + 1] = f"{opts[i + 1]}.0"
    return result


def _unknown_key_message(cfg: CfgNode, key: str, source: str) -> str:
    keys = all_keys(cfg)
    similar = difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    leaf = key.rsplit(".", 1)[-1]
    similar += [k for k in keys if k.rsplit(".", 1)[-1] == leaf and k not in similar][:3]
    hint = (
        f"Did you mean {', '.join(similar)}?" if similar else "See reldn_d2/config.py for the keys."
    )
    return (
        f"Unknown config key {key} in {source}. {hint} Pass --module to import the module that "
        "registers keys of your own."
    )
