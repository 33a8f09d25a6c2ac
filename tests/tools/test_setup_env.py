"""The setup of the environment: which steps run again, which Python is used, what is missing."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_utils import ROOT

SETUP_ENV = ROOT / "tools/setup_env.py"


@pytest.fixture
def setup_env(monkeypatch, tmp_path):
    """`tools/setup_env.py` for an environment under ``tmp_path``."""
    spec = importlib.util.spec_from_file_location("setup_env", SETUP_ENV)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "VENV_PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setattr(module, "NOTE", tmp_path / ".venv/reldn_d2_setup.json")
    return module


@pytest.fixture
def commands(monkeypatch, setup_env):
    """Records the commands of the setup and runs none; the first creates an environment."""
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


def test_install_twice_installs_only_new_groups(setup_env, commands):
    setup_env.install(["base"])
    assert requirement_files(commands) == BASE
    commands.made.clear()
    setup_env.install(["base"])
    assert commands.made == []
    setup_env.install(["base", "test"])
    assert requirement_files(commands) == ["test.txt"]


def test_install_failed_step_exits_and_the_next_run_continues(setup_env, commands, capsys):
    commands.call.fail_at = 3
    with pytest.raises(SystemExit, match=r"\[3/6\] installing torch .*run the same command again"):
        setup_env.install(["base"])
    assert json.loads(setup_env.NOTE.read_text()) == {}
    commands.made.clear()
    commands.call.fail_at = None
    setup_env.install(["base"])
    assert requirement_files(commands) == BASE and "venv" not in commands.made[0]
    assert "[1/5] installing pip" in capsys.readouterr().out


def test_install_incomplete_venv_is_created_again(setup_env, commands):
    setup_env.VENV.mkdir()
    setup_env.write_note({})
    (setup_env.VENV / "left over").touch()
    setup_env.install(["base"])
    assert "venv" in commands.made[0]
    assert not (setup_env.VENV / "left over").exists()


def test_install_changed_requirement_installs_it(setup_env, commands, monkeypatch, tmp_path):
    setup_env.install(["base"])
    commands.made.clear()
    pins = tmp_path / "constraints.txt"
    pins.write_text("torch==2.1\n")
    monkeypatch.setattr(setup_env, "PINS", pins)
    setup_env.install(["base"])
    assert requirement_files(commands) == BASE


def test_install_venv_of_the_user_is_not_touched(setup_env, commands):
    setup_env.VENV.mkdir()
    (setup_env.VENV / "pyvenv.cfg").touch()
    with pytest.raises(SystemExit, match="was not made by `make setup`"):
        setup_env.install(["base"])
    assert commands.made == []


def test_find_python_unsupported_version_finds_another(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 13, 0))
    paths = {"python3.12": "/broken", "python3.11": "/good"}
    monkeypatch.setattr(setup_env.shutil, "which", paths.get)
    monkeypatch.setattr(setup_env, "version_of", {"/good": (3, 11)}.get)
    assert setup_env.find_python() == "/good"
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    with pytest.raises(
        SystemExit, match="python3 is Python 3.13, and there is no Python 3.10, 3.11 or"
    ):
        setup_env.find_python()


def test_check_missing_modules_exits_with_the_commands(setup_env, monkeypatch):
    found = SimpleNamespace(origin="a file")
    specs = {"torch": found, "torchvision": found, "detectron2": SimpleNamespace(origin=None)}
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", specs.get)
    with pytest.raises(SystemExit) as stopped:
        setup_env.check(["base", "test"])
    message = str(stopped.value)
    assert "lacks detectron2, cv2, pytest, xdist, hypothesis, h5py" in message
    assert (
        f"{sys.executable} -m pip install opencv-python pytest pytest-xdist hypothesis h5py\n"
        in message
    )
    assert "'git+https://github.com/facebookresearch/detectron2.git'\n" in message
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: found)
    setup_env.check(["base", "test"])


def test_setup_env_syntax_is_python_3_6():
    """On an old Python it must get as far as naming the supported versions."""
    tree = ast.parse(SETUP_ENV.read_text(), feature_version=(3, 6))
    assert not any(isinstance(x, ast.ImportFrom) and x.module == "__future__" for x in tree.body)
    functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    annotations = [x.returns for x in functions]
    annotations += [x.annotation for f in functions for x in f.args.args]
    for annotation in filter(None, annotations):  # evaluated when the function is defined
        assert isinstance(annotation, (ast.Name, ast.Constant)), ast.unparse(annotation)
