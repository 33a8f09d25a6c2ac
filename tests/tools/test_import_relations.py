"""The tool that converts annotations in other formats."""

import json

import import_relations
import pytest
from import_files import CLASSES, ENTITIES, RELATIONS, write_import_files

from reldn_d2.data.check import main as check
from reldn_d2.data.datasets import register_relation_instances
from reldn_d2.data.datasets.importers import FORMATS

from detectron2.data import DatasetCatalog


@pytest.mark.parametrize("file_format", FORMATS)
def test_import_relations_output_passes_the_check(tmp_path, file_format, registered, capsys):
    path = write_import_files(tmp_path)[file_format]
    output = tmp_path / "new/relations.json"
    arguments = ["--from", file_format, "--input", str(path), "--output", str(output)]
    arguments += ["--image-root", root := str(tmp_path / "images")]
    assert import_relations.main(arguments) == 0
    assert (
        "3 images, 4 boxes of 3 classes, 3 relations with 3 predicates" in capsys.readouterr().out
    )
    register_relation_instances(registered("imported"), {}, str(output), root)
    assert check(["imported"]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert [len(x["relations"]) for x in DatasetCatalog.get("imported")] == [
        len(x) for x in RELATIONS.values()
    ]


def test_import_relations_names_from_files(tmp_path):
    path = write_import_files(tmp_path)["csv"]
    (tmp_path / "classes.txt").write_text("man\nguitar\nchair\nlamp\n")
    (tmp_path / "predicates.json").write_text('["plays", "holds", "behind"]')
    output = tmp_path / "relations.json"
    names = ["--classes", str(tmp_path / "classes.txt")]
    names += ["--predicates", str(tmp_path / "predicates.json")]
    base = ["--from", "csv", "--input", str(path), "--output", str(output)]
    assert import_relations.main([*base, *names]) == 0
    content = json.loads(output.read_text())
    assert [x["name"] for x in content["categories"]] == ["man", "guitar", "chair", "lamp"]
    assert content["predicates"][0] == {"id": 1, "name": "plays"}


def test_import_relations_attributes_and_masks_reach_the_coco_file(tmp_path, registered, capsys):
    files = write_import_files(tmp_path)
    content = json.loads(files["sgg-benchmark"].read_text())
    content["annotations"][1]["attributes"] = ["red", "old"]
    files["sgg-benchmark"].write_text(json.dumps(content))
    (tmp_path / "attributes.txt").write_text("red\nold\n")
    output = tmp_path / "relations.json"
    arguments = ["--from", "sgg-benchmark", "--input", str(files["sgg-benchmark"])]
    arguments += ["--attributes", str(tmp_path / "attributes.txt"), "--output", str(output)]
    assert import_relations.main(arguments) == 0
    assert "3 relations with 3 predicates, 2 attributes" in capsys.readouterr().out
    register_relation_instances(registered("imported"), {}, str(output), str(tmp_path / "images"))
    first = DatasetCatalog.get("imported")[0]["annotations"]
    assert first[1]["attributes"] == [0, 1] and "attributes" not in first[0]
    assert first[1]["segmentation"] == content["annotations"][1]["segmentation"]
    arguments = ["--from", "csv", "--input", str(files["csv"]), *arguments[4:]]
    assert import_relations.main(arguments) == 1
    message = "attributes is an option of visual-genome and sgg-benchmark files, not of csv files"
    assert message in capsys.readouterr().err


def test_import_relations_problems_exit_1_and_keep_the_old_file(tmp_path, capsys):
    path = write_import_files(tmp_path)["csv"]
    (tmp_path / "classes.txt").write_text("man\nchair\n")
    output = tmp_path / "relations.json"
    output.write_text("old")
    base = ["--from", "csv", "--input", str(path), "--output", str(output)]
    base += ["--classes", str(tmp_path / "classes.txt")]
    assert import_relations.main(base) == 1
    error = capsys.readouterr().err
    assert "error: " in error and "line 2: the class 'guitar' is not one of the 2" in error
    assert "2 records have problems; --skip-invalid leaves them out." in error
    assert output.read_text() == "old"
    assert import_relations.main([*base, "--skip-invalid"]) == 0
    assert [x["name"] for x in json.loads(output.read_text())["categories"]] == ["man", "chair"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "test"], "split is an option of psg files, not of csv files"),
        (["--classes", "none.txt"], "none.txt"),
        (["--input", "none.csv"], "none.csv"),
    ],
)
def test_import_relations_wrong_options_exit_1(tmp_path, options, message, capsys):
    path = write_import_files(tmp_path)["csv"]
    output = tmp_path / "relations.json"
    base = ["--from", "csv", "--input", str(path), "--output", str(output)]
    assert import_relations.main([*base, *options]) == 1
    assert message in capsys.readouterr().err and not output.exists()


def test_import_files_cover_the_classes():
    assert {name for entities in ENTITIES.values() for name, _ in entities} == set(CLASSES)
