"""Predictions of other programs: conversion of frames, ids and scores, and wrong files."""

import importlib
import json
import re

import import_predictions as tool
import numpy as np
import pytest
from foreign_predictions import (
    motifs_records,
    raw_predictions,
    released_records,
    write_pickle,
    write_tang,
)

from reldn_d2.evaluation import evaluate_predictions
from reldn_d2.evaluation.imported_predictions import import_predictions
from reldn_d2.evaluation.predictions_io import read_settings
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.protocols import all_predicates_per_pair

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

NAME = "imported_predictions_test_set"
CLASSES, PREDICATES = ["person", "cup", "table"], ["holds", "next to", "on", "under"]


def record(index, classes, relations, width=100, height=80):
    boxes = [[4 * i + index, 5 * i, 4 * i + 30 + index, 5 * i + 40] for i in range(len(classes))]
    return {
        "image_id": 10 + index,
        "file_name": f"images/{index}.jpg",
        "width": width,
        "height": height,
        "annotations": [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": c}
            for box, c in zip(boxes, classes)
        ],
        "relations": relations,
    }


DICTS = [
    record(0, [0, 1, 2], [(0, 1, 0), (1, 2, 2)]),
    record(1, [1], [], 50, 50),
    record(2, [2, 1, 0, 0], [(1, 0, 2), (0, 1, 3), (2, 3, 1)], 60, 90),
]


@pytest.fixture(autouse=True)
def dataset(registered):
    DatasetCatalog.register(registered(NAME), lambda: DICTS)
    MetadataCatalog.get(NAME).set(
        thing_classes=CLASSES, predicate_classes=PREDICATES, evaluator_type="scene_graph"
    )


@pytest.fixture
def images():
    return raw_predictions(DICTS, len(PREDICATES))


def expected(image, record):
    boxes, classes, box_scores, pairs, scores = image
    rows = [(s, o, p) for s, o in pairs.tolist() for p in range(len(PREDICATES))]
    triplet_scores = (scores[:, 1:] * box_scores[pairs].prod(1)[:, None]).reshape(-1)
    return SceneGraph.from_arrays(
        record["image_id"],
        boxes,
        classes - 1,
        box_scores,
        [r[:2] for r in rows],
        [r[2] for r in rows],
        triplet_scores,
    )


def triplets(graph):
    """Label, rounded boxes and score of each triplet, whatever the order of the boxes."""
    boxes = graph.boxes.round(3).tolist()
    classes = graph.classes.tolist()
    return [
        (classes[s], p, classes[o], boxes[s], boxes[o], round(score, 5))
        for (s, o), p, score in zip(
            graph.pairs.tolist(), graph.predicates.tolist(), graph.scores.tolist()
        )
    ]


def write(file_format, folder, images, dicts=DICTS):
    if file_format.startswith("tang"):
        legacy = file_format == "tang-legacy"
        return write_tang(folder / "eval_results.pytorch", images, dicts, 6.0, legacy)
    content = {"motifs": motifs_records, "released": released_records}[file_format](images, dicts)
    return write_pickle(folder / f"{file_format}.pkl", content)


def read(file_format, file, **options):
    return list(import_predictions(file_format.partition("-")[0], str(file), NAME, **options))


@pytest.mark.parametrize("file_format", ["tang", "tang-legacy", "motifs", "released"])
def test_import_predictions_gives_boxes_ids_and_triplet_scores(tmp_path, images, file_format):
    graphs = read(file_format, write(file_format, tmp_path, images))
    assert [graph.image_id for graph in graphs] == [10, 11, 12]
    for graph, image, truth in zip(graphs, images, DICTS):
        assert triplets(graph) == triplets(expected(image, truth))


@pytest.mark.parametrize("file_format", ["tang", "motifs", "released"])
def test_import_predictions_images_with_relations_only(tmp_path, images, file_format):
    related = [0, 2]
    part = [images[i] for i in related], [DICTS[i] for i in related]
    graphs = read(file_format, write(file_format, tmp_path, *part))
    assert [graph.image_id for graph in graphs] == [10, 12]
    one = images[:1], DICTS[:1]
    if file_format != "released":  # which names its images
        with pytest.raises(ValueError, match="1 images, but dataset .* has 3, 2 of which have rel"):
            read(file_format, write(file_format, tmp_path, *one))


