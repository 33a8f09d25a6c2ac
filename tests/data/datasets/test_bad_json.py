"""Loaders report JSON files that are broken in one place; see test_bad_files.py."""

import json
from pathlib import Path

import pytest
from bad_files import check_error
from data_files import coco_content, released_content, write_coco, write_json

from reldn_d2.data.datasets import load_relation_instances

# ------------------------------------------------------------------------------------- JSON files


def released_with(path, value):
    content = json.loads(json.dumps(released_content()))  # a deep copy
    target = content["a.jpg"][1]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return content


SECOND = r"annotations_train\.json: a\.jpg, relationship 1"


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("json_file", released_with(["predicate"], 4), SECOND + ": predicate is 4.* 0 to 3"),
        ("json_file", released_with(["predicate"], "plays"), SECOND + ": predicate is 'plays'"),
        ("json_file", released_with(["subject", "category"], 3), SECOND + ", subject: category"),
        (
            "json_file",
            released_with(["object", "bbox"], [9, 0, 0, 30]),
            SECOND + ", object: bbox is .*ymin <= ymax",
        ),
        (
            "json_file",
            released_with(["object", "bbox"], [0, 9, 30, 9]),
            SECOND + ", object: bbox is .*xmin <= xmax",
        ),
        (
            "json_file",
            released_with(["object", "bbox"], {"x": 1}),
            SECOND + ", object: bbox is .*four numbers",
        ),
        ("json_file", [1, 2], r"expected an object \{file name"),
        ("objects_file", {"categories": []}, r"detections_train\.json: expected a list of names"),
        ("objects_file", ["Man", "Man"], "'Man' is listed more than once"),
        ("predicates_file", [1, 2], r"rel_9_predicates\.json: expected a list of names"),
        ("predicates_file", [], r"rel_9_predicates\.json: expected a list of names"),
    ],
)
def test_released_invalid_json_raises(tmp_path, key, content, message):
    def spoil(arguments):
        write_json(Path(arguments[key]), content)

    check_error(tmp_path, "released", spoil, ValueError, message)


def test_read_json_repeated_key_raises(tmp_path):
    def spoil(arguments):
        Path(arguments["json_file"]).write_text('{"a.jpg": [], "b.jpg": [], "a.jpg": []}')

    check_error(
        tmp_path, "released", spoil, ValueError, r"train\.json: the key 'a\.jpg' occurs twice"
    )


def own_with(key, index, **changes):
    content = coco_content()
    entry = content[key][index]
    for name, value in changes.items():
        if value is None:
            del entry[name]
        else:
            entry[name] = value
    return content


def own_without(key):
    content = coco_content()
    del content[key]
    return content


