"""RelDN's counterpart of Detectron2's ``DefaultTrainer``."""

import logging
import os
import weakref
from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer, TrainerBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint.reldn_checkpoint import build_checkpointer
from ..data.build import build_train_loader, detection_files
from ..data.dataset_mapper import RelationDatasetMapper
from ..data.detection_files import attach_detections
from ..evaluation.build import build_relation_evaluator
from ..modeling.meta_arch import predicts_relations
from ..utils.events import FailSafeWriter, RelationStatisticsPrinter, report_log_errors_once
from ..utils.file_io import write_results
from ..utils.processes import protect_loader_worker
from .hooks import FiniteLossCheck, ResumableBestCheckpointer, SeedEachIteration
from .image_errors import NameImageInErrors, named_images
from .interruption import StopOnSignal
from .model_setup import check_counts, ensure_frequency_table
from .optimizer import build_optimizer
from .run_check import check_run
from .train_loop import build_simple_trainer, create_ddp_model

__all__ = ["RelDNTrainer"]

logger = logging.getLogger(__name__)


class RelDNTrainer(DefaultTrainer):
    """``DefaultTrainer`` for RelDN and, with any other meta-architecture, for its detector."""

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: with the keys of :func:`.config.add_reldn_config`. If ``REFERENCE_WORLD_SIZE`` of
                ``SOLVER`` is set, batch size, learning rate and schedule are rescaled to the
                number of processes, as in Detectron2.
        """
        # Not DefaultTrainer's __init__, which builds its own checkpointer and DDP model.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        if not logging.getLogger("reldn_d2").hasHandlers():  # a script other than train_net.py
            setup_logger(distributed_rank=comm.get_rank(), name="reldn_d2")
        report_log_errors_once()
        check_run(cfg, build_evaluator=self.build_evaluator)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = create_ddp_model(model)
        self.loss_check = FiniteLossCheck(model)
        self._trainer = build_simple_trainer(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = build_checkpointer(cfg, model, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        # Determines the order of the data and all random choices; saved in checkpoints.
        self.seed: int = getattr(data_loader, "seed", max(cfg.SEED, 0))
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[Any]:
        """Add reproducible seeding and the best checkpoint to Detectron2's hooks."""
        hooks = [SeedEachIteration(lambda: self.seed), *super().build_hooks()]
        evaluation = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        self.stop_on_signal = StopOnSignal(self.model, self.checkpointer)
        hooks.insert(evaluation, self.stop_on_signal)
        best, period = self.cfg.SOLVER.BEST_CHECKPOINT, self.cfg.TEST.EVAL_PERIOD
        if best.METRIC and comm.is_main_process():
            # After the evaluation, before the writers.
            hooks.insert(
                -1, ResumableBestCheckpointer(period, self.checkpointer, best.METRIC, best.MODE)
            )
        return hooks

    def build_writers(self) -> list[Any]:
        """Add a writer for the statistics of the relation head to Detectron2's writers.

        If a file of logs cannot be written, training continues.
        """
        writers = [FailSafeWriter(x, self.cfg.OUTPUT_DIR) for x in super().build_writers()]
        return [*writers, RelationStatisticsPrinter()]

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the weights as Detectron2 does; a new run also counts the frequency table.

        A resumed run sees exactly the batches and random choices that the interrupted run would
        have seen.
        """
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.matching_only = False  # the run's own checkpoint fits completely
        super().resume_or_load(resume=resume)
        if hasattr(self.data_loader, "seek"):
            self.data_loader.seek(self.start_iter, self.seed)
        elif self.start_iter:
            logger.warning("This data loader cannot be resumed: it restarts its shuffling.")
        statistics = ensure_frequency_table(self.cfg, self.model)
        if statistics is not None:
            self.checkpointer.description["statistics"] = statistics.description()

    def train(self) -> dict[str, Any] | None:
        """Train as Detectron2 does; SIGTERM and SIGINT stop it with a checkpoint.

        Raises:
            TrainingInterrupted: after a signal; it ends the program with status 128 + signal.
        """
        try:
            return super().train()
        finally:
            self.stop_on_signal.restore_handlers()

    def run_step(self) -> None:
        """Run one step; if a loss is not finite, stop and report the images of the batch."""
        try:
            super().run_step()
        except FloatingPointError:
            self.loss_check.check(self.iter)
            raise  # a loss of another process, whose message names its images
        self.loss_check.check(self.iter)

    def state_dict(self) -> dict[str, Any]:
        """Return Detectron2's state, the optimizer's (which v0.6 leaves out) and the seed."""
        state = super(DefaultTrainer, self).state_dict()
        state["_trainer"] = self._trainer.state_dict()
        state["seed"] = self.seed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super(DefaultTrainer, self).load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning(
                "The checkpoint has no optimizer state (Detectron2 v0.6 saves none): the "
                "optimizer starts from scratch."
            )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        check_counts(cfg, model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        mapper = RelationDatasetMapper(cfg, is_train=True)
        return build_train_loader(
            cfg, NameImageInErrors(mapper), mapper.num_classes, mapper.num_predicates
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        mapper = RelationDatasetMapper(cfg, is_train=False)
        files = detection_files(cfg, is_train=False)
        if files:
            path = files[list(cfg.DATASETS.TEST).index(dataset_name)]
            dicts = get_detection_dataset_dicts(dataset_name, filter_empty=False)
            loader = build_detection_test_loader(
                dataset=attach_detections(dicts, dataset_name, path, mapper.num_classes),
                mapper=NameImageInErrors(mapper),
                num_workers=cfg.DATALOADER.NUM_WORKERS,
            )
        else:
            loader = build_detection_test_loader(
                cfg, dataset_name, mapper=NameImageInErrors(mapper)
            )
        loader.worker_init_fn = protect_loader_worker
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", _task(cfg))
        return build_relation_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict[str, Any]:
        """Evaluate as Detectron2 does and also write ``OUTPUT_DIR/results_TASK.json``.

        Errors about an image name its file.
        """
        with named_images(model):
            results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            write_results(os.path.join(cfg.OUTPUT_DIR, f"results_{_task(cfg)}.json"), results)
        return results

    @classmethod
    def evaluate_checkpoint(cls, cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
        """Build the model, load ``MODEL.WEIGHTS`` (or the last checkpoint) and evaluate it."""
        check_run(cfg, eval_only=True, build_evaluator=cls.build_evaluator)
        model = cls.build_model(cfg)
        checkpointer = build_checkpointer(cfg, model, complete=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        ensure_frequency_table(cfg, model)
        head = getattr(model, "relation_head", None)
        has_weights = any(getattr(head, part, None) is not None for part in ("spatial", "visual"))
        if getattr(checkpointer, "started_from_detector", False) and has_weights:
            logger.warning(
                f"MODEL.WEIGHTS ({cfg.MODEL.WEIGHTS}) is a detector: apart from the frequency "
                "table the relation head is untrained. To evaluate a trained RelDN, set it to "
                "RelDN's model_final.pth, or add --resume."
            )
        return cls.test(cfg, model)


def _task(cfg: CfgNode) -> str:
    """Return the task for the names of results: ``sgdet``, ...; ``bbox`` for a detector."""
    return cfg.TEST.RELATIONS.TASK if predicts_relations(cfg) else "bbox"
