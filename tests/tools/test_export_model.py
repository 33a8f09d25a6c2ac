"""tools/export_model.py: both formats against the model, and its error lines."""

import importlib.util
import json

import export_model
import numpy as np
import pytest
import torch
from model_utils import PREDICATES
from PIL import Image
from usage_utils import picture, write_boxes_checkpoint, write_precomputed_checkpoint

from reldn_d2.export import OUTPUT_NAMES
from reldn_d2.export.graphs import RELATION_NAMES
from reldn_d2.predictor import RelationPredictor

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(x) is None for x in ("onnx", "onnxruntime")),
    reason='needs onnx and onnxruntime: pip install "reldn_d2[export]"',
)
SAME = "the same triplets as the eager model"


@pytest.fixture
def image_file(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.mark.filterwarnings("ignore:.*torch.jit.load. is deprecated")
def test_export_model_in_new_process_gives_equal_triplets(
    checkpoint, image_file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "reldn.ts"
    monkeypatch.chdir(tmp_path)  # the path is relative, as documented
    arguments = ["--checkpoint", str(checkpoint), "--output", "reldn.ts", "--height", "64"]
    arguments += ["--width"]
    arguments += ["96", "--image", image_file, "--opts", "TEST.RELATIONS.TOPK", "9"]
    assert export_model.main(arguments) == 0
    assert SAME in capsys.readouterr().out
    extra = {"reldn.json": ""}
    exported = torch.jit.load(str(out), _extra_files=extra)
    description = json.loads(extra["reldn.json"])
    assert description["input"] == [3, 64, 96] and description["outputs"] == list(OUTPUT_NAMES)
    assert description["predicate_classes"] == PREDICATES
    with torch.no_grad(), pytest.raises(RuntimeError, match="must match the existing size"):
        exported(torch.zeros(3, 96, 64))
    # On images that were not traced, against the eager model's search.
    predictor = RelationPredictor.from_checkpoint(
        checkpoint, "cpu", opts=["TEST.RELATIONS.TOPK", 9]
    )
    for seed in (3, 4):
        rgb = picture(64, 96, seed)
        pixels = torch.as_tensor(np.ascontiguousarray(rgb[:, :, ::-1].transpose(2, 0, 1))).float()
        with torch.no_grad():
            outputs = exported(pixels)
            expected = predictor.model.inference([{"image": pixels}], do_postprocess=False)[0]
        relations = expected["relations"]
        assert torch.equal(outputs[3], relations.pairs)
        assert torch.equal(outputs[4], relations.predicates)
        torch.testing.assert_close(outputs[5], relations.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(outputs[6], relations.predicate_scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(outputs[0], expected["instances"].pred_boxes.tensor)


@needs_onnx
def test_export_model_any_size_and_given_boxes_equal_the_model(
    checkpoint, image_file, tmp_path, capsys
):
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "reldn.onnx")]
    arguments += ["--image", image_file, "--runs", "1"]
    assert export_model.main(arguments) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("traced with image (3, 85, 128)") and SAME in second
    assert second.startswith("in a new process, 2 inputs with ") and "eager" in third
    assert export_model.main([*arguments[:-2], "--given-boxes"]) == 0
    assert "in a new process, 5 inputs with " in capsys.readouterr().out


@pytest.mark.parametrize(
    "file_format", ["torchscript", pytest.param("onnx", marks=needs_onnx)], ids=["ts", "onnx"]
)
def test_export_model_included_box_model_equals_the_model(tmp_path, file_format, capsys):
    arguments = ["--pretrained", "vrd_boxes", "--given-boxes", "--format", file_format]
    assert export_model.main([*arguments, "--output", str(tmp_path / "vrd_boxes.bin")]) == 0
    assert f"vrd_boxes.bin: {file_format}, 0." in (out := capsys.readouterr().out) and SAME in out


def run_here(path, file_format, cases, runs):
    """Run an exported TorchScript file in this process, which saves the start of another."""
    assert file_format == "torchscript" and runs == 0
    exported = torch.jit.load(str(path))
    with torch.no_grad():
        outputs = [exported(*map(torch.from_numpy, case.values())) for case in cases]
    return [{n: x.numpy() for n, x in zip(RELATION_NAMES, found)} for found in outputs], None


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_export_model_torchscript_of_given_boxes_equals_the_model_or_exits_1(
    checkpoint, image_file, tmp_path, monkeypatch, capsys
):
    arguments = ["--checkpoint", str(checkpoint), "--image", image_file, "--given-boxes"]
    arguments += ["--output", str(tmp_path / "x.ts")]
    monkeypatch.setattr(export_model, "run_in_new_process", run_here)
    assert export_model.main(arguments) == 0
    assert SAME in capsys.readouterr().out and not (tmp_path / "x.ts.unchecked").exists()
    before = (tmp_path / "x.ts").read_bytes()

    def save_another(graph, *others):
        table = graph.model.relation_head.semantic.table.weight
        with torch.no_grad():
            before = table.clone()
            table.mul_(-1)
            export_model.save_torchscript(graph, *others)
            table.copy_(before)

    monkeypatch.setitem(export_model.SAVE, "torchscript", save_another)
    assert export_model.main(arguments) == 1
    error = capsys.readouterr().err
    assert "x.ts.unchecked: NOT the same as the eager model for 3 of 5 inputs" in error
    assert "of shape (3, 85, 128), (20, 4)" in error and error.count("\n") == 1
    assert (tmp_path / "x.ts").read_bytes() == before != (tmp_path / "x.ts.unchecked").read_bytes()


@needs_onnx
def test_export_model_file_that_does_not_run_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        export_model.SAVE, "onnx", lambda graph, example, path, *names: (path.write_text("broken"))
    )
    arguments = ["--pretrained", "vrd_boxes", "--given-boxes", "--output", str(tmp_path / "x.onnx")]
    assert export_model.main(arguments) == 1
    error = capsys.readouterr().err
    assert "x.onnx.unchecked does not run in a new process: " in error and "INVALID_PROTO" in error
    assert error.count("\n") == 1 and not (tmp_path / "x.onnx").exists()


def test_export_model_bad_arguments_exit_1(checkpoint, image_file, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("hello")
    common = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.ts")]
    assert export_model.main([*common, "--image", str(tmp_path / "text.jpg")]) == 1
    assert "text.jpg: cannot be read" in capsys.readouterr().err
    few = ["--opts", "TEST.DETECTIONS_PER_IMAGE", "1"]
    assert export_model.main([*common, "--image", image_file, *few]) == 1
    assert "1 entities are found in the example" in capsys.readouterr().err
    (tmp_path / "taken.ts").mkdir()
    common[-1] = str(tmp_path / "taken.ts")
    assert export_model.main([*common, "--image", image_file]) == 1
    assert "taken.ts" in capsys.readouterr().err


def test_export_model_what_cannot_be_exported_is_one_line(checkpoint, image_file, tmp_path, capsys):
    boxes = write_boxes_checkpoint(tmp_path / "boxes")
    precomputed = write_precomputed_checkpoint(tmp_path / "precomputed")
    given, pixels = ["--given-boxes"], ["--image", image_file]
    for path, options, expected in (
        (checkpoint, [], "this model reads pixels: give an example --image"),
        (checkpoint, given, "this model reads pixels: give an example --image"),
        (boxes, [], "detections come from files cannot be exported as a detector: use --given-box"),
        (precomputed, pixels, "detections come from files cannot be exported as a detector: use"),
        (boxes, [*given, *pixels], "reads no pixels: leave out --image, --height and --width"),
        (boxes, [*given, "--height", "9", "--width", "9"], "reads no pixels: leave out --image"),
    ):
        arguments = ["--checkpoint", str(path), "--output", str(tmp_path / "x.ts"), *options]
        assert export_model.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("export_model.py: ") and expected in error
        assert error.count("\n") == 1


def test_export_model_missing_packages_are_named_first(tmp_path, monkeypatch, capsys):
    def find_spec(name, *others):
        return None if name.startswith("onnx") else object()

    monkeypatch.setattr("reldn_d2.export.onnx_file.importlib.util.find_spec", find_spec)
    arguments = ["--checkpoint", "missing.pth", "--output", str(tmp_path / "x.onnx")]
    assert export_model.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("export_model.py: ONNX files need onnx and onnxruntime: pip install")
    assert error.count("\n") == 1 and "reldn_d2[export]" in error
