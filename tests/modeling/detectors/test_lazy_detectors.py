"""Detectors that a LazyConfig describes, under a RelDN YAML (``DETECTOR_LAZY_CONFIG``)."""

import pytest
import torch
from lazy_files import LAZY_DETECTORS, write_lazy_detector
from model_utils import busy_item, small_config, small_model

import reldn_d2
from reldn_d2.checkpoint.reldn_checkpoint import (
    DetectorCheckpointer,
    RelDNCheckpointer,
    pretrained_predicate_modules,
)
from reldn_d2.engine.model_setup import check_counts
from reldn_d2.modeling import ENTITY_DETECTOR_REGISTRY, GeneralizedRCNNDetector

from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

ADAPTERS = {
    "cascade": "CascadeRCNNDetector",
    "c4": "C4RCNNDetector",
    "retinanet": "RetinaNetDetector",
    "fcos": "FCOSDetector",
}
KEY = "MODEL.RELDN.DETECTOR_LAZY_CONFIG"


def lazy_config(path, *options):
    # What the YAML says of a detector is not used: it could not even be built.
    unused = ("MODEL.BACKBONE.NAME", "no_backbone", "MODEL.ROI_HEADS.IN_FEATURES", ["none"])
    return small_config(KEY, str(path), *unused, *options)


def lazy_model(path, *options):
    torch.manual_seed(0)
    return build_model(lazy_config(path, *options))


