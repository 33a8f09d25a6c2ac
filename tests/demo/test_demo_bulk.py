"""demo.py --format jsonl and parquet, run and killed as a user does."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from model_utils import ROOT
from PIL import Image
from session_members import wait_for_no_members
from usage_utils import picture, write_boxes_checkpoint, write_checkpoint, write_coco_detector

import demo as demo_script

COUNT = 40
PACKED = 20  # of them also in a tar or Parquet file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 40 images in it and a subfolder, and two files that are not images."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for seed in range(COUNT):
        pixels = picture(90, 60, seed) if seed % 3 == 2 else picture(60, 90, seed)
        name = f"sub/{seed - 20:02}.png" if seed >= 20 else f"{seed:02}.png"
        Image.fromarray(pixels).save(folder / name)
    (folder / "text.jpg").write_text("hello")
    (folder / "sub/zero.jpg").write_bytes(b"")
    return folder


def run(checkpoint, *arguments):
    return demo_script.main(["--checkpoint", checkpoint, "--device", "cpu", *map(str, arguments)])


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys(folder) -> list[str]:
    return [x["key"] for x in lines(folder / "part-00000.jsonl")]


@pytest.fixture(scope="module")
def expected(checkpoint, folder, tmp_path_factory):
    """Records of an uninterrupted run in one process, by key."""
    out = tmp_path_factory.mktemp("whole") / "out"
    options = ("--format", "jsonl", "--workers", 0)
    assert run(checkpoint, "--input", folder, "--output", out, *options) == 1
    return {x["key"]: x for x in lines(out / "part-00000.jsonl")}


def test_demo_jsonl_has_the_records_of_json(checkpoint, folder, expected, tmp_path):
    assert len(expected) == COUNT and list(expected)[:21] == [
        *(f"{i:02}.png" for i in range(20)),
        "sub/00.png",
    ]
    files = [folder / "03.png", folder / "sub/03.png"]
    options = ("--format", "json")
    assert run(checkpoint, "--input", *files, "--output", tmp_path / "out", *options) == 0
    for name, key in (("03.json", "03.png"), ("03_2.json", "sub/03.png")):
        assert {"key": key, **json.loads((tmp_path / "out" / name).read_text())} == expected[key]


def wait_for_lines(process, file, count: int) -> None:
    """Wait until a run has written some lines."""
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.005)


def write_container(folder, path) -> list[str]:
    """Write the first images of a folder into a tar or Parquet file and return their keys."""
    files = [folder / f"{i:02}.png" for i in range(PACKED)]
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, file.name)
        return [f"{path}/{file.name}" for file in files]
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"image": [x.read_bytes() for x in files]}), path)
    return [f"{path}/{row}" for row in range(PACKED)]


@pytest.mark.parametrize(
    "kind, container, with_workers",
    [
        ("jsonl", "photos.tar", True),  # all processes are killed, as by a reboot
        ("parquet", "photos.parquet", False),  # the workers have to notice it and to end
    ],
)
def test_demo_killed_run_continues_without_loss(
    kind, container, with_workers, checkpoint, folder, expected, tmp_path, capsys
):
    container = tmp_path / container
    packed = write_container(folder, container)
    out = tmp_path / "out"
    arguments = ["--checkpoint", checkpoint, "--device", "cpu"]
    arguments += [
        "--input",
        str(container),
        str(folder),
        "--output",
        str(out),
        "--format",
        kind,
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(ROOT / "demo/demo.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    written = out / ("part-00000.jsonl" if kind == "jsonl" else "_part-00000.jsonl")
    wait_for_lines(process, written, 3)
    if with_workers:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate(timeout=60)
    if os.path.exists("/proc/self/stat"):
        wait_for_no_members(process.pid)
    done = [file.read_bytes().count(b"\n") for file in (written, out / "_errors.jsonl")]
    assert 3 <= done[0] < PACKED + COUNT, "killed in the middle"
    with open(written, "ab") as file:
        file.write(b'{"key": "sub/19.png", "file_na')  # a line that was being written
    assert demo_script.main([*arguments, "--batch-size", "4"]) == 1
    printed = capsys.readouterr()
    total = PACKED + COUNT + 2
    assert f"{sum(done)} of {total} images were done before" in printed.out
    assert f"{total - 2} of {total} images done in {out}" in printed.out
    assert f"2 could not be used: {out}/_errors.jsonl" in printed.err
    assert "with the reason; remove that file to try them again" in printed.err
    assert f"{total}/{total}" in printed.err and "image/s" in printed.err
    assert [x["key"] for x in lines(out / "_errors.jsonl")] == ["text.jpg", "sub/zero.jpg"]
    if kind == "jsonl":
        records = lines(out / "part-00000.jsonl")
    else:
        import pyarrow.dataset

        records = pyarrow.dataset.dataset(out).to_table().to_pylist()
    assert [x["key"] for x in records] == [*packed, *expected]
    for record, wanted in zip(records, [*list(expected.values())[:PACKED], *expected.values()]):
        assert record["instances"]["class_names"] == wanted["instances"]["class_names"]
        scores = record["relations"]["scores"]  # equal up to the rounding of other batches
        assert scores == pytest.approx(wanted["relations"]["scores"], rel=1e-4)
    before = (out / "_errors.jsonl").read_bytes()
    assert demo_script.main(arguments) == 1  # nothing is left to do
    assert f"{total} of {total} images were done before" in capsys.readouterr().out
    assert (out / "_errors.jsonl").read_bytes() == before


def test_demo_bulk_other_model_or_options_are_refused(checkpoint, folder, tmp_path, capsys):
    images = ["--input", folder / "00.png", folder / "01.png"]
    out = ["--output", tmp_path / "out", "--format", "jsonl", "--workers", 0]
    assert run(checkpoint, *images, *out) == 0
    other = write_checkpoint(tmp_path / "other", "MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER", True)
    assert run(checkpoint, *images, *out, "--device", "cpu", "--batch-size", 2) == 0
    capsys.readouterr()
    for model, changed, message in (
        (checkpoint, ["--top-k", 7], "--top-k was 20 and is 7"),
        (checkpoint, ["--opts", "INPUT.MIN_SIZE_TEST", 64], "INPUT.MIN_SIZE_TEST was .96. and is"),
        (str(other), [], "model.config.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER was .False. and is"),
    ):
        assert run(model, *images, *out, *changed) == 1
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert re.search(f"demo.py: .* has results of another run: .*{message}", error)
    assert run(checkpoint, "--input", folder, *out) == 1
    assert "another run: --input was " in capsys.readouterr().err
    torch_file = tmp_path / "retrained" / "model_final.pth"
    write_retrained(other, torch_file)
    assert run(str(other), *images, "--output", tmp_path / "o2", *out[2:]) == 0
    assert run(str(torch_file), *images, "--output", tmp_path / "o2", *out[2:]) == 1
    assert "another run: the weights of the model changed. Give" in capsys.readouterr().err


def test_demo_bulk_same_image_written_in_another_way_is_refused(
    checkpoint, folder, tmp_path, capsys, monkeypatch
):
    """Its key is the path as written, so that it would be predicted again."""
    out = ["--output", tmp_path / "out", "--format", "jsonl", "--workers", 0]
    monkeypatch.chdir(folder)
    assert run(checkpoint, "--input", "sub/00.png", *out) == 0
    monkeypatch.chdir(folder / "sub")
    for name in ("00.png", folder / "sub/00.png", "../sub/00.png"):
        assert run(checkpoint, "--input", name, *out) == 1
        assert "has results of another run: --input was " in capsys.readouterr().err
    assert keys(tmp_path / "out") == ["sub/00.png"]
    (tmp_path / "small").mkdir()
    (tmp_path / "small/a.png").symlink_to(folder / "00.png")
    out[1] = tmp_path / "out2"  # keys below a folder do not have its path
    assert run(checkpoint, "--input", tmp_path / "small", *out) == 0
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, "--input", "small", *out) == 0
    assert keys(tmp_path / "out2") == ["a.png"]


def test_demo_bulk_processes_that_always_die_print_one_line(
    checkpoint, folder, tmp_path, capsys, monkeypatch
):
    def die(*_):
        raise ChildProcessError("processes that read images are killed")

    monkeypatch.setattr(demo_script, "run_bulk", die)
    options = ["--output", tmp_path, "--format", "jsonl"]
    assert run(checkpoint, "--input", folder, *options) == 1
    assert capsys.readouterr().err == "demo.py: processes that read images are killed\n"


def write_retrained(checkpoint, path) -> None:
    """Write a checkpoint with one weight changed."""
    content = torch.load(checkpoint, weights_only=False)
    name = next(x for x in content["model"] if x.endswith("semantic.table.weight"))
    content["model"][name] = content["model"][name] + 1
    path.parent.mkdir()
    torch.save(content, path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "EMPTY", "--output", "OUT"], "no image in this folder and its subfolders"),
        (["--input", "PHOTOS"], "--format jsonl writes several files: give --output FOLDER"),
        (["--input", "PHOTOS", "--output", "x.jsonl"], "several files: give --output FOLDER"),
        (["--input", "PHOTOS", "--output", "PHOTOS/00.png"], "00.png is a file: give a folder"),
        (["--input", "PHOTOS", "--output", "OUT", "--format", "json"], "--workers: add --format"),
    ],
)
def test_demo_bulk_bad_arguments_print_one_line(
    arguments, message, checkpoint, folder, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": tmp_path / "empty", "PHOTOS": folder, "OUT": tmp_path / "out"}
    for short, name in names.items():
        arguments = [x.replace(short, str(name)) for x in arguments]
    assert run(checkpoint, "--format", "jsonl", "--workers", 1, *arguments) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error and error.startswith("demo.py: ")


def test_demo_parquet_without_pyarrow_prints_one_line(
    checkpoint, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(checkpoint, "--input", folder, "--output", tmp_path, "--format", "parquet") == 1
    assert "demo.py: Parquet needs pyarrow" in capsys.readouterr().err


def test_demo_bulk_detector_and_boxes(folder, tmp_path, capsys):
    yaml, weights = write_coco_detector(tmp_path / "coco")
    detector = ["--detector", yaml, "--detector-weights", weights, "--confidence-threshold", 0]
    images = ["--input", folder / "00.png", folder / "sub/00.png", "--format", "jsonl"]
    model = str(write_boxes_checkpoint(tmp_path / "model"))
    out = tmp_path / "found"
    assert run(model, *images, "--output", out, *detector, "--workers", 1) == 0
    records = lines(out / "part-00000.jsonl")
    assert [len(x["instances"]["boxes"]) + len(x["left_out"]) for x in records] == [20, 20]
    assert "boxes left out, of classes that the model does not have: " in capsys.readouterr().out
    assert run(model, *images, "--output", out, *detector, "--min-score", 0) == 1
    assert "--min-score was 0.01 and is 0.0" in capsys.readouterr().err

    # Other weights of the same size, under the same name, which only the config has.
    named = tmp_path / "coco/named.yaml"
    named.write_text(yaml.read_text().replace("WEIGHTS: ''", f"WEIGHTS: {weights}"))
    detector = ["--detector", named, "--confidence-threshold", 0]
    assert run(model, *images, "--output", tmp_path / "named", *detector, "--workers", 0) == 0
    content = torch.load(weights)
    content["model"]["roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(content, weights)
    assert run(model, *images, "--output", tmp_path / "named", *detector) == 1
    assert "another run: the weights of the detector changed. Give" in capsys.readouterr().err

    # Two images have the name 00.png: an entry by name could belong to either.
    entry = {"boxes": [[0, 0, 30, 30], [20, 20, 50, 50]], "classes": ["person", "horse"]}
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"00.png": entry, "01.png": entry}))
    everything = ["--input", folder, "--format", "jsonl", "--boxes", boxes, "--output"]
    assert run(model, *everything, tmp_path / "boxed") == 1
    assert keys(tmp_path / "boxed") == ["00.png", "01.png"]  # whose keys the entries have
    reasons = {x["key"]: x["reason"] for x in lines(tmp_path / "boxed/_errors.jsonl")}
    assert "several images are named 00.png, so the entry '00.png'" in reasons["sub/00.png"]
    assert "give its entry the key 'sub/00.png'" in reasons["sub/00.png"]
    assert "boxes.json has nothing for it (key '02.png')" in reasons["02.png"]
