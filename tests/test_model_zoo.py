"""Included configs and models by name, also away from a checkout."""

import re

import pytest
import torch
from model_utils import ROOT

from reldn_d2 import load_config, model_zoo
from reldn_d2.predictor import RelationPredictor, read_description
from reldn_d2.pretrained.weights import FOLDER, PRETRAINED
from reldn_d2.utils.included_configs import find_config_file, included_configs


def test_get_config_file_is_the_file_of_the_repository():
    path = model_zoo.get_config_file("VRD/reldn_boxes.yaml")
    assert open(path).read() == (ROOT / "configs/VRD/reldn_boxes.yaml").read_text()


def test_get_config_file_unknown_name_raises_with_similar_ones():
    with pytest.raises(ValueError, match="no included config 'VRD/reldn_box.yaml'; did you mean"):
        model_zoo.get_config_file("VRD/reldn_box.yaml")


@pytest.mark.parametrize("name", included_configs())
def test_get_config_reads_every_config(name):
    cfg = model_zoo.get_config(name)
    assert cfg.dump() == load_config(str(ROOT / "configs" / name)).dump()


def test_get_config_trained_is_the_config_of_the_checkpoint():
    cfg = model_zoo.get_config("VRD/reldn_boxes.yaml", trained=True)
    saved = load_config()
    saved.merge_from_other_cfg(saved.load_cfg(read_description(cfg.MODEL.WEIGHTS)["config"]))
    for key in ("META_ARCHITECTURE", "RELDN", "ROI_RELATION_HEAD"):
        assert cfg.MODEL[key] == saved.MODEL[key], key


def test_get_checkpoint_url_of_an_untrained_config_raises():
    with pytest.raises(ValueError, match="no trained model of 'Toy/reldn.yaml' .*VRD/reldn_boxes"):
        model_zoo.get_checkpoint_url("Toy/reldn.yaml")


def test_get_trained_model_has_the_weights_of_the_included_one():
    state = model_zoo.get("VRD/reldn_boxes.yaml", trained=True).state_dict()
    expected = RelationPredictor.from_pretrained("vrd_boxes", device="cpu").model.state_dict()
    assert state.keys() == expected.keys() and len(state) > 2
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", ["configs/VRD/reldn_boxes.yaml", "VRD/reldn_boxes.yaml"])
def test_load_config_away_from_a_checkout_finds_the_included_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).OUTPUT_DIR == "output/vrd/reldn_boxes"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("OUTPUT_DIR: mine\n")  # a file of the user comes first
    assert load_config(name).OUTPUT_DIR == "mine"


def test_find_config_file_unknown_path_stays_as_it_is():
    assert find_config_file("configs/VRD/none.yaml") == "configs/VRD/none.yaml"
    assert find_config_file("") == ""


def test_documented_zoo_has_every_included_model_with_its_size_and_metrics():
    lines = (ROOT / "docs/model_zoo.md").read_text().splitlines()
    for name, file in PRETRAINED.items():
        (row,) = [line for line in lines if line.startswith(f"| `{name}` ")]
        assert f" {(FOLDER / file).stat().st_size / 1e6:.2f} MB " in row
        (measured,) = [
            line
            for line in (ROOT / "docs/benchmarks.md").read_text().splitlines()
            if line.startswith(f"| {name} ")
        ]
        for metric in measured.split(" | ")[1:3]:  # k = 1 and k = 70
            assert f"| {metric} |" in row


def test_documented_zoo_released_checkpoints_have_configs():
    text = (ROOT / "docs/model_zoo.md").read_text()
    rows = re.findall(r"\| `\S+/model_step\d+\.pth` \| \[`configs/(\S+)`\]", text)
    assert len(rows) == 6
    for name in rows:
        assert model_zoo.get_config(name).MODEL.META_ARCHITECTURE == "RelDN"
