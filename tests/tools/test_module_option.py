"""Every program that builds a model, a config, a dataset or a protocol has ``--module``."""

import runpy
import sys

import pytest
from model_utils import ROOT

# Programs that build none of these: they work on files, or on the environment.
WITHOUT = {"import_relations.py", "setup_env.py", "split_openimages_vrd.py", "toy_pictures.py"}
WITHOUT |= {"convert_vrd_detections.py", "site_pages.py"}
SCRIPTS = [ROOT / "train_net.py", ROOT / "demo/demo.py"]
SCRIPTS += [x for x in sorted((ROOT / "tools").glob("*.py")) if x.name not in WITHOUT]
MODULES = ["reldn_d2.data.check", "reldn_d2.data.statistics"]


def help_of(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(program), "--help"])
    with pytest.raises(SystemExit) as end:
        if program in MODULES:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            monkeypatch.syspath_prepend(str(program.parent))  # as Python does
            runpy.run_path(str(program), run_name="__main__")
    assert not end.value.code
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("program", [*SCRIPTS, *MODULES], ids=lambda x: getattr(x, "name", x))
def test_help_tells_of_module(program, monkeypatch, capsys):
    text = help_of(program, monkeypatch, capsys)
    assert "--module FILE_OR_NAME" in text
    if getattr(program, "name", "") == "toy_demo.py":  # passes it on
        assert "see train_net.py --help" in text
    else:
        assert "as a file (my_head.py) or a dotted name" in text and "docs/extending.md" in text


@pytest.mark.parametrize("program", SCRIPTS, ids=lambda x: x.name)
def test_programs_import_the_modules(program):
    """No parsed command line is left without it."""
    source = program.read_text()
    if program.name != "toy_demo.py":
        assert "parse_and_import(" in source and ".parse_args(" not in source


def test_every_tool_is_a_program_or_exempt():
    assert all((ROOT / "tools" / name).exists() for name in WITHOUT)
