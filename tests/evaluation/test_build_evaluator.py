"""The evaluator and the values of k that belong to a config and a dataset."""

import json
import logging
import math

import numpy as np
import pytest
from evaluation_data import NAME, dataset_dicts, output, registered, run
from model_utils import small_model
from PIL import Image

import reldn_d2
from reldn_d2.evaluation import (
    OpenImagesVRDEvaluator,
    RelationDatasetEvaluator,
    RelationEvaluator,
    SceneGraphEvaluator,
    VRDEvaluator,
    box_evaluator,
    build_relation_evaluator,
    evaluate_predictions,
)
from reldn_d2.evaluation.predictions_io import read_settings
from reldn_d2.utils.protocols import (
    PROTOCOL_REGISTRY,
    default_protocol,
    kept_predicates_per_pair,
    predicates_per_pair,
)

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

EVERY_K = (1, 10, 70, None, 2)


@pytest.fixture
def dataset():
    with registered() as metadata:
        yield metadata


@pytest.fixture
def cfg():
    result = get_cfg()
    reldn_d2.add_reldn_config(result)
    result.MODEL.META_ARCHITECTURE = "RelDN"
    result.DATASETS.TEST = (NAME,)
    return result


def test_build_relation_evaluator_picks_protocol_by_metadata(dataset, cfg, tmp_path, caplog):
    cfg.TEST.RELATIONS.TASK = "prdcls"
    cfg.TEST.RELATIONS.PREDICATES_PER_PAIR = [1, 0]  # what None was called before
    evaluator = build_relation_evaluator(cfg, NAME, str(tmp_path))
    assert evaluator.protocol.name == "relations"
    results = run(evaluator)
    assert list(results) == ["relations_prdcls_k1", "relations_prdcls"]
    assert (tmp_path / "relation_predictions.json").exists()

    del dataset.evaluator_type
    dataset.evaluator_type = "vrd"
    cfg.TEST.RELATIONS.TOPK = 60
    cfg.DATASETS.TEST = (NAME, "another")
    with caplog.at_level(logging.WARNING):
        evaluator = build_relation_evaluator(cfg, NAME, str(tmp_path))
    assert evaluator.protocol.name == "lu2016"
    assert "TEST.RELATIONS.TOPK): R@100 is left out" in caplog.text
    assert list(run(evaluator)["lu2016_prdcls_k1"]) == ["predicate R@50"]
    assert (tmp_path / NAME / "relation_predictions.json").exists()

    for unknown in ("coco", None):
        del dataset.evaluator_type
        dataset.evaluator_type = unknown
        with pytest.raises(
            ValueError,
            match=f"evaluator_type {unknown!r}.*known for: openimages_vrd, relation, scene_graph",
        ):
            build_relation_evaluator(cfg, NAME, str(tmp_path))


@pytest.mark.parametrize(
    ("evaluator_type", "kind", "ks", "tasks"),
    [
        ("vrd", VRDEvaluator, (1, 10, 70), [f"lu2016_sgdet_k{k}" for k in (1, 10, 70)]),
        ("openimages_vrd", OpenImagesVRDEvaluator, (2,), ["released_sgdet_k2"]),
        (
            "scene_graph",
            SceneGraphEvaluator,
            (1, None),
            ["motifs_sgdet_graph_constraint", "motifs_sgdet_no_constraint"],
        ),
        ("relation", RelationEvaluator, (None,), ["relations_sgdet"]),
    ],
)
def test_build_relation_evaluator_default_and_named_protocol(
    dataset, cfg, tmp_path, evaluator_type, kind, ks, tasks
):
    del dataset.evaluator_type
    dataset.evaluator_type = evaluator_type
    evaluator = build_relation_evaluator(cfg, NAME, str(tmp_path))
    assert evaluator.protocol is kind(NAME).protocol is default_protocol(NAME)
    # The model keeps what is evaluated, and what any other protocol needs.
    assert predicates_per_pair(cfg) == evaluator.settings.predicates_per_pair == ks
    assert kept_predicates_per_pair(cfg) == EVERY_K
    results = run(evaluator)
    assert [task for task in results if not task.startswith("confusion")] == tasks
    assert all("instance_accuracy" in results[t] for t in results if t.startswith("confusion"))
    # Another protocol for the same dataset, by name.
    cfg.TEST.RELATIONS.PROTOCOL, cfg.TEST.RELATIONS.RECALL_AT = "openimages", [10]
    evaluator = build_relation_evaluator(cfg, NAME, str(tmp_path))
    assert predicates_per_pair(cfg) == evaluator.settings.predicates_per_pair == (None,)
    metrics = run(evaluator)["openimages_sgdet"]
    assert metrics["R@10"] == metrics["score"] == 100 and "R@50" not in metrics
    cfg.TEST.RELATIONS.PREDICATES_PER_PAIR = [3, 0, 3, None]
    assert predicates_per_pair(cfg) == kept_predicates_per_pair(cfg) == (3, None)
    assert "openimages_sgdet_k3" in run(build_relation_evaluator(cfg, NAME, str(tmp_path)))
    cfg.TEST.RELATIONS.PROTOCOL = "openimage"
    with pytest.raises(ValueError, match="'openimage'.*PROTOCOL.*lu2016, motifs, openimages"):
        build_relation_evaluator(cfg, NAME, str(tmp_path))


