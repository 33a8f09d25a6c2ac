"""Loaders of OpenImages, Visual Genome, released and own files, on small hand-made files."""

import json
import logging
import shutil

import numpy as np
import pytest
from data_files import (
    CLASSES,
    HEADER,
    OPENIMAGES_ROWS,
    coco_content,
    released_content,
    row,
    vg_arrays,
    write_coco,
    write_csv,
    write_h5,
    write_openimages,
    write_released,
    write_visual_genome,
)

from reldn_d2.data.datasets import (
    load_openimages_vrd,
    load_relation_instances,
    load_relation_json,
    load_visual_genome,
    register_openimages_vrd,
    register_relation_instances,
    register_relation_json,
    register_visual_genome,
    to_relation_instances,
)
from reldn_d2.data.datasets.visual_genome import VG_CLASSES, VG_PREDICATES
from reldn_d2.structures.scene_graph import boxes_xyxy

from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
)
from detectron2.structures import BoxMode


def boxes(record):
    return boxes_xyxy(record["annotations"]).tolist()


def classes(record):
    return [annotation["category_id"] for annotation in record["annotations"]]


# ------------------------------------------------------------------------------------- OpenImages


def test_load_openimages_records(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        first, second, third = load_openimages_vrd(**write_openimages(tmp_path))
    assert first == {
        "file_name": str(tmp_path / "train/aa01.jpg"),
        "image_id": "aa01",
        "height": 40,
        "width": 60,
        "annotations": [
            {
                "bbox": [0.0, 0.0, 30.0, 40.0],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "iscrowd": 0,
            },
            {
                "bbox": [15.0, 20.0, 30.0, 40.0],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 1,
                "iscrowd": 0,
                "attributes": [0],
            },
        ],
        "relations": [(0, 1, 3), (0, 1, 2)],
        "verified_labels": {0: 1, 2: 0},
    }
    assert second["relations"] == [(1, 0, 1)] and classes(second) == [2, 0]
    assert second["verified_labels"] == {}
    assert third["relations"] == [] and third["annotations"][0]["attributes"] == [0, 1]
    assert "1 relationships repeat an earlier one" in caplog.text and "line 7" in caplog.text


def test_load_openimages_without_merging_keeps_duplicates(tmp_path):
    first = load_openimages_vrd(**write_openimages(tmp_path), merge_duplicates=False)[0]
    assert sorted(first["relations"]) == [(0, 1, 2), (0, 1, 3), (0, 1, 3)]


def test_load_openimages_without_images_uses_cached_or_nominal_sizes(tmp_path, caplog):
    arguments = write_openimages(tmp_path)
    expected = load_openimages_vrd(**arguments, images_needed=False)
    assert expected == load_openimages_vrd(**arguments), "images that exist are read"
    shutil.rmtree(arguments["image_root"])
    assert load_openimages_vrd(**arguments, images_needed=False) == expected
    shutil.rmtree(tmp_path / "reldn_cache")
    with caplog.at_level("INFO", "reldn_d2"):
        nominal = load_openimages_vrd(**arguments, images_needed=False)
    assert "3 of 3 images of OpenImages are missing, and their sizes are not cached" in caplog.text
    for record, other in zip(nominal, expected, strict=True):
        assert record["nominal_size"] and (record["height"], record["width"]) == (1024, 1024)
        assert record["relations"] == other["relations"]
        for entity, original in zip(record["annotations"], other["annotations"], strict=True):
            scaled = np.array(original["bbox"]) / [60, 40, 60, 40] * 1024
            assert np.allclose(entity["bbox"], scaled)
    with pytest.raises(FileNotFoundError, match="The image folder of OpenImages not found"):
        load_openimages_vrd(**arguments)


def test_load_openimages_attributes_as_relations(tmp_path, registered):
    arguments = write_openimages(tmp_path)
    name = registered("openimages_with_is")
    register_openimages_vrd(name, **arguments, attributes_as_relations=True)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["Man", "Guitar", "Chair", "Wooden", "Plastic"]
    assert metadata.predicate_classes[-2:] == ["hits", "is"]
    assert len(metadata.predicate_classes) == 10
    first, _, third = DatasetCatalog.get(name)
    assert classes(first) == [0, 1, 3] and (1, 2, 9) in first["relations"]
    assert boxes(first)[1] == boxes(first)[2], "an attribute has the box of its entity"
    assert third["relations"] == [(0, 1, 9), (0, 2, 9)] and classes(third) == [2, 4, 3]
    assert third["annotations"][0]["attributes"] == [0, 1]


def test_load_openimages_image_list(tmp_path):
    """Loads exactly the listed images in their order, also those without relationships."""
    arguments = write_openimages(tmp_path, images=("bb02", "dd04"))
    (tmp_path / "list.txt").write_text("# mine\ndd04.jpg\n\nbb02\n")
    records = load_openimages_vrd(**arguments, image_list=str(tmp_path / "list.txt"))
    assert [record["image_id"] for record in records] == ["dd04", "bb02"]
    assert records[0]["annotations"] == [] and records[0]["relations"] == []


def test_load_openimages_only_known_skips_other_names(tmp_path, caplog):
    rows = [*OPENIMAGES_ROWS, row("aa01", "/m/77", "plays", "/m/02", "0101", "0101")]
    rows += [row("aa01", "/m/01", "ride", "/m/02", ("0", "1", "0", "1"), ("0", "1", "0", "1"))]
    arguments = write_openimages(tmp_path, rows)
    with_header = write_csv(tmp_path / "oidv6.csv", CLASSES, ["LabelName", "DisplayName"])
    arguments["classes_csv"] = with_header
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        records = load_openimages_vrd(**arguments, only_known=True)
    assert records[0]["relations"] == [(0, 1, 3), (0, 1, 2)]
    assert "2 rows with unlisted names were skipped" in caplog.text
    assert "line 10: class '/m/77'" in caplog.text


@pytest.mark.parametrize("with_list", [False, True])
def test_load_openimages_all_rows_outside_the_lists_says_which_labels_it_met(tmp_path, with_list):
    box = ("0", "1", "0", "1")
    rows = [row("aa01", f"/m/7{i}", "plays", "/m/02", box, box) for i in range(7)]
    rows += [row("aa01", "/m/01", "ride", "/m/02", box, box)]
    rows += [row("bb02", "/m/03", "is", "/m/99", box, box)]
    arguments = write_openimages(tmp_path, rows)
    if with_list:
        (tmp_path / "list.txt").write_text("aa01\nbb02\n")
        arguments["image_list"] = str(tmp_path / "list.txt")
    with pytest.raises(ValueError) as error:
        load_openimages_vrd(**arguments, only_known=True)
    message = str(error.value)
    assert "Download" not in message and "another split" not in message
    assert message == (
        f"{arguments['relations_csv']}: none of its 9 rows can be used: met class '/m/70', "
        "'/m/71', '/m/72', '/m/73', '/m/74', ...; expected '/m/01', '/m/02', '/m/03' (3 in "
        f"{arguments['classes_csv']}); met predicate 'ride'; expected 'at', 'on', 'holds', "
        "'plays', 'interacts_with', ... (9 in predicate_classes); met attribute '/m/99'; "
        f"expected '/m/11', '/m/12' (2 in {arguments['attributes_csv']}). Use the lists that "
        "belong to this file."
    )


def test_load_openimages_only_attributes_without_their_list_raises(tmp_path):
    rows = [x for x in OPENIMAGES_ROWS if x[-1] == "is"]
    arguments = {**write_openimages(tmp_path, rows), "attributes_csv": None}
    with pytest.raises(ValueError, match="none of its 4 rows can be used: 4 rows have attributes"):
        load_openimages_vrd(**arguments)


def test_load_openimages_without_attributes_warns(tmp_path, caplog):
    arguments = {**write_openimages(tmp_path), "attributes_csv": None}
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        records = load_openimages_vrd(**arguments)
    assert "4 rows with attributes ('is') were skipped" in caplog.text
    assert [record["image_id"] for record in records] == ["aa01", "bb02"]


def test_load_openimages_odd_boxes_clipped_with_warning(tmp_path, caplog):
    flat = ("-0.001", "1.002", "0.5", "0.5")
    rows = [row("aa01", "/m/01", "on", "/m/03", flat, ("0", "1", "0", "1"))]
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        (record,) = load_openimages_vrd(**write_openimages(tmp_path, rows))
    assert boxes(record) == [[0, 20, 60, 20], [0, 0, 60, 40]]
    assert "1 boxes without area" in caplog.text and "line 2" in caplog.text


def test_load_openimages_columns_in_any_order(tmp_path):
    arguments = write_openimages(tmp_path)
    expected = load_openimages_vrd(**arguments)
    order = np.random.default_rng(0).permutation(len(HEADER))
    rows = [[values[i] for i in order] + ["x"] for values in OPENIMAGES_ROWS]
    path = tmp_path / "challenge-2018-train-vrd.csv"
    write_csv(path, rows, [HEADER[i] for i in order] + ["IsOccluded"])
    path.write_bytes(
        b"\xef\xbb\xbf" + path.read_bytes()
    )  # byte order mark, as some editors write it
    assert load_openimages_vrd(**arguments) == expected


# ---------------------------------------------------------------------------------- Visual Genome


@pytest.mark.parametrize("attributes", [False, True])
def test_load_visual_genome_records(tmp_path, attributes):
    arguments = write_visual_genome(tmp_path, attributes)
    first, second, third = load_visual_genome(**arguments, split="train", num_val_images=0)
    assert [x["image_id"] for x in (first, second, third)] == [1, 2, 3], "corrupt ones are skipped"
    assert first["file_name"] == str(tmp_path / "VG_100K/1.jpg")
    assert (first["height"], first["width"]) == (40, 60)
    expected = [[0, 0, 30, 40], [35, 20, 55, 40], [5, 5, 15, 15]]
    np.testing.assert_allclose(boxes(first), expected, atol=0.06)  # rounded in the 1024 frame
    assert [VG_CLASSES[c] for c in classes(first)] == ["man", "tire", "zebra"]
    assert first["relations"] == [(0, 1, 30), (1, 2, 49)], "the second one repeats the first"
    assert second["relations"] == [] and len(second["annotations"]) == 1
    assert third["relations"] == [(0, 1, 0)]
    if attributes:
        assert first["annotations"][0]["attributes"] == [1, 0]
        assert "attributes" not in first["annotations"][1], "none was named: unknown"
    else:
        assert "attributes" not in first["annotations"][0]
    test = load_visual_genome(**arguments, split="test", merge_duplicates=False)
    assert [x["image_id"] for x in test] == [4, 5]
    assert test[0]["relations"] == [(0, 1, 19), (0, 1, 19), (2, 1, 21)]
    assert test[1]["annotations"] == [] and test[1]["relations"] == []
    assert len(load_visual_genome(**arguments, split="test")[0]["relations"]) == 2


def test_load_visual_genome_validation_images(tmp_path):
    """The first training images with relations; images without relations are not counted."""
    arguments = write_visual_genome(tmp_path)
    ids = lambda **options: [  # noqa: E731
        x["image_id"] for x in load_visual_genome(**arguments, **options)
    ]
    assert ids(split="val", num_val_images=1) == [1]
    assert ids(split="train", num_val_images=1) == [2, 3]
    assert ids(split="val", num_val_images=2) == [1, 3]
    assert ids(split="train", num_val_images=1, keep_images_without_relations=False) == [3]
    assert ids(split="test", keep_images_without_relations=False) == [4]


def test_load_visual_genome_without_corrupt_images(tmp_path):
    arguments = write_visual_genome(tmp_path)
    expected = load_visual_genome(**arguments, split="train", num_val_images=0)
    with open(arguments["image_data_file"]) as file:
        records = [x for x in json.load(file) if x["image_id"] < 1000]
    with open(arguments["image_data_file"], "w") as file:
        json.dump(records, file)
    assert load_visual_genome(**arguments, split="train", num_val_images=0) == expected


def test_load_visual_genome_odd_records_fixed_with_warning(tmp_path, caplog):
    arguments = write_visual_genome(tmp_path)
    arrays = vg_arrays()
    arrays["boxes_1024"][0] = [1000, 300, 200, 100]
    arrays["relationships"][2] = [1, 1]
    write_h5(tmp_path / "VG-SGG.h5", arrays)
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        first = load_visual_genome(**arguments, split="train", num_val_images=0)[0]
    assert boxes(first)[0][2] == 60.0
    assert first["relations"] == [(0, 1, 30)]
    for text in ("1 boxes extend", "1 relations repeat", "1 relations of a box to itself"):
        assert text in caplog.text


def test_register_visual_genome_metadata(tmp_path, registered):
    name = registered("vg_of_this_test")
    register_visual_genome(name, **write_visual_genome(tmp_path, True), split="test")
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == list(VG_CLASSES)
    assert metadata.predicate_classes == list(VG_PREDICATES)
    assert metadata.attribute_classes == ["red", "old"]
    assert metadata.evaluator_type == "scene_graph"
    assert len(VG_CLASSES) == len(set(VG_CLASSES)) == 150
    assert len(VG_PREDICATES) == len(set(VG_PREDICATES)) == 50
    assert isinstance(DatasetCatalog.get(name)[0]["image_id"], int)


# ------------------------------------------------------------------------ released and own files


def test_register_relation_json_records(tmp_path, registered):
    name = registered("released_of_this_test")
    register_relation_json(name, **write_released(tmp_path), evaluator_type="openimages_vrd")
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["Man", "Guitar", "Chair"]
    assert metadata.predicate_classes == ["at", "on", "holds", "plays"]
    first, second = DatasetCatalog.get(name)
    assert boxes(first) == [[0, 0, 30, 40], [15, 20, 30, 40]], "0-based, not inclusive"
    assert first["relations"] == [(0, 1, 3), (1, 0, 0)]
    assert second["relations"] == []


def test_load_relation_json_odd_boxes_kept_with_warning(tmp_path, caplog):
    content = released_content()
    content["a.jpg"][0]["object"] = {"category": 2, "bbox": [-1, 5, 7, 7]}
    arguments = write_released(tmp_path)
    (tmp_path / "rel_only_annotations_train.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        first = load_relation_json(
            arguments["json_file"], arguments["image_root"], ["a", "b", "c"], ["p"] * 4
        )[0]
    assert boxes(first)[1] == [7, -1, 7, 5]
    assert "1 boxes (XYXY) have no area" in caplog.text and "1 boxes (XYXY) extend" in caplog.text


def test_register_relation_instances_records(tmp_path, registered):
    name = registered("own_of_this_test")
    register_relation_instances(name, {"evaluator_type": "scene_graph"}, **write_coco(tmp_path))
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["man", "guitar"] and metadata.evaluator_type == "scene_graph"
    assert metadata.predicate_classes == ["holds", "plays"]
    assert metadata.attribute_classes == ["wooden"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 9: 1}
    first, second = DatasetCatalog.get(name)
    assert first["image_id"] == 7 and first["file_name"] == str(tmp_path / "images/a.jpg")
    assert first["relations"] == [(0, 1, 1), (0, 1, 0), (1, 0, 1)]
    assert boxes(first) == [[0, 0, 30, 40], [15, 20, 30, 40]]
    assert first["annotations"][1]["attributes"] == [0]
    assert first["verified_labels"] == {0: 1, 1: 0}
    assert second["file_name"] == str(tmp_path / "images/more/b.jpg")
    assert second["annotations"] == [] and second["relations"] == []


def test_load_relation_instances_masks_and_keypoints(tmp_path):
    content = coco_content()
    polygon = [[1.0, 1.0, 9.0, 1.0, 5.0, 9.0]]
    content["annotations"][0].update(segmentation=polygon, keypoints=[3, 4, 2])
    rle = {"size": [40, 60], "counts": [5, 10, 2385]}
    content["annotations"][1]["segmentation"] = rle
    arguments = write_coco(tmp_path, content)
    first = load_relation_instances(**arguments)[0]
    assert first["annotations"][0]["segmentation"] == polygon
    assert first["annotations"][0]["keypoints"] == [3.5, 4.5, 2]
    assert isinstance(first["annotations"][1]["segmentation"]["counts"], bytes)
    written = to_relation_instances([first], ["man", "guitar"], ["holds", "plays"], str(tmp_path))
    assert written["annotations"][0]["keypoints"] == [3, 4, 2]
    json.dumps(written)


@pytest.mark.parametrize("file_format", ["openimages", "visual_genome", "released"])
def test_to_relation_instances_roundtrip(tmp_path, registered, file_format):
    """Written data are read back unchanged, including attributes, labels and duplicates."""
    name = registered("before_conversion")
    if file_format == "openimages":
        arguments = write_openimages(tmp_path)
        register_openimages_vrd(name, **arguments, merge_duplicates=False)
    elif file_format == "visual_genome":
        arguments = write_visual_genome(tmp_path, True)
        register_visual_genome(name, **arguments, split="test", merge_duplicates=False)
    else:
        arguments = write_released(tmp_path)
        register_relation_json(name, **arguments)
    metadata, before = MetadataCatalog.get(name), DatasetCatalog.get(name)
    fields = ("thing_classes", "predicate_classes")
    content = to_relation_instances(
        before,
        *(metadata.get(field) for field in fields),
        metadata.image_root,
        metadata.get("attribute_classes", ()),
    )
    (tmp_path / "own.json").write_text(json.dumps(content))
    again = registered("after_conversion")
    register_relation_instances(again, {}, str(tmp_path / "own.json"), metadata.image_root)
    after = DatasetCatalog.get(again)
    for field in fields:
        assert MetadataCatalog.get(again).get(field) == metadata.get(field)
    assert len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(boxes(new), boxes(old), atol=1e-9)
        assert classes(new) == classes(old)
        for key in ("file_name", "image_id", "height", "width", "relations"):
            assert new[key] == old[key]
        assert new.get("verified_labels") == old.get("verified_labels")
        attributes = [[a.get("attributes") for a in x["annotations"]] for x in (old, new)]
        assert attributes[0] == attributes[1]


def test_load_openimages_image_list_byte_order_mark(tmp_path):
    arguments = write_openimages(tmp_path)
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfaa01\r\nbb02\r\n")
    dicts = load_openimages_vrd(**arguments, image_list=str(tmp_path / "list.txt"))
    assert [record["image_id"] for record in dicts] == ["aa01", "bb02"]
