"""The environment report of ``python -m reldn_d2.env``, and the set-up's own decisions."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

import reldn_d2
from reldn_d2.utils import collect_env as env
from reldn_d2.utils import compat

REPOSITORY = Path(reldn_d2.__file__).parent.parent


def report() -> dict[str, str]:
    return dict(env.environment_rows(reldn_d2.__version__))


def test_report_names_the_versions_in_use():
    rows = report()
    assert rows["reldn_d2"].startswith(reldn_d2.__version__)
    assert rows["torch"].startswith(torch.__version__)
    assert rows["torchvision"] == f"{torchvision.__version__}, its ops load"
    assert rows["bridges"] == (", ".join(compat.applied) or "none needed")
    assert rows["compiled ops"].startswith("installed") == compat.has_compiled_ops()


def test_table_is_aligned():
    lines = env.environment_table(reldn_d2.__version__).splitlines()
    values = [value for _, value in env.environment_rows(reldn_d2.__version__)]
    assert len({line.index(value) for line, value in zip(lines, values)}) == 1


def test_torchvision_of_another_build_is_told(monkeypatch):
    def nms(*args):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(torchvision.ops, "nms", nms)
    value = report()["torchvision"]
    assert "DO NOT load (operator torchvision::nms does not exist)" in value


@pytest.mark.parametrize("gpus", [0, 2])
def test_gpus(monkeypatch, gpus):
    properties = SimpleNamespace(name="Board", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    rows = [row for row in env.environment_rows(reldn_d2.__version__) if row[0].startswith("GPU")]
    expected = [("GPU 0", "Board, 24.0 GiB"), ("GPU 1", "Board, 24.0 GiB")]
    assert rows == (expected if gpus else [("GPU", "none that torch can use")])


def test_data_sets_on_disk(tmp_path):
    (tmp_path / "vrd/json_dataset").mkdir(parents=True)
    for name in ("annotations_test", "objects", "predicates"):
        (tmp_path / f"vrd/json_dataset/{name}.json").write_text("{}")
    (tmp_path / "vrd/sg_dataset/sg_test_images").mkdir(parents=True)
    (tmp_path / "vrd/sg_dataset/sg_train_images").mkdir(parents=True)
    result = subprocess.run(
        [sys.executable, "-m", "reldn_d2.env"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "DETECTRON2_DATASETS": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert rows["DETECTRON2_DATASETS"] == str(tmp_path)
    assert rows["vrd_test"] == "found"
    missing = tmp_path / "vrd/json_dataset/annotations_train.json"
    assert rows["vrd_train"] == f"lacks {missing}"
    genome = tmp_path / "vg/VG-SGG.h5"
    assert rows["visual_genome_test"] == f"lacks {genome} and 3 more"
    assert rows["openimages_vrd_train"].startswith("lacks ")
    assert result.stderr == ""


@pytest.fixture
def setup_env(monkeypatch, tmp_path):
    """`tools/setup_env.py` working on an environment below ``tmp_path``."""
    spec = importlib.util.spec_from_file_location("setup_env", REPOSITORY / "tools/setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "VENV_PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setattr(module, "NOTE", tmp_path / ".venv/reldn_d2_setup.json")
    return module


@pytest.fixture
def commands(monkeypatch, setup_env):
    """Records the set-up's commands; the first makes an environment, none is run."""
    made = []

    def call(command, env, cwd):
        made.append(command)
        if "venv" in command:
            setup_env.VENV_PYTHON.parent.mkdir()
            setup_env.VENV_PYTHON.symlink_to(sys.executable)
        return 1 if call.fail_at == len(made) else 0

    call.fail_at = None
    made_by = SimpleNamespace(made=made, call=call)
    monkeypatch.setattr(setup_env.subprocess, "call", call)
    monkeypatch.setattr(setup_env, "find_python", lambda: sys.executable)
    return made_by


def requirement_files(commands) -> list[str]:
    return [Path(c[c.index("-r") + 1]).name for c in commands.made if "-r" in c]


BASE = ["build.txt", "torch.txt", "detectron2.txt", "libraries.txt"]


def test_second_setup_installs_nothing_and_tests_come_on_top(setup_env, commands):
    setup_env.install(["base"])
    assert requirement_files(commands) == BASE
    commands.made.clear()
    setup_env.install(["base"])
    assert commands.made == []
    setup_env.install(["base", "test"])
    assert requirement_files(commands) == ["test.txt"]


def test_failed_step_is_named_and_the_next_run_goes_on(setup_env, commands, capsys):
    commands.call.fail_at = 3
    with pytest.raises(SystemExit, match=r"\[3/6\] installing torch .*run the same command again"):
        setup_env.install(["base"])
    assert json.loads(setup_env.NOTE.read_text()) == {}
    commands.made.clear()
    commands.call.fail_at = None
    setup_env.install(["base"])
    assert requirement_files(commands) == BASE and "venv" not in commands.made[0]
    assert "[1/5] installing pip" in capsys.readouterr().out


def test_half_made_venv_is_made_anew(setup_env, commands):
    setup_env.VENV.mkdir()
    setup_env.write_note({})
    (setup_env.VENV / "left over").touch()
    setup_env.install(["base"])
    assert "venv" in commands.made[0]
    assert not (setup_env.VENV / "left over").exists()


def test_changed_requirement_is_installed(setup_env, commands, monkeypatch, tmp_path):
    setup_env.install(["base"])
    commands.made.clear()
    pins = tmp_path / "constraints.txt"
    pins.write_text("torch==2.1\n")
    monkeypatch.setattr(setup_env, "PINS", pins)
    setup_env.install(["base"])
    assert requirement_files(commands) == BASE


def test_venv_of_somebody_else_is_not_touched(setup_env, commands):
    setup_env.VENV.mkdir()
    (setup_env.VENV / "pyvenv.cfg").touch()
    with pytest.raises(SystemExit, match="was not made by `make setup`"):
        setup_env.install(["base"])
    assert commands.made == []


def test_unsupported_python_looks_for_another(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 13, 0))
    paths = {"python3.12": "/broken", "python3.11": "/good"}
    monkeypatch.setattr(setup_env.shutil, "which", paths.get)
    monkeypatch.setattr(setup_env, "version_of", {"/good": (3, 11)}.get)
    assert setup_env.find_python() == "/good"
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="python3 is Python 3.13, and no Python 3.10, 3.11 or"):
        setup_env.find_python()


def test_check_names_what_is_missing_and_how_to_install_it(setup_env, monkeypatch):
    found = SimpleNamespace(origin="a file")
    specs = {"torch": found, "torchvision": found, "detectron2": SimpleNamespace(origin=None)}
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", specs.get)
    with pytest.raises(SystemExit) as stopped:
        setup_env.check(["base", "test"])
    message = str(stopped.value)
    assert "lacks detectron2, cv2, pytest, hypothesis, h5py" in message
    assert f"{sys.executable} -m pip install opencv-python pytest hypothesis h5py\n" in message
    assert "'git+https://github.com/facebookresearch/detectron2.git'\n" in message
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: found)
    setup_env.check(["base", "test"])
