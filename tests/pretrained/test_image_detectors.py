"""Detectors of Detectron2 and torchvision as functions, with made weights."""

import builtins
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from model_utils import CLASSES
from PIL import Image
from sandbox import NARROW, merged
from usage_utils import picture

from reldn_d2.checkpoint import DetectorCheckpointer
from reldn_d2.pretrained import image_detectors, load_detector
from reldn_d2.utils.image_io import ImageError

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model

COCO = [x["name"] for x in COCO_CATEGORIES if x["isthing"]]
SSD = "torchvision:ssdlite320_mobilenet_v3_large"


def write_detector(folder: Path, *options) -> tuple[str, torch.nn.Module]:
    """Write the YAML and the weights of a narrow detector with random weights, without names."""
    torch.manual_seed(0)
    architecture = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.WEIGHTS", "")
    cfg = merged("configs/Toy/detector.yaml", *NARROW, *architecture, *options)
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, folder / "detector.pth")
    (folder / "detector.yaml").write_text(cfg.dump())
    return str(folder / "detector.yaml"), model


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """YAML, weights and model of a narrow detector with COCO's 80 classes."""
    folder = tmp_path_factory.mktemp("coco")
    options = ("MODEL.ROI_HEADS.NUM_CLASSES", 80, "DATASETS.TEST", ("coco_2017_val",))
    yaml, model = write_detector(folder, *options)
    return yaml, str(folder / "detector.pth"), model.eval()


@pytest.fixture(scope="module")
def ssd(tmp_path_factory):
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(SSD[12:], weights=None, weights_backbone=None, num_classes=91)
    path = tmp_path_factory.mktemp("ssd") / "ssd.pth"
    torch.save(model.state_dict(), path)
    return str(path), model.eval()


def check(found, names, size):
    """Assert that a result has the promised form."""
    assert set(found) == {"boxes", "classes", "scores"}
    count = len(found["boxes"])
    assert found["boxes"].shape == (count, 4) and count > 0
    assert len(found["classes"]) == len(found["scores"]) == count
    assert {*found["classes"]} <= {*names}
    assert found["scores"] == sorted(found["scores"], reverse=True)
    assert all(isinstance(x, float) and 0 <= x <= 1 for x in found["scores"])
    assert found["boxes"].min() >= 0 and (found["boxes"] <= [*size, *size]).all()


def test_load_detector_detectron2_names_boxes_scores(coco, tmp_path):
    yaml, file, model = coco
    detect = load_detector(yaml, file, device="cpu", min_score=0.0)
    rgb = picture(60, 90)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    found = detect(tmp_path / "a.png")
    check(found, COCO, (90, 60))
    with torch.no_grad():
        image = np.array(Image.fromarray(rgb).resize((96, 64), Image.BILINEAR))[:, :, ::-1]
        tensor = torch.as_tensor(image.transpose(2, 0, 1).copy())
        expected = model([{"image": tensor, "height": 60, "width": 90}])[0]["instances"]
    np.testing.assert_allclose(found["boxes"], expected.pred_boxes.tensor, rtol=1e-4)
    assert found["classes"] == [COCO[x] for x in expected.pred_classes.tolist()]
    # Arrays and PIL images are the same image.
    for image in (rgb, Image.fromarray(rgb)):
        assert detect(image)["scores"] == found["scores"]
    assert detect(rgb[:, :, ::-1], channels="BGR")["scores"] == found["scores"]
    middle = found["scores"][2]
    best = load_detector(yaml, file, device="cpu", min_score=middle)(rgb)
    assert best["scores"] == [x for x in found["scores"] if x >= middle]
    with pytest.raises(ImageError, match="none.png"):
        detect("none.png")


def test_load_detector_model_zoo_config_and_weights(coco, tmp_path, monkeypatch):
    yaml, file, _ = coco
    asked = []

    def config_file(name):
        asked.append(name)
        return yaml

    content = {"model": torch.load(file, weights_only=True)["model"], "__author__": "test"}
    content["model"] = {name: x.numpy() for name, x in content["model"].items()}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content))
    zoo = image_detectors.model_zoo
    monkeypatch.setattr(zoo, "get_config_file", config_file)
    monkeypatch.setattr(zoo, "get_checkpoint_url", lambda name: str(tmp_path / "model_final.pkl"))
    name = "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"
    check(load_detector(name, device="cpu", min_score=0.0)(picture()), COCO, (90, 60))
    assert asked == [name]


def test_load_detector_own_checkpoint_has_its_names(tmp_path):
    yaml, model = write_detector(tmp_path)
    DetectorCheckpointer(model, str(tmp_path), thing_classes=CLASSES).save("named")
    detect = load_detector(yaml, tmp_path / "named.pth", device="cpu", min_score=0.0)
    check(detect(picture()), CLASSES, (90, 60))


