"""The benchmark on VRD's boxes, in small: two seeds, two iterations, four images."""

import json
import shutil

import pytest
import torch
import vrd_benchmark
from data_files import write_json
from sandbox import BOXES

from reldn_d2.data.boxes_only import load_without_images

COLUMNS = [*vrd_benchmark.RECALLS, *vrd_benchmark.ACCURACIES]


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


def test_losses_run_trains_on_the_rest_and_scores_held_out_images(datasets, tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    monkeypatch.setattr(vrd_benchmark, "NUM_HELD_OUT", 1)
    monkeypatch.setitem(vars(MetadataCatalog.get("vrd_train")), "image_root", "no images")
    (datasets.parent / "run").mkdir()
    model = vrd_benchmark.LOSSES[0]
    model = model._replace(options=[*model.options, "SOLVER.MAX_ITER", 2])
    threads = torch.get_num_threads()
    try:
        columns = vrd_benchmark.run(model, 1, None, datasets.parent / "run")
        ids = [[x["image_id"] for x in load_without_images(y)] for y in vrd_benchmark.HELD_OUT]
    finally:
        torch.set_num_threads(threads)
        for name in vrd_benchmark.HELD_OUT:
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
    assert [len(x) for x in ids] == [3, 1] and len({*ids[0], *ids[1]}) == 4
    assert "all_pairs_k70" in columns and "relationship_k1" not in columns


def test_every_model_of_both_tables_is_a_valid_config():
    from reldn_d2 import load_config

    for model in (*vrd_benchmark.BENCHMARK, *vrd_benchmark.LOSSES):
        head = load_config(str(vrd_benchmark.CONFIG), model.options).MODEL.ROI_RELATION_HEAD
        four = head.LOSS.LAMBDA_1 > 0
        assert four == ("four losses" in model.name) or model.options == []


def test_main_without_files_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert vrd_benchmark.main([]) == 1
    assert f"There is no {tmp_path}/vrd/json_dataset" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        vrd_benchmark.main(["--only", "no such row"])
