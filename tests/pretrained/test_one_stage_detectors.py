"""``load_detector``: detectors of torchvision, Detectron2's RetinaNet, and LazyConfigs."""

import numpy as np
import pytest
import torch
from lazy_files import write_lazy_detector
from model_utils import CLASSES
from test_image_detectors import check, write_detector
from usage_utils import picture

from reldn_d2.checkpoint import DetectorCheckpointer
from reldn_d2.pretrained import load_detector

from detectron2.config import LazyConfig, instantiate


@pytest.mark.parametrize(
    "name",
    [
        "fcos_resnet50_fpn",
        "retinanet_resnet50_fpn",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "maskrcnn_resnet50_fpn",
    ],
)
def test_load_detector_torchvision_scores_equal_the_models_own(tmp_path, monkeypatch, name):
    from torchvision import models

    build = models.get_model
    # Small images and few feature maps take seconds instead of minutes.
    monkeypatch.setattr(models, "get_model", lambda *x, **kw: build(*x, **kw, min_size=64))
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    detect = load_detector(
        f"torchvision:{name}",
        tmp_path / "own.pth",
        "cpu",
        min_score=0.0,
        class_names=["cup", "person"],
    )
    rgb = picture(60, 90)
    found = detect(rgb)
    check(found, ["__background__", "cup", "person"], (90, 60))
    getattr(model, "roi_heads", model).score_thresh = 0.0
    with torch.no_grad():
        expected = model([torch.as_tensor(rgb.transpose(2, 0, 1).copy()).float() / 255])[0]
    np.testing.assert_allclose(found["scores"], expected["scores"].sort(descending=True).values)


def test_load_detector_detectron2_retinanet_yaml(tmp_path):
    options = ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 9)
    maps = ("MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4"])
    yaml, model = write_detector(tmp_path, *options, *maps)
    DetectorCheckpointer(model, str(tmp_path), thing_classes=CLASSES).save("named")
    found = load_detector(yaml, tmp_path / "named.pth", device="cpu", min_score=0.0)(picture())
    check(found, CLASSES, (90, 60))


@pytest.mark.parametrize("kind", ["fcos", "retinanet", "cascade"])
def test_load_detector_lazy_config_names_boxes_scores(tmp_path, kind):
    more = """
from detectron2.data import transforms as T
train = dict(init_checkpoint="%s")
dataloader = dict(test=dict(
    dataset=dict(names="toy_vrd_test"),
    mapper=dict(image_format="RGB", augmentations=[L(T.Resize)(shape=(64, 96))]),
))
"""
    path = write_lazy_detector(tmp_path, kind, more % (tmp_path / "detector.pth"))
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(path)).model).eval()
    torch.save(model.state_dict(), tmp_path / "detector.pth")
    rgb = picture(64, 96)
    detect = load_detector(str(path), device="cpu", min_score=0.0)
    found = detect(rgb)
    check(found, CLASSES, (96, 64))
    with torch.no_grad():
        image = torch.as_tensor(rgb.transpose(2, 0, 1).copy())
        expected = model([{"image": image}])[0]["instances"]
    np.testing.assert_allclose(found["scores"], expected.scores.clamp(0, 1), rtol=1e-5)
    np.testing.assert_allclose(found["boxes"], expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
    named = load_detector(str(path), device="cpu", class_names=[f"c{i}" for i in range(9)])
    assert named.class_names[0] == "c0"


def test_load_detector_lazy_config_unusable_raises_one_line(tmp_path):
    path = write_lazy_detector(tmp_path, "fcos")
    with pytest.raises(ValueError, match="train.init_checkpoint is empty; give the weights"):
        load_detector(str(path))
    with pytest.raises(FileNotFoundError, match="detector is 'none.py': no such file, and the"):
        load_detector("none.py")
    path = write_lazy_detector(tmp_path, "fcos", "\nmodel.wrong = 1")
    with pytest.raises(ValueError, match="its model cannot be built: TypeError: .*wrong"):
        load_detector(str(path), "x.pth")
    path = write_lazy_detector(tmp_path, "fcos", "\nmodel = dict()")
    with pytest.raises(ValueError, match="has no `model = L"):
        load_detector(str(path), "x.pth")
    path = write_lazy_detector(tmp_path, "fcos")
    torch.save(instantiate(LazyConfig.load(str(path)).model).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no names. Give class_names, or set dataloader.test.data"):
        load_detector(str(path), tmp_path / "x.pth", device="cpu")
