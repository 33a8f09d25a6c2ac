"""Pictures and the HTML gallery of an evaluation from its predictions file."""

import gzip
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import draw_relations
import make_gallery
import numpy as np
import pytest
import torch
from model_utils import busy_item, register_dataset, unregister_dataset
from PIL import Image
from usage_utils import picture, write_checkpoint

from reldn_d2.predictor import RelationPredictor
from reldn_d2.structures.attributes import EntityAttributes
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.vis.gallery import gallery_record, write_gallery

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode

NAME = "gallery_test_set"


@pytest.fixture
def evaluation(tmp_path):
    """Arguments with a dataset of two images and its predictions file."""
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


def test_make_gallery_lists_hits_and_missed_relations(evaluation, tmp_path, capsys):
    out = tmp_path / "gallery.html"
    arguments = [*evaluation, "--output", str(out)]
    assert make_gallery.main([*arguments, "--protocol", "lu2016"]) == 0
    assert out.read_text().count('"truth": 5, "protocol": "lu2016, k = 1"}') == 2
    assert make_gallery.main(arguments) == 0
    assert '"protocol": "relations"}' in out.read_text()
    lines = out.read_text().splitlines()
    records = [json.loads(x.rstrip(",")) for x in lines if x.startswith('{"name"')]
    assert [x["truth"] for x in records] == [5, 5]
    assert [row[3] for row in records[0]["rows"]] == [0.5, 0.4, 0.3]
    assert [row[4] for row in records[0]["rows"]] == [True, False, True]
    assert [row[2] for row in records[0]["missed"]] == ["plays", "on", "under"]
    (tmp_path / "images" / "1.png").write_text("hello")
    assert make_gallery.main(arguments) == 1
    assert "skipped: " in capsys.readouterr().err


def test_make_gallery_predictions_of_another_data_set_warns(evaluation, tmp_path, capsys):
    settings = {"dataset": "another", "task": "sgdet", "predicates_per_pair": [1], "triplets": 9}
    (tmp_path / "relation_predictions_settings.json").write_text(json.dumps(settings))
    assert make_gallery.main([*evaluation, "--output", str(tmp_path / "x.html")]) == 0
    assert "written for dataset 'another', not 'gallery_test_set'" in capsys.readouterr().err


def test_draw_relations_with_and_without_predictions_differ(evaluation, tmp_path, capsys):
    arguments = [*evaluation, "--output", str(tmp_path / "compared"), "--max-images", "2"]
    assert draw_relations.main(arguments) == 0
    assert draw_relations.main([*evaluation[:2], "--output", str(tmp_path / "truth")]) == 0
    for name in ("0.png", "1.png"):
        compared, truth = (Image.open(tmp_path / x / name).size for x in ("compared", "truth"))
        assert compared != truth
    (tmp_path / "images" / "1.png").write_text("hello")
    capsys.readouterr()
    assert draw_relations.main(arguments) == 1
    printed = capsys.readouterr()
    assert "1.png: " in printed.err and printed.out.count(".png") == 1


@pytest.mark.parametrize("tool", [draw_relations, make_gallery])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"--dataset": "gallery_test_sat"}, f"Did you mean {NAME}?"),
        ({"--predictions": "none.json"}, "No predictions file 'none.json'"),
        ({"--predictions": "other.json"}, f"dataset '{NAME}' has no image 'x'"),
        ({"--module": "no_such_module"}, "--module no_such_module: No module named"),
    ],
)
def test_tools_bad_arguments_exit_2(
    tool, change, message, evaluation, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps([SceneGraph.empty("x").to_dict()]))
    given = {**dict(zip(evaluation[::2], evaluation[1::2])), "--output": "out.html", **change}
    with pytest.raises(SystemExit) as status:
        tool.main([x for pair in given.items() for x in pair])
    assert status.value.code == 2
    assert message in capsys.readouterr().err


