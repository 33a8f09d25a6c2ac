"""Models that come with the package: the file, the tool that writes it, and boxes of anyone."""

import json
import lzma

import numpy as np
import pack_checkpoint
import pytest
import torch
from model_utils import ROOT
from PIL import Image
from usage_utils import picture, write_boxes_checkpoint, write_checkpoint

from reldn_d2.checkpoint import read_checkpoint
from reldn_d2.data.datasets.vrd import VRD_CLASSES, VRD_PREDICATES
from reldn_d2.predictor import RelationPredictor
from reldn_d2.pretrained import PRETRAINED, pretrained_file, weights
from reldn_d2.utils.image_io import ImageError

BOXES = [[5, 5, 40, 55], [30, 20, 80, 58], [1, 1, 20, 20], [10, 30, 60, 59]]


@pytest.fixture(scope="module")
def boxes_checkpoint(tmp_path_factory):
    return write_boxes_checkpoint(tmp_path_factory.mktemp("boxes"))


@pytest.fixture(scope="module")
def packed(boxes_checkpoint):
    path = boxes_checkpoint.with_name("packed.pth.xz")
    arguments = ["--checkpoint", str(boxes_checkpoint), "--output", str(path)]
    assert pack_checkpoint.main([*arguments, "--note", "python train_net.py ..."]) == 0
    return path


def test_pack_checkpoint_predicts_as_the_checkpoint(boxes_checkpoint, packed):
    given = dict(boxes=BOXES, classes=["person", "bike", "sky", "table"], scores=[0.9, 0.8, 1, 0.5])
    first, second = (
        RelationPredictor.from_checkpoint(path, device="cpu")(picture(), **given)
        for path in (boxes_checkpoint, packed)
    )
    rows = {tuple(x): score for x, score in zip(first.relations.tolist(), first.scores)}
    for x, score in zip(second.relations.tolist(), second.scores):
        assert score == pytest.approx(rows.get(tuple(x), score), rel=0.02)
    assert len(second.scores) == len(first.scores) > 10
    assert second.triplets()[0][:3] == first.triplets()[0][:3]


def test_pack_checkpoint_keeps_names_config_and_provenance(boxes_checkpoint, packed):
    content = read_checkpoint(str(packed))
    assert set(content) == {"model", "reldn", "about"}
    original = torch.load(boxes_checkpoint, weights_only=True)
    assert content["model"].keys() == original["model"].keys()
    assert content["model"]["relation_head.semantic.table.weight"].dtype == torch.float16
    about, description = content["about"], content["reldn"]
    assert description["thing_classes"] == list(VRD_CLASSES)
    assert description["predicate_classes"] == list(VRD_PREDICATES)
    assert description["predicates_per_pair"] == original["reldn"]["predicates_per_pair"]
    assert str(boxes_checkpoint.parent) not in description["config"]  # no path of this machine
    assert "research use" in about["license"]  # as for every model of VRD's names
    assert about["note"] == "python train_net.py ..."
    assert len(about["source_sha256"]) == 64 and about["reldn_d2"]
    assert packed.stat().st_size < 1e6


@pytest.mark.parametrize(
    "break_it, output, message",
    [
        (lambda x: x["reldn"].update(thing_classes=[]), "x.pth.xz", "has no thing_classes"),
        (lambda x: x["reldn"].update(config=""), "x.pth.xz", "has no config"),
        (lambda x: x["model"].clear(), "x.pth.xz", "has no relation head"),
        (
            lambda x: x["model"]["relation_head.semantic.table.weight"].fill_(1e6),
            "x.pth.xz",
            "table.weight has values beyond the range of half precision",
        ),
        (lambda x: None, "x.bin", "x.bin: the name must end in .pth, .pth.xz or .safetensors"),
    ],
)
def test_pack_checkpoint_unusable_input_exits_1(
    boxes_checkpoint, break_it, output, message, tmp_path, capsys
):
    content = torch.load(boxes_checkpoint, weights_only=True)
    break_it(content)
    torch.save(content, tmp_path / "broken.pth")
    arguments = ["--checkpoint", str(tmp_path / "broken.pth"), "--output", str(tmp_path / output)]
    assert pack_checkpoint.main(arguments) == 1
    assert message in capsys.readouterr().err and not (tmp_path / output).exists()


def test_read_checkpoint_broken_compressed_file_raises(packed, tmp_path):
    (tmp_path / "cut.pth.xz").write_bytes(packed.read_bytes()[:5000])
    (tmp_path / "text.pth.xz").write_bytes(lzma.compress(b"text"))
    (tmp_path / "plain.pth.xz").write_bytes(b"text")
    for name in ("cut", "text", "plain"):
        with pytest.raises(ValueError, match=f"{name}.pth.xz.*broken"):
            read_checkpoint(str(tmp_path / f"{name}.pth.xz"))


def test_pretrained_file_unknown_name_lists_those_that_exist():
    with pytest.raises(ValueError, match="no pretrained model 'vg_boxes'; known: vrd_boxes"):
        RelationPredictor.from_pretrained("vg_boxes")


