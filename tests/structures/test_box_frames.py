"""Diagnosis of the boxes of a file: every form, unit and scale in which they may be misread."""

import numpy as np
import pytest

from reldn_d2.structures.box_frames import BOX_FORMS, diagnose_boxes


def file_of_boxes(count=300, seed=0):
    """XYXY boxes in landscape and portrait images, some at each border, and the image sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.array([(480, 640), (640, 480), (300, 500)])[rng.integers(0, 3, count)]
    sides = sizes[:, ::-1]
    ends = np.sort(rng.uniform(-0.1, 1.1, (count, 2, 2)), axis=1).clip(0, 1)
    ends[:, 1] = np.maximum(ends[:, 1], ends[:, 0] + 0.02).clip(0, 1)
    ends[:, 0] = np.minimum(ends[:, 0], ends[:, 1] - 0.02)
    return (ends * sides[:, None]).reshape(count, 4), sizes


def in_form(boxes, form):
    x0, y0, x1, y1 = boxes.T
    columns = {
        "xyxy": (x0, y0, x1, y1),
        "xywh": (x0, y0, x1 - x0, y1 - y0),
        "yxyx": (y0, x0, y1, x1),
        "yyxx": (y0, y1, x0, x1),
        "cxcywh": ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0),
    }
    assert columns.keys() == BOX_FORMS.keys()
    return np.stack(columns[form], axis=1)


@pytest.mark.parametrize("form", BOX_FORMS)
@pytest.mark.parametrize("count", [1, 3, 20, 300])
def test_diagnose_boxes_as_declared_is_none(form, count):
    for seed in range(20):
        boxes, sizes = file_of_boxes(count, seed)
        assert diagnose_boxes(in_form(boxes, form), sizes, form) is None
        noisy = boxes + np.random.default_rng(seed).normal(0, 1, boxes.shape)  # beyond by pixels
        assert diagnose_boxes(in_form(noisy, form), sizes, form) is None


@pytest.mark.parametrize("declared", ["xyxy", "xywh"])
@pytest.mark.parametrize("actual", BOX_FORMS)
def test_diagnose_boxes_other_form_is_certain(actual, declared):
    if actual == declared:
        return
    boxes, sizes = file_of_boxes()
    diagnosis = diagnose_boxes(in_form(boxes, actual), sizes, declared)
    assert diagnosis.certain and diagnosis.form == actual
    assert f"look like {BOX_FORMS[actual]}. Convert them to {BOX_FORMS[declared]}." in (
        diagnosis.message
    )
    assert "of the 300 boxes do not fit into their images" in diagnosis.message


@pytest.mark.parametrize("actual", ["xyxy", "xywh", "cxcywh"])
def test_diagnose_boxes_normalized_is_certain(actual):
    boxes, sizes = file_of_boxes()
    fractions = in_form(boxes / np.tile(sizes[:, ::-1], 2), actual)
    for declared in ("xyxy", "xywh"):
        diagnosis = diagnose_boxes(fractions, sizes, declared)
        assert diagnosis.certain and diagnosis.form is None
        assert "100.0% of the 300 boxes lie within [0, 1]" in diagnosis.message
        assert (f"in the form {BOX_FORMS[actual]}" in diagnosis.message) == (actual != declared)
    assert diagnose_boxes(fractions[:1], sizes[:1], actual).certain, "one box is enough"


@pytest.mark.parametrize(
    ("factor", "text"),
    [(0.5, "reach only 0.50 times the width"), (0.8, "reach only 0.80 times the width")]
    + [(1.25, "extend beyond their images, up to 1.25 times"), (2.0, "up to 2.00 times the width")],
)
def test_diagnose_boxes_scaled_is_suspicious(factor, text):
    boxes, sizes = file_of_boxes()
    for form in ("xyxy", "xywh"):
        diagnosis = diagnose_boxes(in_form(boxes * factor, form), sizes, form)
        assert not diagnosis.certain and diagnosis.form is None and text in diagnosis.message


def test_diagnose_boxes_percentages_are_suspicious():
    boxes, sizes = file_of_boxes()
    percent = in_form(boxes / np.tile(sizes[:, ::-1], 2) * 100, "xywh")
    assert "look like percentages" in diagnose_boxes(percent, sizes, "xywh").message


def test_diagnose_boxes_small_objects_in_the_center_is_none():
    boxes, sizes = file_of_boxes()
    center = np.tile(sizes[:, ::-1], 2) / 2
    assert diagnose_boxes(center + (boxes - center) * 0.3, sizes) is None


def test_diagnose_boxes_few_wrong_ones_is_none():
    """Up to one box in twenty is a mistake of its own, not one of the file."""
    boxes, sizes = file_of_boxes()
    boxes[:12, 2:] *= 3
    assert diagnose_boxes(boxes, sizes) is None


def test_diagnose_boxes_empty_is_none():
    assert diagnose_boxes(np.zeros((0, 4)), np.zeros((0, 2))) is None
    assert diagnose_boxes([[0, 0, 0, 0]], [[40, 60]]) is None, "no extent at all"
