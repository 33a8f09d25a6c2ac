"""Names of foreign detectors and the model's classes."""

import logging

import numpy as np
import pytest
import torch

from reldn_d2.data.datasets.vrd import VRD_CLASSES
from reldn_d2.structures.class_matching import (
    MORE_GENERAL,
    SAME_THING,
    find_class,
)
from reldn_d2.structures.class_matching import leave_out_unknown as leave_out
from reldn_d2.structures.class_matching import similar_names

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.structures import Boxes

COCO = [x["name"] for x in COCO_CATEGORIES if x["isthing"]]


def vrd(name):
    class_id = find_class(name, VRD_CLASSES)
    return None if class_id is None else VRD_CLASSES[class_id]


def test_find_class_coco_reaches_47_classes_of_vrd():
    found = {name: vrd(name) for name in COCO}
    renamed = {name: x for name, x in found.items() if x not in (None, name)}
    assert renamed == {
        "bicycle": "bike",
        "backpack": "bag",
        "handbag": "bag",
        "fire hydrant": "hydrant",
        "sports ball": "ball",
        "couch": "sofa",
        "potted plant": "plant",
        "dining table": "table",
        "tv": "monitor",
        "cell phone": "phone",
    }
    assert len({*found.values()} - {None}) == 47
    # Related things are other things.
    for name in ("giraffe", "bear"):
        assert found[name] == name
    for name in ("teddy bear", "wine glass", "microwave", "hot dog", "stop sign", "zebra"):
        assert found[name] is None


def test_find_class_own_names_stay_exact():
    assert [find_class(name, VRD_CLASSES) for name in VRD_CLASSES] == list(range(100))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Person", "person"),
        ("TRAFFIC-LIGHT", "traffic light"),
        ("traffic_light", "traffic light"),
        ("trafficlight", "traffic light"),
        ("Sofa", "sofa"),
        ("diningtable", "table"),  # Pascal VOC
        ("tvmonitor", "monitor"),
        ("aeroplane", "airplane"),  # the same thing; "plane" is more general
        ("plane", "plane"),
        ("Motorbike", "motorcycle"),
        ("Woman", "person"),  # OpenImages
        ("persons", None),
        ("", None),
    ],
)
def test_find_class_variants(name, expected):
    assert vrd(name) == expected


def test_find_class_ambiguous_names_are_not_matched(caplog):
    names = ("traffic light", "traffic-light", "computer monitor", "monitor", "bike", "car")
    assert find_class("traffic-light", names) == 1  # exact
    assert find_class("Traffic Light", names) is None
    assert find_class("tv monitor", names) is None
    assert find_class("bicycle", names) == 4
    warnings = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert any("'Traffic Light' may be any of the model's 'traffic light'" in x for x in warnings)


def test_synonyms_have_no_loop_and_no_name_twice():
    names = [name for group in SAME_THING for name in group]
    assert len({*names}) == len(names)
    assert not {*MORE_GENERAL} & {*MORE_GENERAL.values()}


BOXES = [[0, 0, 9, 9], [1, 1, 5, 5], [2, 2, 6, 6], [3, 3, 7, 7]]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda x: Boxes(torch.tensor(x))])
def test_leave_out_unknown_filters_every_kind_of_boxes(kind, caplog):
    classes = ["person", "zebra", "zebra", "couch"]
    given = {"boxes": kind(BOXES), "classes": np.array(classes), "scores": [0.9, 0.8, 0.7, 0.6]}
    kept, left_out = leave_out(given, VRD_CLASSES, "a.jpg")
    boxes = kept["boxes"].tensor if isinstance(kept["boxes"], Boxes) else kept["boxes"]
    assert np.array_equal(np.asarray(boxes), [BOXES[0], BOXES[3]])
    assert list(kept["classes"]) == ["person", "couch"] and kept["scores"] == [0.9, 0.6]
    assert left_out == {1: "zebra", 2: "zebra"}
    assert (
        "a.jpg: left out 2 of 4 boxes, whose classes the model does not have: 2 x zebra"
        in caplog.text
    )


def test_leave_out_unknown_misspelled_name_is_suggested(caplog):
    given = {"boxes": BOXES[:3], "classes": ["hrose", "broccoli", "person"]}
    leave_out(given, VRD_CLASSES, "a.jpg")
    assert "1 x hrose (did you mean 'horse'?), 1 x broccoli" in caplog.text
    assert similar_names("Hors", VRD_CLASSES).startswith("'horse' or ")
    assert similar_names("qq", ["a"]) == ""


def test_leave_out_unknown_all_left_out_gives_no_boxes():
    for boxes in (BOXES[:1], np.array(BOXES[:1]), torch.tensor(BOXES[:1])):
        kept, left_out = leave_out({"boxes": boxes, "classes": ["zebra"]}, VRD_CLASSES, "x")
        assert len(kept["boxes"]) == len(kept["classes"]) == 0 and left_out == {0: "zebra"}


@pytest.mark.parametrize(
    "given",
    [
        {"boxes": BOXES, "classes": None, "scores": None},
        {"boxes": BOXES, "classes": ["zebra"]},  # lengths: an error of the checks that follow
        {"boxes": BOXES, "classes": 3},
        {"boxes": BOXES, "classes": [0, 1, 2, 99]},  # unknown ids are errors
    ],
)
def test_leave_out_unknown_leaves_other_input_alone(given):
    assert leave_out(given, VRD_CLASSES, "x") == (given, {})
