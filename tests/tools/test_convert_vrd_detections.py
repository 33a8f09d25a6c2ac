"""Conversion of the detections of VRD's authors, on MATLAB files that the tests make."""

import json
import sys

import convert_vrd_detections as tool
import numpy as np
import pytest

from reldn_d2.data.detection_files import load_detections

BOXES = [[[1, 2, 31, 42], [5, 5, 5, 9]], [], [[10, 20, 30, 40]]]
LABELS, SCORES = [[[1], [100]], [], [[27]]], [[[0.9], [0.5]], [], [[1.0]]]
NAMES = ["a.jpg", "b.jpg", "sg_test_images/c.jpg"]


def cells(values):
    """A cell array of one row, as scipy writes it."""
    result = np.empty((1, len(values)), dtype=object)
    for index, x in enumerate(values):
        result[0, index] = x if isinstance(x, str) else np.array(x, dtype=np.float64)
    return result


@pytest.fixture
def mat(tmp_path):
    """Write both files with other values of some variables; return their paths."""
    scipy_io = pytest.importorskip("scipy.io", reason="scipy is an optional dependency")

    def write(paths=NAMES, **changes):
        values = {tool.BOXES: BOXES, tool.LABELS: LABELS, tool.SCORES: SCORES, **changes}
        names = [str(tmp_path / "objectDetRCNN.mat"), str(tmp_path / "imagePath.mat")]
        scipy_io.savemat(names[0], {k: cells(v) for k, v in values.items() if v is not None})
        scipy_io.savemat(names[1], {tool.NAMES: cells(paths)})
        return names

    return write


def test_main_writes_what_the_loader_reads(mat, tmp_path, capsys):
    detections, images = mat()
    output = tmp_path / "test_detections_rcnn.json"
    arguments = ["--detections", detections, "--image-paths", images, "--output", str(output)]
    assert tool.main(arguments) == 0
    assert "3 detections in 2 images" in capsys.readouterr().out
    records = json.loads(output.read_text())
    assert records[0] == {
        "image_id": "a.jpg",
        "category_id": 0,
        "bbox": [1.0, 2.0, 30.0, 40.0],
        "score": 0.9,
    }
    assert [x["category_id"] for x in records] == [0, 99, 26]
    found = load_detections(str(output), 100)
    assert found["c.jpg"]["boxes"].tolist() == BOXES[2] and found["a.jpg"]["boxes"][0, 2] == 31


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({tool.LABELS: [[[1], [101]], [], [[27]]]}, r"image 1 \(a.jpg\), detection 2: .*1 to 100"),
        ({tool.LABELS: [[[0], [1]], [], [[27]]]}, "detection 1: .*expected a label from 1"),
        ({tool.LABELS: [[[1]], [], [[27]]]}, "2, 4., 1 labels and 2 scores"),
        ({tool.SCORES: [[[1], [1]], [], [[1.5]]]}, r"image 3 \(c.jpg\), detection 1: .*0 to 1"),
        ({tool.BOXES: [[[3, 2, 1, 4]] * 2, [], BOXES[2]]}, "expected x1 <= x2"),
        ({tool.BOXES: BOXES[:2]}, "has 2 detection_bboxes, .*imagePath.mat has 3 images"),
        ({tool.BOXES: None}, "no variable detection_bboxes; it has detection_labels, "),
        ({"paths": NAMES[:1]}, "has 1 images"),
    ],
)
def test_convert_unusable_values_raise(mat, changes, message):
    with pytest.raises(ValueError, match=message):
        tool.convert(*mat(**changes))


def test_main_unusable_files_exit_1(mat, tmp_path, capsys):
    detections, images = mat()
    (tmp_path / "text.mat").write_text("not MATLAB" * 20)
    for files, message in (
        ((str(tmp_path / "none.mat"), images), "there is no "),
        ((str(tmp_path / "text.mat"), images), "text.mat cannot be read as a MATLAB file"),
    ):
        arguments = ["--detections", files[0], "--image-paths", files[1]]
        assert tool.main([*arguments, "--output", str(tmp_path / "x.json")]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_main_without_scipy_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    (tmp_path / "x.mat").write_bytes(b"")
    file = str(tmp_path / "x.mat")
    arguments = ["--detections", file, "--image-paths", file, "--output", "x.json"]
    assert tool.main(arguments) == 1
    assert "needs scipy" in capsys.readouterr().err
