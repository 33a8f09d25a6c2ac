"""Checkpoints as .safetensors, with the package if it is installed and always with a stand-in."""

import importlib.util
import json
import struct
import sys

import numpy as np
import pack_checkpoint
import pytest
import safetensors_stand_in
import torch
from model_utils import small_model
from usage_utils import picture, write_boxes_checkpoint, write_checkpoint

from reldn_d2.checkpoint import RelDNCheckpointer, read_checkpoint
from reldn_d2.checkpoint import write_checkpoint as write
from reldn_d2.predictor import RelationPredictor, read_description
from reldn_d2.pretrained import pretrained_file

INSTALLED = importlib.util.find_spec("safetensors") is not None
BOXES = [[5, 5, 40, 55], [30, 20, 80, 58], [1, 1, 20, 20]]


@pytest.fixture(params=["stand-in", "package"])
def package(request, monkeypatch):
    """The package safetensors, or its stand-in."""
    if request.param == "stand-in":
        safetensors_stand_in.install(monkeypatch)
    elif not INSTALLED:
        pytest.skip("safetensors is not installed: pip install safetensors")


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)


@pytest.fixture(scope="module")
def boxes_checkpoint(tmp_path_factory):
    return write_boxes_checkpoint(tmp_path_factory.mktemp("boxes"))


def pack(source, target, *options):
    arguments = ["--checkpoint", str(source), "--output", str(target), "--note", "by hand"]
    assert pack_checkpoint.main([*arguments, *options]) == 0
    return target


def test_packed_safetensors_predicts_exactly_as_the_checkpoint(
    package, checkpoint, tmp_path, capsys
):
    path = pack(checkpoint, tmp_path / "model.safetensors", "--full-precision")
    assert read_checkpoint(str(path))["about"]["license"] == ""  # not VRD's
    assert "license: none (--license FILE adds one)" in capsys.readouterr().out
    first, second = (
        RelationPredictor.from_checkpoint(x, device="cpu")(picture()).to_dict()
        for x in (checkpoint, path)
    )
    assert first == second and len(first["relations"]["scores"]) > 10


def test_packed_safetensors_holds_what_the_compressed_file_holds(
    package, boxes_checkpoint, tmp_path
):
    ours, theirs = (
        read_checkpoint(str(pack(boxes_checkpoint, tmp_path / name)))
        for name in ("model.safetensors", "model.pth.xz")
    )
    assert {key: x for key, x in ours.items() if key != "model"} == {
        key: x for key, x in theirs.items() if key != "model"
    }
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in ours["model"].items():
        assert value.dtype == theirs["model"][name].dtype
        torch.testing.assert_close(value, theirs["model"][name], rtol=0, atol=0, equal_nan=True)
    assert read_description(str(tmp_path / "model.safetensors")) == theirs["reldn"]


def test_safetensors_file_has_the_documented_layout(package, boxes_checkpoint, tmp_path):
    data = pack(boxes_checkpoint, tmp_path / "model.safetensors").read_bytes()
    header, values = safetensors_stand_in.read_header(data)
    metadata = header.pop("__metadata__")
    assert set(metadata) <= {"format", "reldn", "about", "iteration"} and metadata["format"] == "pt"
    description, about = json.loads(metadata["reldn"]), json.loads(metadata["about"])
    assert len(description["predicate_classes"]) == 70 and "MODEL:" in description["config"]
    assert about["note"] == "by hand" and "research use" in about["license"]
    assert str(boxes_checkpoint.parent) not in json.dumps(metadata)
    entry = header["relation_head.semantic.table.weight"]
    start, end = entry["data_offsets"]
    table = np.frombuffer(values[start:end], np.float16).reshape(entry["shape"])
    wanted = torch.load(boxes_checkpoint, weights_only=True)["model"]
    wanted = wanted["relation_head.semantic.table.weight"].half().numpy()
    assert entry["dtype"] == "F16" and np.array_equal(table, wanted)


def test_model_weights_safetensors_loads_a_reldn_and_a_detector(package, tmp_path):
    source = write_checkpoint(tmp_path)
    state = torch.load(source, weights_only=True)
    write({"model": state["model"], "reldn": state["reldn"]}, tmp_path / "reldn.safetensors")
    model = small_model(seed=3)
    RelDNCheckpointer(model).load(str(tmp_path / "reldn.safetensors"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state["model"][name], rtol=0, atol=0, equal_nan=True)
    detector = {
        name.removeprefix("detector.model."): value
        for name, value in state["model"].items()
        if name.startswith("detector.model.")
    }
    write({"model": detector}, tmp_path / "detector.safetensors")  # as of another program
    model = small_model(seed=3)
    RelDNCheckpointer(model).load(str(tmp_path / "detector.safetensors"))
    name = "roi_heads.box_predictor.cls_score.weight"
    torch.testing.assert_close(model.detector.model.state_dict()[name], detector[name])


def test_packed_file_packed_again_keeps_license_and_note(package, tmp_path, capsys):
    source = pretrained_file("vrd_boxes")
    arguments = ["--checkpoint", str(source), "--output", str(tmp_path / "again.safetensors")]
    assert pack_checkpoint.main(arguments) == 0
    about, again = (
        read_checkpoint(str(x))["about"] for x in (source, tmp_path / "again.safetensors")
    )
    assert again["license"] == about["license"] and again["note"] == about["note"]
    assert "license: kept from the checkpoint" in capsys.readouterr().out


def test_write_checkpoint_shared_weights_are_written_twice(package, tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    write({"model": {"a": weight, "b": weight, "c": weight.T}}, tmp_path / "x.safetensors")
    state = read_checkpoint(str(tmp_path / "x.safetensors"))["model"]
    for name, wanted in (("a", weight), ("b", weight), ("c", weight.T)):
        assert torch.equal(state[name], wanted)


def test_write_checkpoint_optimizer_in_safetensors_raises(package, tmp_path):
    with pytest.raises(ValueError, match=r"x\.safetensors.*not optimizer; write a \.pth file"):
        write({"model": {}, "optimizer": {}}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"text", struct.pack("<Q", 1 << 40) + b"{}"])
def test_read_checkpoint_broken_safetensors_raises(package, content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read as a checkpoint") as error:
        read_checkpoint(str(tmp_path / "x.safetensors"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["[]", "not JSON"])
def test_read_checkpoint_foreign_metadata_of_our_name_raises(package, value, tmp_path):
    data = safetensors_stand_in.save({"a": torch.zeros(2)}, {"reldn": value})
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read as a checkpoint"):
        read_checkpoint(str(tmp_path / "x.safetensors"))


def test_safetensors_not_installed_says_what_to_install(
    no_package, boxes_checkpoint, tmp_path, capsys
):
    path = tmp_path / "x.safetensors"
    arguments = ["--checkpoint", str(boxes_checkpoint), "--output", str(path)]
    assert pack_checkpoint.main(arguments) == 1
    error = capsys.readouterr().err
    assert "x.safetensors needs safetensors" in error and "pip install safetensors" in error
    assert error.count("\n") == 1 and not path.exists()
    path.write_bytes(safetensors_stand_in.save({"a": torch.zeros(2)}))
    for read in (read_checkpoint, read_description, RelDNCheckpointer(small_model()).load):
        with pytest.raises(ImportError, match=r"x\.safetensors needs .*: pip install safetensors"):
            read(str(path))
