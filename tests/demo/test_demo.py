"""demo/demo.py and the tools around it, as a user starts them."""

import json
import re

import cv2
import draw_saliency
import export_model
import networkx
import numpy as np
import pytest
import torch
from model_utils import PREDICATES
from PIL import Image
from usage_utils import picture, write_checkpoint

import demo as demo_script
from reldn_d2.export import OUTPUT_NAMES, RelDNExport
from reldn_d2.predictor import RelationPredictor
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.image_io import ImageError
from reldn_d2.vis.video import EntityTracker, VideoError, VideoFile, draw_frame


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(tmp_path):
    """Six images, and three files that are none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(picture(seed=number)).save(folder / f"good_{number}.png")
    (folder / "text.jpg").write_text("hello")
    (folder / "nothing.jpg").write_bytes(b"")
    Image.fromarray(picture(200, 300)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    return folder


def run(checkpoint, *arguments):
    return demo_script.main(["--checkpoint", checkpoint, "--device", "cpu", *map(str, arguments)])


def test_broken_files_are_listed_and_the_others_done(checkpoint, folder, tmp_path, capsys):
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
def test_formats(kind, checkpoint, folder, tmp_path):
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


def test_equal_names_do_not_overwrite_each_other(checkpoint, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(picture(seed=9)).save(other / "good_0.png")
    Image.fromarray(picture(seed=8)).save(folder / "good_0.jpg")
    pattern = str(folder / "good_0.*")
    out = tmp_path / "out"
    status = run(checkpoint, "--input", pattern, other, "--output", out, "--format", "dot")
    assert status == 0
    assert sorted(x.name for x in out.iterdir()) == ["good_0.dot", "good_0_2.dot", "good_0_3.dot"]


def test_given_boxes_thresholds_and_one_output_file(checkpoint, folder, tmp_path, capsys):
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
def test_mistakes_are_told_in_a_line(checkpoint, arguments, message, tmp_path, capsys):
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
def test_impossible_numbers_are_refused(checkpoint, option, value, capsys):
    with pytest.raises(SystemExit) as status:
        run(checkpoint, "--input", "x.png", option, value)
    assert status.value.code == 2 and option in capsys.readouterr().err.splitlines()[-1]


def test_options_of_the_user_come_last(checkpoint, folder, tmp_path):
    out = tmp_path / "out.json"
    arguments = ("--input", folder / "good_0.png", "--output", out, "--format", "json")
    assert run(checkpoint, *arguments, "--opts", "TEST.RELATIONS.TOPK", 3) == 0
    assert len(json.loads(out.read_text())["relations"]["scores"]) == 3


def test_checkpoint_may_be_named_as_detectron2_does(checkpoint, folder, tmp_path, capsys):
    image, out = str(folder / "good_0.png"), str(tmp_path / "x.dot")
    common = ["--input", image, "--output", out, "--format", "dot", "--device", "cpu"]
    assert demo_script.main([*common, "--opts", "MODEL.WEIGHTS", checkpoint]) == 0
    assert demo_script.main(common) == 1
    assert "name a trained model" in capsys.readouterr().err


def write_video(path, count):
    """A scene that stands still for ``count`` frames."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (90, 60))
    for _ in range(count):
        writer.write(np.ascontiguousarray(picture()[:, :, ::-1]))
    writer.release()
    return path


def test_video(checkpoint, tmp_path, capsys):
    path, out = write_video(tmp_path / "in.avi", 5), tmp_path / "out.mp4"
    assert run(checkpoint, "--video-input", path, "--output", out, "--top-k", 3) == 0
    printed = capsys.readouterr()
    assert "5 frames done" in printed.out and "5/5" in printed.err  # the progress bar
    with VideoFile(out) as video:
        frames = list(video)
    assert len(frames) == 5 and frames[0].shape == (640, 960, 3)  # large enough to be read
    assert video.frames_per_second == pytest.approx(10)
    # The scene stands still: so do the colours and names.
    assert np.abs(frames[0].astype(int) - frames[4]).mean() < 6
    plain = cv2.resize(picture(), (960, 640))
    assert np.abs(frames[0].astype(int) - plain).mean() > 6
    before = path.read_bytes()
    assert run(checkpoint, "--video-input", path, "--output", path) == 1
    assert path.read_bytes() == before and "is the input" in capsys.readouterr().err
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(VideoError, match="text.mp4: cannot be read as a video"):
        VideoFile(tmp_path / "text.mp4")


