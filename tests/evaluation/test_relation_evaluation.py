"""The evaluators on small registered datasets: results, files, errors, several processes."""

import json
import logging
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_data import CLASSES, NAME, PREDICATES, dataset_dicts, output, registered, run
from evaluation_utils import random_case
from torch import multiprocessing

import reldn_d2
from reldn_d2.evaluation import (
    RelationDatasetEvaluator,
    RelationEvaluator,
    VRDEvaluator,
)

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import inference_on_dataset, print_csv_format, verify_results
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage


@pytest.fixture
def dataset():
    with registered() as metadata:
        yield metadata


def test_evaluate_ground_truth_as_prediction_gives_100(dataset):
    (task, metrics), *rest = run(RelationEvaluator(NAME, task="prdcls")).items()
    assert task == "relations_prdcls" and not rest
    cases = {name for name in metrics if "cases" in name}
    assert cases == {f"instance_cases{s}" for s in ("", "_object", "_subject")} | {"pairing_cases"}
    # Each held cup could be another one or be the other person's; "next to" has no rivals.
    assert metrics["instance_cases_object"] == metrics["instance_cases_subject"] == 2
    assert metrics["instance_cases"] == 4 and metrics["pairing_cases"] == 2
    assert math.isnan(metrics["AP-wears"])
    for name in set(metrics) - cases - {"AP-wears"}:
        assert metrics[name] == 100.0, name

    keys = ["relationship R@50", "relationship R@100", "phrase R@50", "phrase R@100"]
    for task, vrd_metrics in run(VRDEvaluator(NAME)).items():
        if task.startswith("lu2016"):
            assert vrd_metrics == dict.fromkeys(keys, 100.0)
        else:  # the same report as above
            assert vrd_metrics == {k: metrics[k] for k in vrd_metrics} and len(vrd_metrics) == 8


def test_evaluate_wrong_pairs_give_0_and_a_warning(dataset, caplog):
    wrong = {"a_1.jpg": [(0, 3, 0), (1, 2, 0), (0, 4, 1)]}  # swapped cups; next to a cup
    with caplog.at_level(logging.WARNING):
        metrics = run(RelationEvaluator(NAME), lambda r: wrong.get(r["image_id"], []))[
            "relations_sgdet"
        ]
    # The cups have one class, but not one box: no triplet matches.
    for name, value in metrics.items():
        assert "cases" in name or name == "AP-wears" or value == 0.0, name
    assert "None of the 3 predicted triplets in 3 images matched" in caplog.text
    assert all(f"({cause})" in caplog.text for cause in (1, 2, 3))
    caplog.clear()
    run(RelationEvaluator(NAME))
    assert "matched" not in caplog.text


def test_evaluate_names_the_blocks_after_k(dataset):
    evaluator = RelationEvaluator(NAME, predicates_per_pair=[1, None], recall_at=(20,))
    # Both predicates of one pair: only the better one counts for k = 1.
    results = run(
        evaluator, lambda r: [(0, 2, 0), (0, 2, 1), (1, 3, 0), (0, 1, 1)][: 9 * len(r["relations"])]
    )
    assert list(results) == ["relations_sgdet_k1", "relations_sgdet"]
    assert [results[t]["R@n"] for t in results] == [100.0, pytest.approx(200 / 3)]
    assert [results[t]["R@20"] for t in results] == [100.0, 100.0]
    assert "R@50" not in results["relations_sgdet"]

    assert list(run(VRDEvaluator(NAME, predicates_per_pair=(1, 70, 0), task="prdcls"))) == [
        "lu2016_prdcls_k1",
        "lu2016_prdcls_k70",
        "lu2016_prdcls",
        "confusion_prdcls_k1",
        "confusion_prdcls_k70",
        "confusion_prdcls",
    ]
    metrics = run(VRDEvaluator(NAME, task="prdcls"))["lu2016_prdcls_k10"]
    assert metrics == {"predicate R@50": 100.0, "predicate R@100": 100.0}
    results = run(VRDEvaluator(NAME, predicates_per_pair=(1,), task="preddet"))
    assert results == {"lu2016_preddet_k1": metrics}
    (task, metrics), *rest = run(RelationEvaluator(NAME, task="preddet")).items()
    assert task == "relations_preddet" and not rest
    assert metrics["R@50"] == 100.0 and not any("instance" in x or "pairing" in x for x in metrics)


