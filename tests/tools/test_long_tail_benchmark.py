"""The benchmark of methods for rare predicates, in small: two iterations, a few images."""

import json

import long_tail_benchmark
import pytest
from benchmarks import vrd_data

from reldn_d2 import load_config
from reldn_d2.data.repeat_factors import check_sampler

from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def unregister():
    """Undo what a run changes in its process, which is its own otherwise."""
    yield
    for name in ("tail_train", "tail_test"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


@pytest.mark.parametrize("held_out", [True, False])
def test_run_scores_each_strength_of_one_training(
    held_out, in_checkout, tmp_path, monkeypatch, unregister
):
    monkeypatch.setattr(vrd_data, "NUM_HELD_OUT", 1)
    few = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2]
    arguments = ("vrd", "off", few, 1, held_out, (0.0, 0.5), tmp_path)
    rows = long_tail_benchmark.run(*arguments)
    sizes = [len(DatasetCatalog.get(name)) for name in ("tail_train", "tail_test")]
    assert sizes == ([3, 1] if held_out else [4, 4])
    assert list(rows) == ["off", "off, tau 0.5"]
    for columns in rows.values():
        for k in long_tail_benchmark.BLOCKS:
            for metric in long_tail_benchmark.METRICS:
                assert len(columns[f"{metric} {k}"]) == 2
            assert 0 <= columns[f"F1 {k}"][0] <= 100


@pytest.mark.parametrize("dataset", long_tail_benchmark.DATASETS)
def test_every_training_is_a_valid_config(dataset):
    data = long_tail_benchmark.DATASETS[dataset]
    few, many = (long_tail_benchmark.trainings(data, x) for x in (False, True))
    assert few.items() <= many.items() and list(few)[0] == "off"
    for options in many.values():
        path = long_tail_benchmark.PROJECT / "configs" / data.config
        check_sampler(load_config(str(path), [*data.options, *options]), with_relations=True)


@pytest.mark.slow
def test_main_writes_a_row_per_training_and_strength(in_checkout, tmp_path, capfd):
    output = ["--seeds", "1", "2", "--only", "off", "--output", str(tmp_path)]
    few = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"]
    assert long_tail_benchmark.main([*output, *few]) == 0
    rows = json.loads((tmp_path / "vrd.json").read_text())
    tau = long_tail_benchmark.DATASETS["vrd"].tau[0]
    assert [row["name"] for row in rows] == ["off", f"off, tau {tau:g}"]
    assert all(row["seeds"] == [1, 2] for row in rows)
    assert f"| off, tau {tau:g} " in capfd.readouterr().out
    with pytest.raises(SystemExit):
        long_tail_benchmark.main(["--only", "no such training"])
