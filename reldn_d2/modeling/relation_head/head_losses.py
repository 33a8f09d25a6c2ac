"""Losses of the relation head on the sampled pairs of a batch.

Shapes: N images, R entities of the batch, P sampled pairs of the batch, C predicates; the last of
C + 1 logits is "no relationship".
"""

import logging
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from detectron2.utils.registry import Registry

from ...utils.registry import build_registered
from ..losses import AnchorSides, class_balanced_weights, contrastive_losses, predicate_loss
from ..losses.contrastive import LOSS_NAMES, NORMALIZATIONS, ContrastiveGroups
from .pair_sampling import SampledPairs
from .pairs import EntityBatch
from .training_metrics import contrastive_metrics

__all__ = [
    *("ContrastiveLosses", "L0_MEANS", "PredicateLoss", "RELATION_LOSS_REGISTRY"),
    *("RelationLoss", "build_relation_losses", "check_scalar", "merge_losses"),
]

logger = logging.getLogger(__name__)

RELATION_LOSS_REGISTRY = Registry("RELATION_LOSS")
RELATION_LOSS_REGISTRY.__doc__ = """
Registry for losses of the relation head, subclasses of :class:`RelationLoss`.

The registered object is called with ``obj(cfg)``.
"""

# What L0 is a mean over: "images" (of the mean over each image's pairs) or "pairs" (of all images)
L0_MEANS = ("images", "pairs")


class RelationLoss(nn.Module, ABC):
    """One or several losses on the sampled pairs of a batch.

    Attributes:
        needs_anchor_pairs: whether the loss reads ``for_subjects`` or ``for_objects`` of the pairs.
            Unless some loss does, no pairs are sampled for them.
    """

    needs_anchor_pairs: bool = False

    @abstractmethod
    def forward(
        self, logits: Tensor, targets: Tensor, pairs: SampledPairs, entities: EntityBatch
    ) -> dict[str, Tensor]:
        """Compute the losses; called once per training step.

        Args:
            logits: (P, C + 1), P may be 0.
            targets: (P,) int64 in ``[0, C]``, one class per pair: one of its predicates, drawn at
                random, or C for "no relationship". ``pairs.labels`` has all predicates of a pair.
            pairs: the sampled pairs; ``subjects`` and ``objects`` are indices into the entities.
            entities: the R entities.

        Returns:
            Scalars by the name under which they are logged, weighted; the sum of all is minimized.
        """

    def metrics(
        self, logits: Tensor, targets: Tensor, pairs: SampledPairs, entities: EntityBatch
    ) -> dict[str, Tensor]:
        """Compute scalars that are logged every few iterations under ``reldn/``; by default none.

        Arguments as in :meth:`forward`.
        """
        return {}

    def set_predicate_counts(self, predicate_counts: Tensor) -> None:
        """Take the (C,) relations of each predicate in the training set; by default ignored.

        Called before a training starts or is resumed.
        """


