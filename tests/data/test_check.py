"""python -m reldn_d2.data.check: the summary and every kind of problem."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_files import pictures, rows_with_problems, write_coco, write_openimages
from model_utils import ROOT
from PIL import Image

import reldn_d2.data.check as check_module
from reldn_d2.data.check import check_dataset, main
from reldn_d2.data.datasets import register_openimages_vrd
from reldn_d2.data.summary import DatasetSummary

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

NAME = "data_set_of_this_test"


@pytest.fixture
def register(tmp_path):
    """Registers two images, after ``spoil`` has changed their dicts."""

    def make(spoil=lambda dicts: None, **metadata):
        root = pictures(tmp_path / "images", ["a.png", "b.png"])
        boxes = [[0, 0, 30, 40], [20, 10, 40, 30], [50, 30, 60, 40]]
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": index % 2, "iscrowd": 0}
            for index, box in enumerate(boxes)
        ]
        relations = [(0, 1, 0), (0, 1, 1), (1, 2, 0)]
        dicts = [
            {
                "file_name": os.path.join(root, f"{name}.png"),
                "image_id": name,
                "height": 40,
                "width": 60,
                "annotations": copy.deepcopy(annotations) if name == "a" else [],
                "relations": list(relations) if name == "a" else [],
            }
            for name in "ab"
        ]
        spoil(dicts)
        names = dict(
            thing_classes=["man", "guitar"],
            predicate_classes=["holds", "plays", "on"],
            attribute_classes=["red"],
        )
        DatasetCatalog.register(NAME, lambda: dicts)
        MetadataCatalog.get(NAME).set(**{**names, **metadata})
        return dicts

    yield make
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


def test_check_valid_dataset_prints_summary(register, capsys):
    register()
    assert main([NAME]) == 0
    printed = capsys.readouterr().out
    for line in (
        f"{NAME}: 2 images, 3 boxes, 3 relations",
        "boxes per image: 1.5, at most 3",
        "relations per image: 1.5, at most 3",
        "images without relations: 1 of 2 (50.0%)",
        "related pairs whose boxes do not overlap: 1 of 2 (50.0%)",
        "related pairs with several predicates: 1 of 2 (50.0%)",
        "predicates: 3, 1 of which never occur: on",
        "1 of 2 related pairs do not overlap and are out of reach in SGDET with MODEL.ROI_RELATION",
        f"{NAME} is usable: 0 errors, 1 warning",
    ):
        assert line in printed
    assert "error:" not in printed and printed.count("warning:") == 1
    assert "Decoded" not in printed, "the sample has all images"


def test_summary_bars_are_proportional():
    summary = DatasetSummary(["a"], ["often", "seldom", "once", "never"])
    summary.predicate_counts[:] = [1000, 500, 1, 0]
    lines = summary.text("x", width=60).split("relations per predicate\n")[1].split("\n")
    assert [line.split()[0] for line in lines] == ["often", "seldom", "once"]
    bars = [len(line.split()[-1]) for line in lines]
    assert abs(bars[0] - 2 * bars[1]) <= 1 and bars[2] == 1 and max(map(len, lines)) <= 60
    assert "66.6%" in lines[0]


def test_check_attributes_are_counted(register, capsys):
    def spoil(dicts):
        dicts[0]["annotations"][0]["attributes"] = [0]
        dicts[0]["annotations"][2]["attributes"] = []

    register(spoil)
    assert main([NAME]) == 0
    printed = capsys.readouterr().out
    assert "boxes with annotated attributes: 2 of 3 (66.7%), with 1 attributes" in printed


def test_check_attributes_without_names_is_an_error(register, capsys):
    register(annotation(0, attributes=[0]), attribute_classes=[])
    assert main([NAME]) == 1
    assert "outside the 0 names (0-based) of attribute_classes" in capsys.readouterr().out


def change(**changes):
    def spoil(dicts):
        dicts[0].update(changes)

    return spoil


def annotation(index, **changes):
    def spoil(dicts):
        dicts[0]["annotations"][index].update(changes)

    return spoil


def relation(*triplet):
    return lambda dicts: dicts[0]["relations"].append(triplet)


def damage(dicts):
    Path(dicts[1]["file_name"]).write_bytes(b"not an image")


def cut(dicts):
    data = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(data).save(dicts[1]["file_name"])
    path = Path(dicts[1]["file_name"])
    path.write_bytes(path.read_bytes()[:2000])


def without(key):
    return lambda dicts: dicts[0].pop(key)


ERRORS = {
    "missing image": (lambda d: os.remove(d[1]["file_name"]), "b.png): this image does not exist"),
    "unreadable image": (damage, "b.png): cannot be read as an image"),
    "other size": (change(height=50), "image is 60 x 40 pixels, but its record says 60 x 50"),
    "other width": (change(width=61), "image is 60 x 40 pixels, but its record says 61 x 40"),
    "no size": (without("height"), "the dict has no height"),
    "no annotations": (without("annotations"), 'the dataset dict has no "annotations"'),
    "box outside": (
        annotation(2, bbox=[70, 0, 80, 9]),
        "annotation 2 has the box [70, 0, 80, 9], ",
    ),
    "box above": (annotation(2, bbox=[0, -9, 8, 0]), "which is outside the image of 60 x 40"),
    "turned box": (annotation(1, bbox=[9, 5, 5, 9]), "corners are swapped. Fix or"),
    "nan": (annotation(1, bbox=[0, 0, float("nan"), 9]), "expected four finite numbers"),
    "three numbers": (annotation(1, bbox=[0, 0, 9]), "expected four finite numbers"),
    "text": (annotation(1, bbox="0 0 9 9"), "expected four finite numbers"),
    "mode": (annotation(1, bbox_mode="xyxy"), "in mode 'xyxy'; expected four finite numbers"),
    "class": (annotation(0, category_id=2), "annotation 0 has category_id 2, outside the 2"),
    "class text": (annotation(0, category_id="man"), "category_id 'man'; expected an integer"),
    "predicate": (relation(0, 1, 3), "relation 3 is (0, 1, 3), but predicate 3 is outside the 3"),
    "nothing": (relation(0, 3, 0), "object index 3 is outside the 3 annotations"),
    "itself": (relation(1, 1, 0), "which relates annotation 1 to itself"),
    "pair": (relation(0, 1), "relation 3 is (0, 1); expected (subject_index"),
    "fraction": (relation(0, 1, 0.5), "relation 3 is (0, 1, 0.5); expected three integers"),
    "same id": (lambda d: d[1].update(image_id="a"), "image 0 has the same image_id 'a'"),
    "same file": (
        lambda d: d[1].update(file_name=d[0]["file_name"]),
        "image 0 has the same file_name",
    ),
    "attribute": (
        annotation(1, attributes=[0, 1]),
        "annotation 1 has attributes [0, 1], but 1 is outside the 1 names (0-based) of attribute_c",
    ),
    "attribute text": (
        annotation(1, attributes=["red"]),
        "annotation 1 has attributes ['red']; expected a list of 0-based integers",
    ),
    "attribute no list": (annotation(2, attributes=0), "annotation 2 has attributes 0; expected"),
    "no images": (lambda d: d.clear(), "it has no image"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_check_error_exits_1(register, capsys, case):
    spoil, message = ERRORS[case]
    register(spoil)
    assert main([NAME]) == 1
    printed = capsys.readouterr().out
    (line,) = [x for x in printed.splitlines() if x.startswith("error:")]
    assert message in line
    assert f"{NAME} is NOT usable: 1 error," in printed


WARNINGS = {
    "no width": (annotation(1, bbox=[5, 5, 5, 9]), "annotation 1 has the box [5, 5, 5, 9], which"),
    "box beyond": (annotation(2, bbox=[50, 30, 61, 40]), "extends beyond the image of 60 x 40"),
    "relation twice": (relation(0, 1, 0), "relation (0, 1, 0) is listed 2 times"),
    "entity twice": (
        annotation(2, bbox=[0, 0, 30, 40]),
        "annotation 2 has the class and box of annotation 0",
    ),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_check_warning_exits_0(register, capsys, case):
    spoil, message = WARNINGS[case]
    register(spoil)
    assert main([NAME]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning:")]
    (line,) = [x for x in lines if "related pairs do not overlap" not in x]
    assert message in line and "image 0" in line


def test_check_predicates_of_left_and_right_warn_about_flips(register):
    register(predicate_classes=["left of", "right of", "on"])  # the third never occurs
    (flip,) = [x for x in check_dataset(NAME).warnings if "random flips" in x]
    assert "predicates 'left of', 'right of' with random flips" in flip
    assert "INPUT.RANDOM_FLIP to 'none'" in flip


def many_boxes(change):
    """Replace the boxes of both images with 40 boxes each; ``change`` maps XYXY boxes."""

    def spoil(dicts):
        rng = np.random.default_rng(0)
        for record in dicts:
            low = rng.uniform(0, 0.5, (40, 2)) * (60, 40)
            boxes = np.concatenate([low, low + rng.uniform(0.1, 0.5, (40, 2)) * (60, 40)], axis=1)
            record["annotations"] = [
                {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
                for box in change(boxes).tolist()
            ]
            record["relations"] = [(0, 1, 0)]

    return spoil


WRONG_FRAMES = {
    "normalized": (lambda x: x / (60, 40, 60, 40), "lie within [0, 1]: they look like fractions"),
    "xyxy as xywh": (lambda x: x, "do not fit into their images as [x, y, width, height], but"),
    "yxyx as xywh": (lambda x: x[:, [1, 0, 3, 2]], "they look like [y0, x0, y1, x1]. Convert"),
}


@pytest.mark.parametrize("case", WRONG_FRAMES)
def test_check_wrong_frame_is_one_error(register, capsys, case):
    change, message = WRONG_FRAMES[case]
    register(many_boxes(change))
    assert main([NAME]) == 1
    printed = capsys.readouterr().out.splitlines()
    (error,) = [x for x in printed if x.startswith("error:")]
    assert error.startswith(f"error: dataset {NAME}: ") and message in error
    assert not [x for x in printed if x.startswith("warning:") and "annotation" in x]


def test_check_scaled_boxes_are_one_warning(register):
    def larger(boxes):
        sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        return np.repeat(sizes * 1.3, 2, axis=0) + np.arange(80)[:, None] * 1e-6

    register(many_boxes(larger))
    report = check_dataset(NAME)
    (warning,) = [x for x in report.warnings if "do not overlap" not in x]
    assert "extend beyond their images, up to 1.2" in warning and "larger images" in warning


def test_check_equal_entities_that_are_related_are_two_on_purpose(register):
    def spoil(dicts):
        twin = {**dicts[0]["annotations"][0]}
        dicts[0]["annotations"] += [twin, {**twin}]
        dicts[0]["relations"] += [(0, 3, 2)]  # "person next to person" over one group

    register(spoil)
    (warning,) = [x for x in check_dataset(NAME).warnings if "do not overlap" not in x]
    assert "annotation 4 has the class and box of annotation 0" in warning


def test_check_no_image_at_all_is_a_note(register, capsys):
    dicts = register()
    for record in dicts:
        os.remove(record["file_name"])
    assert main([NAME]) == 0
    printed = capsys.readouterr().out
    folder = os.path.dirname(dicts[0]["file_name"])
    assert f"note: there are no images in {folder}, so the annotations alone were" in printed
    assert f"{NAME} is usable without images: 0 errors" in printed and "Decoded" not in printed


def test_check_limit_counts_all_problems(register, capsys):
    def spoil(dicts):
        for makes, _ in (ERRORS["other size"], ERRORS["turned box"], ERRORS["missing image"]):
            makes(dicts)
        dicts[0]["relations"] += [(0, 9, 0), (2, 2, 0)]

    register(spoil)
    assert main([NAME, "--limit", "2"]) == 1
    assert "... 5 errors in total; raise --limit to see more" in capsys.readouterr().out
    assert len(check_dataset(NAME).errors) == 5


def test_check_truncated_image_in_sample_is_error(register):
    register(cut)
    (error,) = check_dataset(NAME).errors
    assert "b.png): cannot be read as an image" in error


def test_check_decodes_sample_by_default_and_all_with_decode(register, capsys, monkeypatch):
    monkeypatch.setattr(check_module, "_SAMPLE", 1)
    monkeypatch.setattr(check_module, "_SAMPLE_SEED", 1)  # chooses the first image
    register(cut)
    assert main([NAME]) == 0
    assert "Decoded 1 of 2 images; add --decode to read all." in capsys.readouterr().out
    assert main([NAME, "--decode"]) == 1
    printed = capsys.readouterr().out
    assert "b.png): cannot be read as an image" in printed and "Decoded" not in printed


def test_check_lists_all_problems_of_loader(tmp_path, capsys):
    arguments = write_openimages(tmp_path, rows_with_problems())
    register_openimages_vrd(NAME, **arguments)
    try:
        assert main([NAME]) == 1
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
    errors = [x for x in capsys.readouterr().out.splitlines() if x.startswith("error:")]
    assert len(errors) == 3 and "line 2" in errors[0] and "line 4" in errors[2]


def test_check_missing_names_exits_1(register, capsys):
    register(predicate_classes=None)
    assert main([NAME]) == 1
    assert "its metadata has no predicate_classes" in capsys.readouterr().out


def test_check_wrong_command_exits_2(register, capsys):
    register()
    for arguments, message in (
        (["data_set_of_this_tset"], f"Did you mean {NAME}?"),
        ([NAME, "--module", "no_such_module"], "--module no_such_module: No module named"),
    ):
        with pytest.raises(SystemExit) as status:
            main(arguments)
        assert status.value.code == 2
        assert message in capsys.readouterr().err


def test_check_own_dataset_through_module(tmp_path):
    """As a user runs it, in a separate process."""
    arguments = write_coco(tmp_path)
    (tmp_path / "my_data.py").write_text(
        "from reldn_d2.data.datasets import register_relation_instances\n"
        f"register_relation_instances('mine', {{}}, **{arguments!r})\n"
    )
    root = ROOT
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "reldn_d2.data.check", "mine", "--module", "my_data"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mine: 2 images, 2 boxes, 3 relations" in done.stdout
    assert "RuntimeWarning" not in done.stderr
