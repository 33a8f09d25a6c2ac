"""Promises of the documents that no command of them shows whole."""

import csv
import json
import os
import runpy
import subprocess
import sys

import evaluate_relations
import pytest
from model_utils import ROOT
from sandbox import NARROW, Runner
from usage_utils import picture

from reldn_d2.utils.protocols import PROTOCOL_REGISTRY

from detectron2.data import DatasetCatalog

TOY = "configs/Toy/reldn.yaml"
BUILTIN = [
    name
    for name in DatasetCatalog.list()
    if name.startswith(("toy_vrd", "vrd_", "visual_genome", "openimages_vrd"))
]


@pytest.fixture
def default_predictions(in_checkout):
    """``relation_predictions.json`` as a model writes it for the built-in dataset by default."""
    file = in_checkout / "output/toy/reldn/inference/sgdet/relation_predictions.json"
    if not file.exists():
        runner = Runner(in_checkout)
        runner.provide(TOY)
        runner(TOY)
    relations = [record["relations"] for record in json.loads(file.read_text())]
    assert max(len(x["scores"]) for x in relations) >= 100, "cut at the top 100"
    return file


@pytest.mark.parametrize("protocol", PROTOCOL_REGISTRY)
def test_default_predictions_any_protocol_scores_them(default_predictions, protocol):
    arguments = ["--dataset", "toy_vrd_test", "--predictions", str(default_predictions)]
    assert evaluate_relations.main([*arguments, "--protocol", protocol]) == 0


def test_default_run_writes_scalars_for_tensorboard(default_predictions):
    """docs/training.md: they are what Weights & Biases follows."""
    (file,) = (default_predictions.parents[2]).glob("events.out.tfevents.*")
    written = file.read_bytes()
    assert b"loss_predicate" in written and b"relations_sgdet/" in written


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_dataset_passes_the_check(name, in_checkout, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", name])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("reldn_d2.data.check", run_name="__main__", alter_sys=True)
    assert end.value.code == 0, capsys.readouterr().out


def test_write_submission_of_a_csv_gives_the_same_csv(in_checkout):
    names = ["--dataset", "openimages_vrd_mini_val", "--protocol", "openimages"]
    names += ["--labels", "datasets/openimages_vrd/challenge-2018-classes-vrd.csv", "--predictions"]
    records = [
        {
            "image_id": record["image_id"],
            "instances": {
                "boxes": [x["bbox"] for x in record["annotations"]],
                "classes": [x["category_id"] for x in record["annotations"]],
                "scores": [1.0] * len(record["annotations"]),
            },
            "relations": {"pairs": [[0, 1]], "predicates": [3], "scores": [0.5]},
        }
        for record in DatasetCatalog.get("openimages_vrd_mini_val")
    ]
    (in_checkout / "mine.json").write_text(json.dumps(records))
    assert evaluate_relations.main([*names, "mine.json", "--write-submission", "first.csv"]) == 0
    assert evaluate_relations.main([*names, "first.csv", "--write-submission", "again.csv"]) == 0

    def rows(file):
        return list(csv.reader((in_checkout / file).read_text().splitlines()))

    assert rows("first.csv") == rows("again.csv") and len(rows("first.csv")) == 5


def test_graph_of_a_prediction_networkx_writes_and_reads_it(predictor, tmp_path):
    networkx = pytest.importorskip("networkx")
    graph = predictor(picture()).graph()
    assert graph.number_of_edges() > 0
    networkx.write_graphml(graph, tmp_path / "graph.graphml")
    again = networkx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True)
    assert again.number_of_edges() == graph.number_of_edges()
    assert json.dumps(networkx.node_link_data(graph))


def test_two_processes_on_cuda_without_a_gpu_end_with_one_line(in_checkout):
    """docs/training.md, which also has MODEL.DEVICE cpu for two processes (tests/engine)."""
    options = dict(zip(NARROW[::2], NARROW[1::2]))
    options |= {"MODEL.DEVICE": "cuda", "OUTPUT_DIR": "output/two_processes"}
    command = [sys.executable, "-W", "ignore", "train_net.py", "--num-gpus", "2", "--config-file"]
    command += ["configs/VRD/faster_rcnn_R_50_FPN.yaml"]
    command += [str(x) for pair in options.items() for x in pair]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-2000:]
    assert done.stderr == "train_net.py: no CUDA device; set MODEL.DEVICE cpu\n"
    assert not (in_checkout / "output/two_processes").exists()
