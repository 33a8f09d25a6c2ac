"""The detector of configs/Toy/detector.yaml as a LazyConfig; both read the same checkpoints."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    StandardROIHeads,
)


def stage(in_channels, out_channels, stride):
    """Describe a stage of one block."""
    return L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=1,
        stride_per_block=[stride],
        in_channels=in_channels,
        out_channels=out_channels,
        norm="BN",
    )


model = L(GeneralizedRCNN)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=32, norm="BN"),
            stages=[stage(32, 32, 1), stage(32, 64, 2), stage(64, 96, 2)],
            out_features=["res2", "res3", "res4"],
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=64,
    ),
    proposal_generator=L(RPN)(
        in_features=["p2", "p3", "p4"],
        head=L(StandardRPNHead)(in_channels=64, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[16], [32], [64]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=64,
        positive_fraction=0.5,
        pre_nms_topk=(600, 300),
        post_nms_topk=(300, 150),
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=9,
        batch_size_per_image=64,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=["p2", "p3", "p4"],
        box_pooler=L(ROIPooler)(
            output_size=7,
            scales=(1 / 4, 1 / 8, 1 / 16),
            sampling_ratio=2,
            pooler_type="ROIAlignV2",
        ),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=64, height=7, width=7), conv_dims=[], fc_dims=[256, 256]
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=256),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes="${..num_classes}",
        ),
    ),
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[57.0, 57.0, 57.0],
    input_format="BGR",
)
