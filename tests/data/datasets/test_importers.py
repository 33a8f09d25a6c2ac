"""Files of other programs and datasets: what is read, and how invalid records are reported."""

import copy
import json
import logging
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
from data_files import pictures
from import_files import (
    CLASSES,
    CSV_HEADER,
    ENTITIES,
    HEIGHT,
    PREDICATES,
    RELATIONS,
    WIDTH,
    csv_lines,
    image_data,
    label_studio,
    psg,
    scene_graphs,
    sgg_benchmark,
    visual_genome,
    write_import_files,
)
from PIL import Image

from reldn_d2.data.check import check_dataset
from reldn_d2.data.datasets import import_relations, register_imported_relations
from reldn_d2.data.datasets.importers import FORMATS, ImportOptions, read_name_file

from detectron2.data import DatasetCatalog, MetadataCatalog

CONTENTS = {
    "label-studio": label_studio,
    "visual-genome": visual_genome,
    "sgg-benchmark": sgg_benchmark,
    "psg": psg,
}


def with_images(path, **options):
    """Options with the images next to a file, which Label Studio's tasks without boxes need."""
    return ImportOptions(image_root=str(path.parent / "images"), **options)


def words(imported):
    """Entities and relations by file name, in words."""
    dicts, classes, predicates, _ = imported
    return {
        record["file_name"]: (
            [(classes[x["category_id"]], tuple(x["bbox"])) for x in record["annotations"]],
            {(s, o, predicates[p]) for s, o, p in record["relations"]},
        )
        for record in dicts
    }


EXPECTED = {f"{i}.jpg": (ENTITIES[i], set(RELATIONS[i])) for i in ENTITIES}


def in_order_of_mention(content):
    """The chair is mentioned before the man where entities come from relations."""
    reordered = dict(content)
    reordered["2.jpg"] = (ENTITIES[2][::-1], {(0, 1, "behind")})
    return reordered


@pytest.mark.parametrize("file_format", FORMATS)
def test_import_relations_small_file_gives_entities_and_relations(tmp_path, file_format):
    path = write_import_files(tmp_path)[file_format]
    imported = import_relations(file_format, str(path), with_images(path))
    from_relations = file_format in ("csv", "visual-genome")
    assert words(imported) == (in_order_of_mention(EXPECTED) if from_relations else EXPECTED)
    assert imported.thing_classes == CLASSES and imported.predicate_classes == PREDICATES
    assert {(x["height"], x["width"]) for x in imported.dicts} == {(HEIGHT, WIDTH)}


def test_import_relations_scene_graphs_equals_relationships(tmp_path):
    write_import_files(tmp_path)
    imported = import_relations("visual-genome", str(tmp_path / "scene_graphs.json"))
    assert words(imported) == EXPECTED


@pytest.mark.parametrize("file_format", FORMATS)
def test_import_relations_given_names_fix_the_order(tmp_path, file_format):
    path = write_import_files(tmp_path)[file_format]
    options = with_images(
        path, classes=["tree", *reversed(CLASSES)], predicates=[*reversed(PREDICATES), "on"]
    )
    imported = import_relations(file_format, str(path), options)
    assert imported.thing_classes == ["tree", *reversed(CLASSES)]
    assert imported.predicate_classes == [*reversed(PREDICATES), "on"]
    assert words(imported) == words(import_relations(file_format, str(path), with_images(path)))
    options = with_images(path, classes=["man", "chair"])
    with pytest.raises(ValueError, match=r"class 'guitar' is not one of the 2.*--classes"):
        import_relations(file_format, str(path), options)
    options = with_images(path, predicates=["plays", "holds"])
    with pytest.raises(ValueError, match=r"predicate 'behind' is not one of the 2.*--predicates"):
        import_relations(file_format, str(path), options)


@pytest.mark.parametrize("file_format", FORMATS)
def test_import_relations_skip_invalid_leaves_out_classes(tmp_path, file_format, caplog):
    path = write_import_files(tmp_path)[file_format]
    options = with_images(path, classes=["man", "chair"], skip_invalid=True)
    with caplog.at_level(logging.WARNING):
        imported = import_relations(file_format, str(path), options)
    assert "left out" in caplog.text and "'guitar'" in caplog.text
    assert [len(x["relations"]) for x in imported.dicts] == [0, 1, 0]
    whole = import_relations(file_format, str(path), with_images(path))
    assert words(imported)["2.jpg"] == words(whole)["2.jpg"]


