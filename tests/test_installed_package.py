"""The package as a user gets it from a wheel: README's tasks in an empty folder.

The source distribution is built from the repository and the wheel from the source distribution, as
``python -m build`` does, but without downloads. The wheel is installed into an environment of its
own, which finds everything else in the running one.
"""

import importlib.util
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
from usage_utils import picture, write_coco_detector

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
    """Return the folder of a user, with a photo, a detector and nothing else."""
    folder = tmp_path_factory.mktemp("user")
    Image.fromarray(picture(200, 300)).save(folder / "photo.jpg")
    boxes = [[10, 20, 110, 180], [50, 90, 190, 199]]
    entry = {"boxes": boxes, "classes": ["person", "horse"], "scores": [0.9, 0.8]}
    (folder / "boxes.json").write_text(json.dumps({"photo.jpg": entry}))
    write_coco_detector(folder / "detector")
    return folder


# Calls what the commands call, all in one process: each would load torch for seconds. The drawn
# dataset has few images.
CALL = """
import contextlib, io, json, sys
from importlib.metadata import entry_points
from reldn_d2.data.datasets.toy import dataset

dataset._SPLITS.update({split: (seed, 6) for split, (seed, _) in dataset._SPLITS.items()})
commands = {x.name: x for x in entry_points(group="console_scripts")}
results = []
for words in json.loads(sys.argv[1]):
    sys.argv, output = words, io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = commands[words[0]].load()()
        except SystemExit as end:
            status = end.code
    text = output.getvalue() + (status if isinstance(status, str) else "")
    results.append([1 if status else 0, text])
json.dump(results, open("results.json", "w"))
"""