def test_scene_graph_to_output_roundtrip():
    arrays = [[[0, 0, 4, 5], [1, 2, 3, 4]], [1, 0], [0.5, 0.8], [[0, 1], [1, 0]], [2, 1]]
    prediction = SceneGraph.from_arrays(7, *arrays, [0.1, 0.2], image_size=(20, 30))
    output = prediction.to_output()
    assert output["instances"].image_size == (20, 30)
    again = SceneGraph.from_output(7, output)
    for name in ("boxes", "classes", "box_scores", "pairs", "predicates", "scores"):
        np.testing.assert_allclose(getattr(again, name), getattr(prediction, name), rtol=1e-6)
    expected = torch.tensor([0.5, 0.25])
    torch.testing.assert_close(output["relations"].predicate_scores, expected)


def test_write_gallery_script_in_names_is_escaped(tmp_path):
    predictor = RelationPredictor.from_checkpoint(write_checkpoint(tmp_path), device="cpu")
    evil = "</script><script>alert(1)</script>"
    metadata = Metadata(thing_classes=[evil] * 9, predicate_classes=["<b>&amp;"] * 6)
    record = gallery_record(evil, picture(), predictor(picture()), metadata, topk=3)
    out = tmp_path / "x.html"
    assert write_gallery(out, [record], evil, ["<b>"]) == 1
    page = out.read_text()
    assert "<script>alert" not in page and page.count("</script>") == 1
    assert len(record["rows"]) == 3 and record["truth"] is None


def test_write_gallery_failing_record_keeps_the_old_page(tmp_path):
    def records():
        yield gallery_record("x", picture(), SceneGraph.empty(), METADATA)
        raise KeyboardInterrupt

    out = tmp_path / "x.html"
    out.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_gallery(out, records(), "A title")
    assert out.read_text() == "before" and list(tmp_path.iterdir()) == [out]


def output_of(boxes, classes, pairs, predicates, scores):
    """Return a prediction for an image of 90 x 60 pixels."""
    ones = np.ones(len(boxes))
    return SceneGraph.from_arrays(
        None, boxes, classes, ones, pairs, predicates, scores, image_size=(60, 90)
    )


def truth_of(boxes, classes, relations, **extra):
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category}
        for box, category in zip(boxes, classes)
    ]
    return {"annotations": annotations, "relations": relations, **extra}


METADATA = Metadata(
    thing_classes=["person", "cup", "table"],
    predicate_classes=["holds", "on"],
    evaluator_type="relation",
)


def test_gallery_record_entity_has_one_name_in_all_rows():
    # An ordinal tells which of several cups is meant, predicted or not found.
    boxes = [[0, 0, 40, 50], [5, 5, 20, 30], [50, 10, 70, 40], [75, 2, 89, 25], [60, 30, 89, 58]]
    truth = truth_of(boxes, [0, 1, 1, 1, 2], [(0, 1, 0), (0, 2, 0), (3, 4, 1)])
    person, right, other = [1, 0, 40, 50], [50, 12, 70, 41], [74, 2, 89, 26]
    predicted = output_of(
        [right, person, other], [1, 0, 1], [[1, 0], [1, 2], [0, 1]], [0, 0, 1], [0.9, 0.5, 0.3]
    )
    record = gallery_record("x", picture(), predicted, METADATA, truth)
    names = record["names"]
    assert [[names[s], p, names[o], hit] for s, o, p, _, hit in record["rows"]] == [
        ["person", "holds", "cup 2", True],
        ["person", "holds", "cup 3", False],
        ["cup 2", "on", "person", False],
    ]
    assert [[names[s], p, names[o]] for s, o, p in record["missed"]] == [
        ["person", "holds", "cup 1"],
        ["cup 3", "on", "table"],
    ]
    # Each row keeps its own boxes.
    shown = [[record["boxes"][i] for i in row[:2]] for row in record["rows"] + record["missed"]]
    expected = [[person, right], [person, other], [right, person], boxes[:2], boxes[3:]]
    assert shown == expected
    assert record["truth"] == 3 and record["protocol"] == "relations"
    alone = gallery_record("x", picture(), predicted, METADATA)
    assert alone["names"] == ["cup 1", "person", "cup 2"]
    assert alone["truth"] is None and alone["protocol"] is None
    assert alone["missed"] == [] and {row[4] for row in alone["rows"]} == {None}


