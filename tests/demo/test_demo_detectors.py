"""demo/demo.py with a model of the package and anyone's detector."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from usage_utils import picture, write_boxes_checkpoint, write_coco_detector

import demo as demo_script


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Options for a narrow detector with COCO's classes and random weights."""
    yaml, weights = write_coco_detector(tmp_path_factory.mktemp("coco"))
    return ["--detector", str(yaml), "--detector-weights", str(weights)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def run():
    """Run the demo with the pretrained model, or with options that replace it."""

    def call(*arguments, model=("--pretrained", "vrd_boxes")):
        return demo_script.main([*model, "--device", "cpu", *map(str, arguments)])

    return call


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(2):
        Image.fromarray(picture(seed=seed)).save(folder / f"{seed}.png")
    return folder


@pytest.mark.parametrize("own", [False, True])
def test_demo_any_detector_writes_json_and_pictures(own, run, models, detector, photos, capsys):
    out = photos.parent / "out"
    options = ["--input", photos, *detector, "--confidence-threshold", 0, "--min-score", 0]
    model = ["--checkpoint", str(write_boxes_checkpoint(models / "own"))] if own else None
    model = model or ["--pretrained", "vrd_boxes"]
    assert run(*options, "--output", out, "--format", "json", model=model) == 0
    records = [json.loads((out / f"{n}.json").read_text()) for n in (0, 1)]
    assert all(len(x["instances"]["boxes"]) + len(x["left_out"]) == 20 for x in records)
    assert any(x["relations"]["predicate_names"] for x in records)
    left_out = [name for x in records for name in x["left_out"].values()]
    assert f"{len(left_out)} boxes left out, of classes that the model does not have: " in (
        capsys.readouterr().out
    )
    assert run(*options, "--output", out) == 0
    assert sorted(x.name for x in out.glob("*.png")) == ["0.png", "1.png"]


def test_demo_detector_threshold(run, detector, photos):
    out = photos.parent / "out.json"
    options = ["--input", photos / "0.png", *detector, "--output", out, "--format", "json"]
    assert run(*options) == 0  # 0.5; random weights have no such scores
    record = json.loads(out.read_text())
    assert record["instances"]["boxes"] == [] and "left_out" not in record


def test_demo_torchvision_detector(run, photos):
    from torchvision.models import get_model

    name = "ssdlite320_mobilenet_v3_large"
    torch.manual_seed(0)
    model = get_model(name, weights=None, weights_backbone=None, num_classes=91)
    torch.save(model.state_dict(), photos.parent / "ssd.pth")
    out = photos.parent / "out.json"
    options = ["--input", photos / "0.png", "--output", out, "--format", "json"]
    detector = [
        "--detector",
        f"torchvision:{name}",
        "--detector-weights",
        photos.parent / "ssd.pth",
    ]
    assert run(*options, *detector, "--confidence-threshold", 0.01) == 0
    record = json.loads(out.read_text())
    assert len(record["instances"]["boxes"]) + len(record["left_out"]) > 0


def test_demo_pretrained_given_boxes(run, photos):
    entry = {"boxes": [[0, 0, 40, 50], [9, 9, 60, 50], [30, 20, 80, 55]]}
    entry["classes"] = ["Person", "zebra", "couch"]
    (photos / "boxes.json").write_text(json.dumps({"0.png": entry}))
    out = photos.parent / "out.json"
    options = ["--input", photos / "0.png", "--output", out, "--format", "json"]
    assert run(*options, "--boxes", photos / "boxes.json") == 0
    record = json.loads(out.read_text())
    assert record["instances"]["class_names"] == ["person", "sofa"]
    assert record["left_out"] == {"1": "zebra"}


def test_demo_detector_on_video(run, detector, tmp_path, capsys):
    path, out = tmp_path / "in.avi", tmp_path / "out.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (90, 60))
    for _ in range(2):
        writer.write(np.ascontiguousarray(picture()[:, :, ::-1]))
    writer.release()
    options = ["--video-input", path, "--output", out, "--confidence-threshold", 0]
    assert run(*options, *detector) == 0
    printed = capsys.readouterr().out
    assert "2 frames done" in printed and "boxes left out" in printed and out.is_file()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--detector", "x.yaml", "--boxes", "b.json"], "leave out --boxes and --detections"),
        (["--detector-weights", "x.pth"], "--detector-weights: add --detector"),
        (["--detector", "x.yaml"], "detector 'x.yaml': no such file"),
        (["--detector", "torchvision:yolo"], "no detection model 'yolo'"),
        ([], "no detector of its own: add --detector NAME"),
    ],
)
def test_demo_detector_bad_options_print_one_line(options, message, run, photos, capsys):
    out = photos.parent / "out"
    assert run("--input", photos, "--output", out, *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("demo.py: ") and message in error


def test_demo_pretrained_and_checkpoint_exclude_each_other(run, photos, capsys):
    with pytest.raises(SystemExit):
        run("--input", photos, "--checkpoint", "x.pth")
    assert "not allowed with argument" in capsys.readouterr().err
