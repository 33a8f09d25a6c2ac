"""The demo's own logic: what is trained again, how a failure reads, the table."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import toy_demo  # noqa: E402


@pytest.fixture
def trainings(monkeypatch):
    """Replaces ``train_net.py`` by a stand-in that writes its files; lists what was run."""
    runs = []

    def run(name, config, output, options):
        runs.append((config, "--eval-only" in options))
        output.mkdir(parents=True, exist_ok=True)
        (output / "model_final.pth").write_text(f"{config} {len(runs)}")
        metrics = {key: 50.0 + len(runs) for key in toy_demo.METRICS}
        for task in toy_demo.TASKS:
            results = {f"relations_{task}": metrics}
            (output / f"results_{task}.json").write_text(json.dumps(results))

    monkeypatch.setattr(toy_demo, "run_train_net", run)
    monkeypatch.setattr(toy_demo, "draw_data_set", lambda: None)
    return runs


def _demo(tmp_path, *arguments):
    return toy_demo.main(["--output", str(tmp_path), "--pictures", "0", *arguments])


def test_a_second_run_trains_nothing(tmp_path, trainings, capsys):
    assert _demo(tmp_path) == 0
    relations = [(config, False) for config in ("reldn", "reldn_l0")]
    expected = [("detector", False)] + relations + [(config, True) for config, _ in relations]
    assert sorted(trainings) == sorted(expected)
    assert _demo(tmp_path) == 0
    assert len(trainings) == len(expected)
    assert "already trained" in capsys.readouterr().out


def test_retrain_trains_all_again(tmp_path, trainings):
    _demo(tmp_path)
    before = len(trainings)
    _demo(tmp_path, "--retrain")
    assert len(trainings) == 2 * before


def test_other_options_train_relations_only(tmp_path, trainings):
    _demo(tmp_path)
    before = len(trainings)
    _demo(tmp_path, "SOLVER.MAX_ITER", "7")
    assert [config for config, _ in trainings[before:]].count("detector") == 0
    assert len(trainings) == before + 4


def test_a_half_done_training_is_not_taken_as_done(tmp_path, trainings):
    _demo(tmp_path)
    before = len(trainings)
    (tmp_path / "seed_1" / "reldn" / "demo_stamp.txt").write_text("not finished")
    _demo(tmp_path)
    assert trainings[before:] == [("reldn", False), ("reldn", True)]


def test_table_shows_mean_and_spread(tmp_path, trainings):
    _demo(tmp_path, "--seeds", "1", "2")
    table = (tmp_path / "table.md").read_text()
    assert table.splitlines()[0].count("|") == 6
    assert all(head in table for head in toy_demo.METRICS.values())
    assert " ± " in table


def test_a_failed_training_says_where_its_log_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy_demo, "draw_data_set", lambda: None)
    monkeypatch.setattr(toy_demo, "PROJECT", tmp_path)
    configs = tmp_path / "configs" / "Toy"
    configs.mkdir(parents=True)
    (configs / "detector.yaml").write_text("VERSION: 2")
    (tmp_path / "train_net.py").write_text("raise SystemExit('the disk is full')")
    assert _demo(tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "the disk is full" in message and "demo.log" in message and "again" in message


def test_a_model_of_someone_else_is_left_alone(tmp_path, trainings, capsys):
    other = tmp_path / "detector" / "model_final.pth"
    other.parent.mkdir()
    other.write_text("precious")
    assert _demo(tmp_path, "--retrain") == 1
    assert other.read_text() == "precious" and not trainings
    assert "--output" in capsys.readouterr().err