def test_evaluate_many_predicates_logs_head_and_tail(dataset, tmp_path, caplog):
    names = PREDICATES + [f"predicate {i}" for i in range(2997)]
    del dataset.predicate_classes
    dataset.predicate_classes = names
    with caplog.at_level(logging.INFO):
        metrics = run(RelationEvaluator(NAME, str(tmp_path)))["relations_sgdet"]
    assert {f"AP-{name}" for name in names} <= set(metrics)
    logged = re.findall(r"\| AP-(.*?) +\|", caplog.text)
    # Most predicates do not occur: 30 of the head, none of the tail.
    assert logged[:3] == PREDICATES and len(logged) == 30
    assert "2970 metrics of predicates in between are not shown; per_predicate_rel" in caplog.text


def test_vrd_evaluator_phrases_and_relationships_differ(dataset):
    # The second person's cup for the first one's: the relationship's object box is wrong, while the
    # enclosing boxes (0..27.5 and 0..30.5 of one height) overlap by 90 %.
    metrics = run(VRDEvaluator(NAME), lambda r: [(0, 3, 0)] if r["relations"] else [])[
        "lu2016_sgdet_k1"
    ]
    assert metrics["relationship R@50"] == 0.0
    assert metrics["phrase R@50"] == pytest.approx(100 / 3)


def test_relation_evaluator_repeated_annotations_count_once(dataset):
    def repeated():
        records = dataset_dicts()
        records[0]["relations"] = [(0, 2, 0), (0, 2, 0), (1, 3, 0)]
        return records

    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, repeated)
    wanted = [(0, 2, 0), (1, 3, 0)]

    def triplets(record):
        return wanted if record["relations"] else []

    assert run(RelationEvaluator(NAME), triplets)["relations_sgdet"]["R@n"] == 100.0
    recall = run(VRDEvaluator(NAME), triplets)["lu2016_sgdet_k1"]["relationship R@50"]
    assert recall == pytest.approx(200 / 3)


