"""Loaders report a file that is broken in one place: file, place and what is expected."""

import os
import re
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from bad_files import FORMATS, check_error, load_vg
from data_files import (
    CLASSES,
    HEADER,
    OPENIMAGES_ROWS,
    vg_arrays,
    vg_dicts,
    write_csv,
    write_h5,
    write_json,
    write_openimages,
    write_visual_genome,
)

from reldn_d2.data.datasets import load_openimages_vrd, load_visual_genome


@pytest.mark.parametrize("file_format", FORMATS)
def test_load_good_files_has_relations(tmp_path, file_format):
    write, load = FORMATS[file_format]
    assert sum(len(record["relations"]) for record in load(**write(tmp_path))) > 0


# ------------------------------------------------------------------------- any file, any format


def truncate(path):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def empty(path):
    Path(path).write_bytes(b"")


def other_encoding(path):
    text = Path(path).read_text(encoding="utf-8")
    Path(path).write_text(text, encoding="utf-16")


def compressed(path):
    Path(path).write_bytes(b"\x1f\x8b\x08\x00" + os.urandom(200))


def folder(path):
    os.remove(path)
    os.mkdir(path)


def remove(path):
    os.remove(path)


FILES = [
    ("openimages", "relations_csv", "challenge-2018-train-vrd.csv"),
    ("openimages", "classes_csv", "challenge-2018-classes-vrd.csv"),
    ("openimages", "attributes_csv", "challenge-2018-attributes-description.csv"),
    ("openimages", "labels_csv", "challenge-2018-train-vrd-labels.csv"),
    ("vg", "h5_file", "VG-SGG.h5"),
    ("vg", "dicts_file", "VG-SGG-dicts.json"),
    ("vg", "image_data_file", "image_data.json"),
    ("released", "json_file", "rel_only_annotations_train.json"),
    ("released", "objects_file", "detections_train.json"),
    ("released", "predicates_file", "rel_9_predicates.json"),
    ("own", "json_file", "relations.json"),
]
DAMAGES = {
    empty: r"empty|not valid JSON at line 1, column 1|the file has no names",
    other_encoding: r"not UTF-8 text|cannot be read as HDF5",
    compressed: r"not UTF-8 text|cannot be read as HDF5",
    truncate: r"not valid JSON|values, expected 12|found .*; expected two values|"
    r"cannot be read as HDF5|1 values|Confidence",
    folder: r": expected a file .*, found a folder",
}


@pytest.mark.parametrize(
    ("damage", "file_format", "key", "name"),
    [
        (damage, *file)
        for damage in DAMAGES
        for file in FILES
        if not (damage is other_encoding and "h5_file" in file)  # it is not text
    ],
)
def test_load_damaged_file_raises(tmp_path, damage, file_format, key, name):
    def spoil(arguments):
        if damage is truncate and name.endswith(".csv"):  # in the middle of the last line
            path = Path(arguments[key])
            lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(lines[:-1]) + lines[-1].split(b",")[0])
        else:
            damage(arguments[key])

    check_error(
        tmp_path, file_format, spoil, ValueError, re.escape(name) + r".*(" + DAMAGES[damage] + ")"
    )


@pytest.mark.parametrize(("file_format", "key", "name"), FILES)
def test_load_missing_file_raises(tmp_path, file_format, key, name):
    def spoil(arguments):
        remove(arguments[key])

    message = r"not found: .*" + re.escape(name) + r" does not exist.*README"
    check_error(tmp_path, file_format, spoil, FileNotFoundError, message)


FIRST_IMAGE = {"openimages": "aa01.jpg", "vg": "1.jpg", "released": "a.jpg", "own": "a.jpg"}


@pytest.mark.parametrize("file_format", FIRST_IMAGE)
@pytest.mark.parametrize("damage", ["removed", "emptied", "one image"])
def test_load_image_folder_incomplete_raises(tmp_path, file_format, damage):
    def spoil(arguments):
        root = arguments["image_root"]
        if damage == "one image":
            return remove(os.path.join(root, FIRST_IMAGE[file_format]))
        shutil.rmtree(root)
        if damage == "emptied":
            os.mkdir(root)

    messages = {
        "removed": "The image folder of .* not found: .* does not exist",
        "emptied": "the image folder of .* is empty. Unpack",
        "one image": f"image {FIRST_IMAGE[file_format]} is annotated but not in",
    }
    check_error(tmp_path, file_format, spoil, FileNotFoundError, messages[damage])


