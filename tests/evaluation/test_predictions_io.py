"""Predictions files of any origin, their errors, and the tool that scores them."""

import gzip
import io
import json
import logging
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_utils import random_case, run_tool

from reldn_d2.evaluation import (
    RelationEvaluator,
    VRDEvaluator,
    counted_relations,
    evaluate_predictions,
)
from reldn_d2.evaluation.predictions_io import (
    read_predictions,
    read_settings,
    settings_file,
    write_predictions,
    write_settings,
)
from reldn_d2.evaluation.relation_evaluation import load_ground_truth
from reldn_d2.structures.attributes import EntityAttributes
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.protocols import PROTOCOL_REGISTRY

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

NAME = "predictions_file_test_set"
CLASSES, PREDICATES = ["person", "cup"], ["holds", "next to", "wears"]
IDS = [f"image_{i}.jpg" for i in range(6)]


@pytest.fixture
def cases():
    """Six registered images; the predictions that belong to them."""
    rng = np.random.default_rng(0)
    cases = [random_case(rng, 5, 5, 2, 3, ("near", "ties")) for _ in IDS]
    dicts = [
        {
            "image_id": image_id,
            "annotations": [
                {"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": c}
                for b, c in zip(case.gt_boxes, case.gt_classes)
            ],
            "relations": case.relations,
        }
        for image_id, case in zip(IDS, cases)
    ]
    DatasetCatalog.register(NAME, lambda: dicts)
    MetadataCatalog.get(NAME).set(
        thing_classes=CLASSES, predicate_classes=PREDICATES, evaluator_type="vrd"
    )
    yield cases
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def record(case, image_id):
    """A record as anyone might write it: integers, in any order of keys."""
    triplets = case.triplets
    return {
        "relations": {
            "scores": [t[3] for t in triplets],
            "predicates": [t[2] for t in triplets],
            "pairs": [list(t[:2]) for t in triplets],
        },
        "image_id": image_id,
        "instances": {
            "boxes": case.boxes,
            "classes": case.classes,
            "scores": [1] * len(case.boxes),
        },
    }


@pytest.fixture
def records(cases):
    return [record(case, image_id) for image_id, case in zip(IDS, cases)]


@pytest.fixture
def given_cases(cases):
    """The cases with the annotated boxes and classes, as in sgcls and prdcls."""
    return [replace(case, boxes=case.gt_boxes, classes=case.gt_classes) for case in cases]


@pytest.fixture
def given_records(given_cases):
    return [record(case, image_id) for image_id, case in zip(IDS, given_cases)]


def evaluated(cases, **options):
    evaluator = VRDEvaluator(NAME, **options)
    for case, image_id in zip(cases, IDS):
        evaluator.add(type(case.pair()[1])(**{**vars(case.pair()[1]), "image_id": image_id}))
    return evaluator.evaluate()


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_evaluate_predictions_any_json_layout_gives_the_models_metrics(cases, records, tmp_path):
    expected = evaluated(cases)
    assert 0 < expected["lu2016_sgdet_k1"]["relationship R@50"] < 100
    texts = {
        "plain": json.dumps(records),
        "shuffled": json.dumps(records[::-1]),
        "pretty": json.dumps(records, indent=4),
        "tight": json.dumps(records, separators=(",", ":")),
        "spaced": "\ufeff \n[\n" + " ,\n\n ".join(map(json.dumps, records)) + "\n ]\n\n",
        "lines": "\n".join(map(json.dumps, records)),
        "first_beside_bracket": "[" + ",\n".join(map(json.dumps, records)) + "]",
        "mixed": json.dumps(records[:2])[:-1] + ",\n" + json.dumps(records[2:], indent=1)[1:],
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}.json"
        path.write_text(text, encoding="utf-8")
        np.testing.assert_equal(evaluate_predictions(NAME, str(path)), expected)
    zipped = tmp_path / "zipped.json"  # told by its content, whatever its name
    zipped.write_bytes(gzip.compress(texts["plain"].encode()))
    np.testing.assert_equal(evaluate_predictions(NAME, str(zipped)), expected)


