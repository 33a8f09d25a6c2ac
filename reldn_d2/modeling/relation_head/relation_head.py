"""The relation head of RelDN: entities and feature maps in, losses or ranked triplets out.

Shapes: N images, R entities of the whole batch, P pairs of the whole batch, C predicates, d numbers
an ROI vector. Boxes are XYXY in pixels of the network's input.
"""

import logging

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.box_head import build_box_head
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import log_first_n
from detectron2.utils.registry import Registry

from ...structures.relations import predicted_relations
from ...utils.protocols import predicates_per_pair
from ..losses import AnchorSides, contrastive_losses, draw_predicate_targets, predicate_loss
from ..losses.contrastive import LOSS_NAMES, NORMALIZATIONS
from .pair_sampling import SampledPairs, sample_pairs
from .pairs import EntityBatch, distinct_unions, match_pairs, union_boxes
from .predictors import (
    SemanticModule,
    SpatialModule,
    VisualModule,
    spatial_features,
    without_last_relu,
)
from .topk import best_triplets
from .training_metrics import training_statistics

__all__ = ["ROI_RELATION_HEAD_REGISTRY", "RelDNHead", "build_relation_head"]


ROI_RELATION_HEAD_REGISTRY = Registry("ROI_RELATION_HEAD")
ROI_RELATION_HEAD_REGISTRY.__doc__ = """
Registry for relation heads, which predict the predicates of pairs of entities.

The registered object is called with ``obj(cfg, entity_shape, predicate_shape)``: the output shapes
of the detector's and of the predicate backbone, as dicts from feature name to ShapeSpec. Its calls
are those of :class:`reldn_d2.modeling.relation_head.RelDNHead`.
"""


def build_relation_head(
    cfg: CfgNode, entity_shape: dict[str, ShapeSpec], predicate_shape: dict[str, ShapeSpec]
) -> nn.Module:
    """Build the head that ``cfg.MODEL.ROI_RELATION_HEAD.NAME`` names."""
    name = cfg.MODEL.ROI_RELATION_HEAD.NAME
    return ROI_RELATION_HEAD_REGISTRY.get(name)(cfg, entity_shape, predicate_shape)


