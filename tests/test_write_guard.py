"""The guard against tests that write outside their temporary folder."""

import subprocess
import sys

import pytest
from model_utils import ROOT

WRITES = """
import os, sysconfig
from pathlib import Path
HERE = Path(__file__).parent

def test_tmp(tmp_path):
    (tmp_path / "file").write_text("x")

def test_file():
    (HERE / "file").write_text("x")

def test_folder():
    (HERE / "folder").mkdir()

def test_rename(tmp_path):
    (tmp_path / "file").write_text("x")
    os.rename(tmp_path / "file", HERE / "renamed")

def test_remove():
    os.remove(HERE / "file")

def test_relative(monkeypatch):
    monkeypatch.chdir(HERE)
    open("relative", "w").close()

def test_child_process():
    import subprocess, sys
    folder = sysconfig.get_path("purelib")  # of an environment that is this test's own
    subprocess.check_call([sys.executable, "-c", "open(%r, 'w')" % (folder + "/left_over.pth")])

def test_home():
    import subprocess, sys
    code = "from pathlib import Path; (Path.home() / 'left_over').touch()"
    subprocess.check_call([sys.executable, "-c", code])

def test_nothing():
    pass
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Run tests that write; return the guard's message for each that failed."""
    folder = tmp_path_factory.mktemp("guarded")
    venv = folder / "venv"
    create = [sys.executable, "-m", "venv", "--without-pip", str(venv)]
    subprocess.run(create, check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text("\n".join(x for x in sys.path if "site-packages" in x))
    tests = folder / "tests"
    tests.mkdir()
    for name in ("conftest.py", "write_guard.py"):
        (tests / name).write_text((ROOT / "tests" / name).read_text())
    (tests / "test_writes.py").write_text(WRITES)
    command = [str(venv / "bin/python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE"]
    # The guard allows /tmp, where this test runs: give it another temporary folder.
    (folder / "tmp").mkdir()
    result = subprocess.run(
        [*command, "--basetemp", str(folder / "tmp/pytest"), str(tests)],
        env={"TMPDIR": str(folder / "tmp"), "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        cwd=tests,
    )
    lines = [x for x in result.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return {x.split("::")[1].split(" ")[0]: x for x in lines}, result.stdout


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("file", "/tests/file"),
        ("folder", "/tests/folder"),
        ("rename", "/tests/renamed"),
        ("remove", "/tests/file"),
        ("relative", "/tests/relative"),
        ("child_process", "/site-packages/left_over.pth"),
        ("home", "/left_over"),
    ],
)
def test_write_guard_write_elsewhere_fails_the_test(outcomes, name, path):
    failed, output = outcomes
    message = failed.get(f"test_{name}", "")
    assert "written outside temporary folders: " in message and path in message, output


def test_write_guard_temporary_files_pass(outcomes):
    failed, output = outcomes
    assert failed and not {"test_tmp", "test_nothing"} & failed.keys(), output