def test_load_detector_detectron2_unusable_raises(coco, tmp_path):
    yaml, file, _ = coco
    with pytest.raises(ValueError, match="detector 'COCO-Detection/none.yaml': no such file, and"):
        load_detector("COCO-Detection/none.yaml")
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty; give the weights"):
        load_detector(yaml)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        load_detector(yaml, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="2 names for 80 classes"):
        load_detector(yaml, file, class_names=["a", "b"])
    unnamed, _ = write_detector(tmp_path, "DATASETS.TEST", (), "DATASETS.TRAIN", ())
    with pytest.raises(ValueError, match="its classes have no names. Give class_names"):
        load_detector(unnamed, tmp_path / "detector.pth")
    detect = load_detector(unnamed, tmp_path / "detector.pth", class_names=CLASSES)
    assert list(detect.class_names) == CLASSES
    # Weights of a backbone alone would leave the rest of the detector random.
    state = torch.load(file, weights_only=True)["model"]
    backbone = {name: x for name, x in state.items() if name.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="backbone.pth"):
        load_detector(yaml, tmp_path / "backbone.pth")


def test_load_detector_torchvision_names_boxes_scores(ssd):
    file, model = ssd
    rgb = picture(60, 90)
    detect = load_detector(SSD, file, device="cpu", min_score=0.0)
    found = detect(rgb)
    names = [x for x in detect.class_names if x in COCO]
    assert len(names) == 80 and detect.class_names[1] == "person"
    check(found, detect.class_names, (90, 60))
    with torch.no_grad():
        expected = model([torch.as_tensor(rgb.transpose(2, 0, 1).copy()).float() / 255])[0]
    np.testing.assert_allclose(np.sort(found["scores"]), expected["scores"].sort().values)
    assert {*found["classes"]} == {detect.class_names[x] for x in expected["labels"].tolist()}


def test_load_detector_torchvision_own_classes_and_nested_file(tmp_path):
    from torchvision.models import get_model

    model = get_model(SSD[12:], weights=None, weights_backbone=None, num_classes=3)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "own.pth")
    detect = load_detector(
        SSD, tmp_path / "own.pth", "cpu", min_score=0.0, class_names=["cup", "person"]
    )
    check(detect(picture()), ["cup", "person"], (90, 60))
    with pytest.raises(ValueError, match=f"own.pth does not fit {SSD} with 90 classes: .*size"):
        load_detector(SSD, tmp_path / "own.pth")
    with pytest.raises(ValueError, match="give the weights for class_names"):
        load_detector(SSD, class_names=["cup", "person"])


def test_load_detector_torchvision_unusable_raises(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no detection model 'yolo'; known: .*fasterrcnn_resnet50"):
        load_detector("torchvision:yolo")
    with pytest.raises(ValueError, match="no detection model 'resnet50'"):  # a classifier
        load_detector("torchvision:resnet50")
    with pytest.raises(FileNotFoundError, match="no file '.*none.pth'"):
        load_detector(SSD, tmp_path / "none.pth")

    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = "could not be fetched: .*no network.* Download https://.*pth on another machine and"
    with pytest.raises(FileNotFoundError, match=message):
        load_detector(SSD)


def test_load_detector_whole_model_file_says_how_to_save_weights(coco, ssd, tmp_path):
    file = str(tmp_path / "whole.pth")
    for name, model in ((SSD, ssd[1]), (coco[0], coco[2])):
        torch.save(model, file)
        with pytest.raises(
            ValueError, match="whole.pth: expected a state dict, as torch.save.mod"
        ) as e:
            load_detector(name, file, device="cpu")
        assert "but it holds " in str(e.value) and "ALLOW_PICKLE" not in str(e.value)


def test_image_detector_no_detection_is_logged_with_the_threshold(coco, ssd, tmp_path, caplog):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    for name, file in ((coco[0], coco[1]), (SSD, ssd[0])):
        detect = load_detector(name, file, device="cpu", min_score=0.999)
        caplog.clear()
        assert len(detect(tmp_path / "a.png")["boxes"]) == 0
        assert f"a.png: detector {name} finds nothing with a score of 0.999 or more" in caplog.text
        caplog.clear()
        for _ in range(2):  # frames of a video
            detect(picture())
        assert caplog.text.count("finds nothing") == 1


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_load_detector_torchvision_own_threshold_is_lowered(name, tmp_path, monkeypatch):
    """torchvision's detectors drop scores below 0.05 or 0.2 by themselves."""
    from torchvision import models

    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    monkeypatch.setattr(models, "get_model", lambda *_, **__: model)
    names = ["cup", "person"]
    load_detector(f"torchvision:{name}", tmp_path / "x.pth", "cpu", 0.01, names)
    assert model.score_thresh == 0.01


def test_load_detector_without_torchvision_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def no_torchvision(name, *arguments, **options):
        if name == "torchvision":
            raise ImportError("No module named 'torchvision'")
        return real_import(name, *arguments, **options)

    with (
        monkeypatch.context() as patch,
        pytest.raises(ImportError, match="pip install torchvision"),
    ):
        patch.setattr(builtins, "__import__", no_torchvision)
        load_detector(SSD)
