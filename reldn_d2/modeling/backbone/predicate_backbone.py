"""The predicate backbone (``conv_body_rel``): a copy of the detector's, only its later stages, or
another backbone.

Shapes: N images; a feature map is (N, c, h, w).
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import Backbone

from ...utils.lazy_configs import detector_node, instantiate_part

__all__ = [
    "LaterStages",
    "build_predicate_backbone",
    "freeze_unused",
    "record_stages",
    "share_first_stages",
]

logger = logging.getLogger(__name__)

KINDS = ("same", "shared", "other")


class LaterStages(Backbone):
    """The stages of a ResNet or VGG16 that follow those shared with the detector.

    Weights keep their names, so that the detector's weights can be loaded.
    """

    def __init__(self, body: nn.Module, shared_stages: Sequence[str]):
        """
        Args:
            body: has ``stage_names`` and a module of each name.
            shared_stages: the first of these names; this module takes over the others.
        """
        super().__init__()
        self.shared_stages = tuple(shared_stages)
        self.stage_names = tuple(x for x in body.stage_names if x not in self.shared_stages)
        for name in self.stage_names:
            self.add_module(name, getattr(body, name))
        self._out_features = list(body.output_shape())
        self._out_feature_channels = {k: v.channels for k, v in body.output_shape().items()}
        self._out_feature_strides = {k: v.stride for k, v in body.output_shape().items()}
        self._size_divisibility = body.size_divisibility

    @property
    def size_divisibility(self) -> int:
        """Return the value of the whole backbone."""
        return self._size_divisibility

    def forward(self, stages: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the remaining stages.

        Args:
            stages: the detector's maps by the names in ``shared_stages``.

        Returns:
            The maps that the whole backbone would return.
        """
        maps = {name: x for name, x in stages.items() if name in self._out_features}
        x = stages[self.shared_stages[-1]]
        for name in self.stage_names:
            x = getattr(self, name)(x)
            if name in self._out_features:
                maps[name] = x
        return maps


def share_first_stages(backbone: nn.Module, until: str) -> nn.Module:
    """Remove the first stages of a backbone; its input is then a dict of the detector's maps.

    Args:
        backbone: of the detector's structure; changed in place.
        until: the last stage that the detector computes for both.

    Returns:
        The backbone; its ``shared_stages`` names its input maps.

    Raises:
        ValueError: if it has no such stage, or no stage would be left.
    """
    body = getattr(backbone, "bottom_up", backbone)
    names = list(getattr(body, "stage_names", ()))
    usable = names if body is not backbone else names[:-1]
    if until not in usable:
        raise ValueError(
            f"MODEL.RELDN.PREDICATE_BACKBONE.SHARE_UNTIL is '{until}'; stages of this "
            f"{type(body).__name__} that can be shared: {', '.join(usable) or 'none'}."
        )
    later = LaterStages(body, names[: names.index(until) + 1])
    if body is backbone:
        return later
    backbone.bottom_up = later
    backbone.shared_stages = later.shared_stages
    return backbone


@contextmanager
def record_stages(
    backbone: nn.Module, names: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], list[Tensor]]]:
    """Collect the outputs of the named stages of a backbone while the block runs.

    Only those of this thread: others may run the same model.

    Yields:
        the outputs by name, and the input of each run of the backbone's stages.
    """
    body = getattr(backbone, "bottom_up", backbone)
    outputs: dict[str, Tensor] = {}
    inputs: list[Tensor] = []
    thread = threading.get_ident()

    def keep(name):
        def hook(module, arguments, output):
            if threading.get_ident() == thread:
                outputs[name] = output

        return hook

    def keep_input(module, arguments):
        if threading.get_ident() == thread:
            inputs.extend(arguments)

    handles = [getattr(body, name).register_forward_hook(keep(name)) for name in names]
    if names:
        handles.append(body.register_forward_pre_hook(keep_input))
    try:
        yield outputs, inputs
    finally:
        for handle in handles:
            handle.remove()


