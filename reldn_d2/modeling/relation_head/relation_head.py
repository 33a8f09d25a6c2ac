"""Relation head of RelDN: from entities and feature maps to losses or ranked triplets.

Shapes: N images, R entities of the batch, P pairs of the batch, C predicates, d values per ROI
vector. Boxes are XYXY in pixels of the network's input.
"""

import logging
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import log_first_n

from ...structures.box_ops import union_boxes
from ...utils.protocols import kept_predicates_per_pair
from ..losses.contrastive import NORMALIZATIONS
from .build import ROI_RELATION_HEAD_REGISTRY, build_visual_parts
from .head_losses import L0_MEANS, relation_losses
from .joint import JointModule
from .pair_sampling import SampledPairs, training_pairs
from .pairs import EntityBatch, distinct_unions
from .predictors import SemanticModule, SpatialModule, VisualModule, spatial_features
from .topk import best_triplets
from .training_metrics import training_metrics

__all__ = ["RelDNHead"]


@ROI_RELATION_HEAD_REGISTRY.register()
class RelDNHead(nn.Module):
    """Fuses the semantic, spatial, joint and visual module; computes losses and ranks triplets.

    The subject and the object vector of each entity and the vector of each distinct union box are
    computed once per batch and shared by all losses.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        num_predicates: int,
        in_features: list[str],
        entity_pooler: nn.Module | None = None,
        predicate_pooler: nn.Module | None = None,
        subject_box_head: nn.Module | None = None,
        object_box_head: nn.Module | None = None,
        predicate_box_head: nn.Module | None = None,
        semantic: SemanticModule | None = None,
        spatial: SpatialModule | None = None,
        joint: JointModule | None = None,
        visual: VisualModule | None = None,
        overlap_filter: bool = True,
        pair_iou_threshold: float = 0.5,
        sampling: dict[str, int] | None = None,
        lambdas: tuple[float, float, float] = (1.0, 0.5, 0.1),
        alphas: tuple[float, float, float] = (0.2, 0.2, 0.2),
        normalization: str = "paper",
        l0_mean: str = "images",
        topk: int = 100,
        predicates_per_pair: tuple[int | None, ...] = (1,),
        pair_chunk: int = 2048,
        max_visual_pairs: int = 40_000,
        entity_score_exponent: float = 1.0,
        statistics_period: int = 20,
    ):
        """
        Args:
            num_classes: number of entity classes.
            num_predicates: C.
            in_features: names of the feature maps that both poolers read.
            entity_pooler, predicate_pooler: ROI poolers on the detector's and on the predicate
                backbone's feature maps; None if the visual module does not need them.
            subject_box_head, object_box_head, predicate_box_head: (R, c, h, w) to (R, d); likewise.
            semantic, spatial, joint, visual: the four modules; None switches one off.
            overlap_filter: leave out pairs of detected boxes (in training: of proposals) that do
                not overlap. Pairs of given boxes, and in training pairs with a ground-truth box,
                are all used.
            pair_iou_threshold: minimum overlap of a pair with a ground-truth relation that it
                matches.
            sampling: keyword arguments of :func:`.pair_sampling.sample_pairs`.
            lambdas: weights of L1 to L3; all zero switches them off.
            alphas: margins of L1 to L3.
            normalization: of L1 to L3, see :func:`..losses.contrastive.group_weights`.
            l0_mean: one of :data:`.head_losses.L0_MEANS`.
            topk, predicates_per_pair: see :class:`.topk.TopTriplets`.
            pair_chunk: max pairs scored at once at test time.
            max_visual_pairs: max pairs of an image with given boxes that the visual module scores;
                of more pairs, those that the other modules score best are kept.
            entity_score_exponent: a triplet's score is the probability of its predicate times the
                scores of subject and object, each to this power.
            statistics_period: log training metrics every so many iterations.

        Raises:
            ValueError: if all modules are off or an option has an invalid value.
        """
        super().__init__()
        if semantic is None and spatial is None and joint is None and visual is None:
            raise ValueError(
                "The relation head has no module left: switch on at least one of SEMANTIC.ENABLED, "
                "SPATIAL.ENABLED, JOINT.ENABLED, VISUAL.SPO, VISUAL.SUBJECT_SKIP or "
                "VISUAL.OBJECT_SKIP under MODEL.ROI_RELATION_HEAD."
            )
        _check_options(normalization, l0_mean, predicates_per_pair, pair_chunk, max_visual_pairs)
        if not 0 <= entity_score_exponent < math.inf:
            raise ValueError(
                f"TEST.RELATIONS.ENTITY_SCORE_EXPONENT is {entity_score_exponent}; expected a "
                "finite number of 0 or more."
            )
        self.num_classes = num_classes
        self.num_predicates = num_predicates
        self.in_features = list(in_features)
        self.entity_pooler = entity_pooler
        self.predicate_pooler = predicate_pooler
        self.subject_box_head = subject_box_head
        self.object_box_head = object_box_head
        self.predicate_box_head = predicate_box_head
        self.semantic = semantic
        self.spatial = spatial
        self.joint = joint
        self.visual = visual
        self.overlap_filter = overlap_filter
        self.pair_iou_threshold = pair_iou_threshold
        self.sampling = dict(sampling or {})
        if not any(lambdas):
            self.sampling.update(num_anchor_positive=0, num_anchor_negative=0)
        self.lambdas = tuple(lambdas)
        self.alphas = tuple(alphas)
        self.register_buffer("_alphas", torch.tensor(self.alphas), persistent=False)
        self.normalization = normalization
        self.l0_mean = l0_mean
        self.topk = topk
        self.predicates_per_pair = tuple(predicates_per_pair)
        self.pair_chunk = pair_chunk
        self.max_visual_pairs = max_visual_pairs
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
        in_features = list(head.IN_FEATURES or cfg.MODEL.ROI_HEADS.IN_FEATURES)
        num_classes, num_predicates = cfg.MODEL.ROI_HEADS.NUM_CLASSES, head.NUM_PREDICATES
        ret = {
            "num_classes": num_classes,
            "num_predicates": num_predicates,
            "in_features": in_features,
            "overlap_filter": head.OVERLAP_FILTER,
            "pair_iou_threshold": cfg.MODEL.RELDN.ENTITY_IOU_THRESHOLD,
            "sampling": {
                "num_pairs": head.SAMPLING.PAIRS,
                "num_positive": head.SAMPLING.POSITIVE_PAIRS,
                "num_anchor_positive": head.SAMPLING.ANCHOR_POSITIVE_PAIRS,
                "num_anchor_negative": head.SAMPLING.ANCHOR_NEGATIVE_PAIRS,
            },
            "lambdas": (head.LOSS.LAMBDA_1, head.LOSS.LAMBDA_2, head.LOSS.LAMBDA_3),
            "alphas": (head.LOSS.ALPHA_1, head.LOSS.ALPHA_2, head.LOSS.ALPHA_3),
            "normalization": head.LOSS.NORMALIZATION,
            "l0_mean": head.LOSS.L0_MEAN,
            "topk": cfg.TEST.RELATIONS.TOPK,
            "predicates_per_pair": kept_predicates_per_pair(cfg),
            "pair_chunk": cfg.TEST.RELATIONS.PAIR_CHUNK,
            "max_visual_pairs": cfg.TEST.RELATIONS.MAX_VISUAL_PAIRS,
            "entity_score_exponent": cfg.TEST.RELATIONS.ENTITY_SCORE_EXPONENT,
        }
        if head.SEMANTIC.ENABLED:
            ret["semantic"] = SemanticModule(num_classes, num_predicates, head.SEMANTIC.FREEZE)
        if head.SPATIAL.ENABLED:
            ret["spatial"] = SpatialModule(num_predicates, head.SPATIAL.HIDDEN_DIM)
        if head.JOINT.ENABLED:
            ret["joint"] = JointModule(
                num_classes,
                num_predicates,
                embedding_dim=head.JOINT.EMBEDDING_DIM,
                hidden_dim=head.JOINT.HIDDEN_DIM,
                dropout=head.JOINT.DROPOUT,
                embedding_std=head.JOINT.EMBEDDING_STD,
            )
        ret.update(build_visual_parts(cfg, in_features, entity_shape, predicate_shape))
        return ret

    @property
    def box_heads(self) -> list[nn.Module]:
        """Return the box heads of subject, object and predicate, without those that are off."""
        heads = (self.subject_box_head, self.object_box_head, self.predicate_box_head)
        return [head for head in heads if head is not None]

    @property
    def needs_predicate_features(self) -> bool:
        """Whether any part of the head reads the predicate backbone's feature maps."""
        return self.predicate_box_head is not None

    def encode_entities(
        self,
        features: dict[str, Tensor],
        boxes: list[Boxes],
        classes: list[Tensor],
        image_sizes: list[tuple[int, int]],
        chunk: int | None = None,
    ) -> EntityBatch:
        """Encode each entity once as a subject and once as an object.

        Args:
            features: the detector's feature maps, (N, c, h, w) each.
            boxes, classes: one per image.
            image_sizes: (height, width) per image.
            chunk: max boxes pooled at once, for a batch of one image; None pools all.
        """
        subject_vectors = object_vectors = None
        if self.entity_pooler is not None:
            maps = [features[name] for name in self.in_features]
            parts = [boxes]
            if chunk is not None:
                parts = [[Boxes(x)] for x in boxes[0].tensor.split(chunk)]
            heads = [x for x in (self.subject_box_head, self.object_box_head) if x is not None]
            pooled = (self.entity_pooler(maps, part) for part in parts)
            encoded = [torch.cat(x) for x in zip(*([head(p) for head in heads] for p in pooled))]
            if self.subject_box_head is not None:
                subject_vectors = encoded[0]
            if self.object_box_head is not None:
                object_vectors = encoded[-1]
        return EntityBatch.stack(boxes, classes, image_sizes, subject_vectors, object_vectors)

    def pair_logits(
        self,
        entities: EntityBatch,
        predicate_features: dict[str, Tensor] | None,
        subjects: Tensor,
        objects: Tensor,
        visual: bool = True,
    ) -> Tensor:
        """Compute Eq 12 before the softmax: the sum of the modules' logits.

        Args:
            entities: the R encoded entities.
            predicate_features: the predicate backbone's feature maps; None if it is not needed.
            subjects, objects: (P,) int64 indices into the entities.
            visual: whether to add the visual module, if there is one.

        Returns:
            (P, C + 1); the last logit is "no relationship".
        """
        logits = 0
        classes = entities.classes[subjects], entities.classes[objects]
        if self.semantic is not None:
            logits = self.semantic(*classes)
        if self.spatial is not None or self.joint is not None:
            sizes = entities.image_sizes[entities.image[subjects]]
            features = spatial_features(entities.boxes[subjects], entities.boxes[objects], sizes)
            if self.spatial is not None:
                logits = logits + self.spatial(features)
            if self.joint is not None:
                logits = logits + self.joint(*classes, features)
        if self.visual is not None and visual:
            vectors = union = None
            if self.predicate_box_head is not None:
                vectors, union = self._encode_unions(
                    entities, predicate_features, subjects, objects
                )
            logits = logits + self.visual(
                entities.subject_vectors, entities.object_vectors, vectors, subjects, objects, union
            )
        return logits

    def _encode_unions(
        self,
        entities: EntityBatch,
        predicate_features: dict[str, Tensor],
        subjects: Tensor,
        objects: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode each distinct union box of the pairs once.

        Returns:
            (U, d) vectors, and (P,) int64, each pair's union box; None if U = P, pair by pair.
        """
        union = None
        if torch.jit.is_tracing():
            # One image. Finding distinct boxes would write their number into the graph.
            boxes = [union_boxes(entities.boxes[subjects], entities.boxes[objects])]
        else:
            first, second, union, counts = distinct_unions(
                subjects, objects, entities.image, len(entities.boxes), len(entities.sizes)
            )
            boxes = union_boxes(entities.boxes[first], entities.boxes[second]).split(counts)
        maps = [predicate_features[name] for name in self.in_features]
        pooled = self.predicate_pooler(maps, [Boxes(x) for x in boxes])
        return self.predicate_box_head(pooled), union

    def forward(
        self,
        features: dict[str, Tensor],
        predicate_features: dict[str, Tensor] | None,
        entities: list[Instances],
        targets: list[tuple[Instances, Instances]] | None = None,
        *,
        boxes_given: bool = False,
        pairs: list[Tensor] | None = None,
    ):
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
            pairs: at test time, the only pairs to score (PREDDET), (P, 2) int64 per image, each
                once; None takes all.

        Returns:
            In training a dict of losses, weighted by their lambdas. Otherwise the relations of each
            image, see :mod:`reldn_d2.structures.relations`.
        """
        if self.training:
            return self._losses(features, predicate_features, entities, targets)
        return [
            self._predict(
                {name: x[i : i + 1] for name, x in features.items()},
                predicate_features and {n: x[i : i + 1] for n, x in predicate_features.items()},
                instances,
                boxes_given=boxes_given,
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
                sampling=self.sampling,
            )
            for image_proposals, target in zip(proposals, targets)
        ]
        pairs = SampledPairs.cat(samples, entities.sizes)
        logits = self.pair_logits(entities, predicate_features, pairs.subjects, pairs.objects)
        result = relation_losses(
            logits,
            pairs,
            entities,
            num_classes=self.num_classes,
            lambdas=self.lambdas,
            alphas=self._alphas,
            normalization=self.normalization,
            l0_mean=self.l0_mean,
        )
        storage = get_event_storage()
        if (storage.iter + 1) % self.statistics_period == 0:  # when the trainer's writers write
            metrics = training_metrics(logits, result.targets, pairs, result.groups, self.alphas)
            storage.put_scalars(smoothing_hint=False, **metrics)
            if len(pairs) == 0:
                log_first_n(
                    logging.WARNING,
                    f"Iteration {storage.iter}: no pair to train on in {len(proposals)} images. "
                    "Images with fewer than two annotations have none.",
                    n=3,
                )
        return result.losses

    def _predict(
        self,
        features: dict[str, Tensor],
        predicate_features: dict[str, Tensor] | None,
        instances: Instances,
        *,
        boxes_given: bool,
        pairs: Tensor | None,
    ) -> Instances:
        """Rank the triplets of one image; memory is bounded by ``pair_chunk``."""
        entities = self.encode_entities(
            features,
            [instances.pred_boxes],
            [instances.pred_classes],
            [instances.image_size],
            chunk=self.pair_chunk,
        )

        def score_pairs(subjects: Tensor, objects: Tensor, visual: bool = True) -> Tensor:
            logits = self.pair_logits(entities, predicate_features, subjects, objects, visual)
            return logits.float().softmax(dim=1)[:, :-1]

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
            cheap, _ = search(
                partial(score_pairs, visual=False),
                predicates_per_pair=(1,),
                topk=self.max_visual_pairs,
            )
            low, high = cheap.pairs.aminmax(dim=1)
            # (i, j) and (j, i), whose union box is the same, come into one chunk.
            order = (low * len(instances) + high).argsort()
            search = partial(search, shortlist=cheap.pairs[order])
        relations, _ = search(
            score_pairs,
            predicates_per_pair=self.predicates_per_pair,
            topk=self.topk,
        )
        return relations

    def entity_factors(self, scores: Tensor) -> Tensor:
        """Return the factors by which entities with these (R,) scores multiply a triplet's score.

        They are in [0, 1] like the scores, so that the search for the best triplets stays exact.
        """
        if self.entity_score_exponent == 1:
            return scores
        return scores.float() ** self.entity_score_exponent

    def _too_many_pairs(self, num_entities: int) -> bool:
        """Tell whether the visual module would score too many pairs, and others can choose some."""
        others = any(x is not None for x in (self.semantic, self.spatial, self.joint))
        too_many = num_entities * (num_entities - 1) > self.max_visual_pairs
        if self.visual is None or not others or not too_many:
            return False
        log_first_n(
            logging.WARNING,
            f"An image with {num_entities} given boxes has more than "
            f"{self.max_visual_pairs} pairs (TEST.RELATIONS.MAX_VISUAL_PAIRS): the visual module "
            "scores only those that the other modules score best.",
        )
        return True


def _check_options(
    normalization: str,
    l0_mean: str,
    predicates_per_pair: tuple[int | None, ...],
    pair_chunk: int,
    max_visual_pairs: int,
) -> None:
    """Raise a ValueError that names the config key of an invalid option."""
    for key, value, known in (
        ("NORMALIZATION", normalization, NORMALIZATIONS),
        ("L0_MEAN", l0_mean, L0_MEANS),
    ):
        if value not in known:
            raise ValueError(
                f"MODEL.ROI_RELATION_HEAD.LOSS.{key} is '{value}'; known: {', '.join(known)}"
            )
    if len(predicates_per_pair) == 0 or any(k is not None and k < 1 for k in predicates_per_pair):
        raise ValueError(
            f"TEST.RELATIONS.PREDICATES_PER_PAIR is {list(predicates_per_pair)}; expected at least "
            "one limit, each 1 or more, or None for no limit."
        )
    for key, value in (("PAIR_CHUNK", pair_chunk), ("MAX_VISUAL_PAIRS", max_visual_pairs)):
        if value < 1:
            raise ValueError(f"TEST.RELATIONS.{key} is {value}; expected 1 or more pairs.")