def test_evaluate_unprocessed_images_count_as_empty(dataset, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = run(RelationEvaluator(NAME), only=["b_1.jpg"])["relations_sgdet"]
    assert metrics["R@n"] == metrics["mAP"] == metrics["instance_accuracy"] == 0.0
    assert "2 of the 3 images" in caplog.text


def test_evaluate_writes_the_predictions_file(dataset, tmp_path):
    folder = tmp_path / "new" / "inference"
    run(RelationEvaluator(NAME, str(folder)), only=["c_1.jpg", "a_1.jpg"])
    tables = {f"per_predicate_relations_sgdet.{x}" for x in ("json", "md", "png")}
    files = {"relation_predictions.json", "relation_predictions_settings.json"}
    assert set(os.listdir(folder)) == tables | files
    records = json.loads((folder / "relation_predictions.json").read_text())
    assert [r["image_id"] for r in records] == ["a_1.jpg", "c_1.jpg"]
    first = records[0]
    assert list(first) == ["image_id", "height", "width", "instances", "relations"]
    assert first["instances"]["boxes"][2] == [22.0, 10.0, 27.5, 15.0]
    assert first["instances"]["classes"] == [0, 0, 1, 1, 1]
    assert first["instances"]["scores"] == [1.0] * 5
    assert first["relations"]["pairs"] == [[0, 2], [1, 3], [0, 1]]
    assert first["relations"]["predicates"] == [0, 0, 1]
    assert first["relations"]["scores"] == pytest.approx([0.9, 0.8, 0.7])
    empty = {"boxes": [], "classes": [], "scores": []}
    assert records[1]["instances"] == empty
    fields = ("pairs", "predicates", "scores", "predicate_scores")
    assert records[1]["relations"] == {name: [] for name in fields}


def test_evaluate_full_disk_leaves_no_file(dataset, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(reldn_d2.evaluation.predictions_io.json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        run(RelationEvaluator(NAME, str(tmp_path)))
    assert os.listdir(tmp_path) == []


def test_evaluate_data_set_without_relations_gives_nan(dataset, caplog):
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: dataset_dicts()[1:])
    with caplog.at_level(logging.WARNING):
        evaluator = RelationEvaluator(NAME)
        metrics = evaluator.evaluate()["relations_sgdet"]
    assert all(math.isnan(v) for name, v in metrics.items() if "cases" not in name)
    assert all(math.isnan(v) for v in VRDEvaluator(NAME).evaluate()["lu2016_sgdet_k1"].values())
    assert "No image of 'evaluation_test_set' has a relation" in caplog.text


def change(output_, key, field, value):
    output_[key] = Instances(output_[key].image_size, **{**output_[key].get_fields(), field: value})
    return output_


@pytest.mark.parametrize(
    "key, field, value, message",
    [
        ("relations", "scores", [0.9, math.nan, 0.7], "'a_1.jpg': NaN or infinite scores"),
        ("relations", "pairs", [[0, 1], [0, 5], [1, 0]], r"pair 1 is \(0, 5\), but there are 5"),
        ("relations", "predicates", [0, 3, 1], "predictions have the id 3, but predicate_classes"),
        ("instances", "pred_classes", [0, 0, 1, 2, 1], "the id 2, but thing_classes has 2"),
        (
            "instances",
            "pred_boxes",
            Boxes([[0, 0, 1, 1], [5, 5, 3, 8]] + [[0, 0, 1, 1]] * 3),
            r"box 1 is \[5.0, 5.0, 3.0, 8.0\], which ends before it begins.*convert",
        ),
    ],
)
def test_process_bad_predictions_raise(dataset, tmp_path, key, field, value, message):
    record = dataset_dicts()[0]
    value = torch.tensor(value) if isinstance(value, list) else value
    bad = change(output(record, record["relations"]), key, field, value)
    evaluator = RelationEvaluator(NAME, str(tmp_path))
    with pytest.raises(ValueError, match=message):
        evaluator.process([record], [bad])
        evaluator.evaluate()
    assert os.listdir(tmp_path) == []


def test_evaluate_unknown_image_or_detector_output_raises(dataset):
    record = dataset_dicts()[0]
    evaluator = RelationEvaluator(NAME)
    evaluator.process([{"image_id": 7}], [output(record, [])])
    with pytest.raises(ValueError, match="image 7: .*no such image_id .*'a_1.jpg'"):
        evaluator.evaluate()
    instances = {"instances": output(record, [])["instances"]}
    with pytest.raises(ValueError, match="has no 'relations'.*RelDN"):
        evaluator.process([record], [instances])


@pytest.mark.parametrize(
    "change_records, message",
    [
        (lambda r: r[1].update(image_id="a_1.jpg"), "'a_1.jpg': occurs twice"),
        (lambda r: r[0].update(relations=[(0, 9, 0)]), "'a_1.jpg': relation 0 .* 5 annotations"),
        (lambda r: r[0].update(relations=[(0, 1, 3)]), "annotations have the id 3, but predicate_"),
    ],
)
def test_evaluate_bad_ground_truth_raises(dataset, change_records, message):
    def records():
        result = dataset_dicts()
        change_records(result)
        return result

    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, records)
    with pytest.raises(ValueError, match=message):
        RelationEvaluator(NAME).evaluate()


def test_evaluator_bad_settings_raise(dataset):
    with pytest.raises(ValueError, match="'sgget'; expected one of sgdet, sgcls, prdcls, preddet"):
        RelationEvaluator(NAME, task="sgget")
    with pytest.raises(ValueError, match="PREDICATES_PER_PAIR"):
        VRDEvaluator(NAME, predicates_per_pair=[])
    with pytest.raises(ValueError, match="or None for no limit"):
        VRDEvaluator(NAME, predicates_per_pair=[1, -1])
    with pytest.raises(ValueError, match="each n of R@n must be at least 1.*RECALL_AT"):
        VRDEvaluator(NAME, recall_at=[0])
    with pytest.raises(ValueError, match="R@100 needs 100 triplets.*only 50"):
        RelationEvaluator(NAME, topk=50)
    with pytest.raises(ValueError, match="no_such_metadata.*no predicate_classes"):
        RelationEvaluator("no_such_metadata")
    MetadataCatalog.remove("no_such_metadata")


class GroundTruthModel(torch.nn.Module):
    def forward(self, inputs):
        return [output(record, record["relations"]) for record in inputs]


def test_evaluator_works_with_detectron2_tools(dataset, caplog):
    """inference_on_dataset, EvalHook, the printed table and verify_results."""
    loader = [[record] for record in dataset_dicts() * 3]
    evaluator = RelationEvaluator(NAME)
    with caplog.at_level(logging.INFO):
        # Repeated images, as samplers that pad give them, count once.
        results = inference_on_dataset(GroundTruthModel(), loader, evaluator)
        print_csv_format(results)
    assert results["relations_sgdet"]["R@n"] == 100.0
    assert "R@n,R@20,R@50,R@100,mAP,instance_accuracy" in caplog.text
    assert "copypaste: Task: relations_sgdet" in caplog.text and "| AP-holds " in caplog.text
    assert "|  100.00 |" in caplog.text
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["relations_sgdet", "R@n", 100.0, 0.01]]
    assert verify_results(cfg, results)
    hook = EvalHook(1, lambda: results)
    with EventStorage() as storage:
        hook.trainer = type("Trainer", (), {"iter": 0, "max_iter": 2, "storage": storage})
        hook.after_step()
        assert storage.latest()["relations_sgdet/pairing_accuracy"][0] == 100.0


