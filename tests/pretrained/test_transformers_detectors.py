"""Detectors of Hugging Face's transformers as functions of an image, with random weights."""

import builtins
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from usage_utils import picture

from reldn_d2.pretrained import load_detector

try:
    import transformers
except ImportError:
    transformers = None

needs_transformers = pytest.mark.skipif(
    transformers is None, reason="the package transformers is not installed"
)
NAMES = ["person", "cup", "dining table"]
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}


def tiny_detr():
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    config = DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=ResNetConfig(**RESNET, out_features=["stage4"]),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=7,
    )
    return DetrForObjectDetection, config, DetrImageProcessor(size={"height": 64, "width": 96})


def tiny_rt_detr():
    from transformers import (
        RTDetrConfig,
        RTDetrForObjectDetection,
        RTDetrImageProcessor,
        RTDetrResNetConfig,
    )

    backbone = RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=7,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
    )
    size = {"height": 64, "width": 96}
    return RTDetrForObjectDetection, config, RTDetrImageProcessor(size=size)


def write_model(folder, make, names=NAMES):
    """Write what ``save_pretrained`` writes; return the folder's name for ``--detector``."""
    torch.manual_seed(0)
    model_class, config, processor = make()
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    else:
        config.num_labels = 3
    model = model_class(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return f"transformers:{folder}"


@needs_transformers
@pytest.mark.parametrize("make", [tiny_detr, tiny_rt_detr])
def test_load_detector_transformers_names_boxes_scores(tmp_path, make):
    name = write_model(tmp_path / "model", make)
    rgb = picture(60, 90)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    detect = load_detector(name, device="cpu", min_score=0.0)
    found = detect(tmp_path / "a.png")
    assert len(found["scores"]) == 7 and list(detect.class_names) == NAMES
    assert set(found["classes"]) <= set(NAMES)
    assert found["scores"] == sorted(found["scores"], reverse=True)
    assert found["boxes"].min() >= 0 and (found["boxes"] <= [90, 60, 90, 60]).all()
    # The boxes of the library itself, which may leave the image.
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        output = model(**processor(images=Image.fromarray(rgb), return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(
        output, threshold=0.0, target_sizes=[(60, 90)]
    )
    order = expected["scores"].argsort(descending=True, stable=True)
    np.testing.assert_allclose(found["scores"], expected["scores"][order], rtol=1e-5)
    boxes = expected["boxes"][order].numpy().clip(0, [90, 60, 90, 60])
    np.testing.assert_allclose(found["boxes"], boxes, atol=1e-4)
    middle = found["scores"][3]
    assert len(load_detector(name, device="cpu", min_score=middle)(rgb)["scores"]) == 4


@needs_transformers
def test_load_detector_transformers_class_names(tmp_path):
    name = write_model(tmp_path / "model", tiny_detr, names=None)
    with pytest.raises(ValueError, match="its classes have no names. Give class_names, or write"):
        load_detector(name)
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        load_detector(name, class_names=["a", "b"])
    detect = load_detector(name, device="cpu", min_score=0.0, class_names=NAMES)
    assert set(detect(picture())["classes"]) <= set(NAMES)


@needs_transformers
def test_load_detector_transformers_unusable_raises_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="needs config.json, preprocessor_config.json"):
        load_detector(f"transformers:{tmp_path}/empty")
    with pytest.raises(ValueError, match="leave out the weights .x.pth.; give the folder"):
        load_detector(f"transformers:{tmp_path}", "x.pth")
    missing = tmp_path / "missing"
    with pytest.raises((FileNotFoundError, ValueError), match="detector transformers:") as error:
        load_detector(f"transformers:{missing}")
    assert "\n" not in str(error.value)


@needs_transformers
def test_demo_transformers_detector_writes_json(tmp_path):
    import json

    import demo as demo_script

    name = write_model(tmp_path / "model", tiny_detr)
    Image.fromarray(picture()).save(tmp_path / "a.png")
    options = ["--pretrained", "vrd_boxes", "--device", "cpu", "--input", str(tmp_path / "a.png")]
    output = ["--output", str(tmp_path / "out.json"), "--format", "json"]
    assert (
        demo_script.main([*options, *output, "--detector", name, "--confidence-threshold", "0"])
        == 0
    )
    record = json.loads((tmp_path / "out.json").read_text())
    assert len(record["instances"]["boxes"]) + len(record.get("left_out", [])) == 7


def test_load_detector_transformers_not_installed_raises(monkeypatch):
    for module in [x for x in sys.modules if x.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, module)
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    message = "detector transformers:x/y needs the package transformers .*pip install transformers"
    with pytest.raises(ImportError, match=message):
        load_detector("transformers:x/y")
