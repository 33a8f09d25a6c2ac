"""The VRD loader, on small files in the official layout, on broken files, and on the real ones."""

import copy
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

import reldn_d2.data.datasets.builtin as builtin
from reldn_d2.data.datasets.vrd import (
    VRD_CLASSES,
    VRD_PREDICATES,
    load_vrd,
    parse_vrd_annotations,
    register_vrd,
)

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data.build import get_detection_dataset_dicts
from detectron2.structures import BoxMode


def entity(category, bbox):
    return {"category": category, "bbox": bbox}


def relationship(subject, predicate, object_):
    return {"subject": subject, "predicate": predicate, "object": object_}


PERSON = entity(0, [1, 30, 1, 20])  # the top left 20 x 30 pixels
HORSE = entity(43, [11, 40, 6, 50])
RIDES = relationship(PERSON, 35, HORSE)
CONTENT = {"a.jpg": [RIDES, relationship(HORSE, 15, PERSON)], "b.jpg": []}


@pytest.fixture
def vrd(tmp_path):
    """Writes annotations, names and images; returns the arguments of load_vrd."""

    def write(content=CONTENT, images=("a.jpg", "b.jpg"), names=VRD_CLASSES):
        folder = tmp_path / "vrd"
        (folder / "json_dataset").mkdir(parents=True)
        (folder / "images").mkdir()
        (folder / "json_dataset/objects.json").write_text(json.dumps(list(names)))
        (folder / "json_dataset/predicates.json").write_text(json.dumps(list(VRD_PREDICATES)))
        json_file = folder / "json_dataset/annotations_train.json"
        json_file.write_text(json.dumps(content))
        for name in images:
            Image.new("RGB", (60, 40)).save(folder / "images" / name)
        return str(json_file), str(folder / "images")

    return write


def test_load_vrd_records(vrd):
    json_file, image_root = vrd()
    first, second = load_vrd(json_file, image_root)
    assert first == {
        "file_name": os.path.join(image_root, "a.jpg"),
        "image_id": "a.jpg",
        "height": 40,
        "width": 60,
        "annotations": [
            {
                "bbox": [0, 0, 20, 30],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "iscrowd": 0,
            },
            {
                "bbox": [5, 10, 50, 40],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 43,
                "iscrowd": 0,
            },
        ],
        "relations": [(0, 1, 35), (1, 0, 15)],
    }
    assert second["image_id"] == "b.jpg"
    assert second["annotations"] == [] and second["relations"] == []


def test_load_vrd_merges_equal_entities(vrd):
    statue = entity(43, PERSON["bbox"])  # another category in the same box
    content = {"a.jpg": [RIDES, relationship(statue, 18, HORSE), relationship(PERSON, 3, statue)]}
    (record,) = load_vrd(*vrd(content))
    assert [a["category_id"] for a in record["annotations"]] == [0, 43, 43]
    assert record["relations"] == [(0, 1, 35), (2, 1, 18), (0, 2, 3)]


@pytest.mark.parametrize("merge", [True, False])
def test_load_vrd_duplicates(vrd, caplog, merge):
    content = {"a.jpg": [RIDES, relationship(PERSON, 9, HORSE), RIDES]}
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        (record,) = load_vrd(*vrd(content), merge_duplicates=merge)
    assert sorted(record["relations"]) == sorted(
        [(0, 1, 35), (0, 1, 9)] + [(0, 1, 35)] * (not merge)
    )
    assert len(record["annotations"]) == 2
    done = "merged" if merge else "kept"
    assert f"1 relationships repeat an earlier one of their image exactly and were {done}" in (
        caplog.text
    )
    assert "a.jpg, relationship 2" in caplog.text


def test_load_vrd_reflexive_relation_gets_second_entity(vrd, caplog):
    """Its object becomes an additional entity, shared by all such relations of the entity."""
    content = {
        "a.jpg": [
            relationship(PERSON, 3, PERSON),
            RIDES,
            relationship(PERSON, 18, copy.deepcopy(PERSON)),
        ]
    }
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        (record,) = load_vrd(*vrd(content))
    person, twin, horse = record["annotations"]
    assert person == twin and horse["category_id"] == 43
    assert record["relations"] == [(0, 1, 3), (0, 2, 35), (0, 1, 18)]
    assert "2 relationships have the same category and box" in caplog.text
    assert "a.jpg, relationship 0" in caplog.text


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_load_vrd_other_image_suffix_loads(vrd, suffix):
    json_file, image_root = vrd(images=("a" + suffix, "b.jpg"))
    record = load_vrd(json_file, image_root)[0]
    assert record["file_name"] == os.path.join(image_root, "a" + suffix)
    assert record["image_id"] == "a.jpg"
    assert utils.read_image(record["file_name"], "BGR").shape == (40, 60, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_vrd_exif_orientation_matches_detectron2(vrd, orientation):
    json_file, image_root = vrd({"a.jpg": []}, images=())
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (60, 40)).save(os.path.join(image_root, "a.jpg"), exif=exif)
    (record,) = load_vrd(json_file, image_root)
    utils.check_image_size(record, utils.read_image(record["file_name"], "BGR"))
    assert (record["width"] == 40) == (orientation >= 5)