@pytest.mark.parametrize("file_format", FORMATS)
def test_register_imported_relations_passes_the_check(tmp_path, file_format, registered):
    path, root = str(write_import_files(tmp_path)[file_format]), str(tmp_path / "images")
    name = registered("imported_data_set")
    register_imported_relations(name, {"evaluator_type": "vrd"}, file_format, path, root)
    report = check_dataset(name)
    assert report.usable and not report.warnings and not report.absent_images
    assert MetadataCatalog.get(name).thing_classes == CLASSES
    assert DatasetCatalog.get(name)[0]["file_name"] == f"{root}/1.jpg"


def test_import_relations_psg_split(tmp_path):
    path = str(write_import_files(tmp_path)["psg"])
    for split, expected in (("train", {"1.jpg", "3.jpg"}), ("test", {"2.jpg"})):
        assert set(words(import_relations("psg", path, ImportOptions(split=split)))) == expected
    with pytest.raises(ValueError, match="Unknown split 'val'; expected one of train, test"):
        import_relations("psg", path, ImportOptions(split="val"))
    with pytest.raises(ValueError, match="split is an option of psg files, not of csv files"):
        import_relations("csv", path, ImportOptions(split="test"))
    with pytest.raises(ValueError, match="Unknown format 'coco'; expected one of csv, "):
        import_relations("coco", path)


