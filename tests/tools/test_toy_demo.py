"""Tests of the demo's own logic: what is retrained, failures, interruption and the table."""

import json

import pytest
import toy_demo


@pytest.fixture
def trainings(monkeypatch):
    """Replace ``train_net.py`` by a stand-in that writes its files; return the list of its runs."""
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


def test_toy_demo_second_run_trains_nothing(tmp_path, trainings, capsys):
    assert _demo(tmp_path) == 0
    relations = [(config, False) for config in ("reldn", "reldn_l0")]
    expected = [("detector", False)] + relations + [(config, True) for config, _ in relations]
    assert sorted(trainings) == sorted(expected)
    assert _demo(tmp_path) == 0
    assert len(trainings) == len(expected)
    assert "already trained" in capsys.readouterr().out


def test_toy_demo_retrain_trains_everything_again(tmp_path, trainings):
    _demo(tmp_path)
    before = len(trainings)
    _demo(tmp_path, "--retrain")
    assert len(trainings) == 2 * before


def test_toy_demo_other_options_keep_detector(tmp_path, trainings):
    _demo(tmp_path)
    before = len(trainings)
    _demo(tmp_path, "SOLVER.MAX_ITER", "7")
    assert [config for config, _ in trainings[before:]].count("detector") == 0
    assert len(trainings) == before + 4


def test_toy_demo_module_goes_to_the_relation_trainings(tmp_path, trainings, monkeypatch):
    module, calls, run = tmp_path / "my_head.py", [], toy_demo.run_train_net
    module.write_text("LAYERS = 1\n")

    def recording_run(name, config, output, options):
        calls.append((config, options[options.index("--module") + 1 :][:1]))
        run(name, config, output, options)

    _demo(tmp_path)  # the detector
    monkeypatch.setattr(toy_demo, "run_train_net", recording_run)
    arguments = ["--module", str(module), "MODEL.ROI_RELATION_HEAD.NAME", "MyHead"]
    _demo(tmp_path, *arguments)
    assert len(calls) == 4 and all(used == [str(module)] for _, used in calls)
    _demo(tmp_path, *arguments)
    assert len(calls) == 4
    module.write_text("LAYERS = 22\n")  # another module of the same name trains again
    _demo(tmp_path, *arguments)
    assert len(calls) == 8


def test_toy_demo_unfinished_training_runs_again(tmp_path, trainings):
    _demo(tmp_path)
    before = len(trainings)
    (tmp_path / "seed_1" / "reldn" / "demo_stamp.txt").write_text("not finished")
    _demo(tmp_path)
    assert trainings[before:] == [("reldn", False), ("reldn", True)]


def test_toy_demo_several_seeds_table_has_mean_and_deviation(tmp_path, trainings):
    _demo(tmp_path, "--seeds", "1", "2")
    table = (tmp_path / "table.md").read_text()
    assert table.splitlines()[0].count("|") == 6
    assert all(head in table for head in toy_demo.METRICS.values())
    assert " ± " in table


def test_toy_demo_failed_training_names_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy_demo, "draw_data_set", lambda: None)
    monkeypatch.setattr(toy_demo, "PROJECT", tmp_path)
    configs = tmp_path / "configs" / "Toy"
    configs.mkdir(parents=True)
    (configs / "detector.yaml").write_text("VERSION: 2")
    (tmp_path / "train_net.py").write_text("raise SystemExit('the disk is full')")
    assert _demo(tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "the disk is full" in message and "demo.log" in message and "again" in message


def test_toy_demo_foreign_model_is_kept(tmp_path, trainings, capsys):
    other = tmp_path / "detector" / "model_final.pth"
    other.parent.mkdir()
    other.write_text("precious")
    assert _demo(tmp_path, "--retrain") == 1
    assert other.read_text() == "precious" and not trainings
    assert "--output" in capsys.readouterr().err


def test_toy_demo_keyboard_interrupt_exits_130(tmp_path, trainings, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy_demo, "run_train_net", interrupt)
    assert _demo(tmp_path) == 130
    assert "Run the same command to continue" in capsys.readouterr().out
    assert (tmp_path / "detector" / "demo_stamp.txt").read_text() == "not finished"


def test_configuration_fingerprint_data_set_code_changed_differs(tmp_path, monkeypatch):
    code = tmp_path / "reldn_d2" / "data" / "datasets" / "toy" / "scenes.py"
    config = tmp_path / "configs" / "Toy" / "reldn.yaml"
    assert (toy_demo.PROJECT / code.relative_to(tmp_path)).is_file()
    monkeypatch.setattr(toy_demo, "PROJECT", tmp_path)
    for path in (code, config):
        path.parent.mkdir(parents=True)
        path.write_text("")
    before = toy_demo.configuration_fingerprint("reldn", [], [])
    code.write_text("changed = True")
    assert toy_demo.configuration_fingerprint("reldn", [], []) != before


def test_draw_data_set_uses_the_folder_of_the_trainings(tmp_path, monkeypatch):
    """A relative FVCORE_CACHE then means the same folder in all processes."""
    monkeypatch.chdir(tmp_path)
    printed = "import os; print(5, 2, os.getcwd())"
    run = toy_demo.subprocess.run
    monkeypatch.setattr(
        toy_demo.subprocess,
        "run",
        lambda command, **kwargs: run([*command[:-1], printed], **kwargs),
    )
    assert toy_demo.draw_data_set() == str(tmp_path)