PROTOCOL_NAMES = ("lu2016", "motifs", "openimages", "openimages_text", "released", "relations")


def _random_records():
    """Nine images with random relations, and predictions with ties for them."""
    rng = np.random.default_rng(0)
    cases = [random_case(rng, 5, 5, 2, 3, ("near", "ties")) for _ in range(9)]
    records = []
    for image_id, case in enumerate(cases):
        annotations = [
            {"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": c}
            for b, c in zip(case.gt_boxes, case.gt_classes)
        ]
        record = dict(image_id=image_id, annotations=annotations, relations=case.relations)
        records.append(dict(record, verified_labels=case.verified))
    return cases, records


def _evaluate_in_process(rank, folder, world_size):
    """Process ``rank`` of ``world_size`` evaluates every ``world_size``-th image."""
    cases, records = _random_records()
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(thing_classes=CLASSES, predicate_classes=PREDICATES)
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
    results = {}
    for protocol in PROTOCOL_NAMES:
        output = os.path.join(folder, protocol) if protocol == "motifs" else None
        evaluator = RelationDatasetEvaluator(
            NAME, output, protocol=protocol, seen_triplets=[(0, 1, 1), (1, 0, 0)]
        )
        for image_id in range(rank, len(cases), world_size):
            evaluator.add(replace(cases[image_id].pair()[1], image_id=image_id))
        results[protocol] = evaluator.evaluate()
    with open(os.path.join(folder, f"{rank}.json"), "w") as file:
        json.dump(results, file)
    if world_size > 1:
        torch.distributed.barrier()  # nobody leaves while the other still talks
        torch.distributed.destroy_process_group()
    else:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def test_evaluate_two_processes_equal_one(tmp_path):
    for name, world_size in (("together", 2), ("alone", 1)):
        (tmp_path / name).mkdir()
        if world_size > 1:
            multiprocessing.spawn(_evaluate_in_process, (str(tmp_path / name), 2), nprocs=2)
        else:
            _evaluate_in_process(0, str(tmp_path / name), 1)
    assert json.loads((tmp_path / "together/1.json").read_text()) == dict.fromkeys(
        PROTOCOL_NAMES, {}
    )
    alone = json.loads((tmp_path / "alone/0.json").read_text())
    np.testing.assert_equal(json.loads((tmp_path / "together/0.json").read_text()), alone)
    assert 0 < alone["motifs"]["motifs_sgdet_graph_constraint"]["zR@50"] < 100
    paths = [tmp_path / x / "motifs/relation_predictions.json" for x in ("together", "alone")]
    assert paths[0].read_text() == paths[1].read_text()