def test_import_relations_sgg_benchmark_keeps_masks_and_drops_background(tmp_path):
    content = sgg_benchmark()
    for key in ("categories", "rel_categories"):
        content[key].append({"id": 0, "name": "__background__"})
    content["annotations"][0]["segmentation"] = {"size": [40, 60], "counts": [0, 2400]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    imported = import_relations("sgg-benchmark", str(path))
    assert imported.thing_classes == CLASSES and imported.predicate_classes == PREDICATES
    masks = [x["segmentation"] for x in imported.dicts[0]["annotations"]]
    assert masks[0]["size"] == [40, 60] and masks[1] == [[15, 20, 30, 20, 30, 40]]


def with_attributes(file_format, names, attribute_ids=None):
    """Return content whose first entity of image 1 has these attributes."""
    if file_format == "visual-genome":
        content = scene_graphs()
        content[0]["objects"][0]["attributes"] = names
        content[1]["objects"][0]["attributes"] = []
        return content
    content = sgg_benchmark()
    content["annotations"][0]["attributes"] = names
    if attribute_ids is not None:
        content["annotations"][0]["attributes"] = attribute_ids
        content["att_categories"] = [{"id": 7, "name": "old"}, {"id": 3, "name": "wet"}]
    return content


def imported_attributes(tmp_path, file_format, content, **options):
    """Return the names and, by image, the attributes of each entity."""
    write_import_files(tmp_path)
    (tmp_path / "attributed.json").write_text(json.dumps(content))
    path = str(tmp_path / "attributed.json")
    imported = import_relations(file_format, path, ImportOptions(**options))
    lists = [[x.get("attributes") for x in record["annotations"]] for record in imported.dicts]
    return imported.attribute_classes, lists


@pytest.mark.parametrize("file_format", ["visual-genome", "sgg-benchmark"])
def test_import_relations_attributes_by_name(tmp_path, file_format):
    content = with_attributes(file_format, ["wet", "old", "wet "])
    names, lists = imported_attributes(tmp_path, file_format, content)
    assert names == ["old", "wet"], "in alphabetical order"
    assert lists == [[[1, 0], None], [None, None], []], "the others are unknown"
    names, lists = imported_attributes(tmp_path, file_format, content, attributes=["wet", "old"])
    assert names == ["wet", "old"] and lists[0] == [[0, 1], None]
    message = r"attributes: the attribute 'old' is not one of the 1 of the list .*--attributes"
    with pytest.raises(ValueError, match=message):
        imported_attributes(tmp_path, file_format, content, attributes=["wet"])
    options = dict(attributes=["wet"], skip_invalid=True)
    names, lists = imported_attributes(tmp_path, file_format, content, **options)
    assert names == ["wet"] and lists[0] == [[0], None], "the entity stays"


def test_import_relations_sgg_benchmark_attributes_by_id(tmp_path):
    content = with_attributes("sgg-benchmark", None, [7])
    names, lists = imported_attributes(tmp_path, "sgg-benchmark", content)
    assert names == ["wet", "old"] and lists[0] == [[1], None], "in the order of the ids"
    content = with_attributes("sgg-benchmark", None, [8])
    message = r"annotations\[0\] \(id 100\), attributes: the attribute is 8; expected a name"
    with pytest.raises(ValueError, match=message):
        imported_attributes(tmp_path, "sgg-benchmark", content)


@pytest.mark.parametrize("file_format", ["visual-genome", "sgg-benchmark"])
def test_import_relations_attributes_no_list_raises(tmp_path, file_format):
    content = with_attributes(file_format, "red")
    with pytest.raises(ValueError, match="attributes: they are 'red'; expected a list"):
        imported_attributes(tmp_path, file_format, content)


def test_register_imported_relations_names_attributes(tmp_path, registered):
    write_import_files(tmp_path)
    path = tmp_path / "attributed.json"
    path.write_text(json.dumps(with_attributes("sgg-benchmark", ["red"])))
    name, root = registered("imported_data_set"), str(tmp_path / "images")
    register_imported_relations(name, {}, "sgg-benchmark", str(path), root)
    assert MetadataCatalog.get(name).attribute_classes == ["red"]
    assert check_dataset(name).summary.attribute_counts.tolist() == [1]


def panoptic(folder):
    """Write PNG files and return psg.json's content with their segments: the entities' boxes."""
    content = psg()
    for record in content["data"]:
        colors = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        for place, annotation in enumerate(record["annotations"]):
            x0, y0, x1, y1 = annotation["bbox"]
            colors[y0:y1, x0:x1] = (place + 1, 2, 1)
            segment = 256**2 + 2 * 256 + place + 1
            record["segments_info"].append(
                {"id": segment, "category_id": annotation["category_id"], "isthing": 1}
            )
        folder.mkdir(exist_ok=True)
        Image.fromarray(colors).save(folder / record["pan_seg_file_name"])
    return content


def import_panoptic(tmp_path, content, **options):
    path = tmp_path / "psg.json"
    path.write_text(json.dumps(content))
    options = ImportOptions(panoptic_root=str(tmp_path / "png"), **options)
    return import_relations("psg", str(path), options)


def test_import_relations_psg_masks_from_panoptic_files(tmp_path):
    imported = import_panoptic(tmp_path, panoptic(tmp_path / "png"))
    man, guitar = (x["segmentation"] for x in imported.dicts[0]["annotations"])
    pixels = mask_util.decode(guitar)
    assert pixels.shape == (HEIGHT, WIDTH) and pixels[20:40, 15:30].all() and pixels.sum() == 300
    assert mask_util.decode(man).sum() == 30 * 40 - 300, "the guitar is in front"
    assert json.dumps(man), "plain types"
    bare = import_relations("psg", str(tmp_path / "psg.json"))
    assert "segmentation" not in bare.dicts[0]["annotations"][0]
    content = psg()
    content["data"][0]["annotations"][1]["segmentation"] = [[15, 20, 30, 20, 30, 40]]
    (tmp_path / "psg.json").write_text(json.dumps(content))
    own = import_relations("psg", str(tmp_path / "psg.json")).dicts[0]["annotations"]
    assert own[1]["segmentation"] == [[15, 20, 30, 20, 30, 40]] and "segmentation" not in own[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.pop("segments_info"), "masks need pan_seg_file_name and segments_info"),
        (lambda x: x["segments_info"].pop(), "its categories are not those of the annotations"),
        (lambda x: x["segments_info"][0].update(category_id=1), "categories are not those"),
        (lambda x: x["segments_info"][0].update(id=5), r"1\.png has no pixel of .* the id 5"),
        (lambda x: x.update(pan_seg_file_name="9.png"), r"9\.png cannot be read as an image"),
        (lambda x: x.update(width=61), r"1\.png has 60 x 40 pixels, the image not"),
    ],
)
def test_import_relations_psg_wrong_segments_are_named(tmp_path, spoil, message):
    content = panoptic(tmp_path / "png")
    spoil(content["data"][0])
    where = r"psg\.json, data\[0\] \(image_id '1'\), segments_info: .*"
    with pytest.raises(ValueError, match=where + message):
        import_panoptic(tmp_path, content)


