"""Attributes from the file to the picture: train, save, evaluate and draw a made dataset."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_utils import small_config
from PIL import Image

from reldn_d2.data.check import check_dataset
from reldn_d2.data.datasets import register_relation_instances
from reldn_d2.engine import RelDNTrainer
from reldn_d2.evaluation import evaluate_predictions
from reldn_d2.evaluation.submission import write_submission
from reldn_d2.predictor import RelationPredictor
from reldn_d2.structures.graph_formats import graph_to_dot
from reldn_d2.vis.visualizer import RelationVisualizer

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase

TRAIN, PERMUTED, BARE = "attributes_train", "attributes_permuted", "attributes_bare"
ATTRIBUTES = ["red", "blue", "striped"]
COLORS = {"red": (230, 30, 30), "blue": (30, 30, 230)}
HEIGHT, WIDTH, COUNT, ITERATIONS = 64, 96, 12, 60
HEAD = "MODEL.ROI_ATTRIBUTE_HEAD"


def content_of(folder, order=ATTRIBUTES, with_attributes=True):
    """Draw a ball on a box per image; return the COCO file. Every third ball is unknown."""
    rng = np.random.default_rng(0)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "ball"}, {"id": 2, "name": "box"}],
        "predicates": [{"id": 1, "name": "on"}, {"id": 2, "name": "under"}],
    }
    if with_attributes:
        content["attributes"] = [{"id": i, "name": x} for i, x in enumerate(order, 1)]
    for index in range(COUNT):
        pixels = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
        left = int(rng.integers(8, 40))
        boxes = [(left, 8, left + 24, 32), (left - 4, 32, left + 44, 60)]
        image = {"id": index, "file_name": f"{index}.png", "height": HEIGHT, "width": WIDTH}
        ids = [2 * index + 1, 2 * index + 2]
        image["relations"] = [[*ids, 1], [*ids[::-1], 2]]
        content["images"].append(image)
        for place, (x0, y0, x1, y1) in enumerate(boxes):
            color = ("red", "blue")[int(rng.integers(0, 2))]
            pixels[y0:y1, x0:x1] = COLORS[color]
            names = [color]
            if place and index % 2:
                pixels[y0:y1:8, x0:x1] = pixels[y0 + 1 : y1 : 8, x0:x1] = 255
                names.append("striped")
            annotation = {"id": ids[place], "image_id": index, "category_id": place + 1}
            annotation |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
            if with_attributes and (place or index % 3):
                annotation["attributes"] = [order.index(x) + 1 for x in names]
            content["annotations"].append(annotation)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return content


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attributes")
    for name, options in (
        (TRAIN, {}),
        (PERMUTED, {"order": ATTRIBUTES[::-1]}),
        (BARE, {"with_attributes": False}),
    ):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content_of(folder, **options)))
        register_relation_instances(name, {}, str(path), str(folder))
    yield folder
    for name in (TRAIN, PERMUTED, BARE):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config(folder, *options):
    return small_config(
        *("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", 2),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.FPN.OUT_CHANNELS", 16),
        *("DATASETS.TRAIN", (TRAIN,), "DATASETS.TEST", (TRAIN, PERMUTED), "SEED", 1),
        *("OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", ITERATIONS, "SOLVER.IMS_PER_BATCH", 4),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.WARMUP_ITERS", 5),
        *("SOLVER.BASE_LR", 0.003, "TEST.RELATIONS.TASK", "prdcls"),
        *(f"{HEAD}.ENABLED", True, f"{HEAD}.NUM_ATTRIBUTES", 3, f"{HEAD}.HIDDEN_DIM", 32),
        *options,
    )


class AttributeLosses(HookBase):
    """Records the loss of attributes of each iteration."""

    def before_train(self):
        self.values = []

    def after_step(self):
        self.values.append(self.trainer.storage.history("loss_attributes").latest())


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    """Return the folder of a run, its losses and its results."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    trainer = RelDNTrainer(config(folder))
    trainer.resume_or_load(resume=False)
    losses = AttributeLosses()
    trainer.register_hooks([losses])
    trainer.train()
    return folder, losses.values, trainer._last_eval_results


def test_made_dataset_is_usable(datasets):
    report = check_dataset(TRAIN)
    assert report.usable and report.summary.attributed_boxes == 2 * COUNT - COUNT // 3


def test_training_attribute_loss_falls(trained):
    _, losses, _ = trained
    assert len(losses) == ITERATIONS
    assert np.mean(losses[:5]) > 0.5 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_evaluation_scores_attributes_of_given_boxes(trained):
    _, _, results = trained
    block = results[TRAIN]["attributes_prdcls"]
    assert block["mAP"] > 85 and block["R@n"] > 75 and block["mR@n"] > 60


def test_evaluation_attributes_in_another_order_scores_the_same(trained):
    _, _, results = trained
    first, second = (results[name]["attributes_prdcls"] for name in (TRAIN, PERMUTED))
    for name, value in first.items():
        assert second[name] == pytest.approx(value), name