def test_predictions_file_roundtrip(cases, tmp_path):
    file = str(tmp_path / "predictions.json")
    predictions = [
        type(p)(**{**vars(p), "image_id": i}) for i, (_, p) in zip(IDS, (c.pair() for c in cases))
    ]
    write_predictions(predictions, file)
    for before, after in zip(predictions, read_predictions(file)):
        np.testing.assert_equal(vars(after), vars(before))


def test_predictions_file_keeps_probabilities_of_predicates(cases, tmp_path):
    """They are not the scores divided by those of the boxes if these are raised to a power."""
    graph = cases[0].pair()[1]
    known = np.linspace(0.9, 0.1, len(graph.scores))
    file = str(tmp_path / "predictions.json")
    write_predictions([replace(graph, image_id=IDS[0], predicate_scores=known)], file)
    (found,) = read_predictions(file)
    np.testing.assert_array_equal(found.predicate_scores, known)
    np.testing.assert_allclose(found["relations"].predicate_scores, known, rtol=1e-6)


def test_predictions_file_with_attributes_roundtrip(cases, tmp_path):
    file = str(tmp_path / "predictions.json")
    predictions = []
    for image_id, case in zip(IDS, cases):
        graph = case.pair()[1]
        lists = [[[1, 0], [0.75, 0.25]], [[], []]] * len(graph.boxes)
        ids, values = zip(*lists[: len(graph.boxes)])
        attributes = EntityAttributes.from_lists(ids, values, len(graph.boxes), "it")
        predictions.append(replace(graph, image_id=image_id, attributes=attributes))
    write_predictions(predictions, file)
    for before, after in zip(predictions, read_predictions(file, num_attributes=2), strict=True):
        assert after.attributes.rows() == before.attributes.rows()
    with pytest.raises(ValueError, match="record 0 .*attribute 1 is not one of the dataset's 1, 0"):
        list(read_predictions(file, num_attributes=1))


def attributes(ids, scores):
    """Give the first record's boxes these attributes; None leaves a list out."""

    def spoil(records):
        lists = {"attributes": ids, "attribute_scores": scores}
        records[2]["instances"].update({k: v for k, v in lists.items() if v is not None})

    return spoil