def test_import_relations_label_studio_directions_and_files(tmp_path):
    tasks = label_studio()
    relations = [x for x in tasks[0]["annotations"][0]["result"] if x["type"] == "relation"]
    relations[0].update(direction="left", labels=["plays", "near"])
    relations[1].update(direction="bi")
    tasks[0]["data"] = {"image": "/data/local-files/?d=folder/1.jpg", "note": "x"}
    tasks[1]["annotations"].append({"was_cancelled": True, "result": [7]})
    tasks[1]["data"] = {"photo": "https://example.org/a%20b/0123abcd-2.jpg?sig=1"}
    tasks[2]["annotations"] = []
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks))
    with pytest.raises(
        ValueError, match=r"task 2 \(id 3\): the size of the image is unknown.*root"
    ):
        import_relations("label-studio", str(path))
    root = pictures(tmp_path / "images", ["3.jpg", "0123abcd-2.jpg"])
    imported = import_relations("label-studio", str(path), ImportOptions(image_root=root))
    images = words(imported)
    assert list(images) == ["folder/1.jpg", "0123abcd-2.jpg", "3.jpg"]
    assert images["folder/1.jpg"][1] == {
        *((1, 0, "plays"), (1, 0, "near")),
        *((0, 1, "holds"), (1, 0, "holds")),
    }


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_import_relations_csv_other_separator_says_so(tmp_path, separator, name):
    path = tmp_path / "a.csv"
    path.write_text("\n".join(csv_lines()).replace(",", separator))
    with pytest.raises(ValueError, match=f"a.csv, line 1: the values are separated by {name}, exp"):
        import_relations("csv", str(path))


def test_import_relations_csv_boxes_of_larger_images_say_which_frame_is_expected(tmp_path):
    """Boxes within images of 4 times the size: no box lies wholly outside, most lie mostly."""
    path = tmp_path / "a.csv"
    row = "1.jpg,man,{},plays,dog,{},60,40"
    boxes = [("0,0,120,160", "8,8,200,150"), ("0,0,30,40", "50,10,240,120")]
    path.write_text("\n".join([CSV_HEADER, *(row.format(*x) for x in boxes)]))
    message = (
        r"a.csv, image 1.jpg: 3 of 4 boxes lie mostly outside .* 60 x 40 pixels. Expected \[x0, y0"
    )
    with pytest.raises(ValueError, match=message):
        import_relations("csv", str(path))
    path.write_text("\n".join([CSV_HEADER, row.format("0,0,30,40", "10,10,75,45")]))
    assert len(import_relations("csv", str(path)).dicts) == 1  # a little beyond the image


def test_import_relations_csv_box_beyond_its_image_warns(tmp_path, caplog):
    path = tmp_path / "a.csv"
    row = "1.jpg,man,0,{},30,20,plays,dog,0,1,{},40,60,40"
    rows = [row.format(1, 60.5), row.format(2, 75), row.format(-2, 60)]
    path.write_text("\n".join([CSV_HEADER, *rows]))
    imported = import_relations("csv", str(path), ImportOptions())
    boxes = {tuple(x["bbox"]) for x in imported.dicts[0]["annotations"]}
    assert (0, 1, 75, 40) in boxes
    (record,) = caplog.records
    assert re.search(
        r"2 of 6 boxes extend beyond .* the box \[0.0, 1.0, 75.0, 40.0\] .* by 15 pix",
        record.message,
    )


def test_import_relations_csv_missing_image_message_has_one_full_stop(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\n".join(line.rsplit(",", 2)[0] for line in csv_lines()))
    with pytest.raises(ValueError, match=r"a.csv, line 2: .*[^.]\. Fix or remove it\.") as error:
        import_relations("csv", str(path), ImportOptions(image_root=str(tmp_path)))
    assert ".." not in str(error.value).replace(str(tmp_path), "")


def test_import_relations_csv_rows_without_relation_and_one_box_twice(tmp_path):
    lines = csv_lines()[:2]
    lines.append("1.jpg,lamp,1,1,5,9,,,,,,,60,40")
    lines.append("1.jpg,man,0,0,30,40,near,man,0,0,30,40,60,40")
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    ((entities, relations),) = words(import_relations("csv", str(path))).values()
    assert [name for name, _ in entities] == ["man", "guitar", "lamp", "man"]
    assert relations == {(0, 1, "plays"), (0, 3, "near")}


def test_import_relations_csv_without_sizes_reads_images(tmp_path):
    path = tmp_path / "a.csv"
    rows = [line.rsplit(",", 2)[0] for line in csv_lines()]
    path.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"a.csv, line 2: the size of the image is unknown.*root"):
        import_relations("csv", str(path))
    root = pictures(tmp_path / "images", ["1.jpg", "2.jpg", "3.jpg"], size=(60, 41))
    imported = import_relations("csv", str(path), ImportOptions(image_root=root))
    assert {x["height"] for x in imported.dicts} == {41}
    path.write_text("\n".join(line.replace("1.jpg", f"{root}/1.jpg") for line in rows))
    assert words(import_relations("csv", str(path), ImportOptions(image_root=root))).keys() == {
        "1.jpg",
        "2.jpg",
        "3.jpg",
    }


