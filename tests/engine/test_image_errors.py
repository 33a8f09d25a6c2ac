"""Errors about one image in training or evaluation name its file."""

import numpy as np
import pytest
from model_utils import register_dataset, small_config, unregister_dataset
from PIL import Image

from reldn_d2.engine import RelDNTrainer

from detectron2.data import DatasetCatalog

DATASET = "image_errors_test_set"


@pytest.fixture
def trainer(tmp_path):
    register_dataset(DATASET, tmp_path / "images", count=3)
    (tmp_path / "run").mkdir()
    cfg = small_config(
        *("OUTPUT_DIR", str(tmp_path / "run"), "DATASETS.TRAIN", (DATASET,)),
        *("DATASETS.TEST", (DATASET,), "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 3),
    )
    yield RelDNTrainer(cfg)
    unregister_dataset(DATASET)


def broken_file():
    """Truncate the second image of the dataset and return its name."""
    file = DatasetCatalog.get(DATASET)[1]["file_name"]
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    with open(file, "r+b") as stream:
        stream.truncate(2000)
    return file


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_truncated_image_is_named(trainer, workers):
    file = broken_file()
    trainer.cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(ValueError, match=file):
        RelDNTrainer.test(trainer.cfg, trainer.model)


def test_training_truncated_image_is_named(trainer):
    file = broken_file()
    trainer.resume_or_load(resume=False)
    with pytest.raises(ValueError, match=file):
        trainer.train()


def test_evaluation_failing_model_names_the_image(trainer, monkeypatch):
    file = DatasetCatalog.get(DATASET)[1]["file_name"]
    inference = trainer.model.inference

    def fail(inputs, *args, **kwargs):
        if inputs[0]["file_name"] == file:
            raise MemoryError("no memory")
        return inference(inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.model, "inference", fail)
    with pytest.raises(RuntimeError, match=f"failed at image .*{file}.*MemoryError: no memory"):
        RelDNTrainer.test(trainer.cfg, trainer.model)
    monkeypatch.undo()
    monkeypatch.setattr(RelDNTrainer, "build_evaluator", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # not an error about an image
        RelDNTrainer.test(trainer.cfg, trainer.model)