def test_import_predictions_names_of_the_file_are_mapped(tmp_path, images):
    file = write("tang", tmp_path, images)
    names = dict(class_names=CLASSES[::-1], predicate_names=PREDICATES[::-1])
    graphs, plain = (read("tang", file, **options) for options in (names, {}))
    assert graphs[0].classes.tolist() == [2 - c for c in plain[0].classes]
    assert graphs[0].predicates.tolist() == [3 - p for p in plain[0].predicates]
    with pytest.raises(ValueError, match="thing_classes of .*--classes.* differ"):
        read("tang", file, class_names=["person", "cup", "chair"])


@pytest.mark.parametrize("k", all_predicates_per_pair())
def test_import_predictions_topk_is_exact_for_each_limit(tmp_path, images, k):
    graphs = read("tang", write("tang", tmp_path, images), topk=5)
    for graph, image, truth in zip(graphs, images, DICTS):
        best = expected(image, truth).reduced([k], 5)
        assert triplets(graph.reduced([k], 5)) == triplets(best)


@pytest.mark.parametrize(("first", "given"), [(0, None), (1, None), (0, 0), (1, 1)])
def test_import_predictions_released_first_class_id(tmp_path, images, first, given):
    file = write_pickle(tmp_path / "r.pkl", released_records(images, DICTS, first))
    graphs = read("released", file, first_class_id=given)
    assert graphs[0].classes.max() == 2 and graphs[0].classes.min() == 0
    with pytest.raises(ValueError, match="class id .* is not one of .*--first-class-id"):
        read("released", file, first_class_id=1 - first)


def test_import_predictions_released_without_names_uses_the_order(tmp_path, images):
    records = released_records(images, DICTS, names=False)
    renamed = [
        {f"det_{'_'.join(reversed(k.split('_')))}" if k[:3] in ("sbj", "obj") else k: v}
        for x in records
        for k, v in [*x.items()]
    ]
    merged = [dict(kv for x in renamed[i : i + 7] for kv in x.items()) for i in (0, 7, 14)]
    assert "det_boxes_sbj" in merged[0]
    graphs = read("released", write_pickle(tmp_path / "r.pkl", merged))
    assert [graph.image_id for graph in graphs] == [10, 11, 12]
    records = released_records(images, DICTS)
    graphs = read("released", write_pickle(tmp_path / "r.pkl", records[::-1]))
    assert [graph.image_id for graph in graphs] == [12, 11, 10]
    records[1]["image"] = "other.jpg"
    with pytest.raises(ValueError, match="image 1: dataset .* has no image 'other.jpg'"):
        read("released", write_pickle(tmp_path / "r.pkl", records))


def test_import_predictions_motifs_long_side_0_keeps_pixels(tmp_path, images):
    file = write("motifs", tmp_path, images)
    graphs = read("motifs", file, long_side=0)
    assert np.allclose(graphs[0].boxes, images[0][0] * 10.24)
    with pytest.raises(ValueError, match="long_side is an option of motifs files"):
        read("tang", file, long_side=0)


# ------------------------------------------------------------------------------------ wrong files


def change_tang(change):
    def write_changed(folder, images):
        return write_tang(folder / "e.pytorch", images, DICTS, change=change)

    return "tang", write_changed


def change_motifs(change):
    def write_changed(folder, images):
        records = motifs_records(images, DICTS)
        return write_pickle(folder / "e.pkl", change(records) or records)

    return "motifs", write_changed


def set_field(name, value):
    return change_tang(lambda content: vars(content["predictions"][0]).update({name: value}))