# --------------------------------------------------------------------------------- invalid records


def break_csv(old, new, line=1):
    def change(lines):
        assert old in lines[line]
        lines[line] = lines[line].replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_csv(",predicate,", ",verb,", 0), "line 1: unknown column 'verb'; .*--ignore verb"),
        (break_csv("subject_x1,", "", 0), "line 1: no column subject_x1"),
        (break_csv(",width", "", 0), "line 1: no column width"),
        (break_csv(",0,0,30,40,plays", ",a,0,30,40,plays"), "line 2: subject_x1 is 'a'; expected"),
        (break_csv(",0,0,30,40,plays", ",nan,0,30,40,plays"), "line 2: the box .*finite"),
        (break_csv(",0,0,30,40,plays", ",30,0,0,40,plays"), "line 2: the box .* has no area"),
        (
            break_csv(",0,0,30,40,plays", ",70,0,80,40,plays"),
            "line 2: .* outside the image of 60.*Expected .x0",
        ),
        (break_csv(",plays,", ",,"), "line 2: no predicate; expected subject, predicate and obj"),
        (break_csv(",man,", ",,"), "line 2: the subject has a box but no class"),
        (break_csv(",60,40", ",60,50"), "line 3: the size 60 x 40 of image '1.jpg' is 60 x 50"),
        (break_csv(",60,40", ",60,tall"), "line 2: height is 'tall'; expected an integer"),
        (break_csv(",60,40", ",60"), "line 2: 13 values, expected 14"),
    ],
)
def test_import_relations_csv_invalid_row_names_the_line(tmp_path, change, message):
    lines = csv_lines()
    change(lines)
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"a.csv, {message}"):
        import_relations("csv", str(path))


