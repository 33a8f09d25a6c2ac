"""Pictures and the HTML gallery of an evaluation, from its predictions file."""

import gzip
import html
import json
import re
import shutil
import subprocess

import draw_relations
import make_gallery
import numpy as np
import pytest
import torch
from model_utils import busy_item, register_dataset, unregister_dataset
from PIL import Image
from usage_utils import picture, write_checkpoint

from reldn_d2.evaluation.records import Prediction
from reldn_d2.gallery import gallery_record, write_gallery
from reldn_d2.prediction import RelationPrediction
from reldn_d2.predictor import RelationPredictor

from detectron2.structures import Boxes, BoxMode, Instances

NAME = "gallery_test_set"


@pytest.fixture
def evaluation(tmp_path):
    """Arguments that name a data set of two images and a predictions file of it."""
    register_dataset(NAME, tmp_path / "images")
    truth = busy_item()
    record = {
        "image_id": 0,
        "instances": {
            "boxes": truth["instances"].gt_boxes.tensor.tolist(),
            "classes": truth["instances"].gt_classes.tolist(),
            "scores": [0.9] * 4,
        },
        "relations": {
            "pairs": [[1, 3], [0, 1], [3, 0]],
            "predicates": [3, 0, 2],
            "scores": [0.3, 0.5, 0.4],
        },
    }
    file = tmp_path / "relation_predictions.json.gz"
    with gzip.open(file, "wt") as stream:
        json.dump([record, {**record, "image_id": 1}], stream)
    yield ["--dataset", NAME, "--predictions", str(file)]
    unregister_dataset(NAME)


def test_gallery_of_an_evaluation(evaluation, tmp_path, capsys):
    out = tmp_path / "gallery.html"
    arguments = [*evaluation, "--output", str(out)]
    assert make_gallery.main(arguments) == 0
    lines = out.read_text().splitlines()
    records = [json.loads(x.rstrip(",")) for x in lines if x.startswith('{"name"')]
    assert [x["truth"] for x in records] == [5, 5]
    assert [row[3] for row in records[0]["rows"]] == [0.5, 0.4, 0.3]
    assert [row[4] for row in records[0]["rows"]] == [True, False, True]
    assert [row[2] for row in records[0]["missed"]] == ["plays", "on", "under"]
    (tmp_path / "images" / "1.png").write_text("hello")
    assert make_gallery.main(arguments) == 1
    assert "left out: " in capsys.readouterr().err


def test_predictions_of_another_data_set_are_told(evaluation, tmp_path, capsys):
    settings = {"dataset": "another", "task": "sgdet", "predicates_per_pair": [1], "triplets": 9}
    (tmp_path / "relation_predictions_settings.json").write_text(json.dumps(settings))
    assert make_gallery.main([*evaluation, "--output", str(tmp_path / "x.html")]) == 0
    assert "written for data set 'another', not 'gallery_test_set'" in capsys.readouterr().err


def test_pictures_of_an_evaluation(evaluation, tmp_path, capsys):
    arguments = [*evaluation, "--output", str(tmp_path / "beside"), "--number", "2"]
    assert draw_relations.main(arguments) == 0
    assert draw_relations.main([*evaluation[:2], "--output", str(tmp_path / "truth")]) == 0
    for name in ("0.png", "1.png"):
        beside, truth = (Image.open(tmp_path / x / name).size for x in ("beside", "truth"))
        assert beside != truth
    (tmp_path / "images" / "1.png").write_text("hello")
    capsys.readouterr()
    assert draw_relations.main(arguments) == 1
    found = capsys.readouterr()
    assert "1.png: " in found.err and found.out.count(".png") == 1


@pytest.mark.parametrize("tool", [draw_relations, make_gallery])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"--dataset": "gallery_test_sat"}, f"Near to it: {NAME}"),
        ({"--predictions": "none.json"}, "No predictions file 'none.json'"),
        ({"--predictions": "other.json"}, f"data set '{NAME}' has no image 'x'"),
        ({"--module": "no_such_module"}, "--module no_such_module: No module named"),
    ],
)
def test_wrong_commands(tool, change, message, evaluation, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps([Prediction.empty("x").to_record()]))
    given = {**dict(zip(evaluation[::2], evaluation[1::2])), "--output": "out.html", **change}
    with pytest.raises(SystemExit) as status:
        tool.main([x for pair in given.items() for x in pair])
    assert status.value.code == 2
    assert message in capsys.readouterr().err