def test_read_predictions_long_records_and_spaces(cases, records, tmp_path):
    size = 1 << 20
    blank = " " * (size - 10)
    text = "[" + blank + json.dumps(records[0]).replace('"image_id"', blank * 3 + '"image_id"')
    path = write(tmp_path / "long.json", text + "," + json.dumps(records[1]) + blank + "]" + blank)
    assert [p.image_id for p in read_predictions(path)] == IDS[:2]
    for item in records:
        item["mask"] = "a" * (size * 2 // 3)  # an additional field
    path = write(tmp_path / "fields.json", records)
    assert [p.image_id for p in read_predictions(path)] == IDS
    Path(path).write_text(Path(path).read_text()[: -size // 2])
    with pytest.raises(ValueError, match="fields.json: ends within record 5.*cut off"):
        list(read_predictions(path))


@pytest.mark.parametrize("end", ["\n]\n", ""])
def test_read_predictions_one_record_per_line_is_streamed(cases, records, tmp_path, end):
    """The records before a damaged one are yielded before the file is read any further."""
    start, separator = ("[\n", ",\n") if end else ("", "\n")
    lines = [json.dumps(x) for x in records]
    path = write(tmp_path / "lines.json", start + separator.join([*lines, '{"image', *lines]) + end)
    reader = read_predictions(path)
    assert [next(reader).image_id for _ in IDS] == IDS
    # An open string runs to the end of the line, or of the rest of a list.
    with pytest.raises(ValueError, match="lines.json: .*record 6"):
        next(reader)


@pytest.mark.parametrize("damage", range(1, 9))
def test_read_predictions_truncated_anywhere_names_the_record(cases, records, tmp_path, damage):
    for text in (json.dumps(records), "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n"):
        for cut in range(len(text) * damage // 9, len(text) * damage // 9 + 25):
            path = write(tmp_path / "cut.json", text[:cut])
            with pytest.raises(ValueError, match=r"cut.json: ends within record \d.*cut off"):
                list(read_predictions(path))


def test_evaluate_predictions_missing_images_and_empty_list(cases, records, tmp_path, caplog):
    path = write(tmp_path / "some.json", records[:3])
    with caplog.at_level(logging.WARNING):
        some = evaluate_predictions(NAME, path)
    assert "3 of the 6 images" in caplog.text
    np.testing.assert_equal(some, evaluated(cases[:3]))
    write(tmp_path / "none.json", [])
    with caplog.at_level(logging.WARNING):
        none = evaluate_predictions(NAME, str(tmp_path / "none.json"))
    assert none["lu2016_sgdet_k1"]["relationship R@50"] == 0
    assert "None of the 0 predicted triplets" in caplog.text


def change(path, value):
    """A change of record 2: ``path`` is "instances/boxes/0"."""

    def apply(records):
        part = records[2]
        *parents, last = path.split("/")
        for key in parents:
            part = part[int(key) if isinstance(part, list) else key]
        part[int(last) if isinstance(part, list) else last] = value

    return apply


def twice(item):
    """List every triplet of a record twice."""
    item["relations"] = {key: values * 2 for key, values in item["relations"].items()}


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (change("image_id", "other.jpg"), "(image 'other.jpg'): .* no such image_id .*image_0"),
        (change("image_id", "image_1.jpg"), "(image 'image_1.jpg'): record 1 is of the same"),
        (change("image_id", None), "image_id is None; expected the dataset's own"),
        (change("instances/classes/0", 2), "IMG class 2 is not one of .* 2, 0 to 1.*0-based"),
        (change("instances/classes/0", -1), "IMG class -1 is not one of"),
        (change("instances/classes/0", 1.5), "IMG classes are .*; expected integers"),
        (change("relations/predicates/0", 3), "IMG predicate 3 is not one of .* 3, 0 to 2"),
        (change("relations/pairs/0", [0, 5]), r"IMG pair \d is \(0, 5\), but there are 5 boxes"),
        (change("relations/pairs/0", [-1, 0]), r"IMG pair \d is \(-1, 0\)"),
        (change("relations/pairs/0", [0]), r"IMG pairs differ in length; .*\[subject, object\]"),
        (change("relations/scores/0", float("nan")), r"IMG NaN .* scores, the first at index 0"),
        (change("relations/scores/0", "high"), "IMG scores are .*; expected numbers"),
        (change("instances/scores/0", float("inf")), "IMG NaN or infinite box scores"),
        (change("instances/boxes/1", [9, 0, 4, 5]), r"IMG box 1 is \[9.0, 0.0, 4.0, 5.0\], which"),
        (change("instances/boxes", [1, 2, 3, 4]), r"IMG boxes have the shape \(4,\)"),
        (change("instances/scores", [1.0]), "IMG 5 boxes, 5 classes and 1 box scores"),
        (change("relations/scores", [0.5]), r"IMG \d+ pairs, \d+ predicates and 1 triplet scores"),
        (change("relations", {}), r'IMG "relations" is \[\]; .* pairs, predicates, scores'),
        (change("instances", None), 'IMG "instances" is None; .* boxes, classes, scores'),
        (change("relations/pairs/0", [1, 1]), "IMG triplet .* relates an entity to itself"),
        (attributes([[0]] * 5, None), 'IMG "instances" has no "attribute_scores", but'),
        (attributes([[0]] * 5, [[2]] * 5), "IMG an attribute of box 0 has the score 2.0; expected"),
        (attributes([[0]], [[0.5]]), "IMG attributes are .* one list for each of the 5 boxes"),
        (lambda records: twice(records[2]), "IMG triplet .* is listed before as triplet 0, and"),
        (lambda records: records.__setitem__(2, 7), ": expected an object .* found 7"),
    ],
)
def test_evaluate_predictions_wrong_record_raises(cases, records, tmp_path, apply, message):
    apply(records)
    path = write(tmp_path / "predictions.json", records)
    message = message.replace("IMG", "(image 'image_2.jpg'):")
    message = message.replace("(image", r"\(image").replace(".jpg')", r".jpg'\)")
    with pytest.raises(ValueError, match="predictions.json, record 2.*" + message):
        evaluate_predictions(NAME, path, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], r"ends within record \d.*cut off. Copy or write"),
        (lambda text: text[:-1], "record 6, or before the closing bracket: it is cut off"),
        (lambda text: "", "is empty; expected a list with one record per image.*Copy or write"),
        (lambda text: "[" * 100000, "record 0 cannot be read: nested too deeply. Expected a list"),
        (lambda text: text[1:-1], "begins with '{.*expected a list with one record per image"),
        (lambda text: text.replace('}, {"rel', '} {"rel', 1), "after record 0; expected a comma"),
        (lambda text: text + text, r"'\[.* after the closing bracket.*Merge"),
        (lambda text: text.replace('"image_id"', "image_id", 2), "record 0 is no JSON: Expecting"),
        (lambda text: text[:-1] + ", ]", "record 6 is no JSON: .*, near"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_evaluate_predictions_damaged_file_raises(
    cases, records, tmp_path, damage, message, zipped
):
    text = damage(json.dumps(records))
    path = tmp_path / "damaged.json"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    with pytest.raises(ValueError, match="damaged.json: .*" + message):
        evaluate_predictions(NAME, str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_evaluate_predictions_truncated_gzip_binary_or_missing_file_raises(
    cases, records, tmp_path
):
    path = tmp_path / "cut.json.gz"
    path.write_bytes(gzip.compress(json.dumps(records).encode())[:-20])
    with pytest.raises(ValueError, match="cut.json.gz: ends within .*cut off"):
        evaluate_predictions(NAME, str(path))
    path.write_bytes(b"\x80\x02binary")
    with pytest.raises(ValueError, match="expected a list .*, in UTF-8 or gzipped"):
        evaluate_predictions(NAME, str(path))
    with pytest.raises(FileNotFoundError, match="No predictions file 'no.json'.*OUTPUT_DIR"):
        evaluate_predictions(NAME, "no.json")


@pytest.mark.parametrize("suffix", ["pkl", "pytorch", "pth", "json"])
def test_evaluate_predictions_pickle_raises(cases, tmp_path, suffix):
    """By name, and by content whatever the name."""
    path = tmp_path / f"eval_results.{suffix}"
    message = rf"eval_results.{suffix}: is a pickle of another program.*import_predictions.py.*"
    message += "relation_predictions.json"
    contents = [pickle.dumps([{}], protocol) for protocol in (2, 3, 4, 5)]
    buffer = io.BytesIO()
    torch.save([1], buffer)
    contents += [buffer.getvalue()] + ([b"[]"] if suffix != "json" else [])
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            evaluate_predictions(NAME, str(path))


# What a file cannot contain.


def many_pairs(num_predicates):
    """Return an image with 110 triplets, each pair with the given number of predicates."""
    num = 11
    pairs = [(s, o) for s in range(num) for o in range(num) if s != o]
    rows = [(s, o, p) for s, o in pairs for p in range(num_predicates)][:110]
    return {
        "image_id": IDS[0],
        "instances": {
            "boxes": [[i, 0, i + 1, 1] for i in range(num)],
            "classes": [0] * num,
            "scores": [1.0] * num,
        },
        "relations": {
            "pairs": [r[:2] for r in rows],
            "predicates": [r[2] for r in rows],
            "scores": [0.5] * len(rows),
        },
    }


def test_evaluate_predictions_file_for_another_k_raises_or_warns(cases, tmp_path, caplog):
    path = write(tmp_path / "one.json", [many_pairs(1)])
    with pytest.raises(ValueError, match=r"cannot contain those for \[10, 70\].*per-pair 1"):
        evaluate_predictions(NAME, path)
    assert "lu2016_sgdet_k1" in evaluate_predictions(NAME, path, predicates_per_pair=[1])
    assert "too low" not in caplog.text
    # Cut without regard to k: pairs are left out that would be among the best for k = 1.
    path = write(tmp_path / "all.json", [many_pairs(3)])
    with caplog.at_level(logging.WARNING):
        evaluate_predictions(NAME, path)
    assert "in 1 images fewer than 100 triplets are left when a pair keeps 1" in caplog.text


def test_evaluate_predictions_openimages_takes_any_triplets(cases, tmp_path):
    path = write(tmp_path / "one.json", [many_pairs(1)])
    assert "openimages_sgdet" in evaluate_predictions(NAME, path, protocol="openimages")
    with pytest.raises(ValueError, match=r"cannot contain those for \[2\].*per-pair 1"):
        evaluate_predictions(NAME, path, protocol="openimages", predicates_per_pair=[2])
    with pytest.raises(ValueError, match=r"cannot contain those for \[all\].*per-pair 1"):
        evaluate_predictions(NAME, path, protocol="motifs")


def test_evaluate_predictions_without_task_warns(given_records, tmp_path, caplog):
    path = write(tmp_path / "relation_predictions.json", given_records)
    assert "lu2016_sgdet_k1" in evaluate_predictions(NAME, path)
    assert "names its task: it is scored as sgdet" in caplog.text
    caplog.clear()
    evaluate_predictions(NAME, path, task="prdcls")
    assert "names its task" not in caplog.text


def test_evaluate_predictions_checks_the_settings_file(given_records, tmp_path, caplog):
    path = write(tmp_path / "relation_predictions.json", given_records)
    settings = dict(dataset=NAME, task="prdcls", predicates_per_pair=[1, None], triplets=100)
    write_settings(path, settings)
    assert settings_file(path) == settings_file(path + ".gz")
    assert Path(settings_file(path)).name == "relation_predictions_settings.json"
    assert read_settings(path) == settings
    write_settings(path, dict(settings, predicates_per_pair=[1, 0]))  # as it was written before
    assert read_settings(path) == settings
    # k = 70 is all three predicates; k = 10 as well.
    assert list(evaluate_predictions(NAME, path))[:2] == ["lu2016_prdcls_k1", "lu2016_prdcls_k10"]
    assert "motifs_sgdet_graph_constraint" in evaluate_predictions(
        NAME, path, protocol="motifs", task="sgdet"
    )
    with pytest.raises(ValueError, match=r"for \[1, all\] .*'released' .*\[2\].*PER_PAIR \[2\]"):
        evaluate_predictions(NAME, path, protocol="released")
    with pytest.raises(ValueError, match="best 100 triplets .* R@200 .*TOPK 200"):
        evaluate_predictions(NAME, path, recall_at=[200])
    # Gzipped predictions have the same content and keep their settings.
    zipped = Path(path + ".gz")
    zipped.write_bytes(gzip.compress(Path(path).read_bytes()))
    assert read_settings(str(zipped)) == settings
    write_settings(path, dict(settings, dataset="another"))
    with caplog.at_level(logging.WARNING):
        evaluate_predictions(NAME, path)
    assert f"for dataset 'another' and is scored on '{NAME}'" in caplog.text
    Path(settings_file(path)).write_text("{}")
    with pytest.raises(ValueError, match="settings.json: expected dataset, task.*Remove the file"):
        evaluate_predictions(NAME, path)


def test_evaluate_predictions_settings_of_a_replaced_file_raise(cases, records, tmp_path, caplog):
    path = write(tmp_path / "predictions.json", records)
    settings = dict(dataset=NAME, task="sgdet", predicates_per_pair=[1, 10, 70], triplets=100)
    write_settings(path, settings)
    expected = evaluate_predictions(NAME, path)
    write(Path(path), records[:5])
    message = "predictions_settings.json was written for other predictions than .*Remove the"
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(NAME, path)
    # Settings of older versions have no hash.
    write(Path(path), records)
    write(Path(settings_file(path)), settings)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_equal(evaluate_predictions(NAME, path), expected)
    assert "predictions_settings.json has no hash of the predictions" in caplog.text


# The tool.


def test_evaluate_predictions_openimages_ignores_triplets_for_another_k(cases, records, tmp_path):
    """Of a file for k = 1 and all, only the best triplets of all, as the model would give them."""
    options = dict(protocol="openimages", predicates_per_pair=[None], recall_at=[3])
    union = evaluated(cases, **dict(options, predicates_per_pair=[1, None]), topk=3)
    expected = {name: union[name] for name in ("openimages_sgdet", "confusion_sgdet")}
    path = write(tmp_path / "predictions.json", records)
    settings = dict(dataset=NAME, task="sgdet", predicates_per_pair=[1, None], triplets=3)
    without = evaluate_predictions(NAME, path, **options)["openimages_sgdet"]
    assert without["mAP_rel"] != expected["openimages_sgdet"]["mAP_rel"]
    write_settings(path, settings)
    np.testing.assert_equal(evaluate_predictions(NAME, path, **options), expected)


def test_evaluate_relations_tool_scores_what_the_evaluator_wrote(given_cases, tmp_path, capsys):
    live = evaluated(
        given_cases, output_dir=str(tmp_path / "live"), protocol="motifs", task="sgcls"
    )
    path = tmp_path / "live/relation_predictions.json"
    out = tmp_path / "out"
    arguments = ["--dataset", NAME, "--predictions", path, "--protocol", "motifs"]
    assert run_tool([*arguments, "--output", out]) == 0
    results = json.loads((out / "results.json").read_text())
    for task, metrics in live.items():
        for name, value in metrics.items():
            assert results[task][name] == (None if value != value else value)
    assert "motifs_sgcls_graph_constraint" in results  # the task stands in the settings
    assert (out / "per_predicate_motifs_sgcls_no_constraint.png").is_file()
    shown = capsys.readouterr().out
    assert re.search(r"\| mR@50 +\| +\d", shown) and "instance_accuracy" in shown
    assert not (out / "relation_predictions.json").exists()


def test_evaluate_relations_tool_group_thresholds(given_records, tmp_path, capsys):
    path = write(tmp_path / "theirs.json", given_records)
    call = ["--dataset", NAME, "--predictions", path, "--task", "prdcls", "--protocol", "motifs"]
    call += ["--output", tmp_path / "out"]
    assert run_tool([*call, "--group-thresholds", 3, 1]) == 1
    assert "--train-dataset" in capsys.readouterr().err  # which the dataset does not name
    more = ["--train-dataset", NAME, "--group-thresholds", 10_000_000, 1]
    assert run_tool([*call, *more]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    metrics = results["motifs_prdcls_no_constraint"]
    assert metrics["head mR@50"] is None and metrics["tail mR@50"] is None
    assert metrics["body mR@50"] == metrics["mR@50"]


def test_evaluate_relations_tool_options(given_records, tmp_path, capsys):
    path = write(tmp_path / "theirs.json", given_records)
    call = ["--dataset", NAME, "--predictions", path, "--output", tmp_path / "out"]
    options = ["--task", "prdcls", "--predicates-per-pair", 3, "all", "--recall-at", 5]
    assert run_tool([*call, *options, "--train-dataset", NAME]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results)[:2] == ["lu2016_prdcls_k3", "lu2016_prdcls"]
    # Against itself as the training set, nothing is unseen.
    assert results["lu2016_prdcls_k3"]["zero-shot predicate R@5"] is None
    assert set(results["lu2016_prdcls_k3"]) == {"predicate R@5", "zero-shot predicate R@5"}

    write(tmp_path / "theirs.json", "[{")
    capsys.readouterr()
    (tmp_path / "out/results.json").unlink()
    assert run_tool([*call]) == 1
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out/results.json").exists()
    assert run_tool(["--dataset", "predictions_file_test_sat", "--predictions", path]) == 2
    message = f"No dataset 'predictions_file_test_sat' is registered. Did you mean {NAME}?"
    assert message in capsys.readouterr().err


def test_load_ground_truth_of_detections_needs_real_sizes(registered):
    """OpenImages' boxes are fractions of images that may not exist."""
    name = registered("fractions_of_unknown_images")
    record = {"image_id": 4, "height": 1024, "width": 1024, "nominal_size": True}
    DatasetCatalog.register(name, lambda: [record])
    assert list(load_ground_truth(name, "prdcls")) == [4]
    message = f"Dataset '{name}', image 4: its boxes are annotated as fractions"
    with pytest.raises(ValueError, match=message):
        load_ground_truth(name, "sgdet")


def test_evaluator_given_boxes_in_pixels_of_unknown_images_names_the_cause(registered):
    """The annotated fractions are scaled to a nominal size; predictions have the real one."""
    name = registered("fractions_with_given_boxes")
    boxes = np.array([[0.0, 0, 512, 512], [256, 256, 1024, 1024]])
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": i}
        for i, box in enumerate(boxes.tolist())
    ]
    record = {"image_id": 4, "height": 1024, "width": 1024, "nominal_size": True}
    record |= {"annotations": annotations, "relations": [(0, 1, 0)]}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["a", "b"], predicate_classes=["on"])

    def evaluate(scale):
        evaluator = RelationEvaluator(name, task="prdcls")
        graph = (boxes * scale, [0, 1], [1.0, 1.0], [[0, 1]], [0], [0.5])
        evaluator.add(SceneGraph.from_arrays(4, *graph))
        return evaluator.evaluate()

    assert evaluate(1.0)
    message = (
        "image 4: its boxes are annotated as fractions.*predicted boxes in pixels do not match"
    )
    with pytest.raises(ValueError, match=message) as error:
        evaluate(0.5)
    assert "sizes.json" in str(error.value) and "sgdet" not in str(error.value)


def test_evaluate_predictions_vrd_as_its_own_predictions(full_vrd_annotations, tmp_path):
    """Without images: all but the repeated annotations, and k relations of each pair."""
    name = "vrd_test_of_the_tests"
    from reldn_d2.data.datasets.vrd import register_vrd

    register_vrd(name, str(full_vrd_annotations / "annotations_test.json"), "no/images", False)
    try:
        truth = load_ground_truth(name)
        distinct = {
            i: counted_relations(gt, PROTOCOL_REGISTRY["relations"]) for i, gt in truth.items()
        }
        records = [
            {
                "image_id": image_id,
                "instances": {
                    "boxes": gt.boxes.tolist(),
                    "classes": gt.classes.tolist(),
                    "scores": [1.0] * len(gt.boxes),
                },
                "relations": {
                    "pairs": gt.pairs.tolist(),
                    "predicates": gt.relations[:, 2].tolist(),
                    "scores": [1.0] * len(gt.relations),
                },
            }
            for image_id, gt in distinct.items()
        ]
        results = evaluate_predictions(name, write(tmp_path / "own.json", records))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    pairs = sum(len({tuple(r[:2]) for r in gt.relations.tolist()}) for gt in truth.values())
    total = sum(len(gt.relations) for gt in truth.values())
    once = sum(len(gt.relations) for gt in distinct.values())
    assert (pairs, once, total) == (6806, 7478, 7638)
    for k, value in ((1, 100 * pairs / total), (10, 100 * once / total), (70, 100 * once / total)):
        for metric in results[f"lu2016_sgdet_k{k}"].values():
            assert metric == pytest.approx(value)