def test_gallery_record_shows_attributes_of_each_side():
    boxes = [[0, 0, 40, 50], [50, 10, 70, 40], [75, 2, 89, 25]]
    truth = truth_of(boxes, [0, 1, 2], [(0, 1, 0), (0, 2, 0)])
    truth["annotations"][0]["attributes"] = truth["annotations"][2]["attributes"] = [1]
    predicted = output_of(boxes[:2], [0, 1], [[0, 1]], [0], [0.9])
    attributes = EntityAttributes.from_lists([[0], [0]], [[0.9], [0.2]], 2, "it")
    metadata = Metadata(**METADATA.as_dict(), attribute_classes=["tall", "old"])
    record = gallery_record(
        "x", picture(), replace(predicted, attributes=attributes), metadata, truth
    )
    assert record["names"] == ["person (tall)", "cup", "person (old)", "table (old)"]


def test_gallery_record_other_image_size_raises():
    predicted = output_of([[0, 0, 40, 50], [5, 5, 20, 30]], [0, 1], [[0, 1]], [0], [0.9])
    truth = truth_of([], [], [], file_name="a.jpg", height=60, width=90)
    assert gallery_record("x", picture(60, 90), predicted, METADATA, truth)["truth"] == 0
    with pytest.raises(ValueError, match="a.jpg: the image is 60 x 90 pixels, but its record says"):
        gallery_record("x", picture(90, 60), predicted, METADATA, truth)


# Sets the page's controls and points at rows as a user does, and records what is visible.
PROBE = """<script>
const report = {};
function set(settings) {
  for (const id in settings) {
    el(id).value = settings[id];
    el(id).dispatchEvent(new Event("input"));
  }
}
function look(what, settings) {
  set(settings);
  report[what] = {
    names: [...document.querySelectorAll("h2")].map(x => x.textContent).join(" "),
    rows: [...document.querySelectorAll("article button")].map(x => x.textContent),
    wide: document.documentElement.scrollWidth > window.innerWidth,
  };
}
function pointAt(what, image, row, event) {
  const card = [...document.querySelectorAll("article")]
    .find(x => x.querySelector("h2").textContent === image);
  const button = [...card.querySelectorAll("button")].find(x => x.textContent === row);
  button.dispatchEvent(new Event(event));
  const numbers = (x, names) => names.map(name => Number(x.getAttribute(name)));
  const boxes = {};
  for (const x of card.querySelectorAll("figure svg rect")) {
    const box = numbers(x, ["x", "y", "width", "height"]);
    boxes[box] = boxes[box] || Boolean(x.getAttribute("stroke-dasharray"));
  }
  const tips = [...card.querySelectorAll("figure svg polygon")]
    .map(x => x.getAttribute("points").split(" ")[0].split(",").map(Number));
  const starts = [...card.querySelectorAll("figure svg line")].map(x => numbers(x, ["x1", "y1"]));
  const pressed = [...card.querySelectorAll("button[aria-pressed=true]")].map(x => x.textContent);
  report[what] = { boxes, tips, start: starts[0] || null, pressed };
}
look("all", {});
look("hit", { kind: "hit" });
look("miss", { kind: "miss" });
look("missed", { kind: "missed" });
look("on", { kind: "all", predicate: "on" });
look("order", { predicate: "" });
for (const order of ["high", "low", "worst", "best"]) look(order, { sort: order });
look("words", { sort: "order", words: "table" });
set({ words: "" });
for (const event of ["mouseenter", "focus", "click"]) {
  pointAt(`second, ${event}`, "both", "✓cup on table0.50", event);
  pointAt(`first, ${event}`, "both", "✓person holds cup0.90", event);
}
pointAt("missed, mouseenter", "low", "–cup on table", "mouseenter");
document.body.append(make("pre", { id: "report", textContent: JSON.stringify(report) }));
</script></body>"""