@pytest.fixture(scope="module")
def called(programs, user, checkout) -> dict[str, tuple[int, str]]:
    """Call all commands in the user's folder; return the exit status and output of each."""
    train = ["reldn-train", "--config-file"]
    options = [*SMALL, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SEED", 1]
    options += ["DATALOADER.NUM_WORKERS", 0, "MODEL.WEIGHTS"]
    detector = "output/toy/detector/model_final.pth"
    model = "output/toy/reldn/model_final.pth"
    predict = ["reldn-predict", "--input", "photo.jpg", "--output"]
    coco = ["--detector", "detector/config.yaml", "--detector-weights", "detector/model_final.pth"]
    coco += ["--confidence-threshold", 0.0]
    predictions = "output/toy/reldn/inference/prdcls/relation_predictions.json"
    scored = ["--dataset", "toy_vrd_test", "--predictions", predictions]
    lazy = ["train.output_dir=lazy", "train.init_checkpoint=", "train.max_iter=1"]
    toy = "configs/Toy/reldn.yaml"
    lines = {
        "detector": [*train, "configs/Toy/detector.yaml", *options, ""],
        "reldn": [*train, toy, *options, detector, "DATASETS.TEST", "()"],
        "eval": [*train, toy, "--eval-only", *options, model, "TEST.RELATIONS.TASK", "prdcls"],
        "boxes": [*train, "configs/VRD/reldn_boxes.yaml", *options, ""],
        "wrong": [*train, "configs/VRD/no.yaml"],
        "lazy": ["reldn-lazy-train", "--config-file", "configs/lazy/toy_reldn.py", *lazy],
        "photo": [*predict, "json", "--format", "json", "--pretrained", "vrd_boxes", "--boxes"],
        "detected": [*predict, "detected", "--format", "json", "--pretrained", "vrd_boxes", *coco],
        "own": [*predict, "pictures", "--checkpoint", model],
        "check": ["reldn-check", "toy_vrd_test"],
        "evaluate": ["reldn-evaluate", *scored, "--output", "scores"],
        "draw": ["reldn-draw", *scored, "--output", "drawn", "--max-images", "2"],
        "pack": ["reldn-pack", "--checkpoint", model, "--output", "packed.pth.xz"],
        "push": ["reldn-push", "--checkpoint", "packed.pth.xz", "--repository", "no name"],
        "export": ["reldn-export", "--pretrained", "vrd_boxes", "--given-boxes", "--output"],
        "convert": ["reldn-convert", "none.pth", "ours.pth", "--config-file", toy],
        "serve": ["reldn-serve", "--help"],
    }
    lines["photo"].append("boxes.json")
    lines["export"].append("boxes.ts")
    words = json.dumps([[str(x) for x in line] for line in lines.values()])
    folders = {"FVCORE_CACHE": "cache", "DETECTRON2_DATASETS": str(checkout / "datasets")}
    run([programs / "python", "-c", CALL, words], user, **folders)
    return dict(zip(lines, json.loads((user / "results.json").read_text())))


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
    """Every command is called by a test below."""
    assert sorted(x.name for x in programs.glob("reldn-*")) == [f"reldn-{x}" for x in COMMANDS]
    above = Path(__file__).read_text()
    assert all(f'"reldn-{x}"' in above for x in COMMANDS)


def test_installed_env_reports_the_installed_package(programs, user):
    line = run([programs / "reldn-env"], user).splitlines()[0]
    assert line.startswith("reldn_d2") and str(programs.parent) in line


def test_installed_python_predicts_finds_configs_and_has_the_page(programs, user):
    code = """
from reldn_d2 import model_zoo
from reldn_d2.predictor import RelationPredictor

predictor = RelationPredictor.from_pretrained("vrd_boxes")
graph = predictor(boxes=[[10, 20, 110, 220], [50, 150, 190, 300]], classes=["person", "horse"])
print(graph.best(5).triplets())
print(model_zoo.get_config_file("VRD/reldn_boxes.yaml"))
try:
    import fastapi
except ImportError:
    raise SystemExit
import asyncio
from reldn_d2.serve.service import create_app
page = next(x for x in create_app(predictor).routes if getattr(x, "path", "") == "/")
print(asyncio.run(page.endpoint()).body.decode())
"""
    triplets, config, *page = run([programs / "python", "-c", code], user).splitlines()
    assert "horse" in triplets and str(programs.parent) in config
    if importlib.util.find_spec("fastapi"):
        assert "Relations in an image" in " ".join(page)


def test_installed_train_detector_then_reldn_then_evaluates(called, user):
    for name in ("detector", "reldn", "eval"):
        assert called[name][0] == 0, called[name][1][-3000:]
    assert "AP" in json.loads((user / "output/toy/detector/results_bbox.json").read_text())["bbox"]
    assert "R@50" in (user / "output/toy/reldn/results_prdcls.json").read_text()


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("boxes", "output/vrd/reldn_boxes/results_prdcls.json", "R@50"),
        ("lazy", "lazy/model_final.pth", None),
        ("photo", "json/photo.json", "person"),
        ("detected", "detected/photo.json", "predicate"),
        ("own", "pictures/photo.png", None),
        ("evaluate", "scores/results.json", "R@"),
        ("pack", "packed.pth.xz", None),
        ("export", "boxes.ts", None),
    ],
)
def test_installed_command_writes_its_file(called, user, name, file, text):
    status, output = called[name]
    assert status == 0 and (user / file).is_file(), output[-3000:]
    assert text is None or text in (user / file).read_text()


def test_installed_check_draw_and_serve_run(called, user):
    assert "is usable: 0 errors" in called["check"][1]
    assert called["draw"][0] == 0 and len(list((user / "drawn").glob("*.png"))) == 2
    assert called["serve"][0] == 0 and "--pretrained NAME" in called["serve"][1]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("wrong", "reldn-train: No config file 'configs/VRD/no.yaml'"),
        ("push", "reldn-push: "),
        ("convert", "reldn-convert: "),
    ],
)
def test_installed_command_wrong_input_ends_in_a_line_with_its_name(called, name, line):
    status, output = called[name]
    assert output.splitlines()[-1].startswith(line), output[-3000:]
    assert "Traceback" not in output and status == 1
