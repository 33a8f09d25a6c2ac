"""Bi-level data sampling by predicate: show images with rare predicates more often.

Images are repeated as in Detectron2's ``RepeatFactorTrainingSampler``, by the predicates of their
relations instead of the classes of their entities. In the repeated images the relations of frequent
predicates can be dropped at random, so that these are not repeated along with the rare ones (Li et
al., "Bipartite Graph Network with Adaptive Message Passing for Unbiased Scene Graph Generation",
CVPR 2021).

Shapes: N images, P predicates.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detectron2.config import CfgNode

__all__ = [
    "DROP_KEY",
    "PREDICATE_SAMPLER",
    "PredicateRepeats",
    "check_sampler",
    "log_repeats",
    "predicate_repeats",
    "with_drop_probabilities",
]

logger = logging.getLogger(__name__)

PREDICATE_SAMPLER = "RepeatFactorByPredicateSampler"
_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", PREDICATE_SAMPLER)
DROP_KEY = "drop_probabilities"  # of a dataset dict: one value per relation
_SHOWN = 5  # predicates in the log


@dataclass(frozen=True)
class PredicateRepeats:
    """How often images are repeated for the predicates of their relations.

    Attributes:
        predicates: (P,) float64 ``r(p) = max(1, sqrt(threshold / f(p)))``; f(p) is the share of
            images with the predicate. 1 for a predicate that no image has.
        images: (N,) float32, the largest r(p) of an image's relations; 1 without relations.
    """

    predicates: np.ndarray
    images: Tensor

    def drop_probabilities(self, image: int, predicates: np.ndarray, rate: float) -> np.ndarray:
        """Return the probability with which each relation of an image is dropped.

        It is ``rate * (r(image) - r(p)) / r(image)``: 0 for the predicate that the image is
        repeated for, and the larger the more often the image comes and the less its predicate
        needs it.

        Args:
            image: index of the image.
            predicates: (M,) ids of the predicates of its relations.
            rate: ``gamma_d``, in [0, 1].

        Returns:
            (M,) float64.
        """
        of_image = float(self.images[image])
        return np.maximum(rate * (of_image - self.predicates[predicates]) / of_image, 0.0)


def check_sampler(cfg: CfgNode, with_relations: bool) -> None:
    """Check the keys of ``DATALOADER`` that choose how often images are repeated.

    Args:
        cfg: config with the keys of :func:`reldn_d2.config.add_reldn_config`.
        with_relations: whether relations are trained.

    Raises:
        ValueError: with the key and the fix.
    """
    loader = cfg.DATALOADER
    name, threshold, rate = loader.SAMPLER_TRAIN, loader.REPEAT_THRESHOLD, loader.RELATION_DROP_RATE
    if name not in _SAMPLERS:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is '{name}'; expected one of {', '.join(_SAMPLERS)}. "
            "Override build_train_loader to use another one."
        )
    if name != "TrainingSampler" and threshold <= 0:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is '{name}', but DATALOADER.REPEAT_THRESHOLD is "
            f"{threshold:g}, so no image would be repeated. Set it to the share of images below "
            "which a predicate or class counts as rare, such as 0.05."
        )
    if threshold > 1:
        raise ValueError(
            f"DATALOADER.REPEAT_THRESHOLD is {threshold:g}; expected a share of the images, 0 to 1."
        )
    if name == "TrainingSampler" and threshold > 0:
        logger.warning(
            f"DATALOADER.REPEAT_THRESHOLD is {threshold:g}, but no image is repeated, because "
            f"DATALOADER.SAMPLER_TRAIN is '{name}'; '{PREDICATE_SAMPLER}' repeats those with rare "
            "predicates."
        )
    if name == PREDICATE_SAMPLER and not with_relations:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is '{name}', but MODEL.META_ARCHITECTURE "
            f"'{cfg.MODEL.META_ARCHITECTURE}' trains no relations. Use TrainingSampler, or "
            "RepeatFactorTrainingSampler for rare classes."
        )
    if not 0 <= rate <= 1:
        raise ValueError(f"DATALOADER.RELATION_DROP_RATE is {rate:g}; expected 0 to 1.")
    if rate and name != PREDICATE_SAMPLER:
        raise ValueError(
            f"DATALOADER.RELATION_DROP_RATE is {rate:g}, which drops relations of images that are "
            f"repeated for rare predicates. Set DATALOADER.SAMPLER_TRAIN to '{PREDICATE_SAMPLER}' "
            "too, or the rate to 0."
        )


def predicate_repeats(
    dataset_dicts: Sequence[dict[str, Any]], threshold: float, num_predicates: int | None = None
) -> PredicateRepeats:
    """Compute the repeat factors of predicates and images.

    Relations of crowd annotations, which are not trained on, are not counted.

    Args:
        dataset_dicts: N valid dicts.
        threshold: share of images below which a predicate is repeated; one that half as many
            images have is repeated ``sqrt(2)`` times.
        num_predicates: P; None takes the largest id.
    """
    of_image = [np.unique(_predicates(record)) for record in dataset_dicts]
    joined = np.concatenate([np.zeros(0, dtype=np.int64), *of_image])
    if num_predicates is None:
        # Relations of crowds count nowhere, but have a factor like those of any other predicate.
        every = (x[2] for record in dataset_dicts for x in record.get("relations", ()))
        num_predicates = max(every, default=-1) + 1
    frequency = np.bincount(joined, minlength=num_predicates) / max(len(dataset_dicts), 1)
    factors = np.ones(num_predicates)
    present = frequency > 0
    factors[present] = np.maximum(1.0, np.sqrt(threshold / frequency[present]))
    images = [factors[predicates].max(initial=1.0) for predicates in of_image]
    return PredicateRepeats(factors, torch.tensor(images, dtype=torch.float32))


def with_drop_probabilities(
    dataset_dicts: Sequence[dict[str, Any]], repeats: PredicateRepeats, rate: float
) -> list[dict[str, Any]]:
    """Add :data:`DROP_KEY` to the dicts of images some of whose relations may be dropped."""
    result = []
    for index, record in enumerate(dataset_dicts):
        predicates = np.array([x[2] for x in record.get("relations", ())], dtype=np.int64)
        probabilities = repeats.drop_probabilities(index, predicates, rate)
        if probabilities.any():
            record = {**record, DROP_KEY: probabilities.tolist()}
        result.append(record)
    return result


def log_repeats(
    repeats: PredicateRepeats,
    dataset_dicts: Sequence[dict[str, Any]],
    predicate_names: Sequence[str] | None,
    cfg: CfgNode,
) -> None:
    """Log which predicates are repeated most, and how long an epoch becomes."""
    loader = cfg.DATALOADER
    rare = [int(p) for p in np.argsort(-repeats.predicates, kind="stable")]
    rare = [p for p in rare if repeats.predicates[p] > 1]
    if not rare:
        logger.warning(
            f"{PREDICATE_SAMPLER} repeats nothing: no predicate is in fewer than a share of "
            f"{loader.REPEAT_THRESHOLD:g} (DATALOADER.REPEAT_THRESHOLD) of the images."
        )
        return
    names = predicate_names or range(len(repeats.predicates))
    most = ", ".join(f"'{names[p]}' {repeats.predicates[p]:.1f} x" for p in rare[:_SHOWN])
    before, after = len(dataset_dicts), float(repeats.images.double().sum())
    text = (
        f"{PREDICATE_SAMPLER}: {len(rare)} predicates are in fewer than a share of "
        f"{loader.REPEAT_THRESHOLD:g} of the images; most repeated: {most}. An epoch has "
        f"{after:.0f} images instead of {before} ({after / max(before, 1):.2f} x)"
    )
    if loader.RELATION_DROP_RATE:
        shown = dropped = 0.0
        for record, times in zip(dataset_dicts, repeats.images.tolist()):
            shown += times * len(record.get("relations", ()))
            dropped += times * sum(record.get(DROP_KEY, ()))
        text += f", and {100 * dropped / max(shown, 1):.1f} % of their relations are dropped"
    logger.info(f"{text}.")


def _predicates(record: dict[str, Any]) -> np.ndarray:
    """Return the predicates of an image's relations, without those of crowd annotations."""
    crowd = [bool(x.get("iscrowd", 0)) for x in record.get("annotations", ())]
    relations = record.get("relations", ())
    return np.array([p for s, o, p in relations if not (crowd[s] or crowd[o])], dtype=np.int64)