@pytest.mark.parametrize("protocol", ["", *PROTOCOL_REGISTRY])
def test_model_keeps_the_triplets_of_all_protocols(protocol):
    model = small_model("TEST.RELATIONS.PROTOCOL", protocol)
    assert model.relation_head.predicates_per_pair == EVERY_K
    only = ("TEST.RELATIONS.PREDICATES_PER_PAIR", [3])
    assert small_model(*only).relation_head.predicates_per_pair == (3,)


@pytest.mark.parametrize("protocol", PROTOCOL_REGISTRY)
def test_predictions_of_one_protocol_can_be_scored_by_another(dataset, cfg, tmp_path, protocol):
    run(build_relation_evaluator(cfg, NAME, str(tmp_path)))
    file = str(tmp_path / "relation_predictions.json")
    assert set(read_settings(file)["predicates_per_pair"]) == set(EVERY_K)
    cfg.TEST.RELATIONS.PROTOCOL = protocol
    live = run(build_relation_evaluator(cfg, NAME, str(tmp_path / protocol)))
    np.testing.assert_equal(evaluate_predictions(NAME, file, protocol=protocol), live)


def test_named_protocol_needs_no_evaluator_type(dataset, cfg, tmp_path):
    del dataset.evaluator_type
    assert predicates_per_pair(cfg) == (1,)  # nothing is known
    cfg.TEST.RELATIONS.PROTOCOL = "released"
    assert "released_sgdet_k2" in run(build_relation_evaluator(cfg, NAME, str(tmp_path)))
    with pytest.raises(ValueError, match="evaluator_type None.*relation, scene_graph, vrd"):
        RelationDatasetEvaluator(NAME)


def test_process_keeps_only_triplets_that_can_count(dataset):
    """All pairs with all predicates, of which an image keeps the best of every k."""
    record = dataset_dicts()[0]
    triplets = [(s, o, p) for s in range(5) for o in range(5) if s != o for p in range(3)]
    evaluator = SceneGraphEvaluator(NAME, topk=10, recall_at=(10,))
    evaluator.process([record], [output(record, triplets)])
    (kept,) = evaluator._predictions
    # The best ten, and the best of each of ten pairs.
    assert len(kept.scores) == 10 + 10 - 4
    assert evaluator.joined()[0][1] is kept


def test_evaluate_training_set_in_another_order_gives_the_same_zero_shot_recall(dataset, caplog):
    def training():
        records = dataset_dicts()
        records[0]["relations"] = [(0, 2, 2), (0, 3, 2), (0, 1, 0)]  # ids of the reversed list
        return records

    DatasetCatalog.register("evaluation_training_set", training)
    try:
        MetadataCatalog.get("evaluation_training_set").set(
            thing_classes=dataset.thing_classes,
            predicate_classes=list(dataset.predicate_classes)[::-1],
        )
        dataset.train_dataset = "evaluation_training_set"
        evaluator = SceneGraphEvaluator(NAME)
        results = run(evaluator, lambda r: [(0, 1, 1)][: len(r["relations"])])
    finally:
        DatasetCatalog.remove("evaluation_training_set")
        MetadataCatalog.remove("evaluation_training_set")
    assert results["motifs_sgdet_no_constraint"]["zR@20"] == 100
    assert evaluator.settings.training_counts.tolist() == [2, 0, 1]


