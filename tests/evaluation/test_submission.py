"""Submissions of the OpenImages challenge: written, read back, scored alike."""

import gzip
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_utils import random_case, run_tool

from reldn_d2.evaluation import OpenImagesVRDEvaluator, evaluate_predictions
from reldn_d2.evaluation.predictions_io import write_predictions
from reldn_d2.evaluation.submission import read_submission, write_submission
from reldn_d2.structures.attributes import EntityAttributes
from reldn_d2.structures.scene_graph import SceneGraph

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

NAME = "submission_test_set"
CLASSES, PREDICATES = ["/m/04yx4", "/m/0342h"], ["holds", "plays", "inside_of"]
IDS = [f"{i:016x}" for i in range(8)]
# Sizes whose quotients are not exact.
SIZES = [(1023, 683), (641, 1024), (3, 7), (768, 1024), (999, 1001), (1024, 577), (13, 11), (5, 9)]


@pytest.fixture
def images():
    """Registered images, and predictions with single-precision boxes as a model's are."""
    rng = np.random.default_rng(0)
    dicts, predictions = [], []
    for image_id, (width, height) in zip(IDS, SIZES):
        case = random_case(rng, 5, 5, 2, 3, ("near", "ties"))
        scale = np.float32(rng.random() + 0.1)
        annotations = [
            {"bbox": (np.float32(b) * scale).tolist(), "bbox_mode": BoxMode.XYXY_ABS}
            for b in case.gt_boxes
        ]
        for annotation, category in zip(annotations, case.gt_classes):
            annotation["category_id"] = category
        record = dict(image_id=image_id, width=width, height=height, annotations=annotations)
        dicts.append(dict(record, relations=case.relations, verified_labels=case.verified))
        predicted = case.pair()[1]
        boxes = np.asarray(case.boxes, dtype=np.float32) * scale
        predictions.append(
            SceneGraph.from_arrays(
                image_id,
                boxes,
                case.classes,
                predicted.box_scores,
                predicted.pairs,
                predicted.predicates,
                predicted.scores.astype(np.float32),
            )
        )
    DatasetCatalog.register(NAME, lambda: dicts)
    MetadataCatalog.get(NAME).set(
        thing_classes=CLASSES, predicate_classes=PREDICATES, evaluator_type="openimages_vrd"
    )
    yield predictions
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.mark.parametrize("layout", ["server", "table"])
def test_submission_roundtrip_gives_the_same_score(images, tmp_path, layout):
    file = str(tmp_path / "submission.csv")
    evaluator = OpenImagesVRDEvaluator(NAME, protocol="openimages")
    for prediction in images[:-1]:  # one image without predictions
        evaluator.add(prediction)
    expected = evaluator.evaluate()
    assert 0 < expected["openimages_sgdet"]["score"] < 100
    write_submission(NAME, images[:-1], file, layout)
    np.testing.assert_equal(evaluate_predictions(NAME, file, protocol="openimages"), expected)
    zipped = tmp_path / "zipped.csv.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "submission.csv").read_bytes()))
    again = evaluate_predictions(NAME, str(zipped), protocol="openimages")
    np.testing.assert_equal(again, expected)
    for before, after in zip(images[:-1], read_submission(NAME, file)):
        assert after.image_id == before.image_id
        np.testing.assert_array_equal(after.scores, before.scores)
        np.testing.assert_array_equal(after.labels, before.labels)
        np.testing.assert_array_equal(after.boxes[after.pairs], before.boxes[before.pairs])


