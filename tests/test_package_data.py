"""The package as it is installed: no file of it is left out."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest
from model_utils import ROOT

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest depends on it
    import tomli as tomllib

PACKAGE = ROOT / "reldn_d2"


def packaged_files() -> set[Path]:
    """Return the files of the package that setuptools installs besides Python modules."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for package, patterns in settings["package-data"].items():
        folder = ROOT.joinpath(*package.split("."))
        for pattern in patterns:
            matches = set(folder.glob(pattern))
            assert matches, f"package-data: {pattern} matches no file"
            found |= matches
    return found


def test_package_data_has_every_file():
    walked = os.walk(PACKAGE, followlinks=True)  # the configs are reached through a link
    files = {Path(folder, name) for folder, _, names in walked for name in names}
    lazy = {x for x in files if x.suffix == ".py" and PACKAGE / "configs" in x.parents}
    files = {x for x in files if x.suffix not in (".py", ".pyc")} | lazy
    assert lazy  # LazyConfigs are Python files, but no modules
    assert packaged_files() == files
    assert {PACKAGE / "py.typed", PACKAGE / "vis" / "gallery.html"} <= files
    configs = {PACKAGE / x.relative_to(ROOT) for x in (ROOT / "configs").rglob("*.yaml")}
    assert len(configs) > 40 and configs <= files


def test_package_find_has_every_folder_of_modules():
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = setuptools.find_packages(str(ROOT), **settings["packages"]["find"])
    # In a source distribution the configs are a folder in the package, not a link.
    folders = {x.parent for x in PACKAGE.rglob("*.py") if PACKAGE / "configs" not in x.parents}
    assert {ROOT.joinpath(*x.split(".")) for x in packages} == folders


def test_dependencies_name_every_imported_package():
    """No other test would show a missing one: they run where all are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(x for extra in extras for x in extra)]
    named = {re.match(r"[\w-]+", x)[0].lower().replace("-", "_") for x in requirements}
    # The comment in pyproject.toml says why these are not installed; starlette is part of FastAPI.
    named |= {"torch", "torchvision", "detectron2", "cv2", "reldn_d2", "starlette"}
    packages = {"PIL": "pillow", "yaml": "pyyaml"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [x.name for x in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in {x.split(".")[0] for x in modules} - sys.stdlib_module_names:
                assert packages.get(module, module) in named, f"{path} imports {module}"