def test_evaluate_takes_zero_shot_and_frequencies_from_training_set(dataset, tmp_path, caplog):
    def training():
        records = dataset_dicts()
        records[0]["relations"] = [(0, 2, 0), (0, 3, 0), (0, 1, 2)]  # person holds cup, ...
        return records

    DatasetCatalog.register("evaluation_training_set", training)
    MetadataCatalog.get("evaluation_training_set").set(
        thing_classes=dataset.thing_classes, predicate_classes=dataset.predicate_classes
    )
    dataset.train_dataset = "evaluation_training_set"
    results = run(
        SceneGraphEvaluator(NAME, str(tmp_path)), lambda r: [(0, 1, 1)][: len(r["relations"])]
    )
    metrics = results["motifs_sgdet_no_constraint"]
    # Unseen is "person next to person", which is found; R is one of three.
    assert metrics["zR@20"] == 100 and metrics["R@20"] == pytest.approx(100 / 3)
    name = "per_predicate_motifs_sgdet_no_constraint"
    content = json.loads((tmp_path / f"{name}.json").read_text())
    rows = {row["predicate"]: row for row in content["predicates"]}
    assert list(rows) == ["holds", "wears", "next to"]  # by frequency in training
    assert [row["training_relations"] for row in rows.values()] == [2, 1, 0]
    assert [row["relations"] for row in rows.values()] == [2, 0, 1]
    assert rows["next to"]["R@100"] == rows["next to"]["AP"] == 100
    assert rows["wears"]["R@100"] is None and rows["holds"]["R@100"] == 0
    assert [rows[x]["group"] for x in rows] == ["head", None, "body"]
    assert content["groups"]["head"] == {"number": 1, "R@100": 0.0, "AP": 0.0}
    table = (tmp_path / f"{name}.md").read_text()
    assert "| next to " in table and "training_relations" in table and "| tail " in table
    with Image.open(tmp_path / f"{name}.png") as plot:
        assert plot.size[0] > 500 and len(set(plot.convert("L").tobytes())) > 50

    explicit = SceneGraphEvaluator(NAME, seen_triplets=[(0, 1, 0)])
    assert run(explicit)["motifs_sgdet_no_constraint"]["zR@20"] == 100
    other = vars(MetadataCatalog.get("evaluation_training_set"))
    names, other["predicate_classes"] = other["predicate_classes"], ["holds", "wears", "another"]
    with caplog.at_level(logging.WARNING):
        metrics = run(SceneGraphEvaluator(NAME))["motifs_sgdet_no_constraint"]
    assert "zR@20" not in metrics and "another" in caplog.text
    other["predicate_classes"] = names
    DatasetCatalog.remove("evaluation_training_set")
    with caplog.at_level(logging.WARNING):
        metrics = run(SceneGraphEvaluator(NAME))["motifs_sgdet_no_constraint"]
    assert "zR@20" not in metrics and "It is not registered" in caplog.text

    def missing():
        raise FileNotFoundError("annotations_train.json")

    DatasetCatalog.register("evaluation_training_set", missing)
    with caplog.at_level(logging.WARNING):
        assert "zero-shot phrase R@50" not in run(VRDEvaluator(NAME))["lu2016_sgdet_k1"]
    assert "cannot be used" in caplog.text and "(annotations_train.json)" in caplog.text
    DatasetCatalog.remove("evaluation_training_set")
    MetadataCatalog.remove("evaluation_training_set")


@pytest.mark.parametrize(
    "thresholds", [[10], [500, 10000], [500, 500], [10, 0], [3, 2, 1], ["a", 1]]
)
def test_build_relation_evaluator_wrong_group_thresholds_raise(dataset, cfg, tmp_path, thresholds):
    dataset.train_dataset = NAME
    cfg.TEST.RELATIONS.GROUP_THRESHOLDS = thresholds
    with pytest.raises(ValueError, match=r"GROUP_THRESHOLDS is .*\[10000, 500\]"):
        build_relation_evaluator(cfg, NAME, str(tmp_path))


def test_build_relation_evaluator_group_thresholds_need_a_training_set(dataset, cfg, tmp_path):
    cfg.TEST.RELATIONS.PROTOCOL = "motifs"
    cfg.TEST.RELATIONS.GROUP_THRESHOLDS = [2, 1]
    with pytest.raises(ValueError, match="names no train_dataset"):
        build_relation_evaluator(cfg, NAME, str(tmp_path))
    dataset.train_dataset = NAME  # "holds" twice, "next to" once
    metrics = run(build_relation_evaluator(cfg, NAME, str(tmp_path)))
    metrics = metrics["motifs_sgdet_no_constraint"]
    assert metrics["head mR@20"] == metrics["body mR@20"] == metrics["F1@20"] == 100
    assert math.isnan(metrics["tail mR@20"])
    content = json.loads((tmp_path / "per_predicate_motifs_sgdet_no_constraint.json").read_text())
    assert [content["groups"][x]["number"] for x in ("head", "body", "tail")] == [1, 1, 0]


def test_build_relation_evaluator_detector_gets_box_ap(dataset, cfg, tmp_path):
    """With file names as image ids, in a metadata that has a json_file of its own format."""
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    dataset.json_file = "annotations_test.json"
    results = run(build_relation_evaluator(cfg, NAME, str(tmp_path)))
    assert results["bbox"]["AP"] == results["bbox"]["AP50"] == 100.0
    assert results["bbox"]["AP-cup"] == 100.0
    assert dataset.json_file == "annotations_test.json"
    # Changed annotations are converted anew, equal ones are not.
    run(box_evaluator(NAME, str(tmp_path)))
    assert len(list(tmp_path.glob("coco_*/*.json"))) == 1

    def moved():
        records = dataset_dicts()
        for a in records[0]["annotations"]:
            a["bbox"] = [a["bbox"][0] + 40, *a["bbox"][1:]]
        return records

    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, moved)
    assert run(box_evaluator(NAME, str(tmp_path)))["bbox"]["AP"] < 50
    assert len(list(tmp_path.glob("coco_*/*.json"))) == 2
