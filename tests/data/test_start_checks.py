"""Facts that make a training or evaluation pointless or wrong are found before it starts."""

import logging
import os
import re

import numpy as np
import pytest
from data_files import write_coco
from model_utils import register_dataset, small_config, write_dataset
from PIL import Image

from reldn_d2.data.build import load_test_dicts, load_training_dicts
from reldn_d2.data.datasets import register_relation_instances
from reldn_d2.data.start_checks import (
    check_records,
    diagnose_dataset,
    mirrored_predicates,
    missing_images,
    training_warnings,
)
from reldn_d2.data.statistics import RelationStatistics
from reldn_d2.engine.defaults import RelDNTrainer

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

FILTER = "MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER"


def record(boxes, relations=(), mode=BoxMode.XYXY_ABS, size=(100, 200)):
    annotations = [{"bbox": list(x), "bbox_mode": mode, "category_id": 0} for x in boxes]
    return {
        "file_name": "a.png",
        "height": size[0],
        "width": size[1],
        "annotations": annotations,
        "relations": list(relations),
    }


def statistics_of(records, predicates=("on",)):
    return RelationStatistics.count(records, ["thing"], predicates)


APART = [(0, 0, 10, 10), (50, 0, 60, 10)]
NESTED = [(0, 0, 10, 10), (2, 2, 8, 8)]


def test_training_warnings_apart_pairs_are_counted():
    statistics = statistics_of([record(APART + NESTED[1:], [(0, 1, 0), (1, 0, 0), (0, 2, 0)])])
    (warning,) = training_warnings(statistics, small_config(FILTER, True))
    assert "2 of 3 related pairs do not overlap and are out of reach in SGDET with " in warning
    assert "MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER on" in warning
    assert training_warnings(statistics, small_config(FILTER, False)) == []


def test_training_warnings_no_related_pair_overlaps_raises():
    statistics = statistics_of([record(APART, [(0, 1, 0), (1, 0, 0)])])
    with pytest.raises(ValueError, match="None of the 2 related pairs .*OVERLAP_FILTER.* False"):
        training_warnings(statistics, small_config(FILTER, True))
    assert training_warnings(statistics, small_config(FILTER, False)) == []


def test_training_warnings_no_relation_raises():
    statistics = statistics_of([record(NESTED)] * 3)
    with pytest.raises(ValueError, match=r"toy_vrd_train\) has no relation in 3 images"):
        training_warnings(statistics, small_config())


def test_training_warnings_flips_of_left_and_right():
    names = ["on", "left of", "To the Right of"]
    statistics = statistics_of([record(NESTED, [(0, 1, 0)])], names)
    (warning,) = training_warnings(statistics, small_config())
    assert "predicates 'left of', 'To the Right of' with random flips" in warning
    assert "Set INPUT.RANDOM_FLIP to 'none'" in warning and "Now it is 'horizontal'" in warning
    assert training_warnings(statistics, small_config("INPUT.RANDOM_FLIP", "none")) == []
    assert training_warnings(statistics, small_config("INPUT.RANDOM_FLIP", "vertical")) == []


def test_mirrored_predicates_matches_whole_words():
    names = ["left of", "right", "on-the-left", "bright", "leftover", "above", "on_right_of"]
    assert mirrored_predicates(names) == ["left of", "right", "on-the-left", "on_right_of"]
    assert mirrored_predicates(names, "vertical") == ["above"]
    assert mirrored_predicates(names, "none") == []


def test_missing_images_lists_each_folder_once(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for index in range(5):
            (tmp_path / folder / f"{index}.png").touch()
    os.symlink(tmp_path / "a/0.png", tmp_path / "a/link.png")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "a/broken.png")
    existing = [str(tmp_path / f"{x}/{i}.png") for x in "ab" for i in range(5)]
    existing.append(str(tmp_path / "a/link.png"))
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert missing_images([*existing, "https://example.org/x.png"]) == []
    assert listed == [str(tmp_path / "a"), str(tmp_path / "b")]
    absent = [str(tmp_path / x) for x in ("a/9.png", "a/broken.png", "c/0.png")]
    assert missing_images([*existing, *absent]) == absent


def test_check_records_missing_images_raises(tmp_path):
    records = write_dataset(tmp_path / "images", 6)
    check_records("mine", records)
    for index in (1, 2, 4, 5):
        os.remove(records[index]["file_name"])
    message = (
        r"Dataset 'mine': 4 of 6 images do not exist: 1\.png, 2\.png, 4\.png, \.\.\. in "
        rf"{tmp_path}/images\. Unpack"
    )
    with pytest.raises(FileNotFoundError, match=message):
        check_records("mine", records)


