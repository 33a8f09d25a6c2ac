"""The benchmark on VRD's boxes, in small: two seeds, two iterations, four images."""

import json
import shutil

import pytest
import torch
import vrd_benchmark
from benchmarks import vrd_data
from benchmarks.vrd_table import (
    ACCURACIES,
    LOSSES_CORNER,
    LOSSES_TABLE,
    PUBLISHED,
    RECALLS,
    TABLE,
    format_table,
)
from data_files import write_json
from model_utils import ROOT
from sandbox import BOXES

from reldn_d2.data.boxes_only import load_without_images

COLUMNS = [*RECALLS, *ACCURACIES]


@pytest.fixture
def datasets(in_checkout, tmp_path, monkeypatch):
    """A folder for DETECTRON2_DATASETS with VRD's annotations and detections, without images."""
    folder = tmp_path / "datasets"
    shutil.copytree(in_checkout / "datasets/vrd/json_dataset", folder / "vrd/json_dataset")
    detections = [
        {"image_id": f"test_{i}.jpg", "category_id": c, "bbox": [x, y, x2 - x, y2 - y], "score": 1}
        for i in range(4)
        for c, (x, y, x2, y2) in enumerate(BOXES[: 3 if i < 2 else 2])
    ]
    write_json(folder / "vrd/test_detections_rcnn.json", detections)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.slow
def test_main_writes_a_row_per_model(datasets, tmp_path, capfd):
    names = ["Freq", "semantic + spatial, four losses"]
    chosen = [word for name in names for word in ("--only", name)]
    output = ["--seeds", "1", "2", "--output", str(tmp_path / "output")]
    assert vrd_benchmark.main([*chosen, *output, "SOLVER.MAX_ITER", "2"]) == 0
    content = json.loads((tmp_path / "output/vrd_boxes.json").read_text())
    assert [row["name"] for row in content["rows"]] == names
    assert [row["seeds"] for row in content["rows"]] == [[1], [1, 2]]
    for row in content["rows"]:
        assert set(COLUMNS) <= row.keys() and set(COLUMNS) <= row["deviation"].keys()
        assert all(0 <= x <= 100 for x in row["relationship_k1"] + row["annotated_pairs_k1"])
    # The only pairs of the table are those of the data; both predicates of one pair are annotated.
    assert content["rows"][0]["annotated_pairs_k1"] == [75.0, 75.0]
    # In two images of four the third box, with two of four relations, is not detected.
    assert content["ceiling"] == 75.0
    out = capfd.readouterr().out
    assert "75.00 % of the relations" in out and "| semantic + spatial, four losses |" in out
    assert format_table([PUBLISHED, *content["rows"]], TABLE) in out
    # Runs of one process share data. Each gives what it gives in a process of its own.
    alone = ["--only", names[1], "--seeds", "2", "--output", str(tmp_path / "alone")]
    assert vrd_benchmark.main([*alone, "SOLVER.MAX_ITER", "2"]) == 0
    together = ["--seeds", "1", "2", "--processes", "1", "--output", str(tmp_path / "together")]
    assert vrd_benchmark.main([*chosen, *together, "SOLVER.MAX_ITER", "2"]) == 0
    weights = [
        torch.load(tmp_path / x / "vrd_boxes/semantic_+_spatial_four_losses/seed_2/model_final.pth")
        for x in ("alone", "together", "output")
    ]
    for other in weights[1:]:
        for name, value in weights[0]["model"].items():
            assert torch.equal(value, other["model"][name]), name


def test_losses_run_trains_on_the_rest_and_scores_held_out_images(datasets, tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    monkeypatch.setattr(vrd_data, "NUM_HELD_OUT", 1)
    vrd_data.prepared.cache_clear()
    monkeypatch.setitem(vars(MetadataCatalog.get("vrd_train")), "image_root", "no images")
    (datasets.parent / "run").mkdir()
    model = vrd_benchmark.LOSSES[0]
    model = model._replace(options=[*model.options, "SOLVER.MAX_ITER", 2])
    try:
        columns = vrd_benchmark.run(model, 1, None, datasets.parent / "run")
        ids = [[x["image_id"] for x in load_without_images(y)] for y in vrd_data.HELD_OUT]
    finally:
        vrd_data.prepared.cache_clear()
        for name in vrd_data.HELD_OUT:
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
    assert [len(x) for x in ids] == [3, 1] and len({*ids[0], *ids[1]}) == 4
    assert "all_pairs_k70" in columns and "relationship_k1" not in columns


def test_every_model_of_both_tables_is_a_valid_config():
    from reldn_d2 import load_config

    for model in (*vrd_benchmark.BENCHMARK, *vrd_benchmark.LOSSES):
        head = load_config(vrd_data.CONFIG, model.options).MODEL.ROI_RELATION_HEAD
        four = head.LOSS.LAMBDA_1 > 0
        assert four == ("four losses" in model.name) or model.options == []


def tables_of_docs():
    """Return the tables of docs/benchmarks.md, each a list of rows of cells."""
    tables, before = [], ""
    for line in (ROOT / "docs/benchmarks.md").read_text().splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append([x.strip() for x in line.strip("|").split("|")])
        before = line
    return tables


@pytest.mark.parametrize(
    ("corner", "columns", "first", "models"),
    [
        ("%", TABLE, [PUBLISHED], vrd_benchmark.BENCHMARK),
        (LOSSES_CORNER, LOSSES_TABLE, [], vrd_benchmark.LOSSES),
    ],
)
def test_format_table_gives_the_tables_of_the_docs(corner, columns, first, models):
    """Head and published row are equal; each row of the docs is one that the tool has."""
    (table,) = [x for x in tables_of_docs() if x[0][0] == corner]
    head, line, *rows = format_table(first, columns, corner).splitlines()
    for written, made in zip(table, [head, line, *rows]):
        assert f"| {' | '.join(written)} |" == made.replace("|---", "| ---").replace(
            "---|", "--- |"
        )
    names = [row[0] for row in table[2 + len(first) :]]
    assert set(names) <= {model.name for model in models} and len(set(names)) == len(names)
    assert [x for x in [model.name for model in models] if x in names] == names
    assert all(len(row) == len(table[0]) for row in table)


def test_format_table_means_spreads_and_missing_values():
    row = {"name": "a", "seeds": [1, 2], "x": [1.0, 2.0], "y": 3.004, "training_seconds": 7.4}
    row["deviation"] = {"x": [0.25, 0.125], "y": 0.5}
    columns = [("X", "x", (50, 100)), ("Y", "y", ()), ("Z", "z", (100,)), ("x", "x", (100,))]
    once = {"name": "b", "seeds": [1], "x": [4.0, 5.0], "deviation": {"x": [0.0, 0.0]}}
    assert format_table([row, once], columns, "model").splitlines() == [
        "| model | X | Y | Z | x | seeds | training |",
        "|---|---|---|---|---|---|---|",
        "| a | 1.00 ± 0.25 / 2.00 ± 0.12 | 3.00 ± 0.50 | - | 2.00 ± 0.12 | 2 | 7 s |",
        "| b | 4.00 / 5.00 | - | - | 5.00 | 1 | - |",
    ]


def test_main_without_files_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert vrd_benchmark.main([]) == 1
    assert f"There is no {tmp_path}/vrd/json_dataset" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        vrd_benchmark.main(["--only", "no such row"])
