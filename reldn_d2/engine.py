"""Training and evaluation with Detectron2's ``DefaultTrainer``."""

import json
import logging
import os
from typing import Any, Dict, List, Optional

import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm

from .checkpoint import RelDNCheckpointer
from .data.annotations import check_annotations
from .data.dataset_mapper import RelationDatasetMapper
from .data.frequency import log_frequencies
from .data.statistics import RelationStatistics, training_statistics_of
from .evaluation.build import build_relation_evaluator
from .events import RelationStatisticsPrinter
from .modeling.meta_arch import RelDN, predicts_relations

__all__ = ["RelDNTrainer", "build_checkpointer", "build_optimizer", "ensure_frequency_table"]

logger = logging.getLogger(__name__)

_OPTIMIZERS = ("SGD", "AdamW")


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


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Detectron2's optimiser, with RelDN's parameter groups.

    The predicate backbone and the relation box heads learn at ``SOLVER.BACKBONE_MULTIPLIER`` times
    the base rate; biases and norms follow Detectron2's keys. Frozen parameters have no part in it.

    Raises:
        ValueError: ``SOLVER.OPTIMIZER`` is unknown.
    """
    solver = cfg.SOLVER
    common = dict(
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    slow: List[nn.Module] = []
    if isinstance(model, RelDN):
        slow = [x for x in (model.predicate_backbone, *model.relation_head.box_heads) if x]
    slow_parameters = {id(p) for module in slow for p in module.parameters()}
    groups = get_default_optimizer_params(
        nn.ModuleList(slow), base_lr=solver.BASE_LR * solver.BACKBONE_MULTIPLIER, **common
    )
    for group in get_default_optimizer_params(model, base_lr=solver.BASE_LR, **common):
        group["params"] = [p for p in group["params"] if id(p) not in slow_parameters]
        groups.append(group)
    groups = [group for group in groups if group["params"]]
    if solver.OPTIMIZER == "SGD":
        kind, extra = torch.optim.SGD, dict(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    elif solver.OPTIMIZER == "AdamW":
        kind, extra = torch.optim.AdamW, {}
    else:
        raise ValueError(
            f"SOLVER.OPTIMIZER is '{solver.OPTIMIZER}'; known: {', '.join(_OPTIMIZERS)}"
        )
    kind = maybe_add_gradient_clipping(cfg, kind)
    return kind(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **extra)


def build_checkpointer(cfg: CfgNode, model: nn.Module, **kwargs: Any) -> DetectionCheckpointer:
    """A :class:`RelDNCheckpointer` for RelDN, Detectron2's own for any other model."""
    if not isinstance(_unwrap(model), RelDN):
        return DetectionCheckpointer(model, cfg.OUTPUT_DIR, **kwargs)
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


def ensure_frequency_table(cfg: CfgNode, model: nn.Module) -> Optional[RelationStatistics]:
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


def check_counts(cfg: CfgNode) -> None:
    """Compare the numbers of classes and predicates of the config with those of its data sets.

    Raises:
        ValueError: they differ; with both numbers and the key.
    """
    pairs = [("thing_classes", "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
    if predicts_relations(cfg):
        number = cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES
        pairs.append(("predicate_classes", "MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", number))
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

    def build_writers(self) -> List[Any]:
        """Detectron2's writers, and one for the statistics of the relation head."""
        return [*super().build_writers(), RelationStatisticsPrinter()]

    def build_hooks(self):
        """Detectron2's hooks, saving and loading through :func:`build_checkpointer`."""
        state = self.checkpointer.checkpointables
        self.checkpointer = build_checkpointer(self.cfg, self.model, **state)
        return super().build_hooks()

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; a run that starts anew also counts the frequency table."""
        super().resume_or_load(resume=resume)
        statistics = ensure_frequency_table(self.cfg, self.model)
        if statistics is not None:
            self.checkpointer.description["statistics"] = statistics.description()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        check_counts(cfg)
        return super().build_model(cfg)

    def state_dict(self) -> Dict[str, Any]:
        """As Detectron2's, with the optimiser's state, which v0.6 leaves out."""
        state = super(DefaultTrainer, self).state_dict()
        state["_trainer"] = self._trainer.state_dict()
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super(DefaultTrainer, self).load_state_dict(state_dict)
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
        for name in cfg.DATASETS.TRAIN:  # before Detectron2 filters them by their annotations
            for record in DatasetCatalog.get(name):
                check_annotations(record, mapper.num_classes, mapper.num_predicates)
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_detection_test_loader(
            cfg, dataset_name, mapper=RelationDatasetMapper(cfg, is_train=False)
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None):
        return build_relation_evaluator(
            cfg,
            dataset_name,
            output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", _task(cfg)),
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> Dict[str, Any]:
        """As Detectron2's; also writes ``OUTPUT_DIR/results_TASK.json``."""
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            with open(os.path.join(cfg.OUTPUT_DIR, f"results_{_task(cfg)}.json"), "w") as file:
                json.dump(_finite_or_none(results), file, indent=2)
        return results

    @classmethod
    def evaluate_checkpoint(cls, cfg: CfgNode, resume: bool = False) -> Dict[str, Any]:
        """Build the model, load ``MODEL.WEIGHTS`` (or the last checkpoint) and evaluate it."""
        model = cls.build_model(cfg)
        checkpointer = build_checkpointer(cfg, model)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        ensure_frequency_table(cfg, model)
        if getattr(checkpointer, "started_from_detector", False):
            logger.warning(
                f"MODEL.WEIGHTS ({cfg.MODEL.WEIGHTS}) is a detector: apart from the frequency "
                "table the relation head is untrained. To evaluate a trained RelDN, name its "
                "model_final.pth, or add --resume."
            )
        return cls.test(cfg, model)