@ROI_RELATION_HEAD_REGISTRY.register()
class RelDNHead(nn.Module):
    """Semantic, spatial and visual module, their fusion, the losses and the ranking.

    Each entity's subject vector and object vector is computed once an image, each distinct union
    box once, shared by all losses.
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
        visual: VisualModule | None = None,
        overlap_filter: bool = True,
        pair_iou_threshold: float = 0.5,
        sampling: dict[str, int] | None = None,
        lambdas: tuple[float, float, float] = (1.0, 0.5, 0.1),
        alphas: tuple[float, float, float] = (0.2, 0.2, 0.2),
        normalization: str = "paper",
        topk: int = 100,
        predicates_per_pair: tuple[int, ...] = (1,),
        pair_chunk: int = 2048,
        statistics_period: int = 20,
    ):
        """
        Args:
            num_classes: number of entity classes.
            num_predicates: C.
            in_features: names of the feature maps that the poolers take.
            entity_pooler, predicate_pooler: ROI poolers on the detector's and on the predicate
                backbone's feature maps; None where the visual module does not need them.
            subject_box_head, object_box_head, predicate_box_head: (K, c, h, w) to (K, d); likewise.
            semantic, spatial, visual: the three modules; None switches one off.
            overlap_filter: only pairs whose boxes overlap.
            pair_iou_threshold: from which overlap on a pair matches a ground-truth relation.
            sampling: keyword arguments of :func:`.pair_sampling.sample_pairs`.
            lambdas: weights of L1 to L3; all zero switches them off.
            alphas: margins of L1 to L3.
            normalization: of L1 to L3, see :func:`..losses.contrastive.group_weights`.
            topk, predicates_per_pair: see :class:`.topk.TopTriplets`.
            pair_chunk: most pairs scored at once at test time.
            statistics_period: iterations from one entry of training statistics to the next.
        """
        super().__init__()
        if semantic is None and spatial is None and visual is None:
            raise ValueError(
                "The relation head has no module left: switch on at least one of SEMANTIC.ENABLED, "
                "SPATIAL.ENABLED, VISUAL.SPO, VISUAL.SUBJECT_SKIP, VISUAL.OBJECT_SKIP under "
                "MODEL.ROI_RELATION_HEAD."
            )
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"MODEL.ROI_RELATION_HEAD.LOSS.NORMALIZATION is '{normalization}'; known: "
                f"{', '.join(NORMALIZATIONS)}"
            )
        if len(predicates_per_pair) == 0 or min(predicates_per_pair) < 0:
            raise ValueError(
                f"TEST.RELATIONS.PREDICATES_PER_PAIR is {list(predicates_per_pair)}; expected one "
                "or several numbers of predicates, 0 for all of them."
            )
        if pair_chunk < 1:
            raise ValueError(
                f"TEST.RELATIONS.PAIR_CHUNK is {pair_chunk}; expected 1 or more pairs."
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
        self.topk = topk
        self.predicates_per_pair = tuple(predicates_per_pair)
        self.pair_chunk = pair_chunk
        self.statistics_period = statistics_period

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        entity_shape: dict[str, ShapeSpec],
        predicate_shape: dict[str, ShapeSpec],
    ):
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
            "topk": cfg.TEST.RELATIONS.TOPK,
            "predicates_per_pair": predicates_per_pair(cfg),
            "pair_chunk": cfg.TEST.RELATIONS.PAIR_CHUNK,
        }
        if head.SEMANTIC.ENABLED:
            ret["semantic"] = SemanticModule(num_classes, num_predicates, head.SEMANTIC.FREEZE)
        if head.SPATIAL.ENABLED:
            ret["spatial"] = SpatialModule(num_predicates, head.SPATIAL.HIDDEN_DIM)
        ret.update(cls._init_visual(cfg, in_features, entity_shape, predicate_shape))
        return ret

    @classmethod
    def _init_visual(cls, cfg, in_features, entity_shape, predicate_shape):
        head, switch = cfg.MODEL.ROI_RELATION_HEAD, cfg.MODEL.ROI_RELATION_HEAD.VISUAL
        resolution = head.POOLER_RESOLUTION or cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        if not (switch.SPO or switch.SUBJECT_SKIP or switch.OBJECT_SKIP):
            return {}

        def pooler(shape):
            return ROIPooler(
                output_size=resolution,
                scales=tuple(1.0 / shape[name].stride for name in in_features),
                sampling_ratio=head.POOLER_SAMPLING_RATIO,
                pooler_type=head.POOLER_TYPE,
            )

        def box_head(shape):
            channels = shape[in_features[0]].channels
            pooled = ShapeSpec(channels=channels, height=resolution, width=resolution)
            built = build_box_head(cfg, pooled)
            return without_last_relu(built) if head.NO_FC7_RELU else built

        ret = {"entity_pooler": pooler(entity_shape)}
        if switch.SPO or switch.SUBJECT_SKIP:
            ret["subject_box_head"] = box_head(entity_shape)
        if switch.SPO or switch.OBJECT_SKIP:
            ret["object_box_head"] = box_head(entity_shape)
        if switch.SPO:
            ret["predicate_pooler"] = pooler(predicate_shape)
            ret["predicate_box_head"] = box_head(predicate_shape)
        some_head = next(head for name, head in ret.items() if name.endswith("box_head"))
        ret["visual"] = VisualModule(
            some_head.output_shape.channels,
            head.NUM_PREDICATES,
            spo=switch.SPO,
            subject_skip=switch.SUBJECT_SKIP,
            object_skip=switch.OBJECT_SKIP,
        )
        return ret

    @property
    def box_heads(self) -> list[nn.Module]:
        """The box heads there are, of subject, object and predicate."""
        heads = (self.subject_box_head, self.object_box_head, self.predicate_box_head)
        return [head for head in heads if head is not None]

    @property
    def needs_predicate_features(self) -> bool:
        """Whether the predicate backbone is read at all."""
        return self.predicate_box_head is not None

    def encode_entities(
        self,
        features: dict[str, Tensor],
        boxes: list[Boxes],
        classes: list[Tensor],
        image_sizes: list[tuple[int, int]],
        chunk: int | None = None,
    ) -> EntityBatch:
        """Encode each entity once in either role.

        Args:
            features: the detector's feature maps, (N, c, h, w) each.
            boxes, classes: of each image.
            image_sizes: (height, width) of each image.
            chunk: most boxes pooled at once, for one image; None pools all.
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
    ) -> Tensor:
        """Eq 12 before the softmax: the sum of the modules' logits.

        Args:
            entities: the R encoded entities.
            predicate_features: the predicate backbone's feature maps; None if it is not needed.
            subjects, objects: (P,) int64 indices into the entities.

        Returns:
            (P, C + 1); the last logit is "no relationship".
        """
        logits = 0
        if self.semantic is not None:
            logits = self.semantic(entities.classes[subjects], entities.classes[objects])
        subject_boxes, object_boxes = entities.boxes[subjects], entities.boxes[objects]
        if self.spatial is not None:
            sizes = entities.image_sizes[entities.image[subjects]]
            logits = logits + self.spatial(spatial_features(subject_boxes, object_boxes, sizes))
        if self.visual is not None:
            vectors = union = None
            if self.predicate_box_head is not None:
                if torch.jit.is_tracing():  # one image; no number of pairs is to be written down
                    boxes = [union_boxes(subject_boxes, object_boxes)]
                else:
                    first, second, union, sizes = distinct_unions(
                        subjects, objects, entities.image, len(entities.boxes), len(entities.sizes)
                    )
                    boxes = union_boxes(entities.boxes[first], entities.boxes[second]).split(sizes)
                maps = [predicate_features[name] for name in self.in_features]
                vectors = self.predicate_box_head(
                    self.predicate_pooler(maps, [Boxes(x) for x in boxes])
                )
            logits = logits + self.visual(
                entities.subject_vectors, entities.object_vectors, vectors, subjects, objects, union
            )
        return logits

    def forward(
        self,
        features: dict[str, Tensor],
        predicate_features: dict[str, Tensor] | None,
        entities: list[Instances],
        targets: list[tuple[Instances, Instances]] | None = None,
    ):
        """
        Args:
            features: the detector's feature maps.
            predicate_features: the predicate backbone's feature maps; None if not needed.
            entities: of each image; in training with ``proposal_boxes`` and ``gt_classes``, at
                test time with ``pred_boxes``, ``pred_classes`` and ``scores``.
            targets: in training, of each image the ground-truth ``instances`` (``gt_boxes``,
                ``gt_classes``) and ``relations`` (``gt_pairs``, ``gt_predicates``).

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
            )
            for i, instances in enumerate(entities)
        ]

    def _losses(self, features, predicate_features, proposals, targets) -> dict[str, Tensor]:
        boxes, classes = [x.proposal_boxes for x in proposals], [x.gt_classes for x in proposals]
        entities = self.encode_entities(features, boxes, classes, [x.image_size for x in proposals])
        samples = []
        for image_boxes, image_classes, (instances, relations) in zip(boxes, classes, targets):
            grid = match_pairs(
                (image_boxes, image_classes),
                (instances.gt_boxes, instances.gt_classes),
                relations.gt_pairs,
                relations.gt_predicates,
                num_predicates=self.num_predicates,
                overlap_filter=self.overlap_filter,
                iou_threshold=self.pair_iou_threshold,
            )
            samples.append(sample_pairs(grid, **self.sampling))
        pairs = SampledPairs.cat(samples, entities.sizes)
        logits = self.pair_logits(entities, predicate_features, pairs.subjects, pairs.objects)
        return self._sum_losses(logits, pairs, entities)

    def _sum_losses(self, logits, pairs: SampledPairs, entities: EntityBatch) -> dict[str, Tensor]:
        """L0 and, where a lambda is not zero, L1 to L3 of both sides."""
        num_images = len(entities.sizes)
        image = entities.image[pairs.subjects]
        chosen = pairs.for_predicate.float()
        in_image = chosen.new_zeros(num_images).index_add(0, image, chosen)
        weights = chosen / in_image.clamp(min=1.0)[image] / num_images
        targets = draw_predicate_targets(pairs.labels)
        losses = {"loss_predicate": predicate_loss(logits, targets, weights)}

        groups = None
        if any(self.lambdas):
            ends = torch.stack([pairs.subjects, pairs.objects])
            sides = AnchorSides(
                sampled=torch.stack([pairs.for_subjects, pairs.for_objects]),
                anchor=ends,
                other_class=entities.classes[ends.flip(0)],
            )
            contrastive, groups = contrastive_losses(
                logits,
                pairs.labels,
                sides,
                entities.image,
                num_images=num_images,
                num_classes=self.num_classes,
                alphas=self._alphas,
                normalization=self.normalization,
            )
            for name, loss, weight in zip(LOSS_NAMES, contrastive, self.lambdas):
                if weight:
                    losses[f"loss_{name}"] = weight * loss
        storage = get_event_storage()
        if (storage.iter + 1) % self.statistics_period == 0:  # when the trainer's writers write
            statistics = training_statistics(logits, targets, pairs, groups, self.alphas)
            storage.put_scalars(smoothing_hint=False, **statistics)
            if len(pairs) == 0:
                log_first_n(
                    logging.WARNING,
                    f"Iteration {storage.iter}: no pair to train on in {num_images} images. "
                    + "With MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER on, pairs whose boxes do not "
                    + "overlap are left out; images with fewer than two annotations have none.",
                    n=3,
                )
        return losses

    def _predict(self, features, predicate_features, instances: Instances) -> Instances:
        """Ranked triplets of one image; the memory is bounded by ``pair_chunk``."""
        entities = self.encode_entities(
            features,
            [instances.pred_boxes],
            [instances.pred_classes],
            [instances.image_size],
            chunk=self.pair_chunk,
        )

        def score_pairs(subjects: Tensor, objects: Tensor) -> Tensor:
            logits = self.pair_logits(entities, predicate_features, subjects, objects)
            return logits.float().softmax(dim=1)[:, :-1]

        best = best_triplets(
            score_pairs,
            instances.scores,
            instances.pred_boxes.tensor if self.overlap_filter else None,
            num_predicates=self.num_predicates,
            predicates_per_pair=self.predicates_per_pair,
            topk=self.topk,
            chunk=self.pair_chunk,
        )
        return predicted_relations(
            instances.image_size, best.pairs, best.predicates, best.scores, best.predicate_scores
        )
