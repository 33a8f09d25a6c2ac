#!/usr/bin/env python
r"""Convert a checkpoint of the authors' released code to a checkpoint of this project.

Example::

    python tools/convert_released_weights.py model_step80929.pth output/released/oi.pth \
        --config-file configs/OpenImages/reldn_X_101_64x4d_FPN.yaml

The config describes the checkpoint: backbone, classes, predicates, modules. Next to the new
checkpoint a YAML file is written, with that config and the released code's image preprocessing,
anchors and RoIAlign, to be used with it. The released checkpoint must have every weight of the
model; its unused weights are listed.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file, perhaps without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reldn_d2  # noqa: E402  # isort: skip  must be imported before Detectron2
import torch
from torch import Tensor

from reldn_d2.checkpoint import read_checkpoint, write_checkpoint
from reldn_d2.checkpoint.checkpoint_writer import check_checkpoint_name
from reldn_d2.modeling.backbone.vgg import TORCHVISION_NAMES
from reldn_d2.modeling.relation_head.predictors import SpatialModule
from reldn_d2.utils.config_keys import key_owners
from reldn_d2.utils.file_io import write_atomically
from reldn_d2.utils.programs import program_help, program_name
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

_FROZEN_BN_EPSILON = 1e-5

# Buffers that the released code has no counterpart of.
_OURS_ONLY = ("running_mean", "running_var", "counted", "feature_version", "predicate_counts")

# Our module: their module. Box heads and backbones occur several times.
_HEADS = {
    "detector.model.roi_heads.box_head": "Box_Head",
    "relation_head.subject_box_head": "S_Head",
    "relation_head.object_box_head": "O_Head",
    "relation_head.predicate_box_head": "Prd_RCNN.Box_Head",
}
_BODIES = {"detector.model.backbone": "Conv_Body", "predicate_backbone": "Prd_RCNN.Conv_Body"}
_FULLY_CONNECTED = {"fc1": "fc1", "fc2": "fc2", "fc6": "fc1", "fc7": "fc2"}
_FPN = {
    "fpn_lateral5": "conv_top",
    **{f"fpn_lateral{4 - i}": f"topdown_lateral_modules.{i}.conv_lateral" for i in range(3)},
    **{f"fpn_output{5 - i}": f"posthoc_modules.{i}" for i in range(4)},
}
_RPN = {"conv": "conv", "objectness_logits": "cls_score", "anchor_deltas": "bbox_pred"}
_LAYERS = {
    "relation_head.visual.first": "RelDN.prd_cls_feats.0",
    "relation_head.visual.rest.1": "RelDN.prd_cls_feats.2",
    "relation_head.visual.rest.3": "RelDN.prd_cls_scores",
    "relation_head.visual.subject_skip": "RelDN.prd_sbj_scores",
    "relation_head.visual.object_skip": "RelDN.prd_obj_scores",
    "relation_head.spatial.0": "RelDN.spt_cls_feats.0",
    "relation_head.spatial.2": "RelDN.spt_cls_feats.2",
    "relation_head.spatial.4": "RelDN.spt_cls_scores",
    "relation_head.semantic.table": "RelDN.freq_bias.rel_baseline",
    "detector.model.roi_heads.box_predictor.cls_score": "Box_Outs.cls_score",
    "detector.model.roi_heads.box_predictor.bbox_pred": "Box_Outs.bbox_pred",
}
_BACKGROUND_FIRST = (
    "relation_head.visual.rest.3",
    "relation_head.visual.subject_skip",
    "relation_head.visual.object_skip",
    "relation_head.spatial.4",
    "detector.model.roi_heads.box_predictor.cls_score",
)


def released_options(cfg: CfgNode) -> list:
    """Return the options that make a model compute what the released code computes.

    They concern images, anchors and RoIAlign: what the weights were trained with and no weight
    holds.

    Args:
        cfg: of the model; only its backbone is read.
    """
    is_fpn = _is_fpn(cfg)
    options: list = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [102.9801, 115.9465, 122.7717]]
    options += ["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]
    # Their anchors are centered in the cells of the feature map, not in the corners.
    options += ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5]
    for head in ("ROI_BOX_HEAD", "ROI_RELATION_HEAD"):
        options += [f"MODEL.{head}.POOLER_TYPE", "ROIAlign"]  # without the half-pixel shift
        options += [f"MODEL.{head}.POOLER_SAMPLING_RATIO", 2 if is_fpn else 0]
    return options


def _is_fpn(cfg: CfgNode) -> bool:
    return "FPN" in cfg.MODEL.BACKBONE.NAME.upper()


def background_last(x: Tensor, dim: int = 0) -> Tensor:
    """Move the first row ("background", "no relationship") to the end."""
    return x.roll(-1, dims=dim)


@dataclass
class Rule:
    """Their name of one weight, and how to convert its values to ours."""

    name: str
    to_ours: Callable[[Tensor], Tensor] = lambda x: x


def _table_to_ours(x: Tensor, num_classes: int) -> Tensor:
    """Convert a table of (K * K, P + 1), or ((K + 1) ** 2, P + 1) with a background class.

    Returns:
        (K * K, P + 1), with "no relationship" as the last column.
    """
    if len(x) == (num_classes + 1) ** 2:
        grid = x.view(num_classes + 1, num_classes + 1, -1)
        x = grid[1:, 1:].reshape(num_classes**2, -1)
    return background_last(x, 1)


def _anchor_rows(cfg: CfgNode, values: int) -> Tensor:
    """Return the row in their weights of each of our rows.

    They order anchors by ratio, then size; Detectron2 by size, then ratio.

    Args:
        cfg: of the model.
        values: rows per anchor.
    """
    sizes = len(cfg.MODEL.ANCHOR_GENERATOR.SIZES[0])
    ratios = len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0])
    order = torch.arange(sizes * ratios * values).view(ratios, sizes, values)
    return order.transpose(0, 1).reshape(-1)


def _rpn_rule(cfg: CfgNode, layer: str, name: str) -> Rule:
    if layer == "conv":
        return Rule(name)
    order = _anchor_rows(cfg, 4 if layer == "anchor_deltas" else 1)

    def to_ours(x: Tensor) -> Tensor:
        if layer == "objectness_logits" and len(x) == 2 * len(order):  # a softmax of two logits
            x = x[len(order) :] - x[: len(order)]
        return x[order]

    return Rule(name, to_ours)


def _body_name(layer: str) -> str | None:
    """Return their name, below ``Conv_Body``, of a backbone layer; None if they have no such."""
    if layer in _FPN:
        return _FPN[layer]
    vgg = {ours: theirs for theirs, ours in TORCHVISION_NAMES.items()}.get(f"backbone.{layer}")
    if vgg is not None:
        return vgg
    match = re.fullmatch(r"(?:bottom_up\.)?(stem|res\d\.\d+)\.(conv\d|shortcut)(\.norm)?", layer)
    if match is None:
        return None
    block, convolution, norm = match.groups()
    block = "res1" if block == "stem" else block
    if convolution == "shortcut":
        return f"conv_body.{block}.downsample.{1 if norm else 0}"
    return f"conv_body.{block}.{convolution.replace('conv', 'bn') if norm else convolution}"


def rule_of(name: str, cfg: CfgNode) -> Rule | None:
    """Return the rule of a RelDN weight; None if released checkpoints do not contain it.

    Args:
        name: in the model's state dict.
        cfg: of the model.

    Raises:
        ValueError: if the released code has no such module.
    """
    layer, _, kind = name.rpartition(".")
    if kind in _OURS_ONLY:
        return None
    if layer in _LAYERS:
        theirs, num_classes = f"{_LAYERS[layer]}.{kind}", cfg.MODEL.ROI_HEADS.NUM_CLASSES
        if layer in _BACKGROUND_FIRST:
            return Rule(theirs, background_last)
        if layer.endswith("bbox_pred") and not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            return Rule(theirs, lambda x: x[4:])  # Detectron2 has no box of the background
        if layer.endswith("table"):
            return Rule(theirs, lambda x: _table_to_ours(x, num_classes))
        return Rule(theirs)
    parent, _, leaf = layer.rpartition(".")
    if parent in _HEADS and leaf in _FULLY_CONNECTED:
        return Rule(f"{_HEADS[parent]}.{_FULLY_CONNECTED[leaf]}.{kind}")
    if parent == "detector.model.proposal_generator.rpn_head" and leaf in _RPN:
        prefix = "RPN.FPN_RPN_" if _is_fpn(cfg) else "RPN.RPN_"
        return _rpn_rule(cfg, leaf, f"{prefix}{_RPN[leaf]}.{kind}")
    for ours, theirs in _BODIES.items():
        if layer.startswith(f"{ours}."):
            body_name = _body_name(layer[len(ours) + 1 :])
            if body_name is not None:
                return Rule(f"{theirs}.{body_name}.{kind}")
    raise ValueError(
        f"The released code has no counterpart of {name}. Is the config that of the checkpoint?"
    )


def _usual_names(state: dict[str, Tensor], vgg: bool) -> dict[str, Tensor]:
    """Rename weights that have several names among the released files to one of these."""
    result = {}
    for name, value in state.items():
        name = re.sub(r"^module\.", "", name)
        name = re.sub(r"^freq_bias\.", "RelDN.freq_bias.", name)
        if vgg:  # torchvision's containers, whatever they are called
            name = re.sub(
                r"(Conv_Body)\.(?:\w+\.)*(\d+\.(?:weight|bias))$", r"\1.features.\2", name
            )
            name = re.sub(r"(_Head)\.\w+\.0\.(weight|bias)$", r"\1.fc1.\2", name)
            name = re.sub(r"(_Head)\.\w+\.3\.(weight|bias)$", r"\1.fc2.\2", name)
            name = re.sub(r"(_Head)\.fc6\.", r"\1.fc1.", name)
            name = re.sub(r"(_Head)\.fc7\.", r"\1.fc2.", name)
        result[name] = value
    return result


def _constant(name: str, like: Tensor) -> Tensor:
    """Make one of the buffers in ``_OURS_ONLY``.

    The released BatchNorms are affine maps, which are frozen BatchNorms of mean 0 and variance 1
    (less epsilon). The frequency table is counted, and the spatial features are the released ones.
    """
    if name.endswith("counted"):
        return torch.ones_like(like, device="cpu")
    if name.endswith("feature_version"):
        return torch.tensor(SpatialModule.FEATURE_VERSION)
    if name.endswith("predicate_counts"):  # unknown: the released files do not have them
        return torch.zeros_like(like, device="cpu")
    value = 1.0 - _FROZEN_BN_EPSILON if name.endswith("running_var") else 0.0
    return torch.full(like.shape, value)


def to_ours(state: dict[str, Tensor], cfg: CfgNode, report: Callable = print) -> dict[str, Tensor]:
    """Convert the weights of a released checkpoint to the state dict of a RelDN.

    Args:
        state: the ``"model"`` of the checkpoint.
        cfg: of the RelDN.
        report: called with a line about their unused weights, if there are any.

    Raises:
        ValueError: if a weight is missing or has another shape; the message has both shapes.
    """
    state = _usual_names(state, vgg=cfg.MODEL.BACKBONE.NAME == "build_vgg16_backbone")
    result, used = {}, set()
    for name, like in _structure(cfg).items():
        rule = rule_of(name, cfg)
        if rule is None:
            result[name] = _constant(name, like)
            continue
        if rule.name not in state:
            raise ValueError(
                f"The checkpoint has no {rule.name}, the counterpart of {name}. It has "
                f"{', '.join(sorted(state)[:5])}, ... Is the config that of the checkpoint?"
            )
        value = rule.to_ours(state[rule.name].float())
        if value.shape != like.shape:
            raise ValueError(
                f"{rule.name} has shape {tuple(state[rule.name].shape)}, which gives "
                f"{tuple(value.shape)} for {name}; the model has {tuple(like.shape)}. Check the "
                "numbers of classes and predicates and the backbone in the config."
            )
        result[name] = value.clone()
        used.add(rule.name)
    unused = sorted(set(state) - used)
    if unused:
        report(f"Ignored {len(unused)} unexpected weights: {', '.join(unused[:10])}")
    return result


def _structure(cfg: CfgNode) -> dict[str, Tensor]:
    """Return the names and shapes of the model's weights as tensors without memory."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).state_dict()


