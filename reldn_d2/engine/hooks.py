"""Hooks and training steps that RelDN adds to Detectron2's."""

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from ..data.build import mix_seed
from ..utils.file_io import write_atomically

__all__ = ["BestKeeper", "CPUAMPTrainer", "FiniteLosses", "SeedEachIteration"]


class SeedEachIteration(HookBase):
    """Seed all generators from the run's seed, the iteration and the process.

    A resumed run thus draws the pairs that the interrupted one would have drawn.
    """

    def __init__(self, get_seed: Callable[[], int]):
        """
        Args:
            get_seed: gives the run's seed.
        """
        self._get_seed = get_seed

    def before_step(self) -> None:
        seed_all_rng(mix_seed(self._get_seed(), self.trainer.iter, comm.get_rank()))


class FiniteLosses:
    """Remembers a model's last batch and losses, to name the images of a loss that is not finite.

    Looking at the losses after the step costs no waiting for the device: Detectron2 has fetched
    them by then.
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: from batches of dicts to dicts of losses.
        """
        self._images: list[str] = []
        self._losses: dict = {}
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def _before(self, model: nn.Module, inputs: tuple) -> None:
        if model.training:
            self._images = [
                f"{x.get('image_id', '?')} ({x.get('file_name', 'no file name')})"
                for x in inputs[0]
            ]

    def _after(self, model: nn.Module, inputs: tuple, outputs: Any) -> None:
        if model.training and isinstance(outputs, dict):
            self._losses = {name: x.detach() for name, x in outputs.items()}

    def check(self, iteration: int) -> None:
        """Raise if a loss of the last step is not finite.

        Raises:
            FloatingPointError: with the losses and the images of this process's batch.
        """
        losses = {name: x.item() for name, x in self._losses.items()}
        if not torch.isfinite(torch.tensor(list(losses.values()))).all():
            raise FloatingPointError(
                f"A loss is not finite at iteration {iteration}: {losses}. Images of the batch "
                f"(process {comm.get_rank()}): {', '.join(self._images)}. Try a lower "
                "SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED."
            )


class CPUAMPTrainer(SimpleTrainer):
    """``SimpleTrainer`` with bfloat16 autocast on the CPU, where Detectron2's AMP needs CUDA."""

    def __init__(self, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer):
        super().__init__(model, data_loader, optimizer)
        forward = model.forward

        def autocast_forward(*args, **kwargs):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.training):
                return forward(*args, **kwargs)

        model.forward = autocast_forward


class BestKeeper(BestCheckpointer):
    """Detectron2's ``BestCheckpointer``, which does not forget the best when a run is resumed and
    leaves ``last_checkpoint`` alone.
    """

    def __init__(self, eval_period: int, checkpointer: Any, metric: str, mode: str = "max"):
        """
        Args:
            eval_period: iterations from one evaluation to the next.
            checkpointer: a :class:`.checkpoint.DetectorCheckpointer`.
            metric: such as ``"relations_sgdet/R@n"``.
            mode: ``"max"`` or ``"min"``.
        """
        super().__init__(eval_period, _Untagged(checkpointer), metric, mode)
        self._metric = metric
        self._note = os.path.join(checkpointer.save_dir, "model_best.json")

    def before_train(self) -> None:
        if self.trainer.start_iter and os.path.isfile(self._note):
            with open(self._note) as file:
                note = json.load(file)
            if note["metric"] == self._metric:
                self.best_metric, self.best_iter = note["value"], note["iteration"]

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest()
        if self._metric not in latest:
            known = [x for x in sorted(latest) if "/" in x and not x.startswith("reldn/")]
            raise KeyError(
                f"SOLVER.BEST_CHECKPOINT.METRIC is '{self._metric}', which the evaluation did not "
                f"give; it gave {', '.join(known)}."
            )
        super()._best_checking()
        with write_atomically(self._note) as file:
            note = {"metric": self._metric, "value": self.best_metric, "iteration": self.best_iter}
            json.dump(note, file)


class _Untagged:
    """A checkpointer whose files are not where a run resumes."""

    def __init__(self, checkpointer: Any):
        self._checkpointer = checkpointer

    def save(self, name: str, **kwargs: Any) -> None:
        self._checkpointer.save(name, tag=False, **kwargs)