def test_evaluate_checkpoint_and_its_files_give_the_same_results(trained, tmp_path):
    folder, _, results = trained
    cfg = config(tmp_path, "MODEL.WEIGHTS", str(folder / "model_final.pth"))
    again = RelDNTrainer.evaluate_checkpoint(cfg)
    for name in (TRAIN, PERMUTED):
        np.testing.assert_equal(
            dict(again[name]["attributes_prdcls"]), dict(results[name]["attributes_prdcls"])
        )
        file = folder / "inference" / "prdcls" / name / "relation_predictions.json"
        read = evaluate_predictions(name, str(file))
        np.testing.assert_equal(read["attributes_prdcls"], results[name]["attributes_prdcls"])
    # A file in the order of one dataset, scored on the other: mapped by its settings.
    read = evaluate_predictions(PERMUTED, str(folder / f"inference/prdcls/{TRAIN}" / file.name))
    assert read["attributes_prdcls"]["mAP"] == pytest.approx(
        results[TRAIN]["attributes_prdcls"]["mAP"]
    )


def test_best_checkpoint_metric_of_attributes_is_known(trained, tmp_path):
    metric = f"{TRAIN}/attributes_prdcls/mAP"
    options = ("SOLVER.BEST_CHECKPOINT.METRIC", metric, "TEST.EVAL_PERIOD", 2)
    trainer = RelDNTrainer(config(tmp_path, *options, "SOLVER.MAX_ITER", 2))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (tmp_path / "model_best.pth").exists()


def test_challenge_score_counts_attributes(trained, tmp_path):
    folder, _, _ = trained
    file = str(folder / "inference" / "prdcls" / TRAIN / "relation_predictions.json")
    results = evaluate_predictions(TRAIN, file, protocol="openimages")
    full, boxes = results["openimages_prdcls_full"], results["openimages_prdcls"]
    assert full["AP_rel-is"] > 50 and "AP_rel-is" not in boxes
    assert full["mAP_rel"] != boxes["mAP_rel"]
    assert full["AP_rel-on"] == boxes["AP_rel-on"]


def test_predictor_knows_attributes_from_the_checkpoint(trained, datasets, tmp_path):
    folder, _, _ = trained
    predictor = RelationPredictor.from_checkpoint(folder / "model_final.pth", device="cpu")
    assert predictor.attribute_classes == ATTRIBUTES
    right = total = 0
    for record in DatasetCatalog.get(TRAIN):
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in record["annotations"])]
        graph = predictor(record["file_name"], boxes=boxes, classes=["ball", "box"])
        for annotation, words in zip(record["annotations"], graph.attribute_words()):
            if "attributes" in annotation:
                right += {ATTRIBUTES[i] for i in annotation["attributes"]} == set(words)
                total += 1
    assert right / total > 0.7
    words = graph.attribute_words()
    assert any(words), "the last image has attributes to show"
    record = json.loads(graph.to_json())["instances"]
    assert record["attribute_names"][0][0] in ATTRIBUTES
    shown = ", ".join(words[0])
    assert shown in graph_to_dot(graph.graph())
    image = np.asarray(Image.open(datasets / "0.png"))
    picture = RelationVisualizer(image, predictor.metadata).draw_predictions(graph)
    assert any(f"({shown})" in x.get_text() for x in picture.overlay.texts)
    detected = predictor(datasets / "0.png")
    assert detected.attributes is not None
    file = tmp_path / "submission.csv"
    write_submission(TRAIN, [replace(graph, image_id=COUNT - 1)], str(file), "table")
    with open(file) as stream:
        rows = [row for row in csv.DictReader(stream) if row["RelationshipLabel"] == "is"]
    assert {row["LabelName2"] for row in rows} <= set(ATTRIBUTES) and rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("DATASETS.TRAIN", (BARE,)), "no annotation of attributes_bare .* has attributes"),
        (
            (f"{HEAD}.NUM_ATTRIBUTES", 4),
            "NUM_ATTRIBUTES is 4, but the dataset 'attributes_train' h",
        ),
    ],
)
def test_training_without_matching_attributes_ends_at_the_start(
    datasets, tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        RelDNTrainer(config(tmp_path, *options))


def test_training_set_without_attributes_next_to_one_with_is_unknown(datasets, tmp_path):
    cfg = config(tmp_path, "DATASETS.TRAIN", (BARE, TRAIN, PERMUTED), "SOLVER.MAX_ITER", 2)
    trainer = RelDNTrainer(cfg)
    dicts = list(trainer.data_loader.dataset)
    assert dicts[COUNT + 1]["annotations"] == dicts[2 * COUNT + 1]["annotations"]
    assert "attributes" not in dicts[1]["annotations"][1]
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.model.names["attribute_classes"] == ATTRIBUTES
