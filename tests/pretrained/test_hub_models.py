"""Models on the Hugging Face Hub, with a module or a server in its place.

The tests of the server need huggingface_hub and safetensors.
"""

import json
import os
import re
import subprocess
import sys

import hub_stand_in
import push_to_hub
import pytest
import safetensors_stand_in
import yaml
from model_utils import ROOT, small_model
from PIL import Image
from usage_utils import picture, write_boxes_checkpoint

import demo
from reldn_d2.checkpoint import RelDNCheckpointer, read_checkpoint
from reldn_d2.predictor import RelationPredictor
from reldn_d2.pretrained import pretrained_file

BOXES = [[5, 5, 40, 55], [30, 20, 80, 58], [1, 1, 20, 20]]
GIVEN = dict(boxes=BOXES, classes=["person", "bike", "table"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return the folder of a Hub that is a module."""
    safetensors_stand_in.install(monkeypatch)
    hub_stand_in.install(monkeypatch, tmp_path / "hub")
    return tmp_path / "hub"


@pytest.fixture
def results(tmp_path):
    metrics = {"R@50": 18.07, "R@100": 18.62, "zR@100": None, "name": "lu2016"}
    (tmp_path / "results_sgdet.json").write_text(json.dumps({"sgdet": metrics}))
    return tmp_path / "results_sgdet.json"


@pytest.fixture(scope="module")
def boxes_checkpoint(tmp_path_factory):
    return write_boxes_checkpoint(tmp_path_factory.mktemp("boxes"))


def push(checkpoint, *options, repository="me/my.model"):
    arguments = ["--checkpoint", str(checkpoint), "--repository", repository]
    return push_to_hub.main([*arguments, *map(str, options)])


def test_pushed_model_predicts_as_the_included_one(hub, results, capsys):
    source = pretrained_file("vrd_boxes")
    assert push(source, "--results", results, "--message", "First") == 0
    assert "https://huggingface.co/me/my.model/commit/" in capsys.readouterr().out
    files = hub / "me/my.model"
    assert sorted(x.name for x in (files / "main").iterdir()) == ["README.md", "model.safetensors"]
    assert (files / "message").read_text() == "First" and not (files / "private").exists()
    ours, theirs = (
        RelationPredictor.from_pretrained(name, device="cpu")(**GIVEN).to_dict()
        for name in ("vrd_boxes", "hf://me/my.model")
    )
    assert ours == theirs
    unknown = RelationPredictor.from_pretrained("hf://me/my.model", device="cpu")
    assert unknown(boxes=BOXES[:1], classes=["zebra"]).left_out == {0: "zebra"}


def test_pushed_card_has_config_results_license_and_running_code(hub, results):
    source = pretrained_file("vrd_boxes")
    assert push(source, "--results", results, "--private") == 0
    card = (hub / "me/my.model/main/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "reldn_d2" and "scene-graph-generation" in front["tags"]
    about = read_checkpoint(str(source))["about"]
    for text in (about["license"], about["note"]):
        assert all(f"> {line}".rstrip() in card for line in text.strip().splitlines())
    for row in (
        "| Input | boxes and classes, no pixels |",
        "| Predicates | 70 |",
        "| Trained on | vrd_train |",
        "| sgdet | R@50 | 18.07 |",
        "| sgdet | zR@100 | - |",
    ):
        assert row in card
    assert "lu2016" not in card and "person, sky, building" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert len(names["graph"].scores) > 0
    assert (hub / "me/my.model/private").exists()


def test_pushed_model_with_detector_reads_images(hub, checkpoint, tmp_path):
    (tmp_path / "terms.txt").write_text("Do what you like.\n")
    assert push(checkpoint, "--license", tmp_path / "terms.txt", "--note", "by hand") == 0
    card = (hub / "me/my.model/main/README.md").read_text()
    assert "| Input | images |" in card and 'predictor("photo.jpg")' in card
    assert "> Do what you like." in card and "> by hand" in card and "## Results" not in card
    assert RelationPredictor.from_pretrained("hf://me/my.model", "cpu")(picture()).triplets()
    model = small_model(seed=3)  # MODEL.WEIGHTS
    RelDNCheckpointer(model).load("hf://me/my.model@main")


def test_only_write_uploads_nothing(hub, boxes_checkpoint, tmp_path, capsys):
    folder = tmp_path / "files"
    license_file = ROOT / "LICENSE"
    assert push(boxes_checkpoint, "--only-write", folder, "--license", license_file) == 0
    assert sorted(x.name for x in folder.iterdir()) == ["README.md", "model.safetensors"]
    assert not hub.exists() and "nothing was uploaded" in capsys.readouterr().out


def test_demo_pretrained_takes_a_model_of_the_hub(hub, tmp_path):
    assert push(pretrained_file("vrd_boxes")) == 0
    Image.fromarray(picture()).save(tmp_path / "a.jpg")
    (tmp_path / "boxes.json").write_text(json.dumps({"a.jpg": GIVEN}))
    arguments = ["--pretrained", "hf://me/my.model", "--boxes", str(tmp_path / "boxes.json")]
    arguments += ["--input", str(tmp_path / "a.jpg"), "--output", str(tmp_path / "out.json")]
    demo.main([*arguments, "--format", "json"])
    assert "person" in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--repository", "my-model"], "'my-model' is not the name of a repository"),
        ([], "has no terms of use: add --license FILE"),
        (["--license", "no.txt"], "no.txt"),
        (["--results", "broken.json"], "--results broken.json: expected {task: {metric: value}}"),
        (["--results", "list.json"], "--results list.json: expected {task: {metric: value}}"),
    ],
)
def test_push_unusable_arguments_exit_1(
    hub, boxes_checkpoint, options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text('["R@50"]')
    assert push(boxes_checkpoint, *options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not hub.exists()


@pytest.mark.parametrize("name", ["hf://me", "hf://me/a/b", "hf://me/a@", "hf://../a", "hf://"])
def test_from_pretrained_malformed_name_raises(hub, name):
    with pytest.raises(ValueError, match=r"expected hf://OWNER/NAME\[@REVISION\]"):
        RelationPredictor.from_pretrained(name)


@pytest.mark.parametrize("name", ["hf://me/none", "hf://me/none@v2"])
def test_from_pretrained_missing_model_raises_in_one_line(hub, name):
    with pytest.raises(FileNotFoundError, match=f"'{name}'.*could not be fetched: 404") as error:
        RelationPredictor.from_pretrained(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["huggingface_hub", "safetensors"])
def test_hub_packages_missing_says_what_to_install(hub, missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, f"{missing}.torch", None)
    with pytest.raises(ImportError, match=f"hf://me/a needs {missing} .*: pip install {missing}"):
        RelationPredictor.from_pretrained("hf://me/a")
    assert push(pretrained_file("vrd_boxes")) == 1
    assert f"me/my.model needs {missing}" in capsys.readouterr().err


# ---------------------------------------------------------------------- the library over HTTP


# In a process of its own: the library reads HF_ENDPOINT when it is imported.
CODE = """
from huggingface_hub import constants
from reldn_d2.predictor import RelationPredictor
from reldn_d2.pretrained import pretrained_file
from reldn_d2.scripts import push_to_hub

def load(name, offline):
    constants.HF_HUB_OFFLINE = offline
    try:
        predictor = RelationPredictor.from_pretrained(name, device="cpu")
        print(len(predictor(boxes={boxes}, classes={classes}).scores))
    except FileNotFoundError as error:
        print("failed:", error)

options = ["--checkpoint", str(pretrained_file("vrd_boxes")), "--message", "First"]
assert push_to_hub.main([*options, "--repository", "me/my.model"]) == 0
load("hf://me/my.model@main", False)
load("hf://me/my.model@main", True)
load("hf://me/other", True)
load("hf://me/other", False)
""".format(**GIVEN)


@pytest.mark.slow
def test_library_over_http_uploads_and_downloads_once(tmp_path):
    for module in ("huggingface_hub", "safetensors"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    (tmp_path / "hub").mkdir()
    with hub_stand_in.serve(tmp_path / "hub") as endpoint:
        variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        variables |= {"HF_TOKEN": hub_stand_in.TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}
        variables |= {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}
        command = [sys.executable, "-W", "ignore", "-c", CODE]
        environment = {**os.environ, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    *pushed, online, offline, other_offline, other = done.stdout.strip().splitlines()
    assert f"{endpoint}/me/my.model/commit/" in pushed[0]
    files = tmp_path / "hub/me/my.model"
    assert {x.name for x in (files / "main").iterdir()} == {"README.md", "model.safetensors"}
    assert (files / "message").read_text() == "First"
    assert int(online) > 0 and offline == online
    assert other_offline.startswith("failed: The checkpoint 'hf://me/other'")
    assert "local file" in other_offline
    assert other.startswith("failed:") and "404" in other