def test_write_submission_layouts_by_hand(images, tmp_path):
    one = SceneGraph.from_arrays(
        IDS[3], [[0, 256, 192, 512], [96, 0, 768, 1024]], [0, 1], [1, 1], [[1, 0]], [2], [0.75]
    )
    write_submission(NAME, [one], str(tmp_path / "server.csv"))
    lines = (tmp_path / "server.csv").read_text().splitlines()
    assert lines[0] == "ImageId,PredictionString" and len(lines) == 1 + len(IDS)
    assert lines[1] == (
        f"{IDS[3]},0.75 /m/0342h 0.125 0.0 1.0 1.0 /m/04yx4 0.0 0.25 0.25 0.5 inside_of"
    )
    assert lines[2] == f"{IDS[0]},"
    write_submission(NAME, [one], str(tmp_path / "table.csv"), "table")
    assert (tmp_path / "table.csv").read_text().splitlines() == [
        "ImageID,LabelName1,LabelName2,RelationshipLabel,Score,"
        "XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2",
        f"{IDS[3]},/m/0342h,/m/04yx4,inside_of,0.75,0.125,1.0,0.0,1.0,0.0,0.25,0.25,0.5",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Image,Labels\n", "line 1: the columns are 'Image, Labels'; expected ImageId,Pred"),
        ("ImageId,PredictionString\nffff,\n", "line 2: dataset .* has no image 'ffff'"),
        ("ImageId,PredictionString\nID,0.5 a b\n", "line 2: 3 parts, .*multiple of the 12"),
        ("ImageId,PredictionString\nID\n", "line 2: 1 fields instead of 2. The line is cut off"),
        ("ImageId,PredictionString\nID,\nID,\n", "line 3: image '0{16}' is in line 2 as well"),
        ("ImageId,PredictionString\nID,high A 0 0 1 1 B 0 0 1 1 holds\n", "'high'. Scores and"),
        ("ImageId,PredictionString\nID,.5 A 0 0 1 1 C 0 0 1 1 holds\n", "class 'C' is not one"),
        ("ImageId,PredictionString\nID,.5 A 0 0 1 1 B 0 0 1 1 at\n", "predicate 'at' is not one"),
        ("ImageId,PredictionString\nID,nan A 0 0 1 1 B 0 0 1 1 holds\n", "NaN or infinite scores"),
        ("ImageId,PredictionString\nID,.5 A 1 0 0 1 B 0 0 1 1 holds\n", "ends before it begins"),
    ],
)
def test_read_submission_wrong_line_raises(images, tmp_path, text, message):
    path = tmp_path / "wrong.csv"
    text = text.replace("ID,", f"{IDS[0]},").replace("ID\n", f"{IDS[0]}\n")
    text = text.replace(" A ", f" {CLASSES[0]} ").replace(" B ", f" {CLASSES[1]} ")
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape("wrong.csv, line") + ".*" + message[5:]):
        evaluate_predictions(NAME, str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_write_submission_unusable_input_raises(images, tmp_path):
    file = tmp_path / "submission.csv"
    with pytest.raises(ValueError, match="'kaggle'; expected one of server, table"):
        write_submission(NAME, images, str(file), "kaggle")
    with pytest.raises(ValueError, match="'a guitar' has a space"):
        write_submission(NAME, images, str(file), labels=["person", "a guitar"])
    with pytest.raises(ValueError, match="has two equal class names"):
        write_submission(NAME, images, str(file), labels=["person", "person"])
    with pytest.raises(ValueError, match="1 labels for the 2 classes of dataset 'submission_"):
        write_submission(NAME, images, str(file), labels=["person"])
    stranger = SceneGraph.empty("stranger")
    with pytest.raises(ValueError, match="has no image 'stranger'"):
        write_submission(NAME, [stranger], str(file))
    dicts = [{k: v for k, v in r.items() if k != "width"} for r in DatasetCatalog.get(NAME)]
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: dicts)
    with pytest.raises(ValueError, match="its size is unknown"):
        write_submission(NAME, images, str(file))
    assert not file.exists()


def test_evaluate_relations_tool_writes_and_reads_submissions(images, tmp_path):
    """With the classes' identifiers from a file, as the metadata has other names."""
    metadata = MetadataCatalog.get(NAME)
    del metadata.thing_classes
    metadata.thing_classes = ["a person", "a guitar"]
    source, target = str(tmp_path / "predictions.json"), str(tmp_path / "submission.csv")
    write_predictions(images, source)
    labels = tmp_path / "classes.csv"
    labels.write_text("".join(f"{label},some name\n" for label in CLASSES))
    call = ["--dataset", NAME, "--protocol", "openimages", "--labels", str(labels)]
    outputs = [str(tmp_path / name) for name in ("first", "second")]
    write = ["--write-submission", target, "--layout", "table"]
    assert run_tool([*call, "--predictions", source, "--output", outputs[0], *write]) == 0
    assert run_tool([*call, "--predictions", target, "--output", outputs[1]]) == 0
    results = [json.loads(Path(x, "results.json").read_text()) for x in outputs]
    assert results[0] == results[1] and results[0]["openimages_sgdet"]["score"] > 0
    # A submission can be written again, here in the other layout.
    again = str(tmp_path / "again.csv")
    assert run_tool([*call, "--predictions", target, "--write-submission", again]) == 0
    third = str(tmp_path / "third")
    assert run_tool([*call, "--predictions", again, "--output", third]) == 0
    assert json.loads(Path(third, "results.json").read_text()) == results[0]


