"""demo/demo.py and the tools for a trained model, run as a user runs them."""

import json
import re

import cv2
import draw_saliency
import networkx
import numpy as np
import pytest
import torch
from model_utils import PREDICATES
from PIL import Image
from usage_utils import picture, write_checkpoint, write_precomputed_checkpoint

import demo as demo_script
from reldn_d2.scripts.entity_files import read_boxes
from reldn_d2.utils.image_io import ImageError
from reldn_d2.vis.video import VideoError, VideoFile


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(tmp_path):
    """A folder with six images and three files that are not images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        Image.fromarray(picture(seed=seed)).save(folder / f"good_{seed}.png")
    (folder / "text.jpg").write_text("hello")
    (folder / "nothing.jpg").write_bytes(b"")
    Image.fromarray(picture(200, 300)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    return folder


def run(checkpoint, *arguments):
    return demo_script.main(["--checkpoint", checkpoint, "--device", "cpu", *map(str, arguments)])


def test_demo_broken_files_are_listed_and_others_processed(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "out"
    status = run(
        checkpoint,
        *("--input", folder, "--output", out, "--format", "json"),
        *("--batch-size", 4, "--top-k", 7),
    )
    assert status == 1
    assert sorted(x.name for x in out.iterdir()) == [f"good_{n}.json" for n in range(6)]
    printed = capsys.readouterr()
    assert "6 of 9 images done" in printed.out and "3 could not be used:" in printed.err
    for name in ("text.jpg", "nothing.jpg", "cut.jpg"):
        assert len(re.findall(rf"^  .*{name}: cannot be read", printed.err, re.MULTILINE)) == 1
    record = json.loads((out / "good_0.json").read_text())
    assert len(record["relations"]["scores"]) == 7
    assert set(record["relations"]["predicate_names"]) <= set(PREDICATES)


@pytest.mark.parametrize("kind", ["image", "graph", "graphml", "dot", "html"])
def test_demo_formats_write_expected_files(kind, checkpoint, folder, tmp_path):
    out = tmp_path / "out"
    files = [folder / "good_0.png", folder / "good_1.png"]
    assert run(checkpoint, "--input", *files, "--output", out, "--format", kind) == 0
    made = sorted(x.name for x in out.iterdir())
    if kind == "html":
        assert made == ["index.html"]
        page = (out / "index.html").read_text()
        assert page.count("data:image/jpeg;base64,") == 2 and "http" not in page.replace(
            "http://www.w3.org/2000/svg", ""
        )
        return
    suffix = {"image": "png", "graph": "png"}.get(kind, kind)
    assert made == [f"good_{n}.{suffix}" for n in (0, 1)]
    path = out / made[0]
    if suffix == "png":
        assert np.asarray(Image.open(path)).std() > 10
    elif kind == "graphml":
        assert networkx.read_graphml(path).number_of_edges() == 20
    else:
        assert path.read_text().count("->") == 20


def test_demo_equal_file_names_get_a_suffix(checkpoint, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(picture(seed=9)).save(other / "good_0.png")
    Image.fromarray(picture(seed=8)).save(folder / "good_0.jpg")
    pattern = str(folder / "good_0.*")
    out = tmp_path / "out"
    status = run(checkpoint, "--input", pattern, other, "--output", out, "--format", "dot")
    assert status == 0
    assert sorted(x.name for x in out.iterdir()) == ["good_0.dot", "good_0_2.dot", "good_0_3.dot"]


def test_demo_given_boxes_and_confidence_threshold(checkpoint, folder, tmp_path, capsys):
    table = {"good_0.png": {"boxes": [[0, 0, 40, 50], [30, 20, 80, 55]], "classes": ["cup", 7]}}
    (tmp_path / "boxes.json").write_text(json.dumps(table))
    out = tmp_path / "result.json"
    options = ("--output", out, "--format", "json")
    boxes = ("--boxes", tmp_path / "boxes.json")
    assert run(checkpoint, "--input", folder / "good_0.png", *options, *boxes) == 0
    assert json.loads(out.read_text())["instances"]["class_names"] == ["cup", "table"]
    assert run(checkpoint, "--input", folder / "good_1.png", *options, *boxes) == 1
    assert "good_1.png" in capsys.readouterr().err
    status = run(
        checkpoint, "--input", folder / "good_0.png", *options, "--confidence-threshold", 0.999
    )
    assert status == 0 and json.loads(out.read_text())["instances"]["boxes"] == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "EMPTY"], "no image in this folder"),
        (["--input", "EMPTY/*.png"], "no file matches"),
        (["--checkpoint", "EMPTY/none.pth", "--input", "PICTURE"], "No checkpoint '.*none.pth'"),
        (["--video-input", "EMPTY/none.mp4"], "none.mp4: there is no such file"),
        (["--input", "PICTURE", "--opts", "MODEL.NONSENSE", "1"], "Unknown config key"),
        (["--input", "PICTURE", "--output", "PICTURE/x"], "--output .*picture.png.* be written"),
        (["--input", "PICTURE", "--output", "PICTURE"], "picture.png is an input"),
        (["--input", "PICTURE", "--output", "EMPTY/.."], "picture.png is an input"),
        (["--input", "PICTURE", "--output", "EMPTY/x.json"], "or --format json"),
        (["--input", "PICTURE", "PICTURE.", "--output", "EMPTY/x.png"], "there are 2 images"),
        (["--input", "PICTURE", "--config-file", "EMPTY/c.yaml"], "No config file"),
        (["--input", "PICTURE", "--device", "banana"], "device 'banana' is unknown"),
    ],
)
def test_demo_bad_arguments_print_one_line(checkpoint, arguments, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    names = {"EMPTY": str(tmp_path / "empty"), "PICTURE": str(tmp_path / "picture.png")}
    for short, name in names.items():
        arguments = [x.replace(short, name) for x in arguments]
    start = [] if "--checkpoint" in arguments else ["--checkpoint", checkpoint]
    assert demo_script.main([*start, "--device", "cpu", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, error[-1]) and error[-1].startswith("demo.py: ")
    assert "Traceback" not in "".join(error)


@pytest.mark.parametrize(
    "option, value",
    [("--top-k", "0"), ("--batch-size", "-1"), ("--min-score", "2"), ("--format", "jpeg")],
)
def test_demo_invalid_option_values_exit_2(checkpoint, option, value, capsys):
    with pytest.raises(SystemExit) as status:
        run(checkpoint, "--input", "x.png", option, value)
    assert status.value.code == 2 and option in capsys.readouterr().err.splitlines()[-1]


def test_demo_opts_override_the_demos_own(checkpoint, folder, tmp_path):
    out = tmp_path / "out.json"
    arguments = ("--input", folder / "good_0.png", "--output", out, "--format", "json")
    assert run(checkpoint, *arguments, "--opts", "TEST.RELATIONS.TOPK", 3) == 0
    assert len(json.loads(out.read_text())["relations"]["scores"]) == 3


def test_demo_checkpoint_from_model_weights(checkpoint, folder, tmp_path, capsys):
    image, out = str(folder / "good_0.png"), str(tmp_path / "x.dot")
    common = ["--input", image, "--output", out, "--format", "dot", "--device", "cpu"]
    assert demo_script.main([*common, "--opts", "MODEL.WEIGHTS", checkpoint]) == 0
    assert demo_script.main(common) == 1
    assert "no trained model given" in capsys.readouterr().err


def write_video(path, count):
    """Write a still scene of ``count`` frames."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (90, 60))
    for _ in range(count):
        writer.write(np.ascontiguousarray(picture()[:, :, ::-1]))
    writer.release()
    return path


