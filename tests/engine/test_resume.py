"""Resuming with another config, and new runs in the folder of an earlier one."""

import json

import pytest
import torch
from model_utils import register_dataset, small_config, unregister_dataset

from reldn_d2.engine import RelDNTrainer
from reldn_d2.engine.resume import changed_keys

from detectron2.utils import comm

DATASET = "resume_test_set"


@pytest.fixture(autouse=True)
def dataset(tmp_path):
    register_dataset(DATASET, tmp_path / "images")
    yield
    unregister_dataset(DATASET)


def config(folder, *more):
    return small_config(
        *("OUTPUT_DIR", str(folder), "DATASETS.TRAIN", (DATASET,), "DATASETS.TEST", ()),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0),
        *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.001, "SOLVER.STEPS", ()),
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WEIGHT_DECAY", 0.0001),
        *("SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.CLIP_GRADIENTS.ENABLED", False),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 96, "SEED", 1, *more),
    )


def train(cfg, resume=False):
    torch.manual_seed(5)
    trainer = RelDNTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def resumed(cfg):
    trainer = RelDNTrainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def groups(trainer):
    return {
        id(p): {key: value for key, value in group.items() if key != "params"}
        for group in trainer._trainer.optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize(
    ("more", "logged"),
    [
        (("SOLVER.BASE_LR", 0.0004), "SOLVER.BASE_LR 0.001 -> 0.0004"),
        (("SOLVER.STEPS", (3,), "SOLVER.GAMMA", 0.5), "SOLVER.STEPS [] -> [3]"),
        (("SOLVER.MAX_ITER", 9), "SOLVER.MAX_ITER 4 -> 9"),
        (("SOLVER.WARMUP_ITERS", 8, "SOLVER.MAX_ITER", 9), "SOLVER.WARMUP_ITERS 0 -> 8"),
        (("SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.MOMENTUM", 0.5), "SOLVER.MOMENTUM 0.9 -> 0.5"),
        # These regroup the parameters: the momentum must follow them.
        (("SOLVER.BACKBONE_MULTIPLIER", 1.0), "SOLVER.BACKBONE_MULTIPLIER 0.1 -> 1.0"),
        (("SOLVER.WEIGHT_DECAY_NORM", 0.0001), "SOLVER.WEIGHT_DECAY_NORM 0.0 -> 0.0001"),
        (("SOLVER.CLIP_GRADIENTS.ENABLED", True), "SOLVER.CLIP_GRADIENTS.ENABLED"),
    ],
)
def test_resume_with_another_schedule_uses_it(tmp_path, caplog, more, logged):
    first = train(config(tmp_path, "SOLVER.MAX_ITER", 4))
    with caplog.at_level("INFO", logger="reldn_d2"):
        second = resumed(config(tmp_path, *more))
    assert "The resumed run uses new values of the config: " in caplog.text
    assert logged in caplog.text and "outside SOLVER" not in caplog.text
    # Rates, decay and momentum are those of a new optimizer that has run for as many iterations.
    fresh = RelDNTrainer(config(tmp_path / "fresh", *more))
    for _ in range(4):
        fresh._trainer.optimizer.step()
        fresh.scheduler.step()
    found, wanted = groups(second), groups(fresh)
    names = {name: p for name, p in second.model.named_parameters() if p.requires_grad}
    others = dict(fresh.model.named_parameters())
    for name, parameter in names.items():
        assert found[id(parameter)] == wanted[id(others[name])], name
    assert second.scheduler.get_last_lr() == fresh.scheduler.get_last_lr()
    # The momentum of each parameter is its own.
    before = dict(first.model.named_parameters())
    for name, parameter in names.items():
        old = first._trainer.optimizer.state[before[name]]["momentum_buffer"]
        assert torch.equal(second._trainer.optimizer.state[parameter]["momentum_buffer"], old), name


def test_resume_with_fewer_processes_uses_the_scaled_schedule(tmp_path, monkeypatch, caplog):
    more = ("SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.BASE_LR", 0.001, "SOLVER.MAX_ITER", 4)
    monkeypatch.setattr(RelDNTrainer, "auto_scale_workers", staticmethod(lambda cfg, count: cfg))
    train(config(tmp_path, *more))
    monkeypatch.undo()
    assert comm.get_world_size() == 1
    with caplog.at_level("INFO", logger="reldn_d2"):
        second = resumed(config(tmp_path, *more))
    assert "SOLVER.BASE_LR 0.001 -> 0.0005" in caplog.text
    assert "SOLVER.MAX_ITER 4 -> 8" in caplog.text
    assert "SOLVER.IMS_PER_BATCH 2 -> 1" in caplog.text
    assert max(group["lr"] for group in second._trainer.optimizer.param_groups) == 0.0005
    second.train()
    assert second.iter == 8


def test_resume_with_the_same_config_logs_no_difference(tmp_path, caplog):
    train(config(tmp_path))
    with caplog.at_level("INFO", logger="reldn_d2.engine.resume"):
        resumed(config(tmp_path))
    assert not [x.getMessage() for x in caplog.records if x.name == "reldn_d2.engine.resume"]


def test_resume_lists_other_keys_that_differ(tmp_path, caplog):
    train(config(tmp_path))
    more = ("MODEL.ROI_RELATION_HEAD.LOSS.ALPHA_1", 0.3, "INPUT.RANDOM_FLIP", "none", "SEED", 7)
    resumed(config(tmp_path, *more))
    line, seed = (x.getMessage() for x in caplog.records if "resumed" in x.getMessage())
    assert "in 2 keys outside SOLVER: " in line and "ALPHA_1 0.2 -> 0.3" in line
    assert "INPUT.RANDOM_FLIP horizontal -> none" in line
    assert seed == "SEED of the config is ignored: the resumed run keeps its seed 1."


def test_resume_with_another_optimizer_starts_it_from_scratch(tmp_path, caplog):
    train(config(tmp_path))
    second = resumed(config(tmp_path, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.MAX_ITER", 6))
    assert "The optimizer starts from scratch" in caplog.text
    second.train()
    assert second.iter == 6


def test_resume_with_a_frozen_module_starts_the_optimizer_from_scratch(tmp_path, caplog):
    train(config(tmp_path))
    freeze = ("MODEL.ROI_RELATION_HEAD.SEMANTIC.FREEZE", True, "SOLVER.MAX_ITER", 6)
    resumed(config(tmp_path, *freeze)).train()
    assert "The optimizer starts from scratch" in caplog.text


def test_resume_with_mixed_precision_switched_on(tmp_path):
    train(config(tmp_path))
    assert resumed(config(tmp_path, "SOLVER.AMP.ENABLED", True)).start_iter == 4


def test_resume_checkpoint_without_config_keeps_the_momentum(tmp_path, caplog):
    """As checkpoints of detectors before version 0.2, which held no config."""
    train(config(tmp_path))
    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    content["reldn"]["config"] = ""
    torch.save(content, tmp_path / "model_final.pth")
    second = resumed(config(tmp_path, "SOLVER.BASE_LR", 0.0004))
    assert second._trainer.optimizer.state and "from scratch" not in caplog.text
    assert max(group["lr"] for group in second._trainer.optimizer.param_groups) == 0.0004


def test_changed_keys_ignores_new_keys_and_folders(tmp_path):
    cfg = config(tmp_path)
    saved = cfg.clone()
    saved.OUTPUT_DIR, saved.SOLVER.GAMMA = "elsewhere", 0.7
    del saved.TEST["RELATIONS"]
    assert changed_keys(saved.dump(), cfg) == {"SOLVER.GAMMA": (0.7, cfg.SOLVER.GAMMA)}
    assert changed_keys("", cfg) == {}


def test_new_run_in_an_old_folder_is_not_mixed_with_it(tmp_path, caplog):
    """Killed before its first checkpoint, it must not be resumed from the older run."""
    train(config(tmp_path))
    (tmp_path / "model_best.json").write_text(json.dumps({"metric": "m", "value": 9.0}))
    assert "earlier run" not in caplog.text
    second = RelDNTrainer(config(tmp_path))
    second.resume_or_load(resume=False)  # and then killed
    assert f"{tmp_path} (OUTPUT_DIR) holds checkpoints of an earlier run" in caplog.text
    assert "its last is model_final.pth" in caplog.text
    assert "removed last_checkpoint and model_best.json" in caplog.text
    assert (tmp_path / "model_final.pth").is_file()
    third = resumed(config(tmp_path))
    assert third.start_iter == 0 and "--resume starts a new run" in caplog.text
    # A new run without older checkpoints says nothing.
    caplog.clear()
    RelDNTrainer(config(tmp_path)).resume_or_load(resume=False)
    assert "earlier run" not in caplog.text


def test_new_run_that_cannot_start_keeps_the_older_one(tmp_path):
    train(config(tmp_path))
    trainer = RelDNTrainer(config(tmp_path, "MODEL.WEIGHTS", "no/such.pth"))
    with pytest.raises(FileNotFoundError):
        trainer.resume_or_load(resume=False)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