@pytest.mark.parametrize("file_format", ["openimages", "released"])
def test_load_unreadable_image_raises(tmp_path, file_format):
    """Only formats without image sizes read the images."""

    def spoil(arguments):
        empty(os.path.join(arguments["image_root"], FIRST_IMAGE[file_format]))

    check_error(
        tmp_path,
        file_format,
        spoil,
        ValueError,
        rf"{FIRST_IMAGE[file_format]}: cannot be read as an image",
    )


def test_load_image_folder_is_file_raises(tmp_path):
    def spoil(arguments):
        arguments["image_root"] = arguments["classes_csv"]

    check_error(
        tmp_path,
        "openimages",
        spoil,
        ValueError,
        "expected the image folder of OpenImages, found a file",
    )


# ------------------------------------------------------------------------------------ OpenImages


def rows_with(line, column, value):
    """The rows of the good file with one value changed; line 2 is the first row."""
    rows = [list(row) for row in OPENIMAGES_ROWS]
    rows[line - 2][HEADER.index(column)] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_with(3, "XMin1", "left"), r"vrd\.csv, line 3: box 'left, .*expected four numbers"),
        (rows_with(3, "YMax2", ""), r"vrd\.csv, line 3: box .*expected four numbers"),
        (rows_with(6, "XMax1", "nan"), r"vrd\.csv, line 6: box .*between 0 and 1"),
        (rows_with(6, "XMax1", "1.5"), r"vrd\.csv, line 6: box .*between 0 and 1"),
        (rows_with(6, "XMin1", "0.7"), r"vrd\.csv, line 6: box .*XMin <= XMax"),
        (rows_with(6, "YMin2", "-0.5"), r"vrd\.csv, line 6: box .*between 0 and 1"),
        (rows_with(2, "LabelName1", "Man"), r"vrd\.csv, line 2: class 'Man' .*one of the 3 in "),
        (rows_with(2, "LabelName2", "/m/11"), r"vrd\.csv, line 2: class '/m/11' is not"),
        (rows_with(4, "LabelName2", "/m/01"), r"vrd\.csv, line 4: attribute '/m/01' .*of the 2 in"),
        (rows_with(2, "RelationshipLabel", "eats"), r"vrd\.csv, line 2: predicate 'eats' .*of the"),
        ([row[:-1] for row in OPENIMAGES_ROWS], r"vrd\.csv, line 2: 11 values, expected 12"),
        ([], r"vrd\.csv: the file has no relationship"),
    ],
)
def test_openimages_invalid_row_raises(tmp_path, rows, message):
    def spoil(arguments):
        write_csv(Path(arguments["relations_csv"]), rows, HEADER)

    check_error(tmp_path, "openimages", spoil, ValueError, message)


@pytest.mark.parametrize("column", ["ImageID", "LabelName2", "YMax2", "RelationshipLabel"])
def test_openimages_missing_column_raises(tmp_path, column):
    keep = [i for i, name in enumerate(HEADER) if name != column]

    def spoil(arguments):
        rows = [[row[i] for i in keep] for row in OPENIMAGES_ROWS]
        write_csv(Path(arguments["relations_csv"]), rows, [HEADER[i] for i in keep])

    message = rf"vrd\.csv, line 1: no column {column} .*the columns are.*Expected ImageID"
    check_error(tmp_path, "openimages", spoil, ValueError, message)


@pytest.mark.parametrize(
    ("key", "rows", "message"),
    [
        ("classes_csv", [*CLASSES, ("/m/01", "Guitar")], r"line 4: /m/01 has a name already"),
        ("classes_csv", [("/m/01",)], r"line 1: found '/m/01'; expected two values"),
        ("attributes_csv", [("/m/11", "")], r"line 1: found '/m/11,'; expected two values"),
        (
            "labels_csv",
            [("ImageID", "LabelName", "Confidence"), ("aa01", "/m/01", "0.7")],
            r"labels\.csv, line 2: Confidence is '0\.7'; expected 1",
        ),
        (
            "labels_csv",
            [("ImageID", "LabelName", "Confidence")]
            + [("aa01", "/m/01", "0"), ("aa01", "/m/01", "1")],
            r"labels\.csv, line 3: /m/01 is both 1 and 0 for image aa01",
        ),
        ("labels_csv", [("ImageID", "Confidence")], r"labels\.csv, line 1: no column LabelName"),
    ],
)
def test_openimages_invalid_lists_raise(tmp_path, key, rows, message):
    def spoil(arguments):
        write_csv(Path(arguments[key]), rows)

    check_error(tmp_path, "openimages", spoil, ValueError, message)