def freeze_unused(backbone: nn.Module, wanted: Sequence[str], channels: int = 3) -> None:
    """Freeze the parameters of a backbone that no used map depends on.

    They would never get a gradient, which distributed training treats as an error. A backward pass
    of a small image tells which ones they are, for any kind of backbone.

    Args:
        backbone: takes (1, channels, h, w) images. If it cannot process a small one, a warning is
            logged and nothing is frozen.
        wanted: names of the maps that are used.
        channels: of an image.
    """
    if not any(x.requires_grad for x in backbone.parameters()):
        return
    modes = {module: module.training for module in backbone.modules()}
    size = 2 * max(getattr(backbone, "size_divisibility", 0), 32)
    image = next(backbone.parameters()).new_zeros(1, channels, size, size)
    backbone.eval()  # dropped paths would hide parameters, and BatchNorm would count this image
    try:
        # Not by the graph of the maps: activation checkpointing hides parameters there.
        with torch.inference_mode(False), torch.enable_grad():
            maps = backbone(image)
            sum(maps[name].sum() for name in wanted).backward()
    except Exception as error:  # code of the user
        logger.warning(
            f"The {type(backbone).__name__} of the predicate backbone cannot process an image of "
            f"{size} x {size} pixels ({type(error).__name__}: {' '.join(str(error).split())}), so "
            "parameters that no used map depends on, if there are any, are not frozen. Training "
            "in several processes would end with an error about them."
        )
        return
    finally:
        for module, mode in modes.items():
            module.training = mode
        gradients = {x: x.grad for x in backbone.parameters()}
        backbone.zero_grad(set_to_none=True)
    for parameter, gradient in gradients.items():
        if gradient is None:
            parameter.requires_grad_(False)


def build_predicate_backbone(cfg: CfgNode) -> nn.Module:
    """Build the backbone named by ``MODEL.RELDN.PREDICATE_BACKBONE.KIND``.

    ``"same"``: the detector's structure. ``"shared"``: its stages after ``SHARE_UNTIL``; the maps
    up to there are the detector's, frozen. ``"other"``: the backbone described by ``cfg`` with
    ``OPTIONS``; its images are normalized like the detector's. The detector's structure is that of
    ``MODEL.RELDN.DETECTOR_LAZY_CONFIG`` if that is set.

    Raises:
        ValueError: if the kind is unknown, or the backbone lacks maps that the head pools from.
    """
    keys = cfg.MODEL.RELDN.PREDICATE_BACKBONE
    if keys.KIND not in KINDS:
        raise ValueError(
            f"MODEL.RELDN.PREDICATE_BACKBONE.KIND is '{keys.KIND}'; known: {', '.join(KINDS)}"
        )
    if keys.KIND == "other":
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(list(keys.OPTIONS))
    if cfg.MODEL.RELDN.DETECTOR_LAZY_CONFIG and keys.KIND != "other":
        backbone = instantiate_part(cfg, "backbone")
        channels = len(detector_node(cfg).get("pixel_mean", cfg.MODEL.PIXEL_MEAN))
    else:
        backbone = build_backbone(cfg)
        channels = len(cfg.MODEL.PIXEL_MEAN)
    wanted = cfg.MODEL.ROI_RELATION_HEAD.IN_FEATURES or cfg.MODEL.ROI_HEADS.IN_FEATURES
    missing = set(wanted) - set(backbone.output_shape())
    if missing:
        raise ValueError(
            f"The predicate backbone has no map {sorted(missing)}, only "
            f"{sorted(backbone.output_shape())}; the relation head pools from {list(wanted)} of "
            "either backbone (MODEL.ROI_RELATION_HEAD.IN_FEATURES)."
        )
    freeze_unused(backbone, wanted, channels)
    if keys.KIND == "shared":
        return share_first_stages(backbone, keys.SHARE_UNTIL)
    return backbone
