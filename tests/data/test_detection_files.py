"""Detections from files: both formats, their frames, and invalid files."""

import json

import numpy as np
import pytest
import torch
from model_utils import register_dataset, small_config, unregister_dataset

from reldn_d2.data.build import detection_files
from reldn_d2.data.detection_files import attach_detections, load_detections, transform_detections
from reldn_d2.engine.defaults import RelDNTrainer

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T

DATASET = "detections_test_set"
RECORD = {"image_id": 0, "category_id": 1, "bbox": [10, 5, 30, 40], "score": 0.75}


@pytest.fixture
def dataset(tmp_path):
    register_dataset(DATASET, tmp_path / "images")
    yield DATASET
    unregister_dataset(DATASET)


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        images = {}
        for record in records:
            images.setdefault(record["image_id"], []).append(record)
        torch.save([{"image_id": i, "instances": x} for i, x in images.items()], path)
    return str(path)


@pytest.mark.parametrize("name", ["coco_instances_results.json", "instances_predictions.pth"])
def test_load_detections_both_formats(tmp_path, name):
    records = [RECORD, {**RECORD, "image_id": "a.jpg"}, {**RECORD, "category_id": 0, "score": 1}]
    found = load_detections(write(tmp_path / name, records), 3)
    assert set(found) == {"0", "a.jpg"}
    assert found["0"]["boxes"].tolist() == [[10, 5, 40, 45], [10, 5, 40, 45]]
    assert found["0"]["classes"].tolist() == [1, 0] and found["0"]["scores"].tolist() == [0.75, 1]
    assert found["0"]["boxes"].dtype == np.float32