def convert(source: str, target: Path, cfg: CfgNode, allow_pickle: bool = False) -> None:
    """Read a released checkpoint; write ours and, next to it, its config as a YAML file."""
    check_checkpoint_name(target)
    content = read_checkpoint(source, allow_pickle)
    state = to_ours(content.get("model", content), cfg)
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
    description = {
        key: list((metadata and metadata.get(key)) or ())
        for key in ("thing_classes", "predicate_classes")
    }
    config = {"config": cfg.dump(), "config_keys": key_owners(cfg)}
    write_checkpoint({"model": state, "reldn": {**description, **config}}, target)
    with write_atomically(target.with_suffix(".yaml")) as file:
        file.write(cfg.dump())


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and convert; return the exit status."""
    parser = argparse.ArgumentParser(
        description=program_help(__doc__, __file__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="released checkpoint")
    parser.add_argument("target", type=Path, help="file to write, .pth or .safetensors")
    parser.add_argument("--config-file", required=True, help="config of its experiment")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="unpickle the file; this can run code"
    )
    add_module_argument(parser)
    parser.add_argument("--options", nargs="*", default=[], help="KEY VALUE overrides")
    args = parse_and_import(parser, arguments)
    try:
        cfg = reldn_d2.load_config(args.config_file)
        cfg.merge_from_list(released_options(cfg))
        reldn_d2.merge_config(cfg, None, [*args.options, "MODEL.WEIGHTS", str(args.target)])
        convert(args.source, args.target, cfg, args.allow_pickle)
    except (ImportError, OSError, ValueError) as error:
        print(f"{program_name(__file__)}: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {args.target}. Evaluate it with --config-file {args.target.with_suffix('.yaml')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