def test_missing_images_raise_before_training_and_evaluation(tmp_path, registered):
    for name in ("one_train", "one_test"):
        register_dataset(registered(name), tmp_path / name)
    cfg = small_config("DATASETS.TRAIN", ("one_train",), "DATASETS.TEST", ("one_test",))
    RelDNTrainer.build_train_loader(cfg)
    os.remove(tmp_path / "one_test/2.png")
    with pytest.raises(FileNotFoundError, match=r"'one_test': 1 of 4 images .*: 2\.png in "):
        RelDNTrainer.build_test_loader(cfg, "one_test")
    with pytest.raises(FileNotFoundError, match=r"'one_test': 1 of 4 images .*: 2\.png in "):
        RelDNTrainer.build_train_loader(cfg)
    os.remove(tmp_path / "one_train/0.png")
    with pytest.raises(FileNotFoundError, match=r"'one_train': 1 of 4 images .*: 0\.png in "):
        RelDNTrainer.build_train_loader(cfg)


def own_data(tmp_path, name, change_box=lambda box: box, predicate="left of", overlap=False):
    """Register a COCO file of 20 images with two related boxes each."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(20):
        left = rng.uniform(100, 150)
        boxes = [[2, 10, 40, 85], [20 if overlap else left, 5, 48, 92]]
        ids = 2 * index + 1, 2 * index + 2
        images.append(
            {"id": index, "file_name": f"{index}.png", "height": 100, "width": 200}
            | {"relations": [[*ids, 1]]}
        )
        annotations += [
            {"id": i, "image_id": index, "category_id": 1, "bbox": change_box(box)}
            for i, box in zip(ids, boxes)
        ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
        "predicates": [{"id": 1, "name": predicate}],
    }
    arguments = write_coco(tmp_path, content)
    for index in range(20):
        Image.new("RGB", (200, 100)).save(tmp_path / f"images/{index}.png")
    register_relation_instances(name, {}, **arguments)
    options = ("DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,))
    return small_config(*options, FILTER, False)


def test_training_start_own_left_of_warns(tmp_path, registered, caplog):
    """With the filter and flips that were once the default, AP was 0.0 without a word."""
    name = registered("own_left_of")
    cfg = own_data(tmp_path, name)
    RelDNTrainer.build_train_loader(cfg)
    (flip,) = [x.getMessage() for x in caplog.records if x.name == "reldn_d2.data.build"]
    assert "'left of'" in flip
    cfg.INPUT.RANDOM_FLIP = "none"
    caplog.clear()
    RelDNTrainer.build_train_loader(cfg)
    assert not [x for x in caplog.records if x.name == "reldn_d2.data.build"]
    cfg.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER = True
    with pytest.raises(ValueError, match="None of the 20 related pairs"):
        RelDNTrainer.build_train_loader(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"  # the detector needs no relations
    RelDNTrainer.build_train_loader(cfg)


@pytest.mark.parametrize(
    ("change_box", "message"),
    [
        (
            lambda box: [box[0] / 200, box[1] / 100, box[2] / 200, box[3] / 100],
            r"100\.0% of the 40 boxes lie within \[0, 1\]: they look like fractions",
        ),
        (
            lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]],
            r"they look like \[x0, y0, x1, y1\]\. Convert them to \[x, y, width, height\]\.",
        ),
    ],
    ids=["normalized", "xyxy as xywh"],
)
def test_training_start_wrong_frame_raises(tmp_path, registered, change_box, message):
    name = registered("own_wrong_frame")
    cfg = own_data(tmp_path, name, change_box)
    for load in (load_training_dicts, lambda *args: load_test_dicts(args[0], name, *args[1:])):
        with pytest.raises(ValueError, match=f"Dataset '{name}': .*{message}"):
            load(cfg, 1, 1)


def test_diagnose_dataset_names_the_bbox_mode():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.5, (40, 2)) * (200, 100)
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.5, (40, 2)) * (200, 100)], axis=1)
    for mode, other in ((BoxMode.XYWH_ABS, "XYXY_ABS"), (BoxMode.XYXY_ABS, None)):
        diagnosis = diagnose_dataset([record(boxes.tolist(), mode=mode)])
        if other is None:
            assert diagnosis is None
        else:
            assert re.search(f'can have "bbox_mode": BoxMode.{other} instead', diagnosis.message)


def test_check_records_scaled_boxes_warns(caplog):
    rng = np.random.default_rng(0)
    ends = np.sort(rng.uniform(-0.1, 1.1, (300, 2, 2)), axis=1).clip(0, 1)
    boxes = (ends * (200, 100)).reshape(300, 4) * 0.8
    image = record(boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)].tolist())
    image["file_name"] = __file__
    with caplog.at_level(logging.WARNING):
        check_records("shrunk", [image])
    assert "Dataset 'shrunk': the" in caplog.text and "reach only 0.80 times" in caplog.text


def test_diagnose_dataset_malformed_boxes_is_none():
    assert diagnose_dataset([record([(0, 0, 9, 9), (0, 0, 9)])]) is None
    assert diagnose_dataset([record([(0, 0, 9, float("nan"))])]) is None
    assert diagnose_dataset([record([])]) is None


def test_load_test_dicts_images_without_annotations(tmp_path, registered):
    name = registered("plain_images")
    dicts = [
        {k: v for k, v in x.items() if k not in ("annotations", "relations")}
        for x in write_dataset(tmp_path / "images")
    ]
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).set(thing_classes=["a"])
    assert load_test_dicts(small_config(), name, 1, None) == dicts
