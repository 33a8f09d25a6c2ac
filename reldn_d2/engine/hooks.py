"""Hooks that RelDN adds to Detectron2's."""

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from ..data.build import mix_seed
from ..utils.file_io import write_atomically
from .image_errors import describe_images

__all__ = ["FiniteLossCheck", "ResumableBestCheckpointer", "SeedEachIteration"]


class SeedEachIteration(HookBase):
    """Seed all random generators from the run's seed, the iteration and the process.

    A resumed run thus samples the pairs that the interrupted run would have sampled.
    """

    def __init__(self, get_seed: Callable[[], int]):
        """
        Args:
            get_seed: returns the run's seed, which is only known after resuming.
        """
        self._get_seed = get_seed

    def before_step(self) -> None:
        seed_all_rng(mix_seed(self._get_seed(), self.trainer.iter, comm.get_rank()))


class FiniteLossCheck:
    """Record a model's last batch and losses, to name the images whose loss is not finite.

    Checking after the step does not make the CPU wait for the GPU again: by then Detectron2 has
    already fetched the losses.
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: maps a list of dicts to a dict of losses.
        """
        self._images = ""
        self._losses: dict = {}
        model.register_forward_pre_hook(self._record_images)
        model.register_forward_hook(self._record_losses)

    def _record_images(self, model: nn.Module, inputs: tuple) -> None:
        if model.training:
            self._images = describe_images(inputs[0])

    def _record_losses(self, model: nn.Module, inputs: tuple, outputs: Any) -> None:
        if model.training and isinstance(outputs, dict):
            self._losses = {name: x.detach() for name, x in outputs.items()}

    def check(self, iteration: int) -> None:
        """Check the losses of the last step.

        Raises:
            FloatingPointError: if one is not finite; the message has the losses and the images of
                this process's batch.
        """
        losses = {name: x.item() for name, x in self._losses.items()}
        if not torch.isfinite(torch.tensor(list(losses.values()))).all():
            raise FloatingPointError(
                f"A loss is not finite at iteration {iteration}: {losses}. Images in the batch "
                f"(process {comm.get_rank()}): {self._images}. Try a lower "
                "SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED."
            )


class ResumableBestCheckpointer(BestCheckpointer):
    """``BestCheckpointer`` that restores the best value on resume.

    It never updates ``last_checkpoint``, so a resumed run continues from the latest iteration.
    """

    def __init__(self, eval_period: int, checkpointer: Any, metric: str, mode: str = "max"):
        """
        Args:
            eval_period: iterations between two evaluations.
            checkpointer: a :class:`.DetectorCheckpointer`.
            metric: such as ``"relations_sgdet/R@n"``.
            mode: ``"max"`` or ``"min"``.
        """
        super().__init__(eval_period, _UntaggedCheckpointer(checkpointer), metric, mode)
        self._metric = metric
        self._best_file = os.path.join(checkpointer.save_dir, "model_best.json")

    def before_train(self) -> None:
        if self.trainer.start_iter and os.path.isfile(self._best_file):
            with open(self._best_file) as file:
                best = json.load(file)
            if best["metric"] == self._metric:
                self.best_metric, self.best_iter = best["value"], best["iteration"]

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest()
        if self._metric not in latest:
            metrics = [x for x in sorted(latest) if "/" in x and not x.startswith("reldn/")]
            raise ValueError(
                f"SOLVER.BEST_CHECKPOINT.METRIC is '{self._metric}', which is not a result of the "
                f"evaluation; its results are {', '.join(metrics)}."
            )
        super()._best_checking()
        with write_atomically(self._best_file) as file:
            best = {"metric": self._metric, "value": self.best_metric, "iteration": self.best_iter}
            json.dump(best, file)


class _UntaggedCheckpointer:
    """Save checkpoints that ``last_checkpoint`` does not point to."""

    def __init__(self, checkpointer: Any):
        self._checkpointer = checkpointer

    def save(self, name: str, **kwargs: Any) -> None:
        self._checkpointer.save(name, tag=False, **kwargs)
