"""Stopping a training on SIGTERM or SIGINT so that ``--resume`` continues from the same place."""

import logging
import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from detectron2.engine import HookBase
from detectron2.utils import comm

__all__ = ["StopOnSignal", "TrainingInterrupted"]

logger = logging.getLogger(__name__)

# Signals this close together are one: a batch system signals every process of a run, and the
# launcher passes its own signal on to the same processes.
_SAME_SIGNAL_SECONDS = 1.0


class TrainingInterrupted(SystemExit):
    """Ends the process with status 128 + signal (130 or 143), without a traceback."""


class StopOnSignal(HookBase):
    """Write a checkpoint and stop at the end of the iteration in which a signal arrives.

    Processes agree on the iteration, so all of them stop at the same one. During an evaluation,
    whose model is that of the last iteration, a process stops before the next image. A second
    signal ends the process at once. Must come directly before the hooks that evaluate.
    """

    def __init__(self, model: nn.Module, checkpointer: Any):
        """
        Args:
            model: its calls in evaluation mode are watched.
            checkpointer: saves the trainer's state; used in the main process only.
        """
        self._checkpointer = checkpointer
        self._signal = 0  # the signal to stop for, or 0
        self._received = 0.0  # time of the first signal
        self._handlers: dict[int, Any] = {}  # the handlers to restore
        self._group: Any = None
        # Wrapped models are evaluated unwrapped, or with the wrapper calling the inner one.
        getattr(model, "module", model).register_forward_pre_hook(self._before_forward)

    def before_train(self) -> None:
        """Install the handlers; only a program's main thread can."""
        self._signal = 0
        if comm.get_world_size() > 1:  # gloo, because NCCL would synchronize the GPU
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._handlers[signum] = signal.signal(signum, self._on_signal)

    def after_step(self) -> None:
        if self._group is not None:
            flag = torch.tensor(self._signal)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
            self._signal = int(flag)
        # After the last iteration there is nothing to stop but the evaluation.
        if self._signal and self.trainer.iter + 1 < self.trainer.max_iter:
            self._save()
            comm.synchronize()  # no process ends before the checkpoint is complete
            self._stop()

    def restore_handlers(self) -> None:
        """Restore the handlers from before training; after the last evaluation."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _on_signal(self, signum: int, frame: Any) -> None:
        if not self._signal:
            self._signal, self._received = signum, time.monotonic()
            name = signal.Signals(signum).name
            # Not through logging, whose stream may be in the middle of a line.
            os.write(2, f"{name}: stopping; a second signal ends at once\n".encode())
        elif time.monotonic() - self._received > _SAME_SIGNAL_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if self._signal and self._handlers and not model.training:
            self._save()
            self._stop()

    def _save(self) -> None:
        """Save a checkpoint; that of the last iteration exists already, as model_final."""
        iteration = self.trainer.iter
        if comm.is_main_process() and iteration + 1 < self.trainer.max_iter:
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)

    def _stop(self) -> None:
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        logger.info(f"interrupted at iteration {iteration}; --resume continues")
        raise TrainingInterrupted(128 + self._signal)