@RELATION_LOSS_REGISTRY.register()
class PredicateLoss(RelationLoss):
    """L0, the cross entropy of the predicates on the pairs that are drawn for it."""

    @configurable
    def __init__(self, *, mean: str = "images", balanced_beta: float = 0.0):
        """
        Args:
            mean: one of :data:`L0_MEANS`.
            balanced_beta: of :func:`..losses.class_balanced_weights`; 0 weights no pair.

        Raises:
            ValueError: if an option has an invalid value.
        """
        super().__init__()
        _check_choice("L0_MEAN", mean, L0_MEANS)
        if not 0 <= balanced_beta < 1:
            raise ValueError(
                f"MODEL.ROI_RELATION_HEAD.LOSS.CLASS_BALANCED_BETA is {balanced_beta}; expected 0 "
                "(off) to below 1, such as 0.9."
            )
        self.mean = mean
        self.balanced_beta = balanced_beta
        # Empty until the predicates are counted.
        self.register_buffer("target_weights", torch.zeros(0), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        loss = cfg.MODEL.ROI_RELATION_HEAD.LOSS
        return {"mean": loss.L0_MEAN, "balanced_beta": loss.CLASS_BALANCED_BETA}

    def set_predicate_counts(self, predicate_counts: Tensor) -> None:
        weights = class_balanced_weights(predicate_counts, self.balanced_beta)
        if self.balanced_beta and len(predicate_counts):
            heaviest = weights[:-1].topk(min(3, len(predicate_counts)))
            logger.info(
                f"Class-balanced L0: predicates weigh {weights[:-1].min():.2g} to "
                f"{weights[:-1].max():.2g}, most those with ids {heaviest.indices.tolist()}; "
                "'no relationship' weighs 1."
            )
        self.target_weights = weights.to(self.target_weights.device)

    def forward(
        self, logits: Tensor, targets: Tensor, pairs: SampledPairs, entities: EntityBatch
    ) -> dict[str, Tensor]:
        if self.mean == "pairs":
            weights = _pair_weights(pairs.for_predicate)
        else:
            image = entities.image[pairs.subjects]
            weights = _mean_weights(pairs.for_predicate, image, len(entities.sizes))
        if self.balanced_beta:
            weights = weights * self._weights_of(targets)
        return {"loss_predicate": predicate_loss(logits, targets, weights)}

    def _weights_of(self, targets: Tensor) -> Tensor:
        if len(self.target_weights) == 0:
            raise ValueError(
                "MODEL.ROI_RELATION_HEAD.LOSS.CLASS_BALANCED_BETA needs the relations of each "
                "predicate in the training set. RelDNTrainer counts them; a training loop of your "
                "own must call relation_head.set_predicate_counts."
            )
        return self.target_weights[targets]


@RELATION_LOSS_REGISTRY.register()
class ContrastiveLosses(RelationLoss):
    """The graphical contrastive losses L1, L2 and L3, with subjects and with objects as anchors."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        lambdas: tuple[float, float, float] = (1.0, 0.5, 0.1),
        alphas: tuple[float, float, float] = (0.2, 0.2, 0.2),
        normalization: str = "paper",
    ):
        """
        Args:
            num_classes: number of entity classes.
            lambdas: weights of L1 to L3; 0 switches one off.
            alphas: margins of L1 to L3.
            normalization: see :func:`..losses.contrastive.group_weights`.

        Raises:
            ValueError: if the normalization is unknown.
        """
        super().__init__()
        _check_choice("NORMALIZATION", normalization, NORMALIZATIONS)
        self.num_classes = num_classes
        self.lambdas = tuple(lambdas)
        self.alphas = tuple(alphas)
        self.register_buffer("_alphas", torch.tensor(self.alphas), persistent=False)
        self.normalization = normalization

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        loss = cfg.MODEL.ROI_RELATION_HEAD.LOSS
        return {
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "lambdas": (loss.LAMBDA_1, loss.LAMBDA_2, loss.LAMBDA_3),
            "alphas": (loss.ALPHA_1, loss.ALPHA_2, loss.ALPHA_3),
            "normalization": loss.NORMALIZATION,
        }

    @property
    def needs_anchor_pairs(self) -> bool:
        """Whether any of the three losses is on."""
        return any(self.lambdas)

    def forward(
        self, logits: Tensor, targets: Tensor, pairs: SampledPairs, entities: EntityBatch
    ) -> dict[str, Tensor]:
        if not any(self.lambdas):
            return {}
        values, _ = self._losses_and_groups(logits, pairs, entities)
        named = zip(LOSS_NAMES, values, self.lambdas)
        return {f"loss_{name}": weight * loss for name, loss, weight in named if weight}

    def metrics(
        self, logits: Tensor, targets: Tensor, pairs: SampledPairs, entities: EntityBatch
    ) -> dict[str, Tensor]:
        if not any(self.lambdas):
            return {}
        _, groups = self._losses_and_groups(logits, pairs, entities)
        return {} if groups is None else contrastive_metrics(logits, groups, self.alphas)

    def _losses_and_groups(
        self, logits: Tensor, pairs: SampledPairs, entities: EntityBatch
    ) -> tuple[tuple[Tensor, Tensor, Tensor], ContrastiveGroups | None]:
        ends = torch.stack([pairs.subjects, pairs.objects])
        sides = AnchorSides(
            sampled=torch.stack([pairs.for_subjects, pairs.for_objects]),
            anchor=ends,
            other_class=entities.classes[ends.flip(0)],
        )
        return contrastive_losses(
            logits,
            pairs.labels,
            sides,
            entities.image,
            num_images=len(entities.sizes),
            num_classes=self.num_classes,
            alphas=self._alphas,
            normalization=self.normalization,
        )


def build_relation_losses(cfg: CfgNode) -> dict[str, RelationLoss]:
    """Build the losses in ``MODEL.ROI_RELATION_HEAD.LOSS.NAMES``, by name.

    Raises:
        ValueError: if the list is empty or names a loss twice.
    """
    key = "MODEL.ROI_RELATION_HEAD.LOSS.NAMES"
    names = list(cfg.MODEL.ROI_RELATION_HEAD.LOSS.NAMES)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{key} is {names}; expected one or more losses, each once.")
    registry = RELATION_LOSS_REGISTRY
    return {name: build_registered(registry, name, key, RelationLoss, cfg) for name in names}


def merge_losses(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge losses by name.

    Args:
        parts: by the name of what returned them.

    Raises:
        TypeError: if something else than a dict of tensors was returned.
        ValueError: if a loss is not a scalar, or two of them have the same name.
    """
    merged: dict[str, Tensor] = {}
    source_of: dict[str, str] = {}
    for source, losses in parts.items():
        if not isinstance(losses, dict):
            raise TypeError(
                f"{source} returned a {type(losses).__name__}: return a dict of losses by name."
            )
        for name, value in losses.items():
            check_scalar(f"{source}: loss '{name}'", value)
            if name in merged:
                raise ValueError(
                    f"Both {source_of[name]} and {source} return a loss '{name}': rename one."
                )
            merged[name], source_of[name] = value, source
    return merged


def check_scalar(what: str, value: Tensor) -> None:
    """Raise an error that begins with ``what`` if a loss or metric is not a scalar tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}: return a tensor of shape ().")
    if value.shape != ():
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}: return a scalar, such as its mean."
        )


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError that names the config key of an invalid value."""
    if value not in known:
        raise ValueError(
            f"MODEL.ROI_RELATION_HEAD.LOSS.{key} is '{value}'; known: {', '.join(known)}"
        )


def _mean_weights(chosen: Tensor, image: Tensor, num_images: int) -> Tensor:
    """Compute weights that average over the chosen pairs of each image, then over the images.

    Args:
        chosen: (P,) bool.
        image: (P,) int64 in ``[0, num_images)``, the image of each pair.
        num_images: N, images with or without pairs.

    Returns:
        (P,) float; 0 where a pair is not chosen.
    """
    chosen = chosen.float()
    num_chosen = chosen.new_zeros(num_images).index_add(0, image, chosen)
    return chosen / num_chosen.clamp(min=1.0)[image] / num_images


def _pair_weights(chosen: Tensor) -> Tensor:
    """Compute weights that average over the chosen pairs of all images.

    Processes have different numbers of pairs, and their gradients are averaged. Therefore the mean
    is over the pairs of all processes.

    Args:
        chosen: (P,) bool.

    Returns:
        (P,) float; 0 where a pair is not chosen.
    """
    chosen = chosen.float()
    total, num_processes = chosen.sum(), comm.get_world_size()
    if num_processes > 1:
        torch.distributed.all_reduce(total)
    return chosen * num_processes / total.clamp(min=1.0)