FIRST_BOX = r"relations\.json: annotations\[0\] \(id 101\): "
RELATION = r"relations\.json: images\[0\], relation 0 is .*: "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((own_without(key), f'no list "{key}"; it has') for key in ("images", "annotations")),
        *((own_without(key), f'no list "{key}"; it has') for key in ("categories", "predicates")),
        ([1], "expected an object with images, annotations"),
        ({**coco_content(), "relations": [[101, 102, 5]]}, 'found a list "relations" next to'),
        ({**coco_content(), "images": []}, "image_id is 7: no such image"),
        (own_with("images", 0, id=None), r"images\[0\]: expected id .*and file_name"),
        (own_with("images", 0, file_name=None), r"images\[0\]: expected id .*and file_name"),
        (own_with("images", 0, width=None), r"images\[0\] \(a\.jpg\): height is 40 and width None"),
        (own_with("images", 0, height=-4), r"height is -4 and width 60; expected integers"),
        (own_with("images", 1, id=7), r"images\[1\] \(more/b\.jpg\): another image has the id 7"),
        (own_with("images", 0, verified_labels=[[3, 2]]), r"verified_labels has \[3, 2\]"),
        (own_with("annotations", 0, id=None), r"annotations\[0\] is .*expected an object with an"),
        (own_with("annotations", 0, id="101"), r"annotations\[0\] is .*with an id, an integer"),
        (own_with("annotations", 1, id=101), r"annotations\[1\] .*another annotation has this id"),
        (own_with("annotations", 0, image_id=9), FIRST_BOX + "image_id is 9: no such image"),
        (own_with("annotations", 0, category_id=1), FIRST_BOX + "category_id is 1; .*2 ids"),
        (own_with("annotations", 0, category_id=True), FIRST_BOX + "category_id is True"),
        (own_with("annotations", 0, bbox=None), FIRST_BOX + "bbox is None; expected four numbers"),
        (own_with("annotations", 0, bbox=[0, 0, 0, 4]), FIRST_BOX + "bbox is .*above 0"),
        (own_with("annotations", 0, bbox=[0, 0, "4", 4]), FIRST_BOX + "bbox is .*four numbers"),
        (own_with("annotations", 0, bbox=[0, float("nan"), 4, 4]), FIRST_BOX + "bbox is .*nan"),
        (own_with("annotations", 0, bbox=[0, 10**400, 4, 4]), FIRST_BOX + "bbox is .*four"),
        (own_with("annotations", 0, keypoints="abc"), FIRST_BOX + "keypoints are 'abc'; expected"),
        (own_with("annotations", 0, keypoints=[1, 2]), FIRST_BOX + "keypoints are .*three numbers"),
        (own_with("annotations", 0, attributes=1), FIRST_BOX + "attributes are 1; expected a list"),
        (own_with("annotations", 0, segmentation={"counts": [1, 2]}), FIRST_BOX + "segmentation"),
        (own_with("annotations", 0, segmentation=[["1"] * 6]), FIRST_BOX + "segmentation is"),
        (own_with("annotations", 0, iscrowd=2), FIRST_BOX + "iscrowd is 2; expected 0 or 1"),
        (own_with("annotations", 0, segmentation=[[1, 2, 3]]), FIRST_BOX + "segmentation is"),
        (
            own_with("annotations", 1, attributes=[4]),
            r"attributes are \[4\]; expected a list of ids of the 1",
        ),
        (own_with("images", 0, relations=[[101, 103, 5]]), RELATION + "there is no annotation .*3"),
        (own_with("images", 0, relations=[[101, 101, 5]]), RELATION + "it relates an annotation"),
        (own_with("images", 0, relations=[[101, 102, 1]]), RELATION + "there is no predicate"),
        (own_with("images", 0, relations=[[101, 102]]), RELATION + "expected .subject annotation"),
        (own_with("images", 0, relations="plays"), RELATION + "expected .subject annotation"),
        (
            own_with("images", 1, relations=[[101, 102, 5]]),
            r"images\[1\], relation 0 is .*those of another image",
        ),
        (
            own_with("annotations", 1, relations=[[101, 102, 5]]),
            r"annotations\[1\], relation 0 is .*at an annotation that is not its subject",
        ),
        (
            own_with("annotations", 1, image_id=8),
            RELATION + "subject and object are annotations of different images",
        ),
        (own_with("categories", 0, id="9"), r"categories\[0\] is .*expected .\"id\": an integer"),
        (own_with("categories", 0, id=3), r"categories\[1\] is .*is used before"),
        (own_with("predicates", 1, name="holds"), r"predicates\[1\] is .*is used before"),
    ],
)
def test_coco_invalid_record_raises(tmp_path, content, message):
    def spoil(arguments):
        Path(arguments["json_file"]).write_text(json.dumps(content))

    check_error(tmp_path, "own", spoil, ValueError, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, r"relations\.json: cannot be read as JSON \(nested too deeply\)"),
        ("[" + "1" * 5000 + "]", r"relations\.json: (cannot be read as JSON|expected an object)"),
    ],
)
def test_read_json_beyond_python_limits_raises(tmp_path, text, message):
    def spoil(arguments):
        Path(arguments["json_file"]).write_text(text)

    check_error(tmp_path, "own", spoil, ValueError, message)


@pytest.mark.parametrize(
    ("key", "changes"),
    [("images", {"height": 0}), ("annotations", {"bbox": [0, 0, -3, 4]})],
)
def test_coco_invalid_record_is_reported_once(tmp_path, key, changes):
    arguments = write_coco(tmp_path, own_with(key, 0, **changes))
    with pytest.raises(ValueError) as caught:
        load_relation_instances(**arguments)
    assert len(caught.value.problems) == 1, "not also what refers to the record"


def test_coco_windows_text_loads(tmp_path):
    arguments = write_coco(tmp_path)
    good = load_relation_instances(**arguments)
    path = Path(arguments["json_file"])
    text = json.dumps(json.loads(path.read_text()), indent=1).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_relation_instances(**arguments) == good