def set_motifs(name, value):
    return change_motifs(lambda records: records[0].update({name: value}))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (change_tang(lambda content: {"a": 1}), "found a dict; expected {.predictions"),
        (change_tang(lambda content: content["predictions"].__setitem__(0, 7)), r"\[0\]: no bbox"),
        (set_field("extra_fields", {}), r"predictions\[0\]: no pred_labels, .*without relations"),
        (set_field("mode", "cxcywh"), "mode is 'cxcywh'; expected xyxy or xywh"),
        (set_field("size", (600, 0)), "size is .600, 0.; expected .width, height"),
        (set_field("size", (600, 600)), "100 x 80.*another order"),
        (
            change_tang(lambda content: content["groundtruths"].reverse()),
            r"groundtruths\[0\] has 4 boxes, but image 10 of dataset .* has 3",
        ),
        (change_motifs(lambda records: {"a": 1}), "found a dict; expected a list of images"),
        (change_motifs(lambda records: [*records[:2], 7]), "image 2 is 7; expected a dict"),
        (set_motifs("rel_scores", None), "image 0: no rel_scores; it has "),
        (set_motifs("rel_scores", np.ones((6, 4))), "4 scores per pair; expected 5, the first"),
        (set_motifs("rel_scores", np.ones((5, 5))), "6 pairs, 5 rows of predicate scores"),
        (set_motifs("rel_scores", np.ones(5)), r"rel_scores has the shape \(5,\)"),
        (set_motifs("rel_scores", np.full((6, 5), np.nan)), r"image 0 \(10\): NaN or infinite"),
        (set_motifs("pred_classes", np.array([0, 1, 2])), "class id 0 is not one of 1 to 3"),
        (set_motifs("pred_classes", np.array([1, 2, 4])), "class id 4 is not one of 1 to 3"),
        (set_motifs("pred_classes", np.array([1, 2])), "3 boxes, 2 classes, 3 box scores"),
        (set_motifs("pred_classes", np.array(["a"] * 3)), "pred_classes has .* expected numbers"),
        (set_motifs("pred_classes", np.array([1, 2, 2.5])), "classes are not whole numbers"),
        (set_motifs("pred_rel_inds", np.full((6, 2), np.nan)), "pairs are not whole numbers"),
        (set_motifs("pred_rel_inds", np.full((6, 2), 3)), "index outside its 3 boxes"),
        (set_motifs("pred_boxes", [[1, 2], [3]]), "pred_boxes is ragged|pred_boxes has the shape"),
        (set_motifs("pred_boxes", np.full((3, 4), [90, 90, 9, 9.0])), "which ends before it"),
    ],
)
def test_import_predictions_wrong_content_raises(tmp_path, images, case, message):
    file_format, write_changed = case
    file = write_changed(tmp_path, images)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        read(file_format, file)


def test_import_predictions_unknown_format_or_no_file_raises(tmp_path):
    with pytest.raises(ValueError, match="Unknown format 'x'; expected one of tang, motifs, rel"):
        list(import_predictions("x", "a.pkl", NAME))
    with pytest.raises(FileNotFoundError):
        read("motifs", tmp_path / "none.pkl")


# --------------------------------------------------------------------------------------- the tool


@pytest.mark.parametrize("file_format", ["tang", "motifs", "released"])
def test_import_predictions_tool_output_is_scored(tmp_path, images, file_format, capsys):
    file = write(file_format, tmp_path, images)
    output = tmp_path / "new/theirs.json"
    arguments = ["--from", file_format, "--input", str(file), "--dataset", NAME]
    arguments += ["--task", "sgdet", "--output", str(output)]
    assert tool.main(arguments) == 0
    assert f"Wrote {output}" in capsys.readouterr().out
    settings = read_settings(str(output))
    assert settings["task"] == "sgdet" and settings["thing_classes"] == CLASSES
    results = evaluate_predictions(NAME, str(output))
    assert results["motifs_sgdet_no_constraint"]["R@100"] == 100
    for protocol in ("lu2016", "released", "openimages", "relations"):
        evaluate_predictions(NAME, str(output), protocol=protocol)
    with pytest.raises(ValueError, match="import_predictions.py"):
        evaluate_predictions(NAME, str(file))


def test_import_predictions_tool_refuses_objects_in_one_line(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return importlib.import_module, ("antigravity",)

    file = write_pickle(tmp_path / "evil.pkl", [Evil()])
    output = tmp_path / "theirs.json"
    arguments = ["--from", "motifs", "--input", str(file), "--dataset", NAME]
    arguments += ["--task", "sgdet", "--output", str(output)]
    assert tool.main(arguments) == 1
    error = capsys.readouterr().err
    assert "evil.pkl is broken or holds more than" in error and error.count("\n") == 1
    assert "it holds importlib.import_module" in error and not output.exists()


def test_import_predictions_tool_names_from_files(tmp_path, images):
    file = write("motifs", tmp_path, images)
    (tmp_path / "classes.json").write_text(json.dumps(["__background__", *CLASSES[::-1]]))
    (tmp_path / "predicates.txt").write_text("\n".join(PREDICATES))
    output = tmp_path / "theirs.json"
    arguments = ["--from", "motifs", "--input", str(file), "--dataset", NAME, "--task", "prdcls"]
    arguments += ["--output", str(output), "--classes", str(tmp_path / "classes.json")]
    assert tool.main([*arguments, "--predicates", str(tmp_path / "predicates.txt")]) == 0
    assert json.loads(output.read_text())[0]["instances"]["classes"] == [2, 1, 0]
    with pytest.raises(SystemExit):
        tool.main([*arguments, "--topk", "0"])