def test_openimages_repeated_column_raises(tmp_path):
    def spoil(arguments):
        rows = [[*values, values[0]] for values in OPENIMAGES_ROWS]
        write_csv(Path(arguments["relations_csv"]), rows, [*HEADER, "ImageID"])

    message = r"vrd\.csv, line 1: 2 columns are called ImageID"
    check_error(tmp_path, "openimages", spoil, ValueError, message)


def test_openimages_unclosed_quote_raises(tmp_path):
    def spoil(arguments):
        Path(arguments["classes_csv"]).write_text('/m/01,Man\n"/m/02,Guitar\n/m/03,Chair\n')

    check_error(tmp_path, "openimages", spoil, ValueError, r"vrd\.csv, line 3: not a CSV file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"list\.txt: the file lists no image"),
        (b"aa01\nbb02\naa01\n", r"list\.txt, line 3: aa01 is in line 1 already"),
        (b"aa01\nbb02,cc03\n", r"list\.txt, line 2: .*is not an image id"),
        (b"aa01\n\xff\xfe\n", r"list\.txt, line 2: .*is not an image id"),
        (b"cc03\n", r"list\.txt: none of its 1 images has a relationship in .*another split"),
    ],
)
def test_openimages_invalid_image_list_raises(tmp_path, text, message):
    def spoil(arguments):
        arguments["image_list"] = str(tmp_path / "list.txt")
        (tmp_path / "list.txt").write_bytes(text)

    check_error(tmp_path, "openimages", spoil, ValueError, message)


def test_openimages_several_problems_are_collected(tmp_path):
    arguments = write_openimages(tmp_path)
    rows = rows_with(2, "XMin1", "x")
    rows[3][HEADER.index("YMin1")] = "y"
    rows[4][HEADER.index("LabelName1")] = "z"
    write_csv(Path(arguments["relations_csv"]), rows, HEADER)
    with pytest.raises(ValueError, match="2 more problems;") as caught:
        load_openimages_vrd(**arguments)
    assert [re.search(r"line \d", text)[0] for text in caught.value.problems] == [
        "line 2",
        "line 5",
        "line 6",
    ]


# --------------------------------------------------------------------------------- Visual Genome


def array_with(name, place, value):
    arrays = vg_arrays()
    arrays[name] = np.array(arrays[name])
    arrays[name][place] = value
    return arrays


def array_replaced(name, array):
    arrays = vg_arrays()
    if array is None:
        del arrays[name]
    else:
        arrays[name] = array
    return arrays


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        *(
            (array_replaced(name, None), rf"h5: no dataset {name}; it has .*Expected VG-SGG\.h5")
            for name in ("boxes_1024", "labels", "predicates", "relationships", "split")
        ),
        (array_replaced("img_to_last_rel", None), "no dataset img_to_last_rel"),
        (array_with("labels", 3, 151), r"labels\[3\] \(image 1 of the file\) is \[151\].*1 to 150"),
        (array_with("labels", 0, 0), r"labels\[0\] \(image 0 .*a class from 1 to 150"),
        (array_with("predicates", 3, 51), r"predicates\[3\] \(image 2 .*predicate from 1 to 50"),
        (array_with("boxes_1024", (4, 2), 0), r"boxes_1024\[4\] \(image 2 .*width and a height"),
        (array_with("relationships", (3, 1), 8), r"relationships\[3\] \(image 2 .*same image"),
        (array_with("relationships", (0, 0), -1), r"relationships\[0\] .*same image"),
        (array_with("img_to_last_box", 3, 99), r"image 3 of the file has the rows 6 to 99 .* of 9"),
        (array_with("img_to_first_rel", 2, 5), r"image 2 of the file has the rows 5 to 3"),
        (array_with("split", slice(0, 3), 2), r"no image for the split train; .*has 0 images"),
        (array_replaced("labels", np.zeros((4, 1), int)), "should have the same length"),
        (array_replaced("split", np.zeros(4, int)), "should have the same length"),
        (array_replaced("predicates", np.zeros((4, 1), int)), "should have the same length"),
        (array_replaced("boxes_1024", np.zeros((9, 5), int)), r"the shape \(9, 5\).*\(rows, 4\)"),
        (array_replaced("relationships", np.zeros((7, 2))), "the type float64"),
    ],
)
def test_vg_invalid_h5_raises(tmp_path, arrays, message):
    def spoil(arguments):
        write_h5(Path(arguments["h5_file"]), arrays)

    check_error(tmp_path, "vg", spoil, ValueError, message)


