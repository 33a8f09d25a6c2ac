"""Detectors whose LazyConfigs come with Detectron2's main branch: ViTDet, Swin, MViTv2, RegNet, ...

The configs are those of a checkout, made small by a few lines of code.
"""

import os
from pathlib import Path

import lazyconfig_train_net as tool
import pytest
import torch
from export_cases import PADS, image
from lazy_files import write_documented_reldn, write_lazy_detector
from model_utils import CLASSES, PREDICATES, busy_item, small_config
from usage_utils import OPTIONS, picture

import reldn_d2
from reldn_d2.checkpoint.reldn_checkpoint import DetectorCheckpointer
from reldn_d2.export import RelDNExport, save_torchscript
from reldn_d2.export.comparison import compare_outputs
from reldn_d2.predictor import RelationPredictor
from reldn_d2.utils.lazy_configs import detector_node

from detectron2 import modeling
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

KEY = "MODEL.RELDN.DETECTOR_LAZY_CONFIG"
SQUARE = 128  # pixels

# What every R-CNN gets: few classes, small heads, few boxes, scores of random weights.
SMALL_RCNN = """
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec

model = LazyConfig.load({path!r}).model
model.proposal_generator.update(pre_nms_topk=(60, 30), post_nms_topk=(20, 10))
heads = model.roi_heads
heads.num_classes = 9
box_heads = heads.box_heads if "box_heads" in heads else [heads.box_head]
predictors = heads.box_predictors if "box_predictors" in heads else [heads.box_predictor]
for head, predictor in zip(box_heads, predictors):
    head.conv_dims, head.fc_dims = [8], [16]
    predictor.update(
        input_shape=ShapeSpec(channels=16), test_score_thresh=0.0, test_topk_per_image=5
    )
if "mask_head" in heads:
    heads.mask_head.conv_dims = [8, 8]
"""
VIT = f"""
model.backbone.net.update(
    img_size={SQUARE}, embed_dim=16, depth=2, num_heads=2, window_size=3, window_block_indexes=[0],
    drop_path_rate=0.0,
)
model.backbone.square_pad = {SQUARE}
"""
MVIT = """
model.backbone.bottom_up.update(
    embed_dim=8, depth=4, last_block_indexes=(0, 1, 2, 3), drop_path_rate=0.0
)
"""
SWIN = """
model.backbone.bottom_up.update(
    embed_dim=8, depths=[2, 1, 1, 1], num_heads=[1, 1, 2, 2], drop_path_rate=0.0
)
"""
REGNET = """
model.backbone.bottom_up.update(stem_width=8, depth=6, w_a=8.0, w_0=8, w_m=2.0, group_width=8)
"""
PAD = f"model.backbone.square_pad = {SQUARE}\n"
VITDET = "projects/ViTDet/configs/COCO"

# Config in the checkout, its adapter, and the code that makes its backbone small.
DETECTORS = {
    "vitdet": (f"{VITDET}/mask_rcnn_vitdet_b_100ep.py", "Generalized", VIT),
    "cascade_vitdet": (f"{VITDET}/cascade_mask_rcnn_vitdet_b_100ep.py", "Cascade", VIT),
    "cascade_swin": (f"{VITDET}/cascade_mask_rcnn_swin_b_in21k_50ep.py", "Cascade", SWIN + PAD),
    "cascade_mvitv2": (
        f"{VITDET}/cascade_mask_rcnn_mvitv2_b_in21k_100ep.py",
        "Cascade",
        MVIT + PAD,
    ),
    "mvitv2": ("projects/MViTv2/configs/mask_rcnn_mvitv2_t_3x.py", "Generalized", MVIT),
    "new_baseline": ("configs/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py", "Generalized", ""),
    "regnetx": (
        "configs/new_baselines/mask_rcnn_regnetx_4gf_dds_FPN_100ep_LSJ.py",
        "Generalized",
        REGNET,
    ),
    "regnety": (
        "configs/new_baselines/mask_rcnn_regnety_4gf_dds_FPN_100ep_LSJ.py",
        "Generalized",
        REGNET,
    ),
    "keypoint": ("configs/COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py", "Generalized", ""),
    "panoptic": ("configs/COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py", "Generalized", ""),
}


@pytest.fixture(scope="module")
def checkout():
    """The folder of a checkout whose Detectron2 is the installed one."""
    folder = os.environ.get("RELDN_TEST_DETECTRON2")
    if not hasattr(modeling, "ViT"):
        pytest.skip("the installed Detectron2 is not the main branch: it has no ViT")
    if not folder:
        pytest.skip("no checkout of Detectron2: set RELDN_TEST_DETECTRON2 to its folder")
    return Path(folder)


def write_detector(checkout, folder, kind):
    """Write the LazyConfig of a small detector; return its path and the model."""
    if DETECTORS[kind][2].startswith((VIT, MVIT)):
        pytest.importorskip("timm", reason="Detectron2's ViT and MViT need timm")
    path = folder / f"{kind}.py"
    config, _, code = DETECTORS[kind]
    path.write_text(SMALL_RCNN.format(path=str(checkout / config)) + code)
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(path)).model).eval()
    for name, parameter in model.named_parameters():
        # Deep random networks give huge values, at which Detectron2's decoding fails.
        if any(x in name for x in ("bbox_pred", "anchor_deltas", "score_lowres")):
            parameter.data.zero_()
    return path, model