def change_at(*keys, value):
    """Set a value; ``...`` removes it."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        if value is ...:
            del content[keys[-1]]
        else:
            content[keys[-1]] = value

    return change


RESULT = (0, "annotations", 0, "result")


@pytest.mark.parametrize(
    ("file_format", "change", "message"),
    [
        # Label Studio
        ("label-studio", change_at(0, value=7), r"task 0 \(id None\): found 7; expected an object"),
        ("label-studio", change_at(0, "odd", value=1), r"\(id 1\): unknown field 'odd' .*--ignore"),
        ("label-studio", change_at(0, "annotations", value=0), "its annotations are 0; expected"),
        (
            "label-studio",
            change_at(*RESULT, 0, "type", value="polygonlabels"),
            "result 0: its type",
        ),
        ("label-studio", change_at(*RESULT, 0, "value", "x", value="1"), "result 0: x, y, width a"),
        ("label-studio", change_at(*RESULT, 0, "value", "x", value=800), "expected percentages of"),
        (
            "label-studio",
            change_at(*RESULT, 0, "value", "rotation", value=9),
            "0: the image or the",
        ),
        ("label-studio", change_at(*RESULT, 0, "value", "points", value=9), "field 'points'"),
        ("label-studio", change_at(*RESULT, 0, "value", "rectanglelabels", value=[]), "one class"),
        ("label-studio", change_at(*RESULT, 0, "id", value=...), "result 0: its id is None"),
        ("label-studio", change_at(*RESULT, 0, "id", value="r1"), "result 1: another entity"),
        ("label-studio", change_at(*RESULT, 0, "original_width", value=[]), "several image sizes"),
        ("label-studio", change_at(*RESULT, 2, "labels", value=[]), "result 2: its labels are"),
        (
            "label-studio",
            change_at(*RESULT, 2, "labels", value=[5]),
            "the predicate is 5; expected",
        ),
        (
            "label-studio",
            change_at(*RESULT, 2, "to_id", value="x"),
            "its object is 'x', which is no",
        ),
        ("label-studio", change_at(*RESULT, 2, "to_id", value="r0"), "entity 'r0' to itself"),
        ("label-studio", change_at(*RESULT, 2, "direction", value="up"), "its direction is 'up'"),
        ("label-studio", change_at(0, "data", value={}), "its data is {}; expected one value"),
        ("label-studio", change_at(1, "id", value=1), "another image has the id 1"),
        # Visual Genome
        (
            "visual-genome",
            change_at(0, "image_id", value=77),
            "image 0 .*no image with this image_",
        ),
        ("visual-genome", change_at(0, "regions", value=[]), "unknown field 'regions'"),
        (
            "visual-genome",
            change_at(0, "relationships", value={}),
            'expected a list "relationships',
        ),
        (
            "visual-genome",
            change_at(0, "relationships", 1, "object", "w", value=0),
            r"image 0 \(image_id 1\), relationships\[1\], object: the object_id 11 has another",
        ),
        (
            "visual-genome",
            change_at(0, "relationships", 0, "subject", "h", value=-1),
            r"relationships\[0\], subject: the box .* has no area",
        ),
        (
            "visual-genome",
            change_at(0, "relationships", 0, "subject", "x", value=None),
            "x, y, w and h are .None, 0, 30, 40.; expected numbers",
        ),
        (
            "visual-genome",
            change_at(0, "relationships", 0, "subject", "colour", value=1),
            r"relationships\[0\], subject: unknown field 'colour'",
        ),
        (
            "visual-genome",
            change_at(0, "relationships", 0, "object", value={}),
            r"relationships\[0\], object: its object_id is None",
        ),
        (
            "visual-genome",
            change_at(0, "relationships", 0, "object_id", value=99),
            None,  # the object itself counts
        ),
        (
            "visual-genome",
            change_at(0, "relationships", 0, "predicate", value=" "),
            r"relationships\[0\]: the predicate is ''; expected a name",
        ),
        # SGG-Benchmark
        ("sgg-benchmark", change_at("rel_annotations", value=...), 'no list "rel_annotations"; it'),
        (
            "sgg-benchmark",
            change_at("categories", 0, "id", value="1"),
            r"categories\[0\] is .*integ",
        ),
        (
            "sgg-benchmark",
            change_at("images", 0, "width", value=0),
            r"images\[0\] \(id 1\): the hei",
        ),
        ("sgg-benchmark", change_at("images", 1, "id", value=1), "another image has the id 1"),
        (
            "sgg-benchmark",
            change_at("annotations", 0, "keypoints", value=[]),
            r"annotations\[0\] \(id 100\): unknown field 'keypoints'",
        ),
        (
            "sgg-benchmark",
            change_at("annotations", 0, "bbox", value=[1, 2, 3]),
            "bbox is .1, 2, 3.",
        ),
        (
            "sgg-benchmark",
            change_at("annotations", 0, "id", value=True),
            "its id is not an integer",
        ),
        ("sgg-benchmark", change_at("annotations", 1, "id", value=100), "another annotation has"),
        ("sgg-benchmark", change_at("annotations", 0, "image_id", value=5), "no image with the im"),
        ("sgg-benchmark", change_at("annotations", 0, "category_id", value=9), "no category with"),
        ("sgg-benchmark", change_at("annotations", 0, "segmentation", value=[[1]]), "polygons"),
        ("sgg-benchmark", change_at("annotations", 0, "iscrowd", value=2), "iscrowd is 2"),
        (
            "sgg-benchmark",
            change_at("rel_annotations", 0, "subject_id", value=5),
            r"rel_annotations\[0\]: subject_id is 5, which is no annotation's id",
        ),
        (
            "sgg-benchmark",
            change_at("rel_annotations", 0, "object_id", value=200),
            "different imag",
        ),
        ("sgg-benchmark", change_at("rel_annotations", 0, "object_id", value=100), "to itself"),
        (
            "sgg-benchmark",
            change_at("rel_annotations", 0, "image_id", value=2),
            "is not that of its",
        ),
        ("sgg-benchmark", change_at("rel_annotations", 0, "predicate_id", value=0), "the id 0"),
        ("sgg-benchmark", change_at("rel_annotations", 0, "score", value=0), "field 'score'"),
        # PSG
        ("psg", change_at("stuff_classes", value=...), 'no list "stuff_classes"'),
        ("psg", change_at("predicate_classes", value=[1]), "a class or predicate is no text"),
        ("psg", change_at("data", 0, "captions", value=1), r"data\[0\] \(image_id '1'\): unknown"),
        ("psg", change_at("data", 0, "relations", value=...), "its relations are None"),
        (
            "psg",
            change_at("data", 0, "relations", 0, value=[0, 1]),
            r"relations\[0\]: it is \[0, 1",
        ),
        ("psg", change_at("data", 0, "relations", 0, value=[0, 1, 3]), "predicate is 3; expected"),
        ("psg", change_at("data", 0, "relations", 0, value=[0, 2, 1]), "its object is 2, which is"),
        ("psg", change_at("data", 0, "annotations", 0, "bbox_mode", value=2), "bbox_mode is 2"),
        (
            "psg",
            change_at("data", 0, "annotations", 0, "bbox", value=[]),
            r"annotations\[0\]: bbox",
        ),
        ("psg", change_at("data", 0, "annotations", 0, "category_id", value=3), "category_id is 3"),
    ],
)
def test_import_relations_invalid_record_is_named(tmp_path, file_format, change, message):
    path = write_import_files(tmp_path)[file_format]
    content = CONTENTS[file_format]()
    change(content)
    path.write_text(json.dumps(content))
    if message is None:
        import_relations(file_format, str(path))
        return
    with pytest.raises(ValueError, match=f"{path.name}.*{message}") as error:
        import_relations(file_format, str(path))
    assert "\n" not in error.value.problems[0] if hasattr(error.value, "problems") else True


def test_import_relations_reports_every_record_once_and_no_relations_of_it(tmp_path):
    content = sgg_benchmark()
    content["images"][1]["width"] = 0
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        import_relations("sgg-benchmark", str(path))
    assert [x.split(":")[0].rsplit(", ")[1] for x in error.value.problems] == [
        "images[1] (id 2)",
        "annotations[0] (id 100)",
    ]


def test_import_relations_ignored_fields_are_accepted(tmp_path):
    content = visual_genome()
    content[0]["regions"] = []
    path = write_import_files(tmp_path)["visual-genome"]
    path.write_text(json.dumps(content))
    import_relations("visual-genome", str(path), ImportOptions(ignore=["regions"]))
    path = tmp_path / "a.csv"
    path.write_text("\n".join([f"{CSV_HEADER},note", *(f"{x},n" for x in csv_lines()[1:])]))
    import_relations("csv", str(path), ImportOptions(ignore=["note"]))


def test_import_relations_image_data_is_required_and_checked(tmp_path):
    path = write_import_files(tmp_path)["visual-genome"]
    (tmp_path / "image_data.json").rename(tmp_path / "sizes.json")
    with pytest.raises(FileNotFoundError, match="image_data.json.*--image-data"):
        import_relations("visual-genome", str(path))
    options = ImportOptions(image_data=str(tmp_path / "sizes.json"))
    assert import_relations("visual-genome", str(path), options).dicts
    content = image_data()
    del content[1]["height"]
    (tmp_path / "sizes.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"image 1 \(image_id 2\): the height of the image is None"
    ):
        import_relations("visual-genome", str(path), options)


def test_import_relations_file_without_relations_raises(tmp_path):
    content = copy.deepcopy(psg())
    for record in content["data"]:
        record["relations"] = []
    path = tmp_path / "psg.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="psg.json: no relation in its 3 images"):
        import_relations("psg", str(path))
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match="a.csv: the file is empty"):
        import_relations("csv", str(tmp_path / "a.csv"))


def test_scene_graphs_shared_object_is_reported_once(tmp_path):
    content = scene_graphs()
    content[0]["objects"][0]["w"] = 0
    write_import_files(tmp_path)
    path = tmp_path / "scene_graphs.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        import_relations("visual-genome", str(path))
    assert len(error.value.problems) == 1 and "objects[0]" in error.value.problems[0]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "man\n\n chair \n", ["man", "chair"]),
        ("a.json", '["__background__", "man"]', ["man"]),
        ("a.txt", "", "a.txt has no names. Expected classes"),
        ("a.txt", "man\nman", "'man' is listed more than once"),
        ("a.json", '{"man": 1}', "expected a list of names"),
        ("a.json", "[1]", "expected a list of names"),
    ],
)
def test_read_name_file(tmp_path, name, text, expected):
    path = tmp_path / name
    path.write_text(text)
    if isinstance(expected, list):
        assert read_name_file(str(path), "classes") == expected
        return
    with pytest.raises(ValueError, match=expected):
        read_name_file(str(path), "classes")
