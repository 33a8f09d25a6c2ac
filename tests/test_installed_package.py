"""The package as a user gets it from a wheel: README's tasks in an empty folder.

The source distribution is built from the repository and the wheel from the source distribution, as
``python -m build`` does, but without downloads. The wheel is installed into an environment of its
own, which finds everything else in the running one.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from model_utils import ROOT, SMALL
from PIL import Image
from usage_utils import picture

pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("pip")
pytestmark = pytest.mark.slow

BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
FILES = ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md"]
FILES += [
    "configs",
    "demo",
    "docker",
    "docs",
    "mkdocs.yml",
    "pyproject.toml",
    "reldn_d2",
    "requirements",
]
FILES += ["tests", "tools", "train_net.py"]
COMMANDS = ["check", "convert", "draw", "env", "evaluate", "export", "lazy-train", "pack"]
COMMANDS += ["predict", "push", "serve", "train"]


def run(command, folder: Path, **variables: str) -> str:
    """Run a command without any setting of this process; return its output."""
    environment = {"PATH": os.defpath, "HOME": str(folder), "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(
        [str(x) for x in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a source distribution or a wheel with setuptools; return the file."""
    target.mkdir()
    run([sys.executable, "-c", BUILD.format(kind), target], source)
    (file,) = target.iterdir()
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Return the unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "repository"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FILES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"symlinks": True, "ignore": ignored} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, source / name, **options)
    (source / "datasets").mkdir()
    for path in (ROOT / "datasets").glob("*.*"):
        shutil.copy(path, source / "datasets")
    with tarfile.open(build("sdist", source, folder / "dist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Return the wheel that is built from the source distribution."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """Return the folder of Python and the commands of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    python = folder / "venv/bin/python"
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    others = [x for x in sys.path if "site-packages" in x or "dist-packages" in x]
    (site / "packages_of_the_tests.pth").write_text("\n".join(others))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run([*pip, "--ignore-installed", wheel], folder)
    return python.parent


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Path:
    """Return the folder of a user, with a photo and nothing else."""
    folder = tmp_path_factory.mktemp("user")
    Image.fromarray(picture(200, 300)).save(folder / "photo.jpg")
    boxes = [[10, 20, 110, 180], [50, 90, 190, 199]]
    entry = {"boxes": boxes, "classes": ["person", "horse"], "scores": [0.9, 0.8]}
    (folder / "boxes.json").write_text(json.dumps({"photo.jpg": entry}))
    return folder


@pytest.fixture(scope="module")
def model(programs, user) -> Path:
    """Train two iterations with README's command; return the checkpoint."""
    options = [*SMALL, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "DATASETS.TEST", "()"]
    options += ["OUTPUT_DIR", "trained", "SEED", 1, "DATALOADER.NUM_WORKERS", 0]
    train = [programs / "reldn-train", "--config-file", "configs/Toy/reldn.yaml"]
    run([*train, *options], user, FVCORE_CACHE="cache")
    return user / "trained/model_final.pth"


def test_wheel_has_all_files(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {x for x in names if x.startswith("reldn_d2/")}
    walked = os.walk(ROOT / "reldn_d2", followlinks=True)
    files = {Path(folder, name).relative_to(ROOT) for folder, _, x in walked for name in x}
    assert ours == {x.as_posix() for x in files if x.suffix != ".pyc"}
    assert {x.split("/")[0] for x in names} - {"reldn_d2"} == {"reldn_d2-0.1.0.dist-info"}
    assert wheel.stat().st_size < 2e6


def test_sdist_passes_tests_of_its_own(sdist):
    tests = ["tests/test_package_data.py", "tests/structures", "tests/test_model_zoo.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    output = run(command, sdist, PYTHONPATH=str(sdist))
    assert " passed" in output and "failed" not in output


def test_installed_commands_are_those_that_run_here(programs):
    """Every command is run by a test below."""
    assert sorted(x.name for x in programs.glob("reldn-*")) == [f"reldn-{x}" for x in COMMANDS]
    below = Path(__file__).read_text()
    assert all(f'programs / "reldn-{x}"' in below for x in COMMANDS)


def test_installed_env_reports_the_installed_package(programs, user):
    line = run([programs / "reldn-env"], user).splitlines()[0]
    assert line.startswith("reldn_d2") and str(programs.parent) in line


def test_installed_python_predicts_and_finds_configs(programs, user):
    code = """
from reldn_d2 import model_zoo
from reldn_d2.predictor import RelationPredictor

predictor = RelationPredictor.from_pretrained("vrd_boxes")
graph = predictor(boxes=[[10, 20, 110, 220], [50, 150, 190, 300]], classes=["person", "horse"])
print(graph.best(5).triplets())
print(model_zoo.get_config_file("VRD/reldn_boxes.yaml"))
"""
    output = run([programs / "python", "-c", code], user)
    assert "horse" in output and str(programs.parent) in output.splitlines()[-1]


def test_installed_predict_writes_the_relations_of_a_photo(programs, user):
    command = [programs / "reldn-predict", "--pretrained", "vrd_boxes", "--boxes", "boxes.json"]
    run([*command, "--input", "photo.jpg", "--output", "out", "--format", "json"], user)
    assert "person" in (user / "out/photo.json").read_text()


def test_installed_serve_has_its_page(programs, user):
    pytest.importorskip("fastapi", reason="the service needs FastAPI")
    code = """
import sys
from reldn_d2.predictor import RelationPredictor
from reldn_d2.serve.service import create_app
app = create_app(RelationPredictor.from_pretrained("vrd_boxes"))
(page,) = [x for x in app.routes if getattr(x, "path", "") == "/"]
import asyncio
print(asyncio.run(page.endpoint()).body.decode())
"""
    assert "Relations in an image" in run([programs / "python", "-c", code], user)
    assert "--pretrained NAME" in run([programs / "reldn-serve", "--help"], user)


def test_installed_train_writes_a_model_that_predicts(programs, user, model):
    command = [programs / "reldn-predict", "--checkpoint", model, "--input", "photo.jpg"]
    run([*command, "--output", "pictures"], user)
    assert (user / "pictures/photo.png").is_file()


def test_installed_check_evaluate_and_draw_run_on_the_drawn_data(programs, user, model):
    code = """
import json, reldn_d2
from detectron2.data import DatasetCatalog
records = [
    {
        "image_id": x["image_id"],
        "instances": {
            "boxes": [a["bbox"] for a in x["annotations"]],
            "classes": [a["category_id"] for a in x["annotations"]],
            "scores": [1.0] * len(x["annotations"]),
        },
        "relations": {
            "pairs": [r[:2] for r in x["relations"]],
            "predicates": [r[2] for r in x["relations"]],
            "scores": [0.5] * len(x["relations"]),
        },
    }
    for x in DatasetCatalog.get("toy_vrd_test")
]
open("predictions.json", "w").write(json.dumps(records))
"""
    cache = {"FVCORE_CACHE": "cache"}
    run([programs / "python", "-c", code], user, **cache)
    assert "is usable: 0 errors" in run([programs / "reldn-check", "toy_vrd_test"], user, **cache)
    options = ["--dataset", "toy_vrd_test", "--predictions", "predictions.json"]
    run([programs / "reldn-evaluate", *options, "--output", "scores"], user, **cache)
    assert "R@" in (user / "scores/results.json").read_text()
    draw = [programs / "reldn-draw", *options, "--output", "drawn", "--max-images", "2"]
    run(draw, user, **cache)
    assert len(list((user / "drawn").glob("*.png"))) == 2