def options_for(path, detector):
    sizes = ("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", SQUARE, "INPUT.MAX_SIZE_TRAIN", 96)
    return (KEY, str(path), "INPUT.FORMAT", detector.input_format, *OPTIONS, *sizes)


def train_step(model):
    with EventStorage():
        losses = model.train()([busy_item(0)])
    assert all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    assert any(
        p.grad.abs().sum() > 0 for p in model.predicate_backbone.parameters() if p.grad is not None
    )
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= 1e-4 * parameter.grad.sign()  # whatever the gradient's size
            parameter.grad = None


@pytest.mark.parametrize("kind", DETECTORS)
def test_detector_of_main_trains_predicts_a_graph_and_is_restored(checkout, tmp_path, kind):
    path, detector = write_detector(checkout, tmp_path, kind)
    DetectorCheckpointer(detector, str(tmp_path)).save("detector")
    cfg = small_config(*options_for(path, detector))
    torch.manual_seed(1)
    model = build_model(cfg)
    assert type(model.detector).__name__ == f"{DETECTORS[kind][1]}RCNNDetector"
    reldn_d2.RelDNCheckpointer(model).load(str(tmp_path / "detector.pth"))
    model.relation_head.set_predicate_counts(torch.arange(len(PREDICATES)) + 1)
    train_step(model)
    with torch.no_grad():
        found, expected = (x.eval()([busy_item(0)])[0]["instances"] for x in (model, detector))
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.get_fields().keys() == expected.get_fields().keys()
    reldn_d2.RelDNCheckpointer(
        model, str(tmp_path), thing_classes=CLASSES, predicate_classes=PREDICATES, cfg=cfg
    ).save("model_final")
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    del model
    predictor = RelationPredictor.from_checkpoint(tmp_path / "model_final.pth", "cpu")
    restored = predictor.model.state_dict()
    assert restored.keys() == weights.keys()
    assert all(torch.equal(x, restored[name]) for name, x in weights.items())
    graph = predictor(picture())
    assert len(graph.boxes) == 5 and len(graph.triplets()) > 0
    assert len(graph.graph().nodes) == 5
    classified = predictor(picture(), boxes=[[5, 5, 40, 50], [30, 20, 80, 55]])
    assert len(classified.boxes) == 2


@pytest.mark.parametrize("kind", ["vitdet", "cascade_swin", "mvitv2", "regnety"])
def test_detector_of_main_under_a_lazy_reldn_trains_and_predicts(checkout, tmp_path, kind):
    detector, _ = write_detector(checkout, tmp_path, kind)
    adapter = f"{DETECTORS[kind][1]}RCNNDetector"
    path = write_documented_reldn(tmp_path, detector, 16, adapter)
    model = tool.build(tool.load(str(path), []), str(path))
    train_step(model)
    with torch.no_grad():
        (result,) = model.eval()([busy_item(0)])
    assert len(result["instances"]) == 5 and len(result["relations"]) > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "kind",
    ["vitdet", "cascade_swin", "cascade_mvitv2", "mvitv2", "regnety", "keypoint", "panoptic"],
)
def test_export_detector_of_main_equals_the_model(checkout, tmp_path, kind):
    path, detector = write_detector(checkout, tmp_path, kind)
    model = build_model(small_config(*options_for(path, detector)))
    model.detector.model.load_state_dict(detector.state_dict())
    size = (64, 96) if kind == "mvitv2" else None  # the only one that its file accepts
    graph = RelDNExport(model, size)
    save_torchscript(graph, [image(64, 96)], tmp_path / "x.ts")
    exported = torch.jit.load(tmp_path / "x.ts")
    for height, width in [(64, 96)] if size else [(96, 64), (75, 117)]:
        inputs = image(height, width, seed=1)
        with torch.no_grad():
            outputs = graph.model_outputs(inputs), exported(inputs)
        expected, found = (
            dict(zip(graph.output_names, [x.numpy() for x in tensors])) for tensors in outputs
        )
        assert len(found["pairs"]) > 0 and compare_outputs(expected, found).problem is None


def test_zoo_name_of_lazy_config_is_found(checkout):
    name = "new_baselines/mask_rcnn_regnety_4gf_dds_FPN_100ep_LSJ.py"
    node = detector_node(small_config(KEY, name))
    assert node.backbone.bottom_up.depth == 22


def test_image_larger_than_the_square_pad_raises(tmp_path):
    path = write_lazy_detector(tmp_path, "faster_rcnn", PADS)
    for name in ("INPUT.MAX_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST"):
        sizes = {"INPUT.MAX_SIZE_TRAIN": 80, "INPUT.MAX_SIZE_TEST": 80, name: 1333}
        with pytest.raises(ValueError, match=f"80 x 80 .square_pad., but {name} is 1333; set"):
            build_model(small_config(KEY, str(path), *(x for pair in sizes.items() for x in pair)))
    sizes = ("INPUT.MAX_SIZE_TRAIN", 80, "INPUT.MAX_SIZE_TEST", 80)
    model = build_model(small_config(KEY, str(path), *sizes)).eval()
    with pytest.raises(ValueError, match="image-0 .* has 64 x 96 pixels after resizing.* 80 x 80"):
        model([busy_item(0)])