@pytest.mark.parametrize("size", [(60, 90), (320, 180), (50, 960), (700, 1000)])
def test_frames_stay_as_they_are_where_nothing_is_drawn(size):
    frame = picture(*size)
    boxes = [[2.0, 2, 20, 30], [10.0, 20, 30, 40]]
    found = SceneGraph.from_triplets(boxes, [0, 1], [(0, 1, 0, 1.0)])
    drawn = draw_frame(frame, found, EntityTracker(["person", "cup"]), None)
    scale = max(960 / max(size), 1)
    height, width = (2 * int(round(x * scale) // 2) for x in size)
    assert drawn.shape == (height, width, 3)
    plain = cv2.resize(frame, (width, height))
    equal = (np.abs(drawn.astype(int) - plain).max(axis=2) < 40).mean()
    assert 0.5 < equal < 1
    empty = found.best(0)
    drawn = draw_frame(frame, empty, EntityTracker(["person", "cup"]), None)
    assert np.abs(drawn.astype(int) - plain).max() < 40


def test_a_video_that_is_cut_off_is_told(checkpoint, tmp_path, capsys):
    path, out = write_video(tmp_path / "in.avi", 9), tmp_path / "out.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with VideoFile(path) as video:
        if not video.count or video.count < 8:
            pytest.skip("this OpenCV counts the frames that are there")
    assert run(checkpoint, "--video-input", path, "--output", out) == 1
    assert "it says 9 frames" in capsys.readouterr().err and out.is_file()


def test_entities_keep_name_and_colour_while_they_move():
    tracker = EntityTracker(["person", "cup"], patience=2)
    triplets = [(0, 1, 0, 0.9)]

    def scene(shift, order=(0, 1)):
        boxes = np.array([[0, 0, 40, 90], [30, 40, 60, 70]])[list(order)] + [shift, 0, shift, 0]
        return SceneGraph.from_triplets(boxes, [[0, 1][i] for i in order], triplets)

    names, colors = tracker.update(scene(0))
    assert sorted(names.values()) == ["cup 1", "person 1"]
    for shift in range(5, 60, 5):
        moved, new_colors = tracker.update(scene(shift, order=(1, 0)))  # in another order
        assert (moved[0], moved[1]) == (names[1], names[0])
        assert (new_colors[0], new_colors[1]) == (colors[1], colors[0])
    jumped, _ = tracker.update(scene(300))
    assert sorted(jumped.values()) == ["cup 2", "person 2"]
    for _ in range(3):
        tracker.update(SceneGraph.empty())
    assert sorted(tracker.update(scene(300))[0].values()) == ["cup 3", "person 3"]  # forgotten


@pytest.mark.filterwarnings("ignore:.*torch.jit.load. is deprecated")
def test_exported_file_gives_the_same_triplets_in_a_fresh_process(
    checkpoint, folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "reldn.ts"
    monkeypatch.chdir(tmp_path)  # the path is relative, as documented
    arguments = ["--checkpoint", checkpoint, "--output", "reldn.ts", "--height", "64", "--width"]
    arguments += ["96", "--image", str(folder / "good_0.png"), "--opts", "TEST.RELATIONS.TOPK", "9"]
    assert export_model.main(arguments) == 0
    assert "the same triplets as the eager model" in capsys.readouterr().out
    extra = {"reldn.json": ""}
    exported = torch.jit.load(str(out), _extra_files=extra)
    description = json.loads(extra["reldn.json"])
    assert description["input"] == [3, 64, 96] and description["outputs"] == list(OUTPUT_NAMES)
    assert description["predicate_classes"] == PREDICATES
    with torch.no_grad(), pytest.raises(RuntimeError, match="must match the existing size"):
        exported(torch.zeros(3, 96, 64))
    # On images that it was not traced on, and against the model's own lazy way.
    predictor = RelationPredictor.from_checkpoint(
        checkpoint, "cpu", opts=["TEST.RELATIONS.TOPK", 9]
    )
    for seed in (3, 4):
        rgb = picture(64, 96, seed)
        image = torch.as_tensor(np.ascontiguousarray(rgb[:, :, ::-1].transpose(2, 0, 1))).float()
        with torch.no_grad():
            found = exported(image)
            expected = predictor.model.inference([{"image": image}], do_postprocess=False)[0]
        relations = expected["relations"]
        assert torch.equal(found[3], relations.pairs)
        assert torch.equal(found[4], relations.predicates)
        torch.testing.assert_close(found[5], relations.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[6], relations.predicate_scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[0], expected["instances"].pred_boxes.tensor)


@pytest.mark.parametrize("ks", [[1], [0], [1, 3]])
@pytest.mark.parametrize("overlap", [True, False])
def test_exportable_function_equals_the_model(checkpoint, ks, overlap):
    options = ["TEST.RELATIONS.PREDICATES_PER_PAIR", ks, "TEST.RELATIONS.TOPK", 11]
    options += ["MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER", overlap]
    model = RelationPredictor.from_checkpoint(checkpoint, "cpu", opts=options).model
    image = torch.as_tensor(picture(64, 96).transpose(2, 0, 1).copy()).float()
    with torch.no_grad():
        found = RelDNExport(model)(image)
        expected = model.inference([{"image": image}], do_postprocess=False)[0]["relations"]
    assert torch.equal(found[3], expected.pairs) and torch.equal(found[4], expected.predicates)
    torch.testing.assert_close(found[5], expected.scores, rtol=0, atol=1e-6)


def test_export_says_what_is_wrong(checkpoint, folder, tmp_path, capsys):
    common = ["--checkpoint", checkpoint, "--output", str(tmp_path / "x.ts")]
    assert export_model.main([*common, "--image", str(folder / "text.jpg")]) == 1
    assert "text.jpg: cannot be read" in capsys.readouterr().err
    few = ["--opts", "TEST.DETECTIONS_PER_IMAGE", "1"]
    assert export_model.main([*common, "--image", str(folder / "good_0.png"), *few]) == 1
    assert "1 entities are found in the example" in capsys.readouterr().err
    (tmp_path / "taken.ts").mkdir()
    common[-1] = str(tmp_path / "taken.ts")
    assert export_model.main([*common, "--image", str(folder / "good_0.png")]) == 1
    assert "taken.ts" in capsys.readouterr().err


def test_saliency_tool(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "saliency"
    files = ["--input", str(folder / "good_0.png"), str(folder / "text.jpg")]
    common = ["--checkpoint", checkpoint, *files, "--output", str(out)]
    assert draw_saliency.main([*common, "--triplets", "0"]) == 1
    assert "text.jpg" in capsys.readouterr().err
    assert [x.name for x in out.iterdir()] == ["good_0_triplet_0_fused.png"]


def test_boxes_file_without_boxes(tmp_path):
    (tmp_path / "x.json").write_text('{"a.png": {"boxes": null}}')
    with pytest.raises(ImageError, match="x.json: expected"):
        demo_script.read_boxes(tmp_path / "x.json")


def test_boxes_file_of_another_shape(tmp_path):
    (tmp_path / "b.json").write_text("[1, 2]")
    with pytest.raises(ImageError, match="b.json: expected"):
        demo_script.read_boxes(tmp_path / "b.json")