def test_demo_video_roundtrip(checkpoint, tmp_path, capsys):
    path, out = write_video(tmp_path / "in.avi", 5), tmp_path / "out.mp4"
    assert run(checkpoint, "--video-input", path, "--output", out, "--top-k", 3) == 0
    printed = capsys.readouterr()
    assert "5 frames done" in printed.out and "5/5" in printed.err  # the progress bar
    with VideoFile(out) as video:
        frames = list(video)
    assert len(frames) == 5 and frames[0].shape == (640, 960, 3)  # large enough to be read
    assert video.frames_per_second == pytest.approx(10)
    # Names and colors stay the same in a still scene.
    assert np.abs(frames[0].astype(int) - frames[4]).mean() < 6
    plain = cv2.resize(picture(), (960, 640))
    assert np.abs(frames[0].astype(int) - plain).mean() > 6
    before = path.read_bytes()
    assert run(checkpoint, "--video-input", path, "--output", path) == 1
    assert path.read_bytes() == before and "is the input" in capsys.readouterr().err
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(VideoError, match="text.mp4: cannot be read as a video"):
        VideoFile(tmp_path / "text.mp4")


def test_demo_truncated_video_exits_1(checkpoint, tmp_path, capsys):
    path, out = write_video(tmp_path / "in.avi", 9), tmp_path / "out.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with VideoFile(path) as video:
        if not video.count or video.count < 8:
            pytest.skip("this OpenCV counts the frames that are there")
    assert run(checkpoint, "--video-input", path, "--output", out) == 1
    assert " of 9 frames could not be read" in capsys.readouterr().err and out.is_file()


def test_draw_saliency_tool_skips_broken_image(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "saliency"
    files = ["--input", str(folder / "good_0.png"), str(folder / "text.jpg")]
    common = ["--checkpoint", checkpoint, *files, "--output", str(out)]
    assert draw_saliency.main([*common, "--triplets", "0"]) == 1
    assert "text.jpg" in capsys.readouterr().err
    assert [x.name for x in out.iterdir()] == ["good_0_triplet_0_fused.png"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1, 2]", "b.json: expected .* found a list"),
        ("{", "b.json: cannot be read as JSON"),
        ("file,x0,y0,x1,y1", r'Expected {"FILE NAME": {"boxes": \[\[x0, y0, x1, y1\]'),
        ('{"a.png": [[0, 0, 9, 9]]}', "b.json: a.png: expected an object with boxes, classes, sc"),
        ('{"a.png": {"boxes": null}}', "b.json: a.png: boxes missing"),
        (
            '{"a.png": {"boxes": [], "score": []}}',
            "b.json: a.png: unknown key 'score'; known: boxes, classes, scores",
        ),
    ],
)
def test_read_boxes_bad_file_raises(content, message, tmp_path):
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(ImageError, match=message):
        read_boxes(tmp_path / "b.json")


