"""RelDN's counterpart of Detectron2's ``DefaultTrainer``."""

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint.reldn_checkpoint import build_checkpointer
from ..data.build import build_train_loader, load_test_dicts
from ..data.dataset_mapper import RelationDatasetMapper
from ..evaluation.build import build_relation_evaluator
from ..modeling.meta_arch import needs_images, predicts_relations
from ..utils.events import FailSafeWriter, RelationStatisticsPrinter, report_log_errors_once
from ..utils.file_io import write_results
from ..utils.processes import loader_worker_init
from ..utils.registry import explain_missing_keys, explain_unregistered
from .hooks import FiniteLossCheck, ResumableBestCheckpointer, SeedEachIteration
from .image_errors import NameImageInErrors, named_images
from .interruption import StopOnSignal
from .model_setup import check_counts, ensure_frequency_table
from .optimizer import build_optimizer
from .renumbered_model import dataset_renumbering, in_order_of
from .resume import (
    changed_keys,
    log_changed_keys,
    optimizer_state,
    separate_from_earlier_run,
    use_rates_of,
    with_saved_solver,
)
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
        have seen. If ``SOLVER`` has other values than the checkpoint's config, these take effect.

        Raises:
            NameMismatchError: if a dataset has other classes or predicates than the checkpoint;
                another order is mapped.
        """
        resumed = resume and self.checkpointer.has_checkpoint()
        if resumed:
            self.checkpointer.matching_only = False  # the run's own checkpoint fits completely
        elif resume:
            logger.warning(
                f"No last_checkpoint in {self.cfg.OUTPUT_DIR}: --resume starts a new run from "
                "MODEL.WEIGHTS."
            )
        super().resume_or_load(resume=resume)
        self._map_names()
        if not resumed and comm.is_main_process():
            separate_from_earlier_run(self.cfg.OUTPUT_DIR)
        if hasattr(self.data_loader, "seek"):
            self.data_loader.seek(self.start_iter, self.seed)
        elif self.start_iter:
            logger.warning("This data loader cannot be resumed: it restarts its shuffling.")
        training = "resumed" if resumed else "new"
        statistics = ensure_frequency_table(self.cfg, self.model, training)
        if statistics is not None:
            self.checkpointer.description["statistics"] = statistics.description()

    def _map_names(self) -> None:
        """Map the ids of the training data to the model's; check the names of the test sets."""
        for name in self.cfg.DATASETS.TEST:
            dataset_renumbering(self.model, name)
        datasets = self.cfg.DATASETS.TRAIN
        renumbering = dataset_renumbering(self.model, *datasets)  # the loader has given them one
        if renumbering and not hasattr(self.data_loader, "renumbering"):
            raise ValueError(
                f"The names of the checkpoint are listed in another order in {', '.join(datasets)} "
                "(DATASETS.TRAIN), and this data loader cannot map them. List them in the same "
                "order."
            )
        if renumbering:
            self.data_loader.renumbering = renumbering

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
        changes = changed_keys(self.checkpointer.loaded.get("config", ""), self.cfg)
        log_changed_keys(changes, self.seed)
        if "_trainer" in state_dict:
            saved, current = state_dict["_trainer"], self._trainer.state_dict()
            optimizer = self._optimizer_state(saved["optimizer"], changes)
            # The current state is for what the checkpoint lacks, such as AMP's scaler.
            self._trainer.load_state_dict({**current, **saved, "optimizer": optimizer})
        else:
            logger.warning(
                "The checkpoint has no optimizer state (Detectron2 v0.6 saves none): the "
                "optimizer starts from scratch."
            )
        use_rates_of(self._trainer.optimizer, self.scheduler)

    def _optimizer_state(self, saved: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state with the momentum of a checkpoint."""

        def build_saved() -> torch.optim.Optimizer:
            model = getattr(self.model, "module", self.model)
            return self.build_optimizer(with_saved_solver(self.cfg, changes), model)

        other_solver = any(key.startswith("SOLVER.") for key in changes)
        return optimizer_state(
            saved, self._trainer.optimizer, build_saved if other_solver else None
        )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        with explain_unregistered(), explain_missing_keys(cfg, "The model"):
            model = super().build_model(cfg)
        check_counts(cfg, model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        with_images = needs_images(cfg)
        mapper = RelationDatasetMapper(cfg, is_train=True, with_images=with_images)
        counts = mapper.num_classes, mapper.num_predicates
        return build_train_loader(
            cfg,
            NameImageInErrors(mapper),
            *counts,
            with_relations=predicts_relations(cfg),
            with_images=with_images,
            keep_mapped=mapper.keeps_results,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        with_images = needs_images(cfg)
        mapper = RelationDatasetMapper(cfg, is_train=False, with_images=with_images)
        counts = mapper.num_classes, mapper.num_predicates
        loader = build_detection_test_loader(
            dataset=load_test_dicts(cfg, dataset_name, *counts, with_images=with_images),
            mapper=NameImageInErrors(mapper),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        loader.worker_init_fn = loader_worker_init()
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", _task(cfg))
        return build_relation_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict[str, Any]:
        """Evaluate as Detectron2 does and also write ``OUTPUT_DIR/results_TASK.json``.

        A dataset may list the model's classes and predicates in another order: its evaluator gets
        the ids of the dataset.

        Errors about an image name its file.

        Raises:
            NameMismatchError: if a dataset has other names than the model.
        """
        results: dict[str, Any] = OrderedDict()
        evaluators = [evaluators] if isinstance(evaluators, DatasetEvaluator) else evaluators
        models = [in_order_of(name, model) for name in cfg.DATASETS.TEST]  # checks all names first
        for index, name in enumerate(cfg.DATASETS.TEST):
            loader = cls.build_test_loader(cfg, name)
            evaluator = evaluators[index] if evaluators else cls.build_evaluator(cfg, name)
            with named_images(models[index]):
                results[name] = inference_on_dataset(models[index], loader, evaluator)
            if comm.is_main_process():
                logger.info(f"Results for {name} in csv format:")
                print_csv_format(results[name])
        if len(results) == 1:
            (results,) = results.values()
        if results and comm.is_main_process():
            write_results(os.path.join(cfg.OUTPUT_DIR, f"results_{_task(cfg)}.json"), results)
        return results

    @classmethod
    def evaluate_checkpoint(cls, cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
        """Build the model, load ``MODEL.WEIGHTS`` (or the last checkpoint) and evaluate it."""
        check_run(cfg, eval_only=True, resume=resume, build_evaluator=cls.build_evaluator)
        model = cls.build_model(cfg)
        checkpointer = build_checkpointer(cfg, model, complete=True)
        is_resumed = resume and checkpointer.has_checkpoint()
        path = checkpointer.get_checkpoint_file() if is_resumed else cfg.MODEL.WEIGHTS
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        ensure_frequency_table(cfg, model)
        head = getattr(model, "relation_head", None)
        if head is not None:
            head.check_counts(f"the checkpoint {path}")
        names = [] if head is None else head.state_dict()
        has_weights = any(not name.startswith(("semantic.", "prior.")) for name in names)
        untrained = None
        if getattr(checkpointer, "started_from_detector", False):
            untrained = f"MODEL.WEIGHTS ({cfg.MODEL.WEIGHTS}) is a detector"
        elif not (needs_images(cfg) or cfg.MODEL.WEIGHTS or checkpointer.loaded):
            untrained = "MODEL.WEIGHTS is empty"
        if untrained and has_weights:
            logger.warning(
                f"{untrained}: apart from the frequency table the relation head is untrained. To "
                "evaluate a trained RelDN, set it to RelDN's model_final.pth, or add --resume."
            )
        return cls.test(cfg, model)


def _task(cfg: CfgNode) -> str:
    """Return the task for the names of results: ``sgdet``, ...; ``bbox`` for a detector."""
    return cfg.TEST.RELATIONS.TASK if predicts_relations(cfg) else "bbox"
