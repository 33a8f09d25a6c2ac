"""Small LazyConfigs in the manner of Detectron2's ``configs/common/models``."""

import re
from pathlib import Path

from model_utils import ROOT

_HEAD = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import *
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import *
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import *
from torch import nn


def fpn(names, top_block=None, bottom_up=None):
    return L(FPN)(
        bottom_up=bottom_up or resnet(names),
        in_features=names, out_channels=8, top_block=top_block,
    )


def resnet(names, block=BasicBlock, depth=18, **kwargs):
    wide = 8 if block is BasicBlock else 16
    stages = [
        L(ResNet.make_stage)(
            block_class=block, num_blocks=1, in_channels=wide // 2**(i == 0) * 2**max(i - 1, 0),
            out_channels=wide * 2**i, stride_per_block=[1 if i == 0 else 2], norm="BN",
            **({} if block is BasicBlock else {"bottleneck_channels": 4}),
        )
        for i in range(int(names[-1][-1]) - 1)
    ]
    if wide == 16:
        stages[0].in_channels = 8
    stem = L(BasicStem)(in_channels=3, out_channels=stages[0].in_channels, norm="BN")
    return L(ResNet)(stem=stem, stages=stages, out_features=names, **kwargs)


def rpn(names, sizes):
    return L(RPN)(
        in_features=names,
        head=L(StandardRPNHead)(in_channels=8, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=sizes, aspect_ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16][:len(sizes)], offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=32, positive_fraction=0.5,
        pre_nms_topk=(60, 30), post_nms_topk=(20, 10), nms_thresh=0.7,
    )


def matcher(threshold=0.5):
    return L(Matcher)(thresholds=[threshold], labels=[0, 1], allow_low_quality_matches=False)


def predictor(in_features=16, **kwargs):
    return L(FastRCNNOutputLayers)(
        input_shape=ShapeSpec(channels=in_features), test_score_thresh=0.0, test_topk_per_image=5,
        box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
        num_classes="${..num_classes}", **kwargs,
    )


def box_head():
    return L(FastRCNNConvFCHead)(
        input_shape=ShapeSpec(channels=8, height=7, width=7), conv_dims=[6], fc_dims=[16],
        conv_norm=lambda c: nn.GroupNorm(2, c),  # a YAML could not name it
    )


def box_pooler(scales=(1 / 4, 1 / 8, 1 / 16), size=7):
    return L(ROIPooler)(
        output_size=size, scales=scales, sampling_ratio=0, pooler_type="ROIAlignV2"
    )


def rcnn(backbone, names, sizes=((16,), (32,), (64,)), **roi_heads):
    return L(GeneralizedRCNN)(
        backbone=backbone,
        proposal_generator=rpn(names, [list(x) for x in sizes]),
        roi_heads=L(StandardROIHeads)(
            num_classes=9, batch_size_per_image=32, positive_fraction=0.25,
            proposal_matcher=matcher(), box_in_features=names, box_pooler=box_pooler(),
            box_head=box_head(), box_predictor=predictor(),
        ),
        pixel_mean=[103.5, 116.3, 123.7], pixel_std=[57.0, 57.0, 57.0], input_format="BGR",
    )


def dense(cls, head, **kwargs):
    maps = [ShapeSpec(channels=8)] * 4
    return L(cls)(
        backbone=fpn(["res3", "res4"], L(LastLevelP6P7)(
            in_channels=16 * 2, out_channels=8, in_feature="res4")),
        head=L(head)(
            input_shape=maps, num_classes="${..num_classes}", conv_dims=[8], prior_prob=0.1,
            **({"num_anchors": 3} if head is RetinaNetHead else {}),
        ),
        head_in_features=["p3", "p4", "p5", "p6"], num_classes=9,
        test_score_thresh=0.0, test_topk_candidates=20, max_detections_per_image=5,
        pixel_mean=[103.5, 116.3, 123.7], pixel_std=[57.0, 57.0, 57.0], **kwargs,
    )
"""

FASTER = 'model = rcnn(fpn(["res2", "res3", "res4"]), ["p2", "p3", "p4"])\n'

_MODELS = {
    "faster_rcnn": FASTER,
    "cascade": FASTER
    + """
