"""Short trainings on the built-in data set, for the benchmarks of accuracy."""

import json
import shutil
from pathlib import Path

import reldn_d2
from reldn_d2.engine.defaults import RelDNTrainer

from detectron2.config import CfgNode, get_cfg

__all__ = ["PROJECT", "load_config", "read_metrics", "train"]

PROJECT = Path(__file__).resolve().parents[2]


def load_config(name: str, *options) -> CfgNode:
    """Load ``configs/NAME.yaml`` with ``KEY VALUE`` options on the CPU."""
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    options = ("MODEL.DEVICE", "cpu", *options)
    reldn_d2.merge_config(cfg, str(PROJECT / "configs" / f"{name}.yaml"), list(options))
    return cfg


def train(cfg: CfgNode) -> None:
    """Train from ``MODEL.WEIGHTS`` in an emptied ``OUTPUT_DIR``, and evaluate at the end."""
    shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    trainer = RelDNTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


def read_metrics(folder: Path, task: str) -> dict[str, float]:
    """Read all metrics of ``results_TASK.json``."""
    results = json.loads((folder / f"results_{task}.json").read_text())
    return {name: value for block in results.values() for name, value in block.items()}
