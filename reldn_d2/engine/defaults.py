"""Training and evaluation with Detectron2's ``DefaultTrainer``."""

import json
import logging
import os
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint.reldn_checkpoint import DetectorCheckpointer, RelDNCheckpointer
from ..data.build import build_train_loader, detection_files
from ..data.dataset_mapper import RelationDatasetMapper
from ..data.detection_files import attach_detections
from ..data.frequency import log_frequencies
from ..data.statistics import RelationStatistics, training_statistics_of
from ..evaluation.build import build_relation_evaluator
from ..modeling.meta_arch import RelDN, predicts_relations
from ..utils.events import RelationStatisticsPrinter
from .hooks import BestKeeper, CPUAMPTrainer, FiniteLosses, SeedEachIteration
from .optimizer import build_optimizer

__all__ = [
    "RelDNTrainer",
    "build_checkpointer",
    "build_optimizer",
    "check_counts",
    "ensure_frequency_table",
]

logger = logging.getLogger(__name__)


def _unwrap(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


def _finite_or_none(results: Any) -> Any:
    """JSON knows no NaN, which stands for metrics without any case: null instead."""
    if isinstance(results, dict):
        return {key: _finite_or_none(value) for key, value in results.items()}
    return None if results != results else results


def _task(cfg: CfgNode) -> str:
    """What the config's model is evaluated for: ``sgdet``, ...; ``bbox`` for a detector."""
    return cfg.TEST.RELATIONS.TASK if predicts_relations(cfg) else "bbox"


def build_checkpointer(cfg: CfgNode, model: nn.Module, **kwargs: Any) -> DetectorCheckpointer:
    """A :class:`RelDNCheckpointer` for RelDN, a :class:`DetectorCheckpointer` for any other."""
    kwargs.setdefault("matching_only", cfg.MODEL.RELDN.LOAD.MATCHING_ONLY)
    kwargs.setdefault("allow_pickle", cfg.MODEL.RELDN.LOAD.ALLOW_PICKLE)
    if not isinstance(_unwrap(model), RelDN):
        return DetectorCheckpointer(model, cfg.OUTPUT_DIR, **kwargs)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    metadata = MetadataCatalog.get(names[0]) if names else None
    return RelDNCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        thing_classes=metadata and metadata.get("thing_classes"),
        predicate_classes=metadata and metadata.get("predicate_classes"),
        cfg=cfg,
        **kwargs,
    )


def ensure_frequency_table(cfg: CfgNode, model: nn.Module) -> RelationStatistics | None:
    """Fill the semantic module's table from ``DATASETS.TRAIN``, unless a checkpoint brought it.

    Returns:
        What was counted; None if nothing had to be.
    """
    model = _unwrap(model)
    semantic = getattr(getattr(model, "relation_head", None), "semantic", None)
    if semantic is None or bool(semantic.counted):
        return None
    statistics = training_statistics_of(cfg.DATASETS.TRAIN)
    counts = statistics.table(cfg.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER)
    semantic.set_log_frequencies(log_frequencies(counts))
    logger.info(
        f"Counted {int(counts[..., :-1].sum())} relations of {statistics.num_images} images of "
        f"{', '.join(cfg.DATASETS.TRAIN)} into the semantic module's table."
    )
    return statistics


def _wrap_for_distribution(model: nn.Module) -> nn.Module:
    """Detectron2's ``create_ddp_model``, which does not know models on the CPU."""
    if next(model.parameters()).device.type != "cpu":
        return create_ddp_model(model, broadcast_buffers=False)
    if comm.get_world_size() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False)


def _training_step(cfg: CfgNode) -> type:
    """The class of Detectron2 that takes one step; with mixed precision where the config says."""
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer
    return CPUAMPTrainer if torch.device(cfg.MODEL.DEVICE).type == "cpu" else AMPTrainer


_NUM_CLASSES_KEYS = {  # of detectors; others are not checked
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}


def check_counts(cfg: CfgNode, model: nn.Module) -> None:
    """Compare a model's numbers of classes and predicates with those of the config's data sets.

    Raises:
        ValueError: they differ; with both numbers and the key.
    """
    pairs = []
    if isinstance(model, RelDN):
        detector, number = model.detector, cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES
        pairs.append(("thing_classes", detector.num_classes_key, detector.num_classes))
        pairs.append(("predicate_classes", "MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", number))
    elif cfg.MODEL.META_ARCHITECTURE in _NUM_CLASSES_KEYS:
        key = _NUM_CLASSES_KEYS[cfg.MODEL.META_ARCHITECTURE]
        pairs.append(("thing_classes", key, cfg.MODEL[key.split(".")[1]].NUM_CLASSES))
    for dataset in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        for field, key, number in pairs:
            names = MetadataCatalog.get(dataset).get(field, None)
            if names is not None and len(names) != number:
                raise ValueError(
                    f"{key} is {number}, but the data set '{dataset}' has {len(names)} {field}. "
                    f"Set {key} to {len(names)} or name another data set in DATASETS."
                )