def browse(page, folder, width):
    """Return what PROBE records of the page in a window of this width."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium")
    (folder / "probed.html").write_text(page.read_text().replace("</body>", PROBE))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
    flags += "--disable-background-networking --disable-component-update --disable-sync "
    flags += f"--window-size={width},900 --virtual-time-budget=3000"
    done = subprocess.run(
        [chromium, *flags.split(), f"--user-data-dir={folder / 'user'}", folder / "probed.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    report = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.S).group(1)
    return json.loads(html.unescape(report))


@pytest.mark.parametrize("width", [1400, 420])
def test_gallery_page_in_browser_filters_sorts_and_points(width, tmp_path):
    boxes = [[0, 0, 40, 50], [30, 20, 80, 55], [5, 30, 30, 58]]
    truth = truth_of(boxes, [0, 1, 2], [(0, 1, 0), (1, 2, 1)])

    def record(name, scores, predicates, truth):
        pairs = [[0, 1], [1, 2]][: len(scores)]
        predicted = output_of(boxes, [0, 1, 2], pairs, predicates, scores)
        return gallery_record(name, picture(), predicted, METADATA, truth)

    records = [
        record("half", [0.7, 0.0123], [0, 0], truth),
        record("untold", [0.3, 0.0004], [0, 0], None),
        record("both", [0.9, 0.5], [0, 1], truth),
        record("low", [0.2], [1], truth),
    ]
    write_gallery(tmp_path / "x.html", records, "A title", METADATA.predicate_classes)
    seen = browse(tmp_path / "x.html", tmp_path, width)

    rows = {
        "half": ["✓person holds cup0.70", "✗cup holds table0.012", "–cup on table"],
        "untold": ["person holds cup0.30", "cup holds table<0.001"],
        "both": ["✓person holds cup0.90", "✓cup on table0.50"],
        "low": ["✗person on cup0.20", "–person holds cup", "–cup on table"],
    }
    kept = {"hit": "✓", "miss": "✗", "missed": "–", "on": " on ", "words": "table"}
    names = {
        "hit": "half both",
        "miss": "half low",
        "missed": "half low",
        "on": "half both low",
        "words": "half untold both low",
        "all": "half untold both low",
        "order": "half untold both low",
        "high": "both half untold low",
        "low": "low untold half both",
        "worst": "low half both untold",  # without ground truth last
        "best": "both half low untold",
    }
    for what, expected in names.items():
        shown = [
            row for name in expected.split() for row in rows[name] if kept.get(what, "") in row
        ]
        assert seen[what] == {"names": expected, "rows": shown, "wide": False}, what

    person, cup, table = ("0,0,40,50", "30,20,50,35", "5,30,25,28")
    centers = {person: [20, 25], cup: [55, 37.5], table: [17.5, 44]}
    pointed = {"missed, mouseenter": (cup, table, rows["low"][2])}
    for event in ("mouseenter", "focus", "click"):
        pointed[f"first, {event}"] = (person, cup, rows["both"][0])
        pointed[f"second, {event}"] = (cup, table, rows["both"][1])
    for what, (subject, object_, row) in pointed.items():
        assert seen[what] == {
            "boxes": {subject: False, object_: True},  # the object's is dashed
            "tips": [centers[object_]],
            "start": centers[subject],
            "pressed": [row],
        }, what


def test_tools_equal_file_names_and_wrong_size(tmp_path, capsys):
    # Equal names in two folders give two pictures; an image of another size is reported.
    records = []
    for image_id, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture()).save(tmp_path / folder / "x.png")
        records.append({"file_name": str(tmp_path / folder / "x.png"), "image_id": image_id})
    records.append({**records[0], "file_name": str(tmp_path / "y.png"), "image_id": 2})
    Image.fromarray(picture(30, 20)).save(tmp_path / "y.png")
    box = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    for record in records:
        record.update(height=60, width=90, annotations=[box, box], relations=[(0, 1, 0)])
    name = "sizes_test_set"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        thing_classes=["cup"], predicate_classes=["on"], evaluator_type="relation"
    )
    try:
        file = tmp_path / "relation_predictions.json"
        file.write_text(json.dumps([SceneGraph.empty(n).to_dict() for n in range(3)]))
        arguments = ["--dataset", name, "--output", str(tmp_path / "out")]
        assert draw_relations.main(arguments) == 1
        assert sorted(x.name for x in (tmp_path / "out").iterdir()) == ["x.png", "x_2.png"]
        assert capsys.readouterr().err.count("skipped: ") == 1
        arguments = [
            *arguments[:2],
            "--predictions",
            str(file),
            "--output",
            str(tmp_path / "x.html"),
        ]
        assert make_gallery.main(arguments) == 1
        assert capsys.readouterr().err.count("skipped: ") == 1
        assert (tmp_path / "x.html").read_text().count('{"name": "x.png"') == 2
    finally:
        unregister_dataset(name)
