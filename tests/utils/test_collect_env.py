"""The environment report of ``python -m reldn_d2.env``."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

import reldn_d2
from reldn_d2.utils import collect_env, compat

REPOSITORY = Path(reldn_d2.__file__).parent.parent


def report() -> dict[str, str]:
    return dict(collect_env.environment_rows(reldn_d2.__version__))


def test_environment_rows_name_the_versions_in_use():
    rows = report()
    assert rows["reldn_d2"].startswith(reldn_d2.__version__)
    assert rows["torch"].startswith(torch.__version__)
    assert rows["torchvision"] == f"{torchvision.__version__}, its ops load"
    assert rows["patches"] == (", ".join(compat.applied) or "none needed")
    assert rows["compiled ops"].startswith("installed") == compat.has_compiled_ops()


def test_environment_table_is_aligned():
    lines = collect_env.environment_table(reldn_d2.__version__).splitlines()
    values = [value for _, value in collect_env.environment_rows(reldn_d2.__version__)]
    assert len({line.index(value) for line, value in zip(lines, values)}) == 1


def test_environment_rows_torchvision_of_another_build_reports_it(monkeypatch):
    def nms(*args):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(torchvision.ops, "nms", nms)
    value = report()["torchvision"]
    assert "DO NOT load (operator torchvision::nms does not exist)" in value


@pytest.fixture
def installed(monkeypatch):
    """Install Detectron2 as given: whether from its main branch, and what pip noted."""

    def install(is_main, direct_url, file=None):
        name = "create_local_process_group"
        if is_main:
            monkeypatch.setattr(collect_env.comm, name, print, raising=False)
        else:
            monkeypatch.delattr(collect_env.comm, name, raising=False)
        distribution = SimpleNamespace(read_text=lambda file: direct_url)
        monkeypatch.setattr(collect_env.metadata, "distribution", lambda name: distribution)
        found = {"detectron2": ["detectron2"]}
        monkeypatch.setattr(collect_env.metadata, "packages_distributions", lambda: found)
        monkeypatch.setattr(collect_env.detectron2, "__version__", "0.6")
        if file is not None:
            monkeypatch.setattr(collect_env.detectron2, "__file__", str(file))

    return install


def test_environment_rows_tell_the_release_from_the_main_branch(installed, tmp_path):
    installed(False, None)
    assert report()["Detectron2"].startswith("0.6, the release, installed as detectron2, /")
    noted = {"url": "https://github.com/x/y", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}
    installed(True, json.dumps(noted))
    value = report()["Detectron2"]
    assert value.startswith("0.6, the main branch, commit ab12, installed as detectron2, /")
    installed(True, None, tmp_path / "detectron2/__init__.py")
    assert "the main branch, commit unknown," in report()["Detectron2"]


def test_environment_rows_clone_of_the_main_branch_names_its_commit(installed, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    installed(True, json.dumps({"url": "file:///clone"}), tmp_path / "detectron2/__init__.py")
    assert f"the main branch, commit {commit}," in report()["Detectron2"]
    # pip install ./detectron2
    noted = json.dumps({"url": tmp_path.as_uri(), "dir_info": {}})
    installed(True, noted, tmp_path / "site-packages/detectron2/__init__.py")
    assert f"commit {commit} (now in {tmp_path}, which it was inst" in report()["Detectron2"]


@pytest.mark.parametrize("gpus", [0, 2])
def test_environment_rows_lists_gpus(monkeypatch, gpus):
    properties = SimpleNamespace(name="Board", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    rows = [
        row
        for row in collect_env.environment_rows(reldn_d2.__version__)
        if row[0].startswith("GPU")
    ]
    expected = [("GPU 0", "Board, 24.0 GiB"), ("GPU 1", "Board, 24.0 GiB")]
    assert rows == (expected if gpus else [("GPU", "none that torch can use")])


def test_env_command_reports_data_sets_on_disk(tmp_path):
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
