"""Fitting a model to its datasets: the numbers of classes, and what is counted in training sets."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from detectron2.config import CfgNode

from ..data.datasets.catalog import dataset_names
from ..data.frequency import log_frequencies
from ..data.statistics import RelationStatistics, training_statistics_of
from ..modeling.meta_arch import RelDN
from ..modeling.relation_head.joint import JointModule

__all__ = ["check_counts", "ensure_frequency_table"]

logger = logging.getLogger(__name__)

# Detectors whose number of classes is checked, by meta-architecture.
_NUM_CLASSES_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}


def check_counts(cfg: CfgNode, model: nn.Module) -> None:
    """Compare a model's numbers of classes and predicates with those of the config's datasets.

    The number of attributes is compared too if the model predicts any; test sets may have none.

    Raises:
        ValueError: if they differ, with both counts and the config key; or if two classes or
            predicates of a dataset have the same name.
    """
    expected = []  # (metadata field, config key, count)
    if isinstance(model, RelDN):
        detector = model.detector
        expected = [
            ("thing_classes", detector.num_classes_key, detector.num_classes),
            (
                "predicate_classes",
                "MODEL.ROI_RELATION_HEAD.NUM_PREDICATES",
                cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES,
            ),
        ]
        attribute_head = cfg.MODEL.ROI_ATTRIBUTE_HEAD
        if attribute_head.ENABLED:
            key = "MODEL.ROI_ATTRIBUTE_HEAD.NUM_ATTRIBUTES"
            expected.append(("attribute_classes", key, attribute_head.NUM_ATTRIBUTES))
    elif cfg.MODEL.META_ARCHITECTURE in _NUM_CLASSES_KEYS:
        key = _NUM_CLASSES_KEYS[cfg.MODEL.META_ARCHITECTURE]
        expected = [("thing_classes", key, cfg.MODEL[key.split(".")[1]].NUM_CLASSES)]
    counted = cfg.MODEL.ROI_RELATION_HEAD.SEMANTIC.COUNT_DATASETS if expected[1:] else ()
    for dataset in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, *counted)):
        for field, key, count in expected:
            names = dataset_names(dataset).get(field)
            if field == "attribute_classes" and not names:
                continue
            if names is not None and len(names) != count:
                raise ValueError(
                    f"{key} is {count}, but the dataset '{dataset}' has {len(names)} {field}. "
                    f"Set {key} to {len(names)} or use another dataset (DATASETS)."
                )


def ensure_frequency_table(
    cfg: CfgNode, model: nn.Module, training: str = ""
) -> RelationStatistics | None:
    """Fill the semantic module's table from the annotations unless a checkpoint had it.

    It is counted on ``DATASETS.TRAIN``, or on ``SEMANTIC.COUNT_DATASETS`` if that is set. For a
    training, the head also gets the relations of each predicate in ``DATASETS.TRAIN``, for class
    balanced weights and, from the checkpoint, for logit adjustment; the joint module gets those of
    each class, to shrink embeddings at test time.

    Args:
        cfg: names these datasets and says whether pairs must overlap.
        model: possibly wrapped for distributed training.
        training: "new" counts predicates also if the initial checkpoint has counts, because those
            are of another training. "resumed" keeps the counts of the checkpoint if it has any.
            Empty is for evaluations, which must not need a training set unless there is no table.

    Returns:
        the statistics of the training sets, in the model's order of names; None if nothing had to
        be counted.
    """
    model = getattr(model, "module", model)
    head = getattr(model, "relation_head", None)
    semantic = getattr(head, "semantic", None)
    needs_table = semantic is not None and not bool(semantic.counted)
    prior = getattr(head, "prior", None)
    needs_counts = prior is not None and (
        training == "new" or not prior.known and (training == "resumed" or needs_table)
    )
    joint = getattr(head, "joint", None)
    joint = joint if isinstance(joint, JointModule) else None
    needs_class_counts = joint is not None and (
        training == "new" or training == "resumed" and not joint.counts_known
    )
    if training and prior is not None and not needs_counts:
        head.set_predicate_counts(prior.predicate_counts)  # those of the checkpoint
    if not (needs_table or needs_counts or needs_class_counts):
        return None
    statistics = training_statistics_of(cfg.DATASETS.TRAIN)
    owner = f"dataset '{cfg.DATASETS.TRAIN[0]}'"
    of_model = statistics.in_order_of(getattr(model, "names", {}), owner, "the model")
    if needs_counts:
        head.set_predicate_counts(torch.from_numpy(of_model.predicate_counts))
    if needs_class_counts:
        joint.set_counts(*map(torch.from_numpy, of_model.class_counts))
    if needs_table:
        _fill_table(cfg, model, statistics)
    return of_model


def _fill_table(cfg: CfgNode, model: nn.Module, training: RelationStatistics) -> None:
    """Fill the semantic module's table; ``training`` has the statistics of ``DATASETS.TRAIN``."""
    semantic = model.relation_head.semantic
    names = tuple(cfg.MODEL.ROI_RELATION_HEAD.SEMANTIC.COUNT_DATASETS) or cfg.DATASETS.TRAIN
    counted = training if names == cfg.DATASETS.TRAIN else _statistics_of(names, training, cfg)
    owner = f"dataset '{names[0]}'"
    counted = counted.in_order_of(getattr(model, "names", {}), owner, "the model")
    counts = counted.table(cfg.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER)
    semantic.set_log_frequencies(log_frequencies(counts))
    logger.info(
        f"Counted {int(counts[..., :-1].sum())} relations of {counted.num_images} images of "
        f"{', '.join(names)} for the semantic module's frequency table."
    )


def _statistics_of(
    names: Sequence[str], training: RelationStatistics, cfg: CfgNode
) -> RelationStatistics:
    """Return the statistics of ``SEMANTIC.COUNT_DATASETS`` in the training set's order of names.

    Raises:
        NameMismatchError: if classes or predicates differ by more than their order.
    """
    owner = f"MODEL.ROI_RELATION_HEAD.SEMANTIC.COUNT_DATASETS is {', '.join(names)}, which"
    trained_on = f"{', '.join(cfg.DATASETS.TRAIN)} (DATASETS.TRAIN)"
    return training_statistics_of(names).in_order_of(training, owner, trained_on)