def test_openimages_missing_verified_labels_warns(images, caplog):
    dicts = [
        {k: v for k, v in r.items() if k != "verified_labels"} for r in DatasetCatalog.get(NAME)
    ]
    with caplog.at_level(logging.WARNING):
        OpenImagesVRDEvaluator(NAME, protocol="openimages").evaluate()
    assert "verified labels" not in caplog.text
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: dicts)
    with caplog.at_level(logging.WARNING):
        OpenImagesVRDEvaluator(NAME).evaluate()
        assert "verified labels" not in caplog.text
        OpenImagesVRDEvaluator(NAME, protocol="openimages").evaluate()
    assert f"No image of '{NAME}' has verified labels" in caplog.text


def test_read_submission_copies_and_equal_boxes_score_as_in_the_challenge(images, tmp_path, caplog):
    """A copy is a false positive, and so are two equal boxes of one class; copies are reported."""
    row = "0.5 /m/04yx4 0.1 0.1 0.5 0.5 /m/0342h 0.2 0.2 0.6 0.6 holds"
    equal = "0.4 /m/04yx4 0.1 0.1 0.5 0.5 /m/04yx4 0.1 0.1 0.5 0.5 holds"
    file = tmp_path / "copies.csv"
    file.write_text(f"ImageId,PredictionString\n{IDS[0]},{row} {row} {equal}\n")
    with caplog.at_level(logging.WARNING):
        (prediction,) = read_submission(NAME, str(file))
    assert prediction.labels.tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    boxes = prediction.boxes[prediction.pairs]
    np.testing.assert_array_equal(boxes[0], boxes[1])
    np.testing.assert_array_equal(boxes[2, 0], boxes[2, 1])
    assert "copies.csv lists 1 triplets again" in caplog.text


# --------------------------------------------------------------------------------------- attributes

ATTRIBUTES = ["/m/02gy9n", "/m/05z87"]


@pytest.fixture
def attributed(images):
    """The images with predicted and annotated attributes."""
    rng = np.random.default_rng(1)
    MetadataCatalog.get(NAME).attribute_classes = ATTRIBUTES
    for record in DatasetCatalog.get(NAME):
        for annotation in record["annotations"]:
            annotation["attributes"] = [int(rng.integers(0, 2))]
    result = []
    for graph in images:
        values = rng.random((len(graph.boxes), 2)).astype(np.float32).astype(float).tolist()
        attributes = EntityAttributes.from_lists([[0, 1]] * len(values), values, len(values), "it")
        # A submission has no scores of boxes; equal entities would become one.
        ones = np.ones(len(graph.boxes))
        boxes = graph.boxes + np.float32(0.25) * np.arange(len(ones))[:, None].astype(np.float32)
        boxes = boxes.astype(np.float32).astype(float)
        result.append(replace(graph, attributes=attributes, box_scores=ones, boxes=boxes))
    return result


@pytest.mark.parametrize("layout", ["server", "table"])
def test_submission_with_attributes_roundtrip_gives_the_same_score(attributed, tmp_path, layout):
    file = str(tmp_path / "submission.csv")
    evaluator = OpenImagesVRDEvaluator(NAME, protocol="openimages")
    for prediction in attributed:
        evaluator.add(prediction)
    expected = evaluator.evaluate()
    assert 0 < expected["openimages_sgdet_full"]["AP_rel-is"] < 100
    write_submission(NAME, attributed, file, layout)
    np.testing.assert_equal(evaluate_predictions(NAME, file, protocol="openimages"), expected)
    for before, after in zip(attributed, read_submission(NAME, file)):
        rows = [
            sorted(
                (x.boxes[e].tolist(), int(x.classes[e]), a, s) for e, a, s in x.attributes.rows()
            )
            for x in (before, after)
        ]
        assert rows[0] == rows[1]


