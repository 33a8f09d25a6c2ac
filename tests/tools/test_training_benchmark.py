"""The benchmark of a training step runs on a small model, and its clock and counts are right."""

import json
import time

import benchmark
import pytest
from benchmarks.training_step import STAGES, StageClock, TrainingStep
from model_utils import ROOT


def test_benchmark_training_small_model_prints_stages(tmp_path, capfd):
    path = tmp_path / "figures.json"
    options = ["--config-file", "configs/Toy/reldn.yaml", "--size", "64", "96", "--steps", "1"]
    key = "MODEL.RELDN.MAPS_ON_DEMAND"
    options += ["--threads", "1", "--inference", "--without", key, "--json", str(path)]
    benchmark.main(["training", *options])
    printed = capfd.readouterr().out
    assert "detector and relations, CPU ms" in printed
    assert "images/s" in printed and "function that synchronizes" in printed
    results = json.loads(path.read_text())
    assert list(results) == ["here", "without MAPS_ON_DEMAND"]
    for result in results.values():
        assert set(result["stages"]) == {*STAGES, "other"}
        detector, both = (result["inference"][part][1] for part in ("detector", "all"))
        assert 0 < detector < both
        assert result["stages"]["backward"][0] > 0 and result["operations"] > 0
    ours, theirs = (x["losses"] for x in results.values())
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_training_step_backbones_share_frozen_stages():
    options = {"config_file": str(ROOT / "configs/Toy/reldn.yaml"), "device": "cpu", "batch": 1}
    options.update(precision="float32", size=(64, 96), opts=["MODEL.BACKBONE.FREEZE_AT", 2])
    assert TrainingStep(options).model._later_backbone().shared_stages == ("res2",)


def test_stage_clock_nested_stages_count_once():
    clock = StageClock(on_gpu=False)
    clock.begin()
    with clock.stage("losses"):
        time.sleep(0.02)
        with clock.stage("backward"):
            time.sleep(0.05)
    spent = clock.end()
    assert 0.015 < spent["losses"][0] < spent["backward"][0]
    assert spent["optimizer"] == [0.0, 0.0]
