"""``MODEL.RELDN.DETECTOR: "auto"``: the adapter of each config, and detectors that are refused."""

import pytest
import torch
from model_utils import ROOT, SIZE, TINY, busy_item, small_config

import reldn_d2
from reldn_d2.checkpoint.reldn_checkpoint import DetectorCheckpointer, RelDNCheckpointer

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.projects.point_rend import add_pointrend_config
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

RETINANET = """
MODEL:
  META_ARCHITECTURE: "{architecture}"
  DEVICE: "cpu"
  BACKBONE:
    NAME: "build_retinanet_resnet_fpn_backbone"
    FREEZE_AT: 0
  RESNETS: {{DEPTH: 18, OUT_FEATURES: ["res3", "res4", "res5"], RES2_OUT_CHANNELS: 64}}
  FPN: {{IN_FEATURES: ["res3", "res4", "res5"], OUT_CHANNELS: 8}}
  RETINANET: {{NUM_CLASSES: 9, NUM_CONVS: 1}}
  ROI_BOX_HEAD: {{FC_DIM: 16}}
"""


def base_of_reldn(folder, architecture, text=RETINANET):
    """Write a detector's YAML in Detectron2's manner and a RelDN's on top of it."""
    (folder / "detector.yaml").write_text(text.format(architecture=architecture))
    reldn = folder / "reldn.yaml"
    reldn.write_text('_BASE_: "detector.yaml"\nMODEL:\n  META_ARCHITECTURE: "RelDN"\n')
    return reldn_d2.load_config(str(reldn))


def toy_base(folder, architecture, more=""):
    """A RelDN on the R-CNN of configs/Toy with the given meta-architecture."""
    text = f'_BASE_: "{ROOT}/configs/Toy/Base-Toy.yaml"\nMODEL:\n'
    text += '  META_ARCHITECTURE: "{architecture}"\n' + more
    cfg = base_of_reldn(folder, architecture, text)
    small = small_config(*TINY)
    cfg.MODEL.RESNETS, cfg.MODEL.FPN = small.MODEL.RESNETS, small.MODEL.FPN
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES = 6
    return cfg


def train_and_predict(model, record=None):
    record = record or busy_item(0)
    with EventStorage():
        losses = model.train()([record])
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    with torch.no_grad():
        return model.eval()([record])[0]


def test_auto_retinanet_yaml_without_detector_key_is_found_and_trains(tmp_path):
    cfg = base_of_reldn(tmp_path, "RetinaNet")
    assert cfg.MODEL.RELDN.DETECTOR_META_ARCHITECTURE == "RetinaNet"
    model = build_model(cfg)
    assert type(model.detector).__name__ == "RetinaNetDetector"
    assert model.relation_head.in_features == ["p3", "p4", "p5"]
    assert "relations" in train_and_predict(model)


def test_auto_retinanet_merged_in_python_is_recognized_by_its_maps(tmp_path):
    (tmp_path / "detector.yaml").write_text(RETINANET.format(architecture="RetinaNet"))
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    cfg.merge_from_file(str(tmp_path / "detector.yaml"))
    cfg.MODEL.META_ARCHITECTURE = "RelDN"
    assert cfg.MODEL.RELDN.DETECTOR_META_ARCHITECTURE == ""
    assert type(build_model(cfg).detector).__name__ == "RetinaNetDetector"


def test_auto_key_given_in_yaml_or_option_wins(tmp_path):
    cfg = base_of_reldn(tmp_path, "GeneralizedRCNN")
    reldn_d2.merge_config(cfg, None, ["MODEL.RELDN.DETECTOR_META_ARCHITECTURE", "RetinaNet"])
    reldn_d2.merge_config(cfg, str(tmp_path / "reldn.yaml"))
    assert cfg.MODEL.RELDN.DETECTOR_META_ARCHITECTURE == "RetinaNet"