def test_demo_given_scores_multiply_the_triplets(checkpoint, folder, tmp_path):
    entry = {"boxes": [[0, 0, 40, 50], [30, 20, 80, 55]], "classes": ["cup", 7]}
    records = []
    for scores in ({}, {"scores": [0.5, 0.25]}):
        table = {f"good_{n}.png": {**entry, **scores} for n in range(3)}
        (tmp_path / "boxes.json").write_text(json.dumps(table))
        files = [folder / f"good_{n}.png" for n in range(3)]
        options = ("--format", "json", "--batch-size", 2, "--boxes", tmp_path / "boxes.json")
        out = tmp_path / f"out_{len(records)}"
        assert run(checkpoint, "--input", *files, "--output", out, "--min-score", 0, *options) == 0
        records.append(json.loads((out / "good_2.json").read_text()))
    plain, scored = records
    assert plain["instances"]["scores"] == [1, 1] and scored["instances"]["scores"] == [0.5, 0.25]
    expected = [0.125 * x for x in plain["relations"]["scores"]]
    assert scored["relations"]["scores"] == pytest.approx(expected, rel=1e-5)
    assert scored["instances"]["boxes"] == entry["boxes"]


DETECTIONS = [
    {"image_id": 7, "category_id": 1, "bbox": [5, 5, 30, 40], "score": 0.9},
    {"image_id": 7, "category_id": 0, "bbox": [30, 10, 40, 45], "score": 0.8},
    {"image_id": 7, "category_id": 7, "bbox": [0, 0, 9, 9], "score": 0.01},
]


def write_detections(path):
    """Write DETECTIONS in the format that the suffix tells, ``x.by_name.json`` being by name."""
    if path.suffix == ".pth":
        torch.save([{"image_id": 7, "instances": DETECTIONS}], path)
    elif path.name == "by_name.json":
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (d["bbox"] for d in DETECTIONS)]
        scores = [d["score"] for d in DETECTIONS]
        entry = {"boxes": boxes, "classes": ["cup", "person", 7], "scores": scores}
        path.write_text(json.dumps({"000007.png": entry}))
    else:
        path.write_text(json.dumps(DETECTIONS))
    return path


@pytest.fixture(scope="module")
def precomputed(tmp_path_factory):
    """A checkpoint trained on detections from files."""
    return str(write_precomputed_checkpoint(tmp_path_factory.mktemp("precomputed")))


@pytest.mark.parametrize("name", ["coco.json", "x.pth", "by_name.json"])
def test_demo_detections_from_files(precomputed, name, tmp_path, capsys):
    for n in (7, 8):
        Image.fromarray(picture(seed=n)).save(tmp_path / f"00000{n}.png")
    file = write_detections(tmp_path / name)
    options = ("--output", tmp_path / "out", "--format", "json", "--detections", file)
    images = ("--input", tmp_path / "000007.png", tmp_path / "000008.png")
    assert run(precomputed, *images, *options) == 1
    record = json.loads((tmp_path / "out/000007.json").read_text())
    assert record["instances"]["class_names"] == ["cup", "person"]  # 0.01 is below the threshold
    assert record["instances"]["scores"] == pytest.approx([0.9, 0.8])
    assert record["instances"]["boxes"][0] == pytest.approx([5, 5, 35, 45], abs=1e-3)
    assert len(record["relations"]["scores"]) > 0
    error = capsys.readouterr().err
    assert "1 could not be used" in error and re.search(f"8.png: .*{name} has nothing for", error)


def test_demo_precomputed_model_needs_detections(precomputed, checkpoint, folder, tmp_path, capsys):
    image = ("--input", folder / "good_0.png", "--output", tmp_path / "x.json", "--format", "json")
    assert run(precomputed, *image) == 1
    assert "add --detector NAME, --detections FILE, or --boxes" in capsys.readouterr().err
    file = write_detections(tmp_path / "coco.json")
    assert run(checkpoint, *image, "--detections", file) == 1
    assert "has its own detector and takes none; give --boxes" in capsys.readouterr().err
    assert run(precomputed, *image, "--detections", tmp_path / "none.json") == 1
    assert "none.json" in capsys.readouterr().err
    video = ("--video-input", write_video(tmp_path / "in.avi", 2), "--output", tmp_path / "x.mp4")
    assert run(precomputed, *video) == 1
    assert "no detector of its own" in capsys.readouterr().err