def test_write_submission_attributes_by_hand(attributed, tmp_path):
    one = SceneGraph.from_arrays(
        IDS[3], [[0, 256, 192, 512], [96, 0, 768, 1024]], [0, 1], [0.5, 1], [[1, 0]], [2], [0.75]
    )
    attributes = EntityAttributes.from_lists([[1], []], [[0.25], []], 2, "it")
    file = str(tmp_path / "server.csv")
    write_submission(NAME, [replace(one, attributes=attributes)], file)
    box = "0.0 0.25 0.25 0.5"
    expected = (
        f"{IDS[3]},0.75 /m/0342h 0.125 0.0 1.0 1.0 /m/04yx4 {box} inside_of "
        f"0.125 /m/04yx4 {box} /m/05z87 {box} is"
    )
    assert Path(file).read_text().splitlines()[1] == expected
    labels = ["A", "B", "C", "D"]  # of the classes and then of the attributes
    write_submission(NAME, [replace(one, attributes=attributes)], file, labels=labels)
    assert Path(file).read_text().splitlines()[1].endswith(f"0.125 A {box} D {box} is")
    with pytest.raises(
        ValueError, match="3 labels for the 2 classes .* the 2 attributes, in their"
    ):
        write_submission(NAME, [one], file, labels=labels[:3])


def test_write_submission_attributes_with_blanks_need_labels(attributed, tmp_path):
    del MetadataCatalog.get(NAME).attribute_classes
    MetadataCatalog.get(NAME).attribute_classes = ["dark red", "old"]
    file = str(tmp_path / "server.csv")
    with pytest.raises(ValueError, match="attribute 'dark red' has a space, which separates"):
        write_submission(NAME, attributed, file)
    write_submission(NAME, [replace(x, attributes=None) for x in attributed], file)
    write_submission(NAME, attributed, file, labels=["A", "B", "C", "D"])
    write_submission(NAME, attributed, file, "table")
    assert "dark red" in Path(file).read_text()


@pytest.mark.parametrize(
    ("triplet", "message"),
    [
        ("A 0 0 1 1 B 0 0 1 1 is", "/m/04yx4 is /m/0342h: an attribute is the second label of"),
        (
            "A 0 0 1 1 RED 0 0 1 1 holds",
            "holds /m/02gy9n: an attribute is the second label of 'is'",
        ),
        ("RED 0 0 1 1 A 0 0 1 1 holds", "/m/02gy9n holds /m/04yx4: an attribute is the second"),
        ("A 0 0 1 1 RED 0 0 1 .9 is", "/m/04yx4 is /m/02gy9n has two different boxes. Both are"),
    ],
)
def test_read_submission_wrong_attribute_raises(attributed, tmp_path, triplet, message):
    words = {"A": CLASSES[0], "B": CLASSES[1], "RED": ATTRIBUTES[0]}
    triplet = " ".join(words.get(word, word) for word in triplet.split())
    file = tmp_path / "wrong.csv"
    file.write_text(f"ImageId,PredictionString\n{IDS[0]},0.5 {triplet}\n")
    with pytest.raises(ValueError, match=r"wrong\.csv, line 2 .*" + re.escape(message)):
        list(read_submission(NAME, str(file)))
    nan = f"{CLASSES[0]} 0 0 1 1 {ATTRIBUTES[0]} 0 0 1 1 is"
    file.write_text(f"ImageId,PredictionString\n{IDS[0]},nan {nan}\n")
    with pytest.raises(ValueError, match="NaN or infinite scores of attributes"):
        list(read_submission(NAME, str(file)))


def test_read_submission_attribute_listed_twice_is_another_entity(attributed, tmp_path, caplog):
    row = f"{CLASSES[0]} 0 0 1 1 {ATTRIBUTES[0]} 0 0 1 1 is"
    file = tmp_path / "twice.csv"
    file.write_text(f"ImageId,PredictionString\n{IDS[0]},0.5 {row} 0.25 {row}\n")
    (graph,) = read_submission(NAME, str(file))
    assert len(graph.boxes) == 2 and graph.attributes.scores.tolist() == [0.5, 0.25]
    assert len(graph.pairs) == 0 and "lists 1 triplets again" in caplog.text