def test_vg_empty_h5_raises(tmp_path):
    def spoil(arguments):
        h5py.File(arguments["h5_file"], "w").close()

    check_error(tmp_path, "vg", spoil, ValueError, "no dataset split, .*; it has none")


def test_vg_attributes_other_length_raises(tmp_path):
    def spoil(arguments):
        arrays = {**vg_arrays(True), "attributes": np.zeros((3, 10), int)}
        write_h5(Path(arguments["h5_file"]), arrays)

    check_error(tmp_path, "vg_attributes", spoil, ValueError, "attributes 3")


@pytest.mark.parametrize("value", [3, -1])
def test_vg_attribute_out_of_range_raises(tmp_path, value):
    def spoil(paths):
        arrays = vg_arrays(True)
        arrays["attributes"][1, 4] = value
        write_h5(paths["h5_file"], arrays)

    message = r"attributes\[1\] \(image 0 of the file\) is .*; expected attributes from 1 to 2"
    check_error(tmp_path, "vg_attributes", spoil, ValueError, message)


def test_vg_without_h5py_raises(tmp_path, monkeypatch):
    arguments = write_visual_genome(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"VG-SGG\.h5 needs h5py.*reldn_d2\[vg\]"):
        load_vg(**arguments)


def test_vg_unknown_split_raises(tmp_path):
    with pytest.raises(ValueError, match="no split 'testing'; use train, val or test"):
        load_visual_genome(**write_visual_genome(tmp_path), split="testing")


def dicts_with(**changes):
    content = vg_dicts()
    content["label_to_idx"].update(changes)
    return content


def dicts_without(key):
    content = vg_dicts()
    del content[key]
    return content


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("dicts_file", dicts_without("label_to_idx"), r'dicts\.json: no object "label_to_idx"'),
        ("dicts_file", dicts_without("predicate_to_idx"), 'no object "predicate_to_idx"'),
        ("dicts_file", ["man"], 'no object "label_to_idx"'),
        ("dicts_file", dicts_with(airplane=151), "'animal' the id 2; expected the ids"),
        ("dicts_file", dicts_with(animal="2"), r"gives .*expected the ids from 1 to 150"),
        ("dicts_file", dicts_with(airplane=2, animal=1), "has 'animal' with id 1, expected 'air"),
        ("dicts_file", dicts_with(zoo=151), "has 151 names, expected 150"),
        ("image_data_file", {"images": []}, r"image_data\.json: expected a list of images"),
        ("image_data_file", [{"image_id": 1, "width": 0, "height": 4}], "image 0 is .*above 0"),
        ("image_data_file", [{"image_id": 1, "width": 60}], "image 0 is .*expected image_id"),
        ("image_data_file", ["1.jpg"], "image 0 is '1.jpg'"),
        (
            "image_data_file",
            [{"image_id": 1, "width": 60, "height": 40}] * 2,
            "image 1 has the same image_id 1 as image 0",
        ),
        (
            "image_data_file",
            [{"image_id": i, "width": 60, "height": 40} for i in (1, 2, 3, 4)],
            r"4 images besides the 4 corrupt ones, but .*h5 has 5",
        ),
    ],
)
def test_vg_invalid_json_raises(tmp_path, key, content, message):
    def spoil(arguments):
        write_json(Path(arguments[key]), content)

    check_error(tmp_path, "vg", spoil, ValueError, message)