def test_predictions_become_an_output_again():
    arrays = [[[0, 0, 4, 5], [1, 2, 3, 4]], [1, 0], [0.5, 0.8], [[0, 1], [1, 0]], [2, 1]]
    prediction = Prediction.from_arrays(7, *arrays, [0.1, 0.2])
    output = prediction.to_output(20, 30)
    assert output["instances"].image_size == (20, 30)
    again = Prediction.from_output(7, output)
    for name in ("boxes", "classes", "box_scores", "pairs", "predicates", "scores"):
        np.testing.assert_allclose(getattr(again, name), getattr(prediction, name), rtol=1e-6)
    expected = torch.tensor([0.5, 0.25])
    torch.testing.assert_close(output["relations"].predicate_scores, expected)


def test_gallery_cannot_be_broken_by_names(tmp_path):
    predictor = RelationPredictor.from_checkpoint(write_checkpoint(tmp_path), device="cpu")
    evil = "</script><script>alert(1)</script>"
    record = gallery_record(
        evil, picture(), predictor(picture()), [evil] * 9, ["<b>&amp;"] * 6, topk=3
    )
    out = tmp_path / "x.html"
    assert write_gallery(out, [record], evil, ["<b>"]) == 1
    page = out.read_text()
    assert "<script>alert" not in page and page.count("</script>") == 1
    assert len(record["rows"]) == 3 and record["truth"] is None


# Sets the page's controls as a user does, and writes down what is then seen.
PROBE = """<script>
const report = [];
function look(what, settings) {
  for (const id in settings) {
    el(id).value = settings[id];
    el(id).dispatchEvent(new Event("input"));
  }
  const names = [...document.querySelectorAll("h2")].map(x => x.textContent).join(" ");
  const rows = [...document.querySelectorAll("article button")].map(x => x.textContent).join(";");
  const wide = document.documentElement.scrollWidth > window.innerWidth;
  report.push(`${what}|${names}|${rows}|${wide}`);
}
look("all", {});
look("on", { predicate: "on" });
look("missed", { predicate: "", kind: "missed" });
look("high", { kind: "all", sort: "high" });
look("worst", { sort: "worst" });
look("words", { sort: "order", words: "table" });
document.title = "done";
document.body.append(make("pre", { id: "report", textContent: report.join("\\n") }));
</script></body>"""


@pytest.mark.parametrize("width", [1400, 420])
def test_gallery_in_a_browser(width, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium")
    truth = {
        "annotations": [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": number}
            for number, box in enumerate([[0, 0, 40, 50], [30, 20, 80, 55], [5, 30, 30, 58]])
        ],
        "relations": [(0, 1, 0), (1, 2, 1)],
    }

    def record(name, scores, predicates):
        found = RelationPrediction(Instances((60, 90)), Instances((60, 90)))
        instances, relations = found["instances"], found["relations"]
        instances.pred_boxes = Boxes(torch.tensor([x["bbox"] for x in truth["annotations"]]))
        instances.pred_classes = torch.arange(3)
        relations.pairs = torch.tensor([[0, 1], [1, 2]][: len(scores)])
        relations.predicates, relations.scores = torch.tensor(predicates), torch.tensor(scores)
        names = (["person", "cup", "table"], ["holds", "on"])
        return gallery_record(name, picture(), found, *names, truth)

    records = [record("low", [0.2], [1]), record("both", [0.9, 0.5], [0, 1])]
    write_gallery(tmp_path / "x.html", records, "A title", ["holds", "on"])
    page = (tmp_path / "x.html").read_text().replace("</body>", PROBE)
    (tmp_path / "x.html").write_text(page)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
    flags += "--disable-background-networking --disable-component-update --disable-sync "
    flags += f"--window-size={width},900 --virtual-time-budget=3000"
    done = subprocess.run(
        [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'user'}", tmp_path / "x.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    report = html.unescape(re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.S).group(1))
    seen = {x.split("|")[0]: x.split("|")[1:] for x in report.split("\n")}
    hit, wrong, third = "✓person holds cup0.90", "✗person on cup0.20", "✓cup on table0.50"
    missed = "–person holds cup;–cup on table"
    both = f"{hit};{third}"
    assert seen["all"][:2] == ["low both", f"{wrong};{missed};{both}"]
    assert seen["on"][:2] == ["low both", f"{wrong};–cup on table;{third}"]
    assert seen["missed"][:2] == ["low", missed]
    assert seen["high"][:2] == ["both low", f"{both};{wrong};{missed}"]
    assert seen["worst"][0] == "low both"
    assert seen["words"][1] == f"–cup on table;{third}"
    assert all(x[2] == "false" for x in seen.values())  # nothing to scroll to the side