@pytest.mark.parametrize("architecture", ["ProposalNetwork", "SemanticSegmentor"])
def test_auto_detector_without_classified_boxes_raises(tmp_path, architecture):
    cfg = toy_base(tmp_path, architecture)
    with pytest.raises(ValueError, match=f"no adapter knows.*'{architecture}'.*classifies boxes"):
        build_model(cfg)


@pytest.mark.parametrize(
    "key, name",
    [
        ("MODEL.BACKBONE.NAME", "build_trident_resnet_backbone"),
        ("MODEL.ROI_HEADS.NAME", "TridentRes5ROIHeads"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "TridentRPN"),
    ],
)
def test_build_trident_raises(key, name):
    with pytest.raises(ValueError, match=f"{key} is '{name}': TridentNet computes several"):
        build_model(small_config(key, name))


def test_build_maps_that_the_backbone_lacks_raise():
    cfg = small_config("MODEL.ROI_HEADS.IN_FEATURES", ["res9"])
    with pytest.raises(ValueError, match="has no feature map 'res9'.*ROI_HEADS.IN_FEATURES"):
        build_model(cfg)


def test_precomputed_proposals_train_and_without_files_raise():
    options = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    with pytest.raises(ValueError, match="MODEL.LOAD_PROPOSALS is False: set it to True"):
        build_model(small_config(*options))
    model = build_model(small_config(*options, "MODEL.LOAD_PROPOSALS", True)).eval()
    with pytest.raises(ValueError, match="image-0.*without 'proposals'.*PROPOSAL_FILES_TRAIN"):
        model([busy_item(0)])
    record = busy_item(0)
    record["proposals"] = Instances(SIZE, objectness_logits=torch.zeros(4))
    record["proposals"].proposal_boxes = record["instances"].gt_boxes.clone()
    assert len(train_and_predict(model, record)["instances"]) > 0


KEYPOINTS = """
  KEYPOINT_ON: True
  ROI_KEYPOINT_HEAD: {{NUM_KEYPOINTS: 3, CONV_DIMS: [8], POOLER_RESOLUTION: 7}}
"""
PANOPTIC = """
  MASK_ON: True
  ROI_MASK_HEAD: {{NAME: "MaskRCNNConvUpsampleHead", NUM_CONV: 1, CONV_DIM: 8}}
  SEM_SEG_HEAD:
    IN_FEATURES: ["p2", "p3", "p4"]
    NUM_CLASSES: 5
    CONVS_DIM: 8
    NORM: ""
"""


POINT_REND = """
  MASK_ON: True
  ROI_MASK_HEAD:
    NAME: "PointRendMaskHead"
    POOLER_TYPE: ""
    FC_DIM: 16
    NUM_FC: 1
    CONV_DIM: 8
    POINT_HEAD_ON: True
  POINT_HEAD: {{NUM_CLASSES: 9, FC_DIM: 8, NUM_FC: 1, SUBDIVISION_STEPS: 3}}
"""


@pytest.mark.parametrize(
    "architecture, more, field",
    [
        ("GeneralizedRCNN", KEYPOINTS, "pred_keypoints"),
        ("PanopticFPN", PANOPTIC, "pred_masks"),
        ("GeneralizedRCNN", POINT_REND, "pred_masks"),
    ],
)
def test_detector_with_more_heads_trained_checkpoint_loads_and_trains(
    tmp_path, own_registrations, architecture, more, field
):
    reldn_d2.register_config_keys(add_pointrend_config)
    cfg = toy_base(tmp_path, architecture, more)
    as_detector = cfg.clone()
    as_detector.MODEL.META_ARCHITECTURE = architecture
    detector = build_model(as_detector)
    DetectorCheckpointer(detector, str(tmp_path)).save("detector")
    model = build_model(cfg)
    assert type(model.detector).__name__ == "GeneralizedRCNNDetector"
    RelDNCheckpointer(model).load(str(tmp_path / "detector.pth"))
    theirs = detector.state_dict()
    for name, value in model.detector.model.state_dict().items():
        assert torch.equal(value, theirs[name])
    result = train_and_predict(model)
    assert result["instances"].has(field) and len(result["instances"]) == 5