def test_load_detections_json_maps_category_ids(tmp_path):
    ids = {1: 0, 17: 2}
    path = write(tmp_path / "x.json", [{**RECORD, "category_id": 17}])
    assert load_detections(path, 3, ids)["0"]["classes"].tolist() == [2]
    with pytest.raises(ValueError, match="x.json, detection 0: category_id 5 is not in"):
        load_detections(write(tmp_path / "x.json", [{**RECORD, "category_id": 5}]), 3, ids)
    path = write(tmp_path / "x.pth", [{**RECORD, "category_id": 2}])  # 0-based there already
    assert load_detections(path, 3, ids)["0"]["classes"].tolist() == [2]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image_id": 1, "bbox": [0, 0, 1, 1]}, "detection 1: category_id, score missing"),
        ({**RECORD, "category_id": 3}, "category_id 3 is outside the 3 classes"),
        ({**RECORD, "bbox": [0, 0, -1, 1]}, r"box \[0, 0, -1, 1\]"),
        ({**RECORD, "bbox": [0, 0, 1]}, "expected finite numbers"),
        ({**RECORD, "score": float("nan")}, "score nan"),
        ("text", "detection 1: image_id"),
    ],
)
def test_load_detections_invalid_record_raises(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        load_detections(write(tmp_path / "x.json", [RECORD, record]), 3)


COCO_LIKE = [{**RECORD, "category_id": i} for i in (1, 2, 17, 44, 82, 90)]


def test_load_detections_coco_ids_say_so(tmp_path, caplog):
    """COCO's own ids, 1 to 90, are recognized, whether the dataset has as many classes or not."""
    path = write(tmp_path / "x.json", COCO_LIKE)
    with pytest.raises(ValueError, match="category_id 82 is outside the 80 classes.*COCO's own"):
        load_detections(path, 80)
    assert not caplog.text
    load_detections(path, 100)
    assert f"{path}: These ids look like COCO's own (1 to 90, with gaps)" in caplog.text
    caplog.clear()
    load_detections(path, 3, dict.fromkeys(range(91), 0))
    # 0-based ids: 0 occurs; 12, which COCO does not have; no high id; too few to tell.
    for ids in ((0, 1, 17, 44, 82, 90), (1, 2, 12, 44, 82, 90), (1, 2, 3, 4, 5, 6), (1, 90)):
        records = [{**RECORD, "category_id": i} for i in ids]
        load_detections(write(tmp_path / "x.json", records), 100)
    assert not caplog.text


def test_load_detections_invalid_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="Detection file '.*no.json' does not exist"):
        load_detections(str(tmp_path / "no.json"), 3)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="x.json contains a dict, not a list"):
        load_detections(str(tmp_path / "x.json"), 3)
    torch.save({"model": 1}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth is not Detectron2's instances_predictions.pth"):
        load_detections(str(tmp_path / "x.pth"), 3)
    torch.save([{"image_id": 0, "instances": range(3)}], tmp_path / "x.pth")
    with pytest.raises(ValueError, match="can run code.*coco_instances_results.json"):
        load_detections(str(tmp_path / "x.pth"), 3)


def test_attach_detections_matches_image_ids(tmp_path, dataset, caplog):
    dicts = DatasetCatalog.get(DATASET)
    records = [RECORD, {**RECORD, "image_id": 2}, {**RECORD, "image_id": 77}]
    with caplog.at_level("INFO", logger="reldn_d2.data.detection_files"):
        found = attach_detections(dicts, DATASET, write(tmp_path / "x.json", records), 9)
    assert [len(x["detections"]["scores"]) for x in found] == [1, 0, 1, 0]
    assert "no detection for 2 of 4 images" in caplog.text and "1 of which are not" in caplog.text
    assert "detections" not in dicts[0]
    with pytest.raises(ValueError, match="for none of the 4 images.*'77'.*those of the dataset"):
        attach_detections(dicts, DATASET, write(tmp_path / "x.json", records[2:]), 9)


def test_attach_detections_boxes_of_another_frame_raise(tmp_path, dataset):
    """Images have 96 x 64 pixels; a single stray box is no reason."""
    dicts = DatasetCatalog.get(DATASET)
    far = {**RECORD, "bbox": [150, 100, 90, 90]}
    path = write(tmp_path / "x.json", [far, {**far, "image_id": 1}, RECORD])
    message = (
        r"x.json: 2 of 3 boxes lie mostly outside .*96 x 64 pixels. Expected \[x, y, width, hei"
    )
    with pytest.raises(ValueError, match=message):
        attach_detections(dicts, DATASET, path, 9)
    unsized = [{k: v for k, v in x.items() if k not in ("height", "width")} for x in dicts]
    attach_detections(unsized, DATASET, path, 9)
    path = write(tmp_path / "x.json", [far, RECORD, RECORD])
    assert len(attach_detections(dicts, DATASET, path, 9)[0]["detections"]["scores"]) == 3


def test_transform_detections_follow_image():
    arrays = {
        "boxes": np.array([[10.0, 5, 40, 45], [90, 0, 96, 4]], np.float32),
        "scores": np.array([0.5, 0.25], np.float32),
        "classes": np.array([1, 2]),
    }
    transforms = T.TransformList([T.HFlipTransform(96), T.ScaleTransform(64, 96, 128, 192)])
    found = transform_detections(arrays, transforms, (128, 192))
    assert found.pred_boxes.tensor.tolist() == [[112, 10, 172, 90], [0, 0, 12, 8]]
    crop = T.TransformList([T.CropTransform(20, 10, 30, 30)])
    found = transform_detections(arrays, crop, (30, 30))
    assert found.pred_boxes.tensor.tolist() == [[0, 0, 20, 30]]
    assert found.pred_classes.tolist() == [1] and found.scores.tolist() == [0.5]


def test_loaders_attach_detections(tmp_path, dataset):
    path = write(tmp_path / "x.json", [{**RECORD, "image_id": i} for i in range(4)])
    cfg = small_config(
        *("DATASETS.TRAIN", (DATASET,), "DATASETS.TEST", (DATASET,), "SOLVER.IMS_PER_BATCH", 1),
        *("DATASETS.DETECTION_FILES_TRAIN", (path,), "DATASETS.DETECTION_FILES_TEST", (path,)),
        *("INPUT.MIN_SIZE_TEST", 128, "INPUT.MAX_SIZE_TEST", 192, "SEED", 1),
    )
    (first,) = next(iter(RelDNTrainer.build_test_loader(cfg, DATASET)))
    assert first["detections"].pred_boxes.tensor.tolist() == [[20, 10, 80, 90]]
    (any_image,) = next(iter(RelDNTrainer.build_train_loader(cfg)))
    assert len(any_image["detections"]) == 1
    assert any_image["detections"].image_size == tuple(any_image["image"].shape[1:])
    cfg.DATASETS.DETECTION_FILES_TEST = (path, path)
    with pytest.raises(ValueError, match="DETECTION_FILES_TEST has 2 files, but.*1 datasets"):
        detection_files(cfg, is_train=False)
    assert MetadataCatalog.get(DATASET).thing_classes


def test_attach_detections_matches_file_names_if_no_image_id_does(tmp_path, dataset):
    dicts = DatasetCatalog.get(DATASET)  # ids 0 to 3, files 0.png to 3.png
    records = [{**RECORD, "image_id": "0.png"}, {**RECORD, "image_id": "2.png"}]
    found = attach_detections(dicts, DATASET, write(tmp_path / "x.json", records), 9)
    assert [len(x["detections"]["scores"]) for x in found] == [1, 0, 1, 0]
    twice = [{**x, "file_name": "0.png"} for x in dicts]
    with pytest.raises(ValueError, match="has detections for none of the 4 images"):
        attach_detections(twice, DATASET, write(tmp_path / "x.json", records), 9)