@pytest.mark.parametrize("kind", LAZY_DETECTORS)
def test_lazy_detector_checkpoint_loads_trains_and_predicts(tmp_path, kind):
    path = write_lazy_detector(tmp_path, kind)
    torch.manual_seed(1)
    detector = instantiate(LazyConfig.load(str(path)).model)
    DetectorCheckpointer(detector, str(tmp_path)).save("detector")
    model = lazy_model(path)
    assert type(model.detector).__name__ == ADAPTERS.get(kind, "GeneralizedRCNNDetector")
    check_counts(lazy_config(path), model)
    RelDNCheckpointer(model).load(str(tmp_path / "detector.pth"))
    theirs = detector.state_dict()
    for name, value in model.detector.model.state_dict().items():
        assert torch.equal(value, theirs[name])
    # The relation branch starts from the detector's weights, as with a detector of YAML.
    for name, value in model.predicate_backbone.state_dict().items():
        assert torch.equal(value, theirs[f"backbone.{name}"])
    is_dense = kind in ("retinanet", "fcos")
    assert len(pretrained_predicate_modules(model)) == (1 if is_dense else 2)
    if not is_dense:
        for box_head in model.relation_head.box_heads:
            wanted = model.detector.box_head.state_dict()
            assert all(torch.equal(x, wanted[n]) for n, x in box_head.state_dict().items())
    with EventStorage():
        losses = model.train()([busy_item(0)])
    sum(losses.values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and not any(p.requires_grad for p in model.detector.parameters())
    for name, p in model.predicate_backbone.named_parameters():
        assert p.grad is not None or not p.requires_grad or "top_block" in name, name
    model.eval()
    with torch.no_grad():
        (result,) = model([busy_item(0)])
        assert len(result["instances"]) > 0
        # The same detections as those of the detector itself.
        (alone,) = detector.eval()([busy_item(0)])
        found, expected = result["instances"], alone["instances"]
        assert torch.equal(found.pred_classes, expected.pred_classes)
        torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        torch.testing.assert_close(found.scores, expected.scores)
        model.task = "sgcls"
        (classified,) = model([busy_item(0)])
        assert len(classified["instances"]) == 4


def test_fcos_classifies_given_boxes_by_its_own_scores(tmp_path):
    """A given box that is equal to a detection gets at least that detection's score."""
    model = lazy_model(write_lazy_detector(tmp_path, "fcos")).eval()
    with torch.no_grad():
        (found,) = model.detector.detect(*features_of(model))
        (scores,) = model.detector.classify(*features_of(model), [found.pred_boxes])
        own = scores[torch.arange(len(found)), found.pred_classes]
        assert len(found) and (own >= found.scores - 1e-5).all()
        (proposed,) = model.detector.propose(*features_of(model))
        assert isinstance(found, Instances) and len(proposed) > 5


def test_fcos_in_bfloat16_boxes_are_not_rounded(tmp_path):
    model = lazy_model(write_lazy_detector(tmp_path, "fcos")).eval()
    with torch.no_grad():
        batch, images, features = features_of(model)
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = model.detector.detect(batch, images, features)
            (boxes,), _ = model.detector._dense(features)
    assert len(found) and found.scores.dtype == torch.float32
    boxes = Boxes(boxes)
    boxes.clip(found.image_size)
    difference = (found.pred_boxes.tensor[:, None] - boxes.tensor).abs().amax(dim=2)
    assert difference.amin(dim=1).max() < 1e-4


def features_of(model):
    batch = [busy_item(0)]
    images = model.detector.preprocess(batch)
    return batch, images, model.detector.extract_features(images)


def test_lazy_detector_predicate_backbone_shared_and_other(tmp_path):
    path = write_lazy_detector(tmp_path, "faster_rcnn")
    kind = "MODEL.RELDN.PREDICATE_BACKBONE.KIND"
    shared = lazy_model(path, kind, "shared", "MODEL.RELDN.PREDICATE_BACKBONE.SHARE_UNTIL", "res2")
    assert shared.predicate_backbone.shared_stages == ("res2",)
    options = ("MODEL.RELDN.PREDICATE_BACKBONE.OPTIONS", ["MODEL.BACKBONE.NAME", BACKBONE])
    other = lazy_model(path, kind, "other", *options)
    assert not any(x.startswith("bottom_up.res2") for x in shared.predicate_backbone.state_dict())
    theirs, ours = (x.backbone.state_dict() for x in (other.detector, shared.detector))
    assert set(theirs) == set(ours) != set(other.predicate_backbone.state_dict())
    for model in (shared, other):
        with EventStorage():
            sum(model.train()([busy_item(0)]).values()).backward()


BACKBONE = "build_small_resnet_fpn_backbone"


def test_lazy_detector_other_backbone_with_other_channels_raises(tmp_path):
    path = write_lazy_detector(tmp_path, "faster_rcnn")
    keys = "MODEL.RELDN.PREDICATE_BACKBONE"
    options = ["MODEL.BACKBONE.NAME", BACKBONE, "MODEL.FPN.OUT_CHANNELS", 12]
    with pytest.raises(ValueError, match="box head of .*does not fit.*12 channels and 7 x 7"):
        lazy_model(path, f"{keys}.KIND", "other", f"{keys}.OPTIONS", options)


def test_lazy_detector_overrides_and_number_of_classes_checked(tmp_path):
    path = write_lazy_detector(tmp_path, "faster_rcnn")
    overrides = [
        "model.roi_heads.num_classes=4",
        "model.roi_heads.box_predictor.test_topk_per_image=2",
    ]
    options = ("MODEL.RELDN.DETECTOR_LAZY_OVERRIDES", overrides)
    model = lazy_model(path, *options)
    assert model.detector.num_classes == model.relation_head.num_classes == 4
    assert len(model.eval()([busy_item(0)])[0]["instances"]) == 2
    message = "num_classes of the model in .*faster_rcnn.py is 4, but .* has 9 thing_classes"
    with pytest.raises(ValueError, match=message):
        check_counts(lazy_config(path, *options), model)


@pytest.mark.parametrize(
    "more, options, message",
    [
        ("", ["MODEL.RELDN.DETECTOR", "RetinaNetDetector"], "not work with GeneralizedRCNN with"),
        ("", ["MODEL.RELDN.DETECTOR", "PrecomputedDetector"], '"auto" or to GeneralizedRCNNDet'),
        ("", ["INPUT.FORMAT", "RGB"], "reads images as BGR, but INPUT.FORMAT is RGB; set INPUT"),
        ("\nmodel = L(nn.Identity)()", [], "not work with Identity.*accepts_model returns True"),
        ("\nmodel = dict(a=1)", [], "has no `model = L"),
        ("\nmodel.roi_heads.wrong = 1", [], "whose model cannot be built: TypeError: .*wrong"),
        (
            "\nclass Needs(GeneralizedRCNN):\n    def __init__(self, **kw): import no_such_package"
            "\nmodel._target_ = Needs",
            [],
            "ModuleNotFoundError: No module named .* Install the package of 'no_such_package'",
        ),
        ("\n1 / 0", [], "cannot be loaded: .*faster_rcnn.py, line [0-9]+: ZeroDivisionError"),
        ("\nx = (", [], "cannot be loaded: .*SyntaxError"),
        ("\nmodel.roi_heads.box_pooler.output_size = (7, 5)", [], "7 x 5 cells; the relation head"),
        (
            "\nclass TridentHeads(StandardROIHeads): pass\nmodel.roi_heads._target_ = TridentHeads",
            [],
            "has a TridentHeads: TridentNet",
        ),
        (
            "",
            ["MODEL.RELDN.DETECTOR_LAZY_OVERRIDES", ["model.roi_head.num_classes=4"]],
            "override 'model.roi_head.num_classes=4' of .*faster_rcnn.py is not valid: .*no 'model",
        ),
    ],
)
def test_lazy_detector_unusable_raises_one_line(tmp_path, more, options, message):
    path = write_lazy_detector(tmp_path, "faster_rcnn", more)
    with pytest.raises(ValueError, match=message) as error:
        lazy_model(path, *options)
    assert "faster_rcnn.py" in str(error.value) and "\n" not in str(error.value)


def test_lazy_detector_missing_file_raises():
    with pytest.raises(FileNotFoundError, match=f"{KEY} is 'new_baselines/x.py': no such file"):
        lazy_model("new_baselines/x.py")


def test_lazy_detector_name_of_model_zoo_is_found(tmp_path, monkeypatch):
    path = write_lazy_detector(tmp_path, "faster_rcnn")
    names = []
    monkeypatch.setattr(
        "detectron2.model_zoo.get_config_file", lambda name: names.append(name) or str(path)
    )
    assert lazy_model("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py").detector.num_classes == 9
    assert set(names) == {"new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"}


def test_merge_config_lazy_config_as_config_file_raises(tmp_path):
    path = write_lazy_detector(tmp_path, "faster_rcnn")
    with pytest.raises(ValueError, match=f"is a LazyConfig, not a YAML.*{KEY}.*lazyconfig_train"):
        reldn_d2.load_config(str(path))


def test_lazy_detector_own_adapter_accepts_model(tmp_path):
    @ENTITY_DETECTOR_REGISTRY.register()
    class QuietDetector(GeneralizedRCNNDetector):
        @classmethod
        def accepts_model(cls, model):
            return type(model).__name__ == "QuietRCNN"

    more = "\nclass QuietRCNN(GeneralizedRCNN): pass\nmodel._target_ = QuietRCNN"
    try:
        model = lazy_model(write_lazy_detector(tmp_path, "faster_rcnn", more))
        assert type(model.detector) is QuietDetector
    finally:
        del ENTITY_DETECTOR_REGISTRY._obj_map["QuietDetector"]


def test_fcos_by_yaml_raises():
    with pytest.raises(ValueError, match="FCOS has no YAML keys: name its LazyConfig"):
        small_model("MODEL.RELDN.DETECTOR", "FCOSDetector")
