"""What all relation heads share: from encoded entities and pairs to losses or ranked triplets.

Shapes: N images, R entities of the batch, P pairs of the batch, C predicates. Boxes are XYXY in
pixels of the network's input.
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import log_first_n

from ...utils.protocols import kept_predicates_per_pair
from ..losses import draw_predicate_targets
from .attribute_head import AttributeHead
from .head_losses import RelationLoss, build_relation_losses, check_scalar, merge_losses
from .logit_adjustment import PredicatePrior
from .pair_sampling import PairSampler, SampledPairs, build_pair_sampler, training_pairs
from .pairs import EntityBatch, check_logits
from .topk import best_triplets, check_options
from .training_metrics import store_metrics, training_metrics

__all__ = ["EntitiesAndRelations", "RelationHead"]


class EntitiesAndRelations(NamedTuple):
    """Predictions for one image."""

    instances: Instances  # R entities: pred_boxes, pred_classes, scores
    relations: Instances  # between them, best first; see reldn_d2.structures.relations


class RelationHead(nn.Module, ABC):
    """Predicts the relations of pairs of entities; the base class of all relation heads.

    This class matches pairs with the ground truth, samples them, computes losses and training
    metrics, and ranks triplets, in chunks of pairs. A subclass must implement

    * :meth:`pair_logits`: the logits of pairs. Called once per training step, and once per chunk
      of ``pair_chunk`` pairs at test time.

    It may override

    * :meth:`encode_entities`: what is computed once per entity. Called once per training step and
      once per image at test time, always before ``pair_logits``. By default, boxes and classes.
    * :meth:`refine_entities`: other classes, scores or fields of the entities, at test time. Called
      after ``encode_entities``, before pairs are scored. The model returns, evaluates and draws
      the refined entities.
    * :meth:`entity_losses`: losses of the entities themselves. Called once per training step.
    * :meth:`shortlist_logits` and :attr:`can_shortlist`: cheaper logits for images with very many
      given boxes.
    * :attr:`needs_predicate_features`: True if it reads the predicate backbone's feature maps; the
      model has no such backbone otherwise. Default: False.
    * :attr:`box_heads`: box heads that start from the weights of the detector's. Default: none.

    The optimizer and the checkpointer also read two attributes if they are there:
    ``predicate_box_head`` (one of the box heads, on the predicate backbone's maps, which learns
    at the backbone's rate) and ``semantic`` (a :class:`.predictors.SemanticModule`, whose table is
    counted on the training set).

    ``from_config(cfg, entity_shape, predicate_shape)`` returns the arguments of this class; a
    subclass adds its own to ``super().from_config(...)``.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        num_predicates: int,
        losses: dict[str, RelationLoss],
        sampler: PairSampler,
        attribute_head: AttributeHead | None = None,
        overlap_filter: bool = True,
        pair_iou_threshold: float = 0.5,
        topk: int = 100,
        predicates_per_pair: tuple[int | None, ...] = (1,),
        pair_chunk: int = 2048,
        max_visual_pairs: int = 40_000,
        logit_adjustment: float = 0.0,
        entity_score_exponent: float = 1.0,
        statistics_period: int = 20,
    ):
        """
        Args:
            num_classes: number of entity classes.
            num_predicates: C.
            losses: by name.
            sampler: draws the training pairs.
            attribute_head: scores the attributes of entities from their ``vectors``, in addition to
                what a subclass does with entities; None for none.
            overlap_filter: leave out pairs of detected boxes (in training: of proposals) that do
                not overlap. Pairs of given boxes, and in training pairs with a ground-truth box,
                are all used.
            pair_iou_threshold: minimum overlap of a pair with a ground-truth relation that it
                matches.
            topk, predicates_per_pair: see :class:`.topk.TopTriplets`.
            pair_chunk: max pairs scored at once at test time.
            max_visual_pairs: max pairs of an image with given boxes that are scored completely; of
                more pairs, those with the best :meth:`shortlist_logits` are kept.
            logit_adjustment: tau at test time, see :class:`.logit_adjustment.PredicatePrior`.
            entity_score_exponent: a triplet's score is the probability of its predicate times the
                scores of subject and object, each to this power.
            statistics_period: log training metrics every so many iterations.

        Raises:
            ValueError: if an option has an invalid value.
        """
        super().__init__()
        check_options(predicates_per_pair, pair_chunk, max_visual_pairs, entity_score_exponent)
        self.num_classes = num_classes
        self.num_predicates = num_predicates
        self.losses = nn.ModuleDict(losses)
        self.sampler = sampler
        self.sampler.for_anchors = any(loss.needs_anchor_pairs for loss in losses.values())
        self.attribute_head = attribute_head
        self.overlap_filter = overlap_filter
        self.pair_iou_threshold = pair_iou_threshold
        self.topk = topk
        self.predicates_per_pair = tuple(predicates_per_pair)
        self.pair_chunk = pair_chunk
        self.max_visual_pairs = max_visual_pairs
        self.prior = PredicatePrior(num_predicates, logit_adjustment)
        self.entity_score_exponent = entity_score_exponent
        self.statistics_period = statistics_period

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        entity_shape: dict[str, ShapeSpec],
        predicate_shape: dict[str, ShapeSpec],
    ) -> dict[str, Any]:
        head = cfg.MODEL.ROI_RELATION_HEAD
        return {
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "num_predicates": head.NUM_PREDICATES,
            "losses": build_relation_losses(cfg),
            "sampler": build_pair_sampler(cfg),
            "overlap_filter": head.OVERLAP_FILTER,
            "pair_iou_threshold": cfg.MODEL.RELDN.ENTITY_IOU_THRESHOLD,
            "topk": cfg.TEST.RELATIONS.TOPK,
            "predicates_per_pair": kept_predicates_per_pair(cfg),
            "pair_chunk": cfg.TEST.RELATIONS.PAIR_CHUNK,
            "max_visual_pairs": cfg.TEST.RELATIONS.MAX_VISUAL_PAIRS,
            "logit_adjustment": cfg.TEST.RELATIONS.LOGIT_ADJUSTMENT,
            "entity_score_exponent": cfg.TEST.RELATIONS.ENTITY_SCORE_EXPONENT,
        }

    def set_predicate_counts(self, predicate_counts: Tensor) -> None:
        """Give losses and logit adjustment the (C,) relations of each predicate in training."""
        self.prior.set_counts(predicate_counts)
        for loss in self.losses.values():
            loss.set_predicate_counts(self.prior.predicate_counts)

    def check_counts(self, owner: str = "this model") -> None:
        """Raise a ValueError if testing needs counts of the training set that are unknown.

        Args:
            owner: the model or its file, for the message.
        """
        self.prior.check(owner)

    @property
    def box_heads(self) -> list[nn.Module]:
        """Return the box heads that start from the weights of the detector's."""
        return []

    @property
    def needs_predicate_features(self) -> bool:
        """Whether any part of the head reads the predicate backbone's feature maps."""
        return False

    @property
    def can_shortlist(self) -> bool:
        """Whether :meth:`shortlist_logits` is there."""
        return False

    @abstractmethod
    def pair_logits(
        self,
        entities: EntityBatch,
        predicate_features: dict[str, Tensor] | None,
        subjects: Tensor,
        objects: Tensor,
    ) -> Tensor:
        """Score pairs.

        Args:
            entities: the R entities, as :meth:`encode_entities` returned them.
            predicate_features: the predicate backbone's feature maps, (N, c, h, w) each; None if
                they are not needed.
            subjects, objects: (P,) int64 indices into the entities; P may be 0.

        Returns:
            (P, C + 1); the last logit is "no relationship".
        """

    def shortlist_logits(self, entities: EntityBatch, subjects: Tensor, objects: Tensor) -> Tensor:
        """Score pairs at less cost; arguments and result as in :meth:`pair_logits`."""
        raise NotImplementedError(f"{type(self).__name__} has no cheaper logits.")

    def encode_entities(
        self,
        features: dict[str, Tensor],
        boxes: list[Boxes],
        classes: list[Tensor],
        image_sizes: list[tuple[int, int]],
        chunk: int | None = None,
    ) -> EntityBatch:
        """Encode each entity once.

        Args:
            features: the detector's feature maps, (N, c, h, w) each.
            boxes, classes: one per image.
            image_sizes: (height, width) per image.
            chunk: max boxes encoded at once, for a batch of one image; None encodes all.
        """
        return EntityBatch.stack(boxes, classes, image_sizes)

    def refine_entities(
        self, entities: EntityBatch, instances: Instances, classes_given: bool
    ) -> Instances:
        """Return the entities of one image, at test time, with what the head predicts of them.

        Args:
            entities: of the image, encoded.
            instances: R entities with ``pred_boxes``, ``pred_classes`` and ``scores``.
            classes_given: whether the classes are given (PRDCLS, PREDDET) and must stay.

        Returns:
            The same R entities in the same order; ``instances`` itself stays unchanged.
        """
        return instances

    def entity_losses(self, entities: EntityBatch, proposals: list[Instances]) -> dict[str, Tensor]:
        """Compute losses of the entities themselves, by name; by default none.

        Args:
            entities: of the batch, encoded.
            proposals: the entities of each image, see :meth:`forward`.
        """
        return {}

    def forward(
        self,
        features: dict[str, Tensor],
        predicate_features: dict[str, Tensor] | None,
        entities: list[Instances],
        targets: list[tuple[Instances, Instances]] | None = None,
        *,
        boxes_given: bool = False,
        classes_given: bool = False,
        pairs: list[Tensor] | None = None,
    ) -> dict[str, Tensor] | list[EntitiesAndRelations]:
        """Compute losses in training, and the best relations otherwise.

        Args:
            features: the detector's feature maps, (N, c, h, w) each.
            predicate_features: the predicate backbone's feature maps; None if not needed.
            entities: one per image; in training with ``proposal_boxes``, ``gt_classes`` and
                ``gt_index`` (see :func:`..detectors.label_entities`), at test time with
                ``pred_boxes``, ``pred_classes`` and ``scores``.
            targets: in training, the ground-truth ``instances`` (``gt_boxes``, ``gt_classes``) and
                ``relations`` (``gt_pairs``, ``gt_predicates``) of each image.
            boxes_given: at test time, whether the boxes are given (SGCLS, PRDCLS) and not detected;
                then the overlap filter does not apply.
            classes_given: at test time, whether the classes are given too (PRDCLS).
            pairs: at test time, the only pairs to score (PREDDET), (P, 2) int64 per image, each
                once; None takes all.

        Returns:
            In training a dict of losses, weighted by their lambdas. Otherwise the entities and
            their relations, one :class:`EntitiesAndRelations` per image.
        """
        if self.training:
            return self._losses(features, predicate_features, entities, targets)
        self.check_counts()
        return [
            self._predict(
                {name: x[i : i + 1] for name, x in features.items()},
                predicate_features and {n: x[i : i + 1] for n, x in predicate_features.items()},
                instances,
                boxes_given=boxes_given,
                classes_given=classes_given,
                pairs=None if pairs is None else pairs[i],
            )
            for i, instances in enumerate(entities)
        ]

    def _losses(
        self,
        features: dict[str, Tensor],
        predicate_features: dict[str, Tensor] | None,
        proposals: list[Instances],
        targets: list[tuple[Instances, Instances]],
    ) -> dict[str, Tensor]:
        """Sample pairs, score them and compute the losses; arguments as in :meth:`forward`."""
        boxes, classes = [x.proposal_boxes for x in proposals], [x.gt_classes for x in proposals]
        entities = self.encode_entities(features, boxes, classes, [x.image_size for x in proposals])
        samples = [
            training_pairs(
                image_proposals,
                *target,
                num_predicates=self.num_predicates,
                overlap_filter=self.overlap_filter,
                iou_threshold=self.pair_iou_threshold,
                sampler=self.sampler,
            )
            for image_proposals, target in zip(proposals, targets)
        ]
        pairs = SampledPairs.cat(samples, entities.sizes)
        logits = self.score_pairs(entities, predicate_features, pairs.subjects, pairs.objects)
        case = (logits, draw_predicate_targets(pairs.labels), pairs, entities)
        parts = {name: loss(*case) for name, loss in self.losses.items()}
        name = f"{type(self).__name__}.entity_losses"
        parts[name] = self.entity_losses(entities, proposals)
        if self.attribute_head is not None:
            parts["attribute_head"] = self.attribute_head.losses(entities.vectors, proposals)
        losses = merge_losses(parts)
        storage = get_event_storage()
        if (storage.iter + 1) % self.statistics_period == 0:  # when the trainer's writers write
            metrics = training_metrics(*case[:3])
            for name, loss in self.losses.items():
                own = loss.metrics(*case)
                for metric, value in own.items():
                    check_scalar(f"{name}: metric '{metric}'", value)
                metrics.update(own)
            store_metrics(metrics, storage, len(pairs), len(proposals))
        return losses

    def _predict(
        self,
        features: dict[str, Tensor],
        predicate_features: dict[str, Tensor] | None,
        instances: Instances,
        *,
        boxes_given: bool,
        classes_given: bool,
        pairs: Tensor | None,
    ) -> EntitiesAndRelations:
        """Rank the triplets of one image; memory is bounded by ``pair_chunk``."""
        data = [instances.pred_boxes], [instances.pred_classes], [instances.image_size]
        entities = self.encode_entities(features, *data, chunk=self.pair_chunk)
        entities, instances = self.refine(entities, instances, classes_given)

        def score_pairs(subjects: Tensor, objects: Tensor) -> Tensor:
            logits = self.score_pairs(entities, predicate_features, subjects, objects)
            return self.prior(logits)[:, :-1]

        def score_cheaply(subjects: Tensor, objects: Tensor) -> Tensor:
            logits = self.shortlist_logits(entities, subjects, objects)
            check_logits(
                *(logits, f"{type(self).__name__}.shortlist_logits"),
                *(len(subjects), self.num_predicates),
            )
            return self.prior(logits)[:, :-1]

        overlap_filter = self.overlap_filter and not boxes_given
        search = partial(
            best_triplets,
            scores=self.entity_factors(instances.scores),
            boxes=instances.pred_boxes.tensor if overlap_filter else None,
            image_size=instances.image_size,
            num_predicates=self.num_predicates,
            chunk=self.pair_chunk,
        )
        if pairs is not None:
            search = partial(search, shortlist=pairs)
        elif boxes_given and self._too_many_pairs(len(instances)):
            cheap, _ = search(score_cheaply, predicates_per_pair=(1,), topk=self.max_visual_pairs)
            low, high = cheap.pairs.aminmax(dim=1)
            # (i, j) and (j, i), whose union box is the same, come into one chunk.
            order = (low * len(instances) + high).argsort()
            search = partial(search, shortlist=cheap.pairs[order])
        limits = {"predicates_per_pair": self.predicates_per_pair, "topk": self.topk}
        relations, _ = search(score_pairs, **limits)
        return EntitiesAndRelations(instances, relations)

    def score_pairs(
        self,
        entities: EntityBatch,
        predicate_features: dict[str, Tensor] | None,
        subjects: Tensor,
        objects: Tensor,
    ) -> Tensor:
        """Call :meth:`pair_logits` and check the shape of its result.

        Raises:
            ValueError: if it is another one than (P, C + 1).
        """
        logits = self.pair_logits(entities, predicate_features, subjects, objects)
        return check_logits(
            logits, f"{type(self).__name__}.pair_logits", len(subjects), self.num_predicates
        )

    def refine(
        self, entities: EntityBatch, instances: Instances, classes_given: bool
    ) -> tuple[EntityBatch, Instances]:
        """Refine the entities of one image; pairs are then scored by the refined classes.

        With an attribute head the entities get ``pred_attributes``.

        Raises:
            ValueError: if :meth:`refine_entities` returns another number of entities.
        """
        refined = self.refine_entities(entities, instances, classes_given)
        if len(refined) != len(instances):
            raise ValueError(
                f"{type(self).__name__}.refine_entities returned {len(refined)} entities for "
                f"{len(instances)}: return the same ones in the same order."
            )
        if self.attribute_head is not None:
            refined = Instances(refined.image_size, **refined.get_fields())
            refined.pred_attributes = self.attribute_head.predict(entities.vectors)
        return replace(entities, classes=refined.pred_classes), refined

    def entity_factors(self, scores: Tensor) -> Tensor:
        """Return the factors by which entities with these (R,) scores multiply a triplet's score.

        They are in [0, 1] like the scores, so that the search for the best triplets stays exact.
        """
        if self.entity_score_exponent == 1:
            return scores
        return scores.float() ** self.entity_score_exponent

    def _too_many_pairs(self, num_entities: int) -> bool:
        """Tell whether there are too many pairs to score completely, and some can be chosen."""
        too_many = num_entities * (num_entities - 1) > self.max_visual_pairs
        if not too_many or not self.can_shortlist:
            return False
        log_first_n(
            logging.WARNING,
            f"An image with {num_entities} given boxes has more than "
            f"{self.max_visual_pairs} pairs (TEST.RELATIONS.MAX_VISUAL_PAIRS): the visual module "
            "scores only those that the other modules score best.",
        )
        return True
