"""tools/predict_ray.py on a local Ray, with an actor killed in the middle."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import predict_ray
import pytest
from model_utils import ROOT
from PIL import Image
from usage_utils import picture, write_checkpoint

from reldn_d2.bulk.shards import Shard, plan_shards, predict_shard
from reldn_d2.predictor import RelationPredictor
from reldn_d2.scripts.entity_files import FileEntities
from reldn_d2.utils.image_io import ImageError

COUNT = 48


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 48 images in three subfolders and two files that are not images."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(COUNT):
        (folder / str(seed % 3)).mkdir(exist_ok=True)
        Image.fromarray(picture(seed=seed)).save(folder / f"{seed % 3}/{seed // 3:02}.png")
    (folder / "text.jpg").write_text("hello")
    (folder / "1/zero.jpg").write_bytes(b"")
    return folder


@pytest.fixture
def shards(tmp_path):
    """Two tar files with two images each, and one that is cut off."""
    for name in ("0.tar", "1.tar", "cut.tar"):
        with tarfile.open(tmp_path / name, "w") as archive:
            for seed in range(2):
                file = io.BytesIO()
                Image.fromarray(picture(seed=seed)).save(file, "png")
                info = tarfile.TarInfo(f"{seed}.png")
                info.size = file.tell()
                file.seek(0)
                archive.addfile(info, file)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:1000])
    return tmp_path


def keys(folder: Path, pattern: str = "part-*.jsonl") -> list[str]:
    """Return the keys of all lines, with repeats."""
    lines = [x for file in sorted(folder.glob(pattern)) for x in file.read_text().splitlines()]
    return [json.loads(line)["key"] for line in lines]


def images_in(folder: Path) -> set[str]:
    return {str(x.relative_to(folder)) for x in folder.rglob("*.png")}


def test_plan_shards_folders_and_containers(folder, shards):
    plan = plan_shards([folder, str(shards / "*.tar")], 20)
    assert [x.name for x in plan] == [f"{i:06}" for i in range(6)]
    assert [len(x.images) for x in plan] == [20, 20, 10, 0, 0, 0]
    assert [Path(x.container).name for x in plan[3:]] == ["0.tar", "1.tar", "cut.tar"]
    assert {key for x in plan for key, _ in x.images} == images_in(folder) | {
        "text.jpg",
        "1/zero.jpg",
    }
    with pytest.raises(ImageError, match="two images have the key"):
        plan_shards([folder / "0", folder / "1"], 20)


def test_predict_shard_is_written_once(checkpoint, shards, tmp_path):
    predictor = RelationPredictor.from_checkpoint(checkpoint, "cpu")
    rest = (FileEntities(None, None), tmp_path / "out", "jsonl", 20, 0.01)
    first, _, cut = plan_shards([str(shards / "*.tar")], 5)
    with pytest.raises(ValueError, match="out is not the output folder on .* same path"):
        predict_shard(first, predictor, *rest)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/_run.json").write_text("{}")
    assert predict_shard(first, predictor, *rest)[:3] == ("000000", 2, 0)
    written = tmp_path / "out/part-000000.jsonl"
    assert keys(tmp_path / "out") == [f"{shards}/0.tar/{i}.png" for i in range(2)]
    before = written.stat().st_mtime_ns
    assert predict_shard(first, None, *rest)[:3] == ("000000", 2, 0)
    assert written.stat().st_mtime_ns == before
    result = predict_shard(cut, predictor, *rest)
    assert "cut.tar: cannot be read as a tar file" in result.problem
    assert not (tmp_path / "out/part-000002.jsonl").exists()
    assert predict_shard(Shard("000009", "", (("a", "b"),)), predictor, *rest)[:3] == (
        *("000009", 0, 1),
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "EMPTY"], "no image in this folder"),
        (["--input", "PHOTOS", "--output", "x.jsonl"], "give --output FOLDER"),
        (["--input", "PHOTOS", "--checkpoint", "none.pth"], "No checkpoint 'none.pth'"),
        (["--input", "TARS", "--boxes", "b.json"], "--boxes and --detections are for image files"),
        (["--input", "PHOTOS", "--top-k", "7"], "another run: options.top_k was 20 and is 7"),
        (["--input", "PHOTOS", "--shard-size", "9"], "options.shard_size was 1000 and is 9"),
        (["--input", "PHOTOS"], "this needs Ray"),
    ],
)
def test_predict_ray_problems_at_the_start_print_one_line(
    arguments, message, checkpoint, folder, shards, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": tmp_path / "empty", "PHOTOS": folder, "TARS": shards / "0.tar"}
    common = ["--checkpoint", checkpoint, "--device", "cpu", "--output", str(tmp_path / "out")]
    if "another" in message or "shard_size" in message:
        assert predict_ray.main([*common, "--input", str(folder)]) == 1
        capsys.readouterr()
    for short, name in names.items():
        arguments = [x.replace(short, str(name)) for x in arguments]
    assert predict_ray.main([*common, *arguments]) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error and error.startswith("predict_ray.py: ")


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of a process's children, their children and so on, by id."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int(
                    (folder / "stat").read_text().split(") ")[-1].split()[1]
                )
                commands[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().decode(errors="replace")
                )
            except OSError:  # it has ended
                continue
    found, previous = {pid}, set()
    while found != previous:
        previous = set(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return {x: commands[x] for x in found if x in commands and x != pid}


def actors(pid: int) -> set[int]:
    """Return the ids of the actors' processes that a driver has started."""
    return {x for x, command in descendants(pid).items() if "ShardPredictor" in command}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the actors in /proc")
def test_predict_ray_actor_killed_in_the_middle_loses_and_doubles_nothing(
    checkpoint, folder, tmp_path
):
    pytest.importorskip("ray", reason="tools/predict_ray.py needs Ray")
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/predict_ray.py"), "--device"]
    command += ["cpu", "--checkpoint", checkpoint, "--input", str(folder), "--output", str(out)]
    command += ["--actors", "2", "--shard-size", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_agent_register_timeout_ms": "300000"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while len(list(out.glob("part-*"))) < 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        before = actors(process.pid)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        done = len(list(out.glob("part-*")))
        printed, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1 and "2 could not be used" in printed, printed
    assert len(before) == 2 and done < 13, "killed in the middle"
    assert f"{COUNT} of {COUNT + 2} images done" in printed, printed
    assert len(list(out.glob("part-*"))) == 13
    assert sorted(keys(out)) == sorted(images_in(folder))
    assert sorted(keys(out, "_errors-*.jsonl")) == ["1/zero.jpg", "text.jpg"]

    # What is missing, here two parts, is predicted by the same command.
    for name in ("part-000003.jsonl", "part-000011.jsonl"):
        (out / name).unlink()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "11 of 13 shards were done before" in again.stdout, again.stdout + again.stderr
    assert sorted(keys(out)) == sorted(images_in(folder))