def test_load_vrd_box_beyond_image_warns(vrd, caplog):
    outside = entity(1, [1, 41, 1, 60])
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        (record,) = load_vrd(*vrd({"a.jpg": [relationship(PERSON, 3, outside)]}))
    assert record["annotations"][1]["bbox"] == [0, 0, 60, 41]
    assert "1 boxes (XYXY) extend beyond their image" in caplog.text and "a.jpg" in caplog.text


def test_load_vrd_empty_image_follows_filter_empty(vrd):
    """Detectron2 skips images without annotations with its default settings, and only then."""
    json_file, image_root = vrd()
    register_vrd("vrd_of_this_test", json_file, image_root)
    try:
        assert len(get_detection_dataset_dicts("vrd_of_this_test", filter_empty=True)) == 1
        assert len(get_detection_dataset_dicts("vrd_of_this_test", filter_empty=False)) == 2
    finally:
        DatasetCatalog.remove("vrd_of_this_test")
        MetadataCatalog.remove("vrd_of_this_test")


def broken(**changes):
    """CONTENT whose first relationship is changed; None removes the key."""
    record = copy.deepcopy(RIDES)
    for key, value in changes.items():
        target, name = (record["subject"], key[2:]) if key.startswith("s_") else (record, key)
        target[name] = value
        if value is None:
            del target[name]
    return {"a.jpg": [RIDES, record]}


FIRST = r"annotations_train\.json: a\.jpg, relationship 1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken(predicate=None), FIRST + r': no "predicate" in'),
        (broken(subject=None), FIRST + r': no "subject" in'),
        (broken(object=None), FIRST + r': no "object" in'),
        (broken(s_category=None), FIRST + r', subject: no "category" in'),
        (broken(s_bbox=None), FIRST + r', subject: no "bbox" in'),
        (broken(predicate=70), FIRST + ": predicate is 70; expected an integer from 0 to 69"),
        (broken(predicate=-1), FIRST + ": predicate is -1"),
        (broken(predicate="on"), FIRST + ": predicate is 'on'"),
        (broken(s_category=100), FIRST + ", subject: category is 100; .* from 0 to 99"),
        (broken(s_category=1.5), FIRST + ", subject: category is 1.5"),
        (
            broken(s_bbox=[1, 30, 20, 10]),
            FIRST + r", subject: bbox is \[1, 30, 20, 10\]; .*xmin <=",
        ),
        (broken(s_bbox=[30, 1, 1, 20]), FIRST + ", subject: bbox is .*ymin <= ymax"),
        (broken(s_bbox=[0, 30, 1, 20]), FIRST + ", subject: bbox is .*1-based"),
        (broken(s_bbox=[1, 30, 1]), FIRST + ", subject: bbox is .*four numbers"),
        (broken(s_bbox=[1, 30, 1, "20"]), FIRST + ", subject: bbox is .*four numbers"),
        (broken(s_bbox=[1, 30, 1, float("nan")]), FIRST + ", subject: bbox is"),
        ({"a.jpg": ["on"]}, r"a\.jpg, relationship 0: no \"subject\" in 'on'"),
        ({"a.jpg": None}, r"a\.jpg: expected a list of relationships .*found None"),
        ([RIDES], r"annotations_train\.json: expected an object .*found a list"),
    ],
)
def test_load_vrd_invalid_record_raises(vrd, content, message):
    with pytest.raises(ValueError, match=message):
        load_vrd(*vrd(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], r"annotations_train\.json: not valid JSON at line 1"),
        (lambda data: b"", r"annotations_train\.json: not valid JSON at line 1, column 1"),
        (lambda data: data.replace(b"a.jpg", b"\xe9.jpg"), "not UTF-8 text"),
    ],
)
def test_load_vrd_damaged_file_raises(vrd, spoil, message):
    json_file, image_root = vrd()
    with open(json_file, "rb") as file:
        data = file.read()
    with open(json_file, "wb") as file:
        file.write(spoil(data))
    with pytest.raises(ValueError, match=message + ".*download"):
        load_vrd(json_file, image_root)


def test_load_vrd_other_names_raise(vrd):
    names = list(VRD_CLASSES)
    names[7] = "stool"
    with pytest.raises(ValueError, match=r"objects\.json: name 7 is 'stool', but in VRD .*'chair'"):
        load_vrd(*vrd(names=names))


def test_load_vrd_missing_name_raises(vrd):
    with pytest.raises(ValueError, match=r"objects\.json: expected .* 100 names, found 99 names"):
        load_vrd(*vrd(names=VRD_CLASSES[:99]))


def test_load_vrd_missing_image_raises(vrd):
    json_file, image_root = vrd(images=("a.jpg",))
    with pytest.raises(FileNotFoundError, match="image b.jpg is annotated but not in") as error:
        load_vrd(json_file, image_root)
    assert image_root in str(error.value) and "Unpack" in str(error.value)