model.roi_heads.update(
    _target_=CascadeROIHeads,
    box_heads=[box_head() for _ in range(3)],
    box_predictors=[predictor(cls_agnostic_bbox_reg=True) for _ in range(3)],
    proposal_matchers=[matcher(x) for x in (0.5, 0.6, 0.7)],
)
for x in model.roi_heads.box_predictors:
    x.num_classes = "${...num_classes}"
for x in ("box_head", "box_predictor", "proposal_matcher"):
    model.roi_heads.pop(x)
""",
    "c4": """
model = rcnn(resnet(["res4"], BottleneckBlock), ["res4"], [[16, 32, 64]])
model.proposal_generator.head.update(in_channels=64, num_anchors=9)
model.proposal_generator.anchor_generator.strides = [16]
model.roi_heads = L(Res5ROIHeads)(
    num_classes=9, batch_size_per_image=32, positive_fraction=0.25, proposal_matcher=matcher(),
    in_features=["res4"], pooler=box_pooler((1 / 16,), 8),
    res5=L(ResNet.make_stage)(
        block_class=BottleneckBlock, num_blocks=1, stride_per_block=[2], in_channels=64,
        bottleneck_channels=4, out_channels=24, norm="BN",
    ),
    box_predictor=predictor(24),
)
""",
    # The names and strides of its maps are not those of a ResNet.
    "regnet": """
names = ["s1", "s2", "s3"]
model = rcnn(fpn(names, None, L(RegNet)(
    stem_class=SimpleStem, stem_width=8, block_class=ResBottleneckBlock, depth=4, w_a=8.0, w_0=8,
    w_m=2.0, group_width=8, norm="BN", out_features=names,
)), ["p2", "p3", "p4"])
""",
    "own_backbone": """
from detectron2.modeling.backbone import Backbone

class Pyramid(Backbone):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self._out_features = ["fine", "coarse"]
        self._out_feature_strides = {"fine": 8, "coarse": 16}
        self._out_feature_channels = {"fine": channels, "coarse": channels}
    size_divisibility = 16
    def forward(self, x):
        x = self.conv(x)
        return {"fine": nn.functional.avg_pool2d(x, 4), "coarse": nn.functional.avg_pool2d(x, 8)}

model = rcnn(L(Pyramid)(channels=8), ["fine", "coarse"], [[32], [64]])
model.proposal_generator.anchor_generator.strides = [8, 16]
model.roi_heads.box_pooler.scales = (1 / 8, 1 / 16)
""",
    "retinanet": """
model = dense(
    RetinaNet, RetinaNetHead,
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[x] for x in (16, 32, 64, 128)], aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64], offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
)
""",
    "fcos": "model = dense(FCOS, FCOSHead)\n",
}
LAZY_DETECTORS = tuple(_MODELS)


def write_lazy_detector(folder: Path, kind: str, more: str = "") -> Path:
    """Write the LazyConfig of a small detector with 9 classes; ``more`` is code after it."""
    path = Path(folder) / f"{kind}.py"
    path.write_text(_HEAD + _MODELS[kind] + more)
    return path


def write_documented_reldn(folder: Path, detector: Path, vector_size: int, adapter: str) -> Path:
    """Write the LazyConfig of a RelDN in docs/detectors.md, on another detector.

    Args:
        folder: gets ``my_lazy_reldn.py``.
        detector: LazyConfig of an R-CNN.
        vector_size: of its box head's vectors.
        adapter: ``GeneralizedRCNNDetector`` or ``CascadeRCNNDetector``.
    """
    text = (ROOT / "docs/detectors.md").read_text()
    (code,) = re.findall(r"```python my_lazy_reldn.py\n(.*?)```", text, re.DOTALL)
    if adapter == "CascadeRCNNDetector":
        code = code.replace("heads.box_head)", "heads.box_heads[0])")
    for old, new in (
        ("configs/lazy/toy_reldn.py", str(ROOT / "configs/lazy/toy_reldn.py")),
        ("my_lazy_detector.py", str(detector)),
        ("vector_size=1024", f"vector_size={vector_size}"),
        ("GeneralizedRCNNDetector", adapter),
    ):
        assert old in code
        code = code.replace(old, new)
    path = folder / "my_lazy_reldn.py"
    path.write_text(code)
    return path
