"""The documentation site: its navigation, its pages, and its build."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
import site_pages
import yaml
from model_utils import ROOT


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name functions of MkDocs' extensions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SETTINGS = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


@pytest.fixture
def source(tmp_path):
    """Return a folder with mkdocs.yml and the pages."""
    site_pages.write_pages(tmp_path / SETTINGS["docs_dir"])
    shutil.copyfile(ROOT / "mkdocs.yml", tmp_path / "mkdocs.yml")
    (tmp_path / "reldn_d2").symlink_to(ROOT / "reldn_d2")
    return tmp_path


def listed(node) -> list[str]:
    """Return the files of the navigation."""
    if isinstance(node, str):
        return [node]
    return [x for part in (node.values() if isinstance(node, dict) else node) for x in listed(part)]


def test_navigation_has_every_page_once_and_starts_with_the_readme():
    names = listed(SETTINGS["nav"])
    assert sorted(names) == sorted([*site_pages.pages(), "api.md"]) and names[0] == "README.md"


def test_api_modules_exist():
    for module in site_pages.API:
        assert importlib.util.find_spec(module), module


def test_pages_link_to_files_of_the_site(source):
    folder = source / SETTINGS["docs_dir"]
    for page in site_pages.pages():
        text = re.sub(r"^```.*?^```", "", (folder / page).read_text(), flags=re.M | re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            assert (folder / page).parent.joinpath(target).is_file(), f"{page}: {target}"


def test_pages_fences_have_a_language_and_a_title_only(source):
    folder = source / SETTINGS["docs_dir"]
    for page in site_pages.pages():
        for line in (folder / page).read_text().splitlines():
            if line.startswith("```"):
                assert re.fullmatch(r'```(\w+( title="[\w./-]+")?)?', line), f"{page}: {line}"


@pytest.mark.slow
def test_site_builds_without_warnings(source):
    for module in ("material", "mkdocstrings"):
        pytest.importorskip(
            module, reason="requirements/test.txt has MkDocs for Python 3.11 and later"
        )
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=source,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    site = source / SETTINGS["site_dir"]
    assert "RelationPredictor" in (site / "api.html").read_text()
    assert 'id="the-long-tail"' in (site / "docs/training.html").read_text()
    assert "RelationPredictor" in (site / "docs/tutorial.html").read_text()
    assert 'href="docs/tutorial.html"' in (site / "index.html").read_text()
