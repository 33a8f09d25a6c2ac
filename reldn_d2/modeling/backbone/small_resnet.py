"""A ResNet-FPN small enough to train on a laptop's CPU in minutes, for the built-in dataset."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

__all__ = ["build_small_resnet_fpn_backbone"]


@BACKBONE_REGISTRY.register()
def build_small_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build an FPN without an extra top level on a ResNet with one BasicBlock per stage.

    It has as many stages as ``MODEL.RESNETS.OUT_FEATURES`` needs.

    ``MODEL.RESNETS.STEM_OUT_CHANNELS`` is the width of the stem; stages are 1, 2, 3, 4 times as
    wide. ``MODEL.RESNETS.NORM``, ``MODEL.BACKBONE.FREEZE_AT`` and ``MODEL.FPN`` act as in
    Detectron2's ``build_resnet_fpn_backbone``.
    """
    resnets, norm = cfg.MODEL.RESNETS, cfg.MODEL.RESNETS.NORM
    width = resnets.STEM_OUT_CHANNELS
    stem = BasicStem(input_shape.channels, width, norm=norm)
    stages, in_channels = [], width
    last = max(int(name[len("res") :]) for name in resnets.OUT_FEATURES)
    for stage in range(2, last + 1):
        out_channels = width * (stage - 1)
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                1,
                stride_per_block=[1 if stage == 2 else 2],
                in_channels=in_channels,
                out_channels=out_channels,
                norm=norm,
            )
        )
        in_channels = out_channels
    bottom_up = ResNet(
        stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
