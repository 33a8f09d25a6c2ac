"""The names of programs in their error lines and in ``--help``."""

import ast
import importlib
import sys

import lazyconfig_train_net
import push_to_hub
import pytest
from model_utils import ROOT

from reldn_d2.data import check
from reldn_d2.scripts import demo
from reldn_d2.utils.programs import program_help, program_name


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("/venv/bin/reldn-train", "reldn-train"),
        ("train_net.py", "train_net.py"),
        ("/venv/bin/pytest", "train_net.py"),
        ("", "train_net.py"),
    ],
)
def test_program_name_is_that_of_the_command_or_the_file(monkeypatch, called, name):
    monkeypatch.setattr(sys, "argv", [called])
    assert program_name("/clone/train_net.py") == name


def test_program_help_names_the_installed_command_or_the_file(monkeypatch):
    text = "python tools/export_model.py --image a.jpg\npython -m reldn_d2.export_model x"
    monkeypatch.setattr(sys, "argv", ["tools/export_model.py"])
    assert program_help(text, "/clone/export_model.py") == text
    monkeypatch.setattr(sys, "argv", ["/venv/bin/reldn-export"])
    wanted = "reldn-export --image a.jpg\nreldn-export x"
    assert program_help(text, "/site-packages/reldn_d2/scripts/export_model.py") == wanted


@pytest.mark.parametrize(
    ("command", "main", "line"),
    [
        ("reldn-push", push_to_hub.main, "reldn-push --checkpoint model_final.pth"),
        ("reldn-lazy-train", lazyconfig_train_net.invoke_main, "reldn-lazy-train --config-file"),
        ("reldn-check", check.main, "usage: reldn-check "),
        ("reldn-predict", demo.main, "reldn-predict --checkpoint model_final.pth"),
    ],
)
def test_installed_help_names_no_file_of_a_clone(monkeypatch, capsys, command, main, line):
    monkeypatch.setattr(sys, "argv", [f"/venv/bin/{command}", "--help"])
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert line in text and "python tools/" not in text and "python -m" not in text


def test_installed_serve_help_names_no_file_of_a_clone(monkeypatch):
    pytest.importorskip("fastapi", reason="the service needs FastAPI")
    program = importlib.import_module("reldn_d2.serve.__main__")
    monkeypatch.setattr(sys, "argv", ["/venv/bin/reldn-serve", "--help"])
    text = program.build_parser().format_help()
    assert "reldn-serve --pretrained vrd_boxes" in text and "python -m" not in text


PROGRAMS = [*sorted((ROOT / "tools").glob("*.py")), ROOT / "demo/demo.py"]
PROGRAMS += [ROOT / "reldn_d2/serve/__main__.py"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda x: x.name)
def test_description_keeps_its_continued_lines(path):
    """A backslash at a line's end joins it with the next one, unless the string is raw."""
    description = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert max(map(len, description.splitlines()), default=0) <= 100