def test_pretrained_file_missing_from_the_installation_raises(monkeypatch):
    monkeypatch.setitem(PRETRAINED, "vrd_boxes", "none.pth.xz")
    with pytest.raises(FileNotFoundError, match="missing from this installation"):
        pretrained_file("vrd_boxes")


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_files_are_small_and_say_where_they_come_from(name):
    path = weights.FOLDER / PRETRAINED[name]
    assert path.stat().st_size < 1e6 and path.name in (weights.FOLDER / "LICENSE.md").read_text()
    about = read_checkpoint(str(path))["about"]
    assert about["license"] == (weights.FOLDER / "LICENSE.md").read_text() and about["note"]


@pytest.fixture
def pretrained():
    return RelationPredictor.from_pretrained("vrd_boxes", device="cpu")


def test_vrd_boxes_on_the_photo_predicts_what_the_picture_shows(pretrained):
    (given,) = json.loads((ROOT / "docs/photo_boxes.json").read_text()).values()
    graph = pretrained(ROOT / "docs/photo.jpg", **given)
    triplets = [(x.subject, x.predicate, x.object) for x in graph.best(10).triplets()]
    assert {("person", "wear", "coat"), ("hand", "hold", "camera")} <= set(triplets)


def test_from_pretrained_foreign_names_are_matched_and_others_counted(pretrained, caplog):
    assert pretrained.thing_classes == list(VRD_CLASSES)
    classes = ["Person", "zebra", "couch", "traffic-light"]
    found = dict(boxes=np.array(BOXES), classes=classes, scores=np.array([0.9, 0.8, 0.7, 0.6]))
    graph = pretrained(picture(), **found)
    names = [pretrained.thing_classes[x] for x in graph.classes]
    assert names == ["person", "sofa", "traffic light"]
    assert graph.boxes.tolist() == [BOXES[0], BOXES[2], BOXES[3]]
    assert graph.box_scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert graph.left_out == {1: "zebra"} and graph.best(3).left_out == {1: "zebra"}
    assert json.loads(graph.to_json())["left_out"] == {"1": "zebra"}
    assert "image: left out 1 of 4 boxes" in caplog.text and "1 x zebra" in caplog.text
    caplog.clear()
    pretrained(picture(), **found)
    assert "left out" not in caplog.text  # known by now; the result still counts
    pretrained(picture(), boxes=BOXES[:2], classes=["zebra", "wine glass"])
    assert "left out 2 of 2 boxes" in caplog.text and "1 x wine glass" in caplog.text
    # As detections, and in a list with an image that loses nothing and one that loses everything.
    detected = pretrained(picture(), detections=found)
    assert detected.left_out == {1: "zebra"} and len(detected.boxes) == 3
    many = pretrained([picture()] * 3, boxes=[BOXES] * 3, classes=[classes, [0] * 4, ["zebra"] * 4])
    assert [len(x.boxes) for x in many] == [3, 4, 0]
    assert [len(x.left_out) for x in many] == [1, 0, 4] and len(many[2].scores) == 0
    assert "left_out" not in many[1].to_dict()


def test_from_pretrained_unknown_classes_as_errors():
    strict = RelationPredictor.from_pretrained("vrd_boxes", "cpu", unknown_classes="error")
    with pytest.raises(ImageError, match="no class 'zebra'"):
        strict(picture(), boxes=BOXES[:2], classes=["couch", "zebra"])
    assert strict(picture(), boxes=BOXES[:1], classes=["couch"]).triplets() == []
    with pytest.raises(ValueError, match="expected error or leave_out"):
        RelationPredictor.from_pretrained("vrd_boxes", unknown_classes="skip")


def test_from_checkpoint_unknown_ids_stay_errors(tmp_path):
    path = write_checkpoint(tmp_path)
    lenient = RelationPredictor.from_checkpoint(path, "cpu", unknown_classes="leave_out")
    with pytest.raises(ImageError, match="no class 99"):
        lenient(picture(), boxes=BOXES[:2], classes=["person", 99])
    assert lenient(picture(), boxes=BOXES[:2], classes=["person", "sky"]).left_out == {1: "sky"}
    assert len(lenient(picture(), boxes=BOXES).boxes) == 4  # without classes


def test_photo_of_the_readme_has_boxes_of_known_classes():
    photo = ROOT / "docs" / "photo.jpg"
    entry = json.loads((ROOT / "docs" / "photo_boxes.json").read_text())[photo.name]
    assert photo.stat().st_size <= 200_000 and {*entry["classes"]} <= {*VRD_CLASSES}
    boxes, (width, height) = np.array(entry["boxes"]), Image.open(photo).size
    assert len(boxes) == len(entry["classes"]) >= 8
    assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_vrd_boxes_logit_adjustment_prefers_rarer_predicates():
    given = dict(boxes=BOXES, classes=["person", "bike", "sky", "table"])
    opts = ["TEST.RELATIONS.TOPK", 20, "TEST.RELATIONS.PREDICATES_PER_PAIR", [1]]
    means = []
    for tau in (0.0, 0.5, 1.0):
        opts_of_tau = [*opts, "TEST.RELATIONS.LOGIT_ADJUSTMENT", tau]
        predictor = RelationPredictor.from_pretrained("vrd_boxes", "cpu", opts_of_tau)
        counts = predictor.model.relation_head.prior.predicate_counts.numpy()
        assert counts.sum() == 29857  # the relations of VRD's training images
        means.append(float(np.log(counts[predictor(**given).relations[:, 2]]).mean()))
    assert means[0] > means[1] > means[2]
