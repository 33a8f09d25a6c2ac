"""The notebook docs/tutorial.ipynb: its form, and its code from the first cell to the last."""

import json
import os
import re
import subprocess
import sys

import pytest
from model_utils import ROOT
from sandbox import write_checkout

NOTEBOOK = ROOT / "docs/tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(x["source"]) for x in CELLS if x["cell_type"] == "code"]

# What the reader must have at the end.
CHECKS = """
triplets = {(x.subject, x.predicate, x.object) for x in graph.best(10).triplets()}
assert ("person", "wear", "coat") in triplets, triplets
assert not report.errors and len(report.warnings) == 1 and "OVERLAP_FILTER" in report.warnings[0]
assert metrics["R@n"] > 95, metrics
best = found.best(2).triplets()
best = [(x.subject_index, x.object_index, PREDICATES.index(x.predicate)) for x in best]
assert sorted(best) == sorted(relations), (best, relations)
print("the tutorial is complete")
"""


def test_tutorial_is_a_valid_notebook_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", x) for x in ids)
    for cell in CELLS:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == keys and all(isinstance(x, str) for x in cell["source"])
    assert NOTEBOOK.stat().st_size < 50_000


def test_tutorial_is_short_and_its_lines_fit():
    lines = [line for text in CODE for line in text.splitlines() if line.strip()]
    assert len(lines) < 150 and max(map(len, lines)) <= 100


def test_tutorial_links_lead_to_files_and_headings():
    text = "\n".join("".join(x["source"]) for x in CELLS if x["cell_type"] == "markdown")
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
    assert len(targets) > 5
    for target in targets:
        path, _, anchor = target.partition("#")
        heads = re.findall(r"^#+ (.*)", (ROOT / "docs" / path).read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in heads]
        assert not anchor or anchor in slugs, target


def test_tutorial_outside_of_a_clone_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not in a clone of the repository"):
        exec(CODE[0], {})


@pytest.mark.slow
def test_tutorial_cells_run_in_order(tmp_path):
    """In a folder of a clone; the last expressions of cells are evaluated, not shown."""
    write_checkout(tmp_path / "clone")
    folder = tmp_path / "clone/notebooks"
    folder.mkdir()
    (folder / "tutorial.py").write_text("\n\n".join([*CODE, CHECKS]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tutorial.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "the tutorial is complete" in done.stdout
    assert (folder / "output/tutorial/model/model_final.pth").is_file()