class RelDNTrainer(DefaultTrainer):
    """``DefaultTrainer`` for RelDN and, with any other meta-architecture, for its detector."""

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: with :func:`.config.add_reldn_config`'s keys. With
                ``SOLVER.REFERENCE_WORLD_SIZE`` batch, rate and schedule are rescaled to the number
                of processes, as Detectron2 does.
        """
        TrainerBase.__init__(self)  # DefaultTrainer's own builds its checkpointer and DDP itself
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        if not logging.getLogger("reldn_d2").hasHandlers():  # a script without train_net.py
            setup_logger(distributed_rank=comm.get_rank(), name="reldn_d2")
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = _wrap_for_distribution(model)
        self.losses = FiniteLosses(model)
        self._trainer = _training_step(cfg)(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = build_checkpointer(cfg, model, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        # The order of the data and all random choices follow from it; it is in the checkpoint.
        self.seed: int = getattr(data_loader, "seed", max(cfg.SEED, 0))
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[Any]:
        """Detectron2's hooks; random choices that a resumed run repeats; the best checkpoint."""
        hooks = [SeedEachIteration(lambda: self.seed), *super().build_hooks()]
        best = self.cfg.SOLVER.BEST_CHECKPOINT
        if best.METRIC and comm.is_main_process():
            if self.cfg.TEST.EVAL_PERIOD <= 0:
                raise ValueError("SOLVER.BEST_CHECKPOINT.METRIC needs a TEST.EVAL_PERIOD above 0.")
            keeper = BestKeeper(
                self.cfg.TEST.EVAL_PERIOD, self.checkpointer, best.METRIC, best.MODE
            )
            hooks.insert(-1, keeper)  # after the evaluation, before the writers
        return hooks

    def build_writers(self) -> list[Any]:
        """Detectron2's writers, and one for the statistics of the relation head."""
        return [*super().build_writers(), RelationStatisticsPrinter()]

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; a run that starts anew also counts the frequency table.

        A resumed run goes on with the batches and the random choices that would have come next.
        """
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.matching_only = False  # what a run has saved fits as a whole
        super().resume_or_load(resume=resume)
        if hasattr(self.data_loader, "seek"):
            self.data_loader.seek(self.start_iter, self.seed)
        elif self.start_iter:
            logger.warning("This data loader cannot be resumed: the order of images starts anew.")
        statistics = ensure_frequency_table(self.cfg, self.model)
        if statistics is not None:
            self.checkpointer.description["statistics"] = statistics.description()

    def run_step(self) -> None:
        """One step; a loss that is not finite stops the training with the images of the batch."""
        try:
            super().run_step()
        except FloatingPointError:
            self.losses.check(self.iter)
            raise  # the loss of another process, whose message names its images
        self.losses.check(self.iter)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        check_counts(cfg, model)
        return model

    def state_dict(self) -> dict[str, Any]:
        """As Detectron2's, with the optimiser's state, which v0.6 leaves out, and the seed."""
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
            logger.warning("The checkpoint has no optimiser state (Detectron2 v0.6): it is lost.")

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        mapper = RelationDatasetMapper(cfg, is_train=True)
        return build_train_loader(cfg, mapper, mapper.num_classes, mapper.num_predicates)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        mapper = RelationDatasetMapper(cfg, is_train=False)
        files = detection_files(cfg, is_train=False)
        if not files:
            return build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        path = files[list(cfg.DATASETS.TEST).index(dataset_name)]
        dicts = get_detection_dataset_dicts(dataset_name, filter_empty=False)
        return build_detection_test_loader(
            dataset=attach_detections(dicts, dataset_name, path, mapper.num_classes),
            mapper=mapper,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
        return build_relation_evaluator(
            cfg,
            dataset_name,
            output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", _task(cfg)),
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict[str, Any]:
        """As Detectron2's; also writes ``OUTPUT_DIR/results_TASK.json``."""
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            with open(os.path.join(cfg.OUTPUT_DIR, f"results_{_task(cfg)}.json"), "w") as file:
                json.dump(_finite_or_none(results), file, indent=2)
        return results

    @classmethod
    def evaluate_checkpoint(cls, cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
        """Build the model, load ``MODEL.WEIGHTS`` (or the last checkpoint) and evaluate it."""
        model = cls.build_model(cfg)
        checkpointer = build_checkpointer(cfg, model, complete=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        ensure_frequency_table(cfg, model)
        head = getattr(model, "relation_head", None)
        untrained = [x for x in (getattr(head, "spatial", 0), getattr(head, "visual", 0)) if x]
        if getattr(checkpointer, "started_from_detector", False) and untrained:
            logger.warning(
                f"MODEL.WEIGHTS ({cfg.MODEL.WEIGHTS}) is a detector: apart from the frequency "
                "table the relation head is untrained. To evaluate a trained RelDN, name its "
                "model_final.pth, or add --resume."
            )
        return cls.test(cfg, model)
