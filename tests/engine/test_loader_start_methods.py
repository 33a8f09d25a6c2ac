"""Loader workers with the start methods of macOS, Windows and Python 3.14."""

import os
import pickle
import pickletools
import subprocess
import sys

import pytest
from model_utils import ROOT

from reldn_d2.utils import compat

from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.common import ToIterableDataset
from detectron2.data.samplers import TrainingSampler

# Given as -c, like a notebook: there is no main file that a worker could import.
SCRIPT = """
import multiprocessing, sys
from pathlib import Path
import reldn_d2
from model_utils import register_dataset, small_config
from reldn_d2.engine import RelDNTrainer

multiprocessing.set_start_method(sys.argv[1])
folder = Path(sys.argv[2])
register_dataset("started", folder / "images", count=2)
cfg = small_config(
    *("OUTPUT_DIR", str(folder / "run"), "DATASETS.TRAIN", ("started",), "SEED", 1),
    *("DATASETS.TEST", ("started",), "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 1),
    *("DATALOADER.NUM_WORKERS", 1),
)
trainer = RelDNTrainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()
print("trained and evaluated")
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_loaders_start_method_train_and_evaluate(tmp_path, method):
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, method, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "trained and evaluated" in result.stdout
    assert (tmp_path / "run" / "results_sgdet.json").is_file()


@pytest.mark.skipif("loader workers" not in compat.applied, reason="this Detectron2 needs no patch")
def test_detectron2_datasets_unpickling_imports_the_patches_first():
    """Detectron2's own loaders, which a script may build, thus work with these start methods."""
    images = DatasetFromList(["a", "b"])
    mapped = MapDataset(images, str.upper)
    endless = ToIterableDataset(mapped, TrainingSampler(2, shuffle=False))
    for dataset in (images, mapped, endless):
        content = pickle.dumps(dataset, protocol=2)
        imported = [x for op, x, _ in pickletools.genops(content) if op.name == "GLOBAL"]
        assert imported[0] == "reldn_d2.utils.compat _call"
    assert list(pickle.loads(pickle.dumps(mapped))) == ["A", "B"]
    assert next(iter(pickle.loads(pickle.dumps(endless)))) == "A"