def test_load_vrd_unreadable_image_raises(vrd):
    json_file, image_root = vrd()
    with open(os.path.join(image_root, "b.jpg"), "wb") as file:
        file.write(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"b\.jpg: cannot be read as an image"):
        load_vrd(json_file, image_root)


@pytest.mark.parametrize("value", [None, "/some/where"])
def test_load_vrd_missing_folder_shows_variable_and_path(tmp_path, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    else:
        monkeypatch.setenv("DETECTRON2_DATASETS", value)
    path = str(tmp_path / "vrd" / "annotations_train.json")
    with pytest.raises(FileNotFoundError) as error:
        load_vrd(path, str(tmp_path / "vrd" / "images"))
    message = str(error.value)
    assert path in message and "datasets/README.md" in message
    assert (
        f"DETECTRON2_DATASETS={value}" if value else "DETECTRON2_DATASETS is not set"
    ) in message


def test_load_vrd_missing_image_folder_raises(vrd):
    json_file, image_root = vrd()
    with pytest.raises(FileNotFoundError, match="image folder of VRD not found: .*elsewhere"):
        load_vrd(json_file, image_root + "/elsewhere")


@pytest.mark.parametrize("name", ["vrd_train", "vrd_test"])
def test_vrd_metadata_needs_no_files(name):
    metadata = MetadataCatalog.get(name)
    assert len(metadata.thing_classes) == 100 and len(metadata.predicate_classes) == 70
    assert metadata.evaluator_type == "vrd"
    assert name in DatasetCatalog.list()


@pytest.fixture
def register_below():
    """Registers the built-in splits below another folder during a test."""
    names = ("vrd_train", "vrd_test")
    loaders = {name: DatasetCatalog.pop(name) for name in names}
    metadata = {name: MetadataCatalog.pop(name) for name in names}
    yield lambda root: builtin.register_all_vrd(str(root))
    for name in names:
        DatasetCatalog.pop(name, None)
        DatasetCatalog.register(name, loaders[name])
        MetadataCatalog[name] = metadata[name]


@pytest.mark.parametrize(("split", "count"), [("train", 1), ("test", 2)])
def test_vrd_official_layout_loads(tmp_path, register_below, split, count):
    """Equal relationships are merged for training, and counted for evaluation."""
    folder = tmp_path / "vrd"
    image_root = folder / f"sg_dataset/sg_{split}_images"
    image_root.mkdir(parents=True)
    Image.new("RGB", (60, 40)).save(image_root / "a.jpg")
    (folder / "json_dataset").mkdir()
    for name, content in (
        (f"annotations_{split}", {"a.jpg": [RIDES, RIDES]}),
        ("objects", VRD_CLASSES),
        ("predicates", VRD_PREDICATES),
    ):
        (folder / f"json_dataset/{name}.json").write_text(json.dumps(content))
    register_below(tmp_path)
    (record,) = DatasetCatalog.get(f"vrd_{split}")
    assert record["file_name"] == str(image_root / "a.jpg")
    assert record["relations"] == [(0, 1, 35)] * count


@pytest.mark.parametrize("split", ["train", "test"])
def test_load_vrd_real_files_match_json(real_datasets, register_below, split):
    """Compare every relationship, box and image size with the raw JSON."""
    register_below(real_datasets)
    with open(real_datasets / f"vrd/json_dataset/annotations_{split}.json") as file:
        content = json.load(file)
    records = DatasetCatalog.get(f"vrd_{split}")
    assert [record["image_id"] for record in records] == list(content)
    for record, relationships in zip(records, content.values(), strict=True):
        found = []
        for subject, object_, predicate in record["relations"]:
            ends = []
            for index in (subject, object_):
                annotation = record["annotations"][index]
                x0, y0, x1, y1 = annotation["bbox"]
                ends.append((annotation["category_id"], (y0 + 1, y1, x0 + 1, x1)))
                assert x1 <= record["width"] and y1 <= record["height"]
            found.append((*ends, predicate))
        expected = [
            (
                (r["subject"]["category"], tuple(r["subject"]["bbox"])),
                (r["object"]["category"], tuple(r["object"]["bbox"])),
                r["predicate"],
            )
            for r in relationships
        ]
        assert sorted(found) == sorted(set(expected) if split == "train" else expected)
        assert all(subject != object_ for subject, object_, _ in record["relations"])
    for record in records[:5]:
        utils.check_image_size(record, utils.read_image(record["file_name"], "BGR"))


def test_parse_vrd_annotations_published_counts(full_vrd_annotations):
    train = parse_vrd_annotations(str(full_vrd_annotations / "annotations_train.json"))
    test = parse_vrd_annotations(
        str(full_vrd_annotations / "annotations_test.json"), merge_duplicates=False
    )
    assert len(train) in (4000, 3780)  # with and without the 220 images that have no relationship
    assert sum(len(image.relations) for image in train.values()) == 29857
    assert len(test) == 1000
    assert sum(len(image.relations) for image in test.values()) == 7638
    assert sum(not image.relations for image in test.values()) == 45
    for image in (*train.values(), *test.values()):
        boxes = np.array([annotation["bbox"] for annotation in image.annotations]).reshape(-1, 4)
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all() and (boxes >= 0).all()
