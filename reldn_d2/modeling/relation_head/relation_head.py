"""Relation head of RelDN: encodes entities and union boxes for its predicate classifier.

Shapes: N images, R entities of the batch, P pairs of the batch, U union boxes, C predicates, d
values per ROI vector, X values per contextual vector. Boxes are XYXY in pixels of the network's
input.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes

from ...structures.box_ops import union_boxes
from .attribute_head import build_attribute_head
from .build import ROI_RELATION_HEAD_REGISTRY, build_visual_parts
from .entity_context import EntityContext, build_entity_context
from .head_base import RelationHead
from .joint import JointModule
from .pairs import (
    EntityBatch,
    PairBatch,
    check_logits,
    distinct_unions,
    distinct_unions_of_both_orders,
)
from .poolers import LevelPooler
from .predicate_classifier import MODULES, PredicateClassifier, build_predicate_classifier

__all__ = ["RelDNHead"]


@ROI_RELATION_HEAD_REGISTRY.register()
class RelDNHead(RelationHead):
    """Encodes entities and union boxes; a predicate classifier scores the pairs.

    The subject and the object vector of each entity and the vector of each distinct union box are
    computed once per batch and shared by all losses.

    The names of weights of RelDN's modules have no ``predictor`` in them
    (``visual.first.weight``): they were saved so before there were other classifiers.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        predictor: PredicateClassifier,
        context: EntityContext | None = None,
        vector_size: int = 0,
        entity_pooler: nn.Module | None = None,
        predicate_pooler: nn.Module | None = None,
        subject_box_head: nn.Module | None = None,
        object_box_head: nn.Module | None = None,
        predicate_box_head: nn.Module | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            in_features: names of the feature maps that both poolers read.
            predictor: scores pairs.
            context: adds to the entities' vectors what it says of each; None for none.
            vector_size: d; 0 without box heads.
            entity_pooler, predicate_pooler: ROI poolers on the detector's and on the predicate
                backbone's feature maps; None if they are not needed.
            subject_box_head, object_box_head, predicate_box_head: (R, c, h, w) to (R, d); likewise.
            kwargs: see :class:`RelationHead`.

        Raises:
            ValueError: if no part of the head reads the context.
        """
        super().__init__(**kwargs)
        if context is not None and not predictor.reads_context:
            raise ValueError(
                f"MODEL.ROI_RELATION_HEAD.CONTEXT.NAME is '{type(context).__name__}', but no "
                "module of the relation head reads entity vectors: switch on JOINT.ENABLED or a "
                "part of VISUAL under MODEL.ROI_RELATION_HEAD."
            )
        self.in_features = list(in_features)
        self.entity_pooler = entity_pooler
        self.predicate_pooler = predicate_pooler
        self.subject_box_head = subject_box_head
        self.object_box_head = object_box_head
        self.predicate_box_head = predicate_box_head
        self.context = context
        self.context_to_subject = self.context_to_object = None
        if context is not None and subject_box_head is not None:
            self.context_to_subject = nn.Linear(context.size, vector_size)
        if context is not None and object_box_head is not None:
            self.context_to_object = nn.Linear(context.size, vector_size)
        self.predictor = predictor
        self.register_load_state_dict_post_hook(_rename_missing)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        entity_shape: dict[str, ShapeSpec],
        predicate_shape: dict[str, ShapeSpec],
    ) -> dict[str, Any]:
        ret = super().from_config(cfg, entity_shape, predicate_shape)
        head = cfg.MODEL.ROI_RELATION_HEAD
        ret["in_features"] = list(head.IN_FEATURES or cfg.MODEL.ROI_HEADS.IN_FEATURES)
        ret.update(build_visual_parts(cfg, ret["in_features"], entity_shape, predicate_shape))
        vector_size = ret.get("vector_size", 0)
        num_vectors = ("subject_box_head" in ret) + ("object_box_head" in ret)
        context = build_entity_context(cfg, num_vectors * vector_size)
        ret["context"] = context
        ret["attribute_head"] = build_attribute_head(cfg, num_vectors * vector_size)
        context_size = 0 if context is None else context.size
        ret["predictor"] = build_predicate_classifier(cfg, vector_size, context_size)
        return ret

    # The modules of RelDN's classifier; None if one is off or the classifier has none of that name.
    semantic = property(lambda self: getattr(self.predictor, "semantic", None))
    spatial = property(lambda self: getattr(self.predictor, "spatial", None))
    joint = property(lambda self: getattr(self.predictor, "joint", None))
    visual = property(lambda self: getattr(self.predictor, "visual", None))

    def check_counts(self, owner: str = "this model") -> None:
        """Check those of the joint module too; see :meth:`RelationHead.check_counts`."""
        super().check_counts(owner)
        if isinstance(self.joint, JointModule):
            self.joint.check_counts(owner)

    @property
    def box_heads(self) -> list[nn.Module]:
        """Return the box heads of subject, object and predicate, without those that are off."""
        heads = (self.subject_box_head, self.object_box_head, self.predicate_box_head)
        return [head for head in heads if head is not None]

    @property
    def needs_predicate_features(self) -> bool:
        """Whether union boxes are encoded."""
        return self.predicate_box_head is not None

    @property
    def can_shortlist(self) -> bool:
        """Whether the classifier has cheaper logits."""
        return self.predictor.can_shortlist

    def encode_entities(
        self,
        features: dict[str, Tensor],
        boxes: list[Boxes],
        classes: list[Tensor],
        image_sizes: list[tuple[int, int]],
        chunk: int | None = None,
    ) -> EntityBatch:
        """Encode each entity once as a subject and once as an object; then add the context."""
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
        vectors = subject_vectors, object_vectors
        return self.add_context(EntityBatch.stack(boxes, classes, image_sizes, *vectors))

    def add_context(self, entities: EntityBatch) -> EntityBatch:
        """Compute the contextual vectors, and add them to the vectors of subjects and objects.

        Raises:
            ValueError: if the context returns vectors of another shape than (R, X).
        """
        if self.context is None:
            return entities
        entities.context = self.context(entities)
        if entities.context.shape != (len(entities.boxes), self.context.size):
            raise ValueError(
                f"{type(self.context).__name__} returned vectors of shape "
                f"{tuple(entities.context.shape)} for {len(entities.boxes)} entities: return "
                f"({len(entities.boxes)}, {self.context.size}), the latter being its size."
            )
        if self.context_to_subject is not None:
            added = self.context_to_subject(entities.context)
            entities.subject_vectors = entities.subject_vectors + added
        if self.context_to_object is not None:
            added = self.context_to_object(entities.context)
            entities.object_vectors = entities.object_vectors + added
        return entities

    def pair_logits(
        self,
        entities: EntityBatch,
        predicate_features: dict[str, Tensor] | None,
        subjects: Tensor,
        objects: Tensor,
    ) -> Tensor:
        """Score pairs; the union boxes of all of them are encoded."""
        pairs = self.pair_batch(entities, predicate_features, subjects, objects)
        logits = self.predictor(entities, pairs)
        return self._check_logits(logits, "forward", len(subjects))

    def shortlist_logits(self, entities: EntityBatch, subjects: Tensor, objects: Tensor) -> Tensor:
        logits = self.predictor.shortlist_logits(entities, PairBatch(subjects, objects))
        return self._check_logits(logits, "shortlist_logits", len(subjects))

    def _check_logits(self, logits: Tensor, method: str, num_pairs: int) -> Tensor:
        """Return the classifier's logits; an error about their shape names the classifier."""
        source = f"{type(self.predictor).__name__}.{method}"
        return check_logits(logits, source, num_pairs, self.num_predicates)

    def pair_batch(
        self,
        entities: EntityBatch,
        predicate_features: dict[str, Tensor] | None,
        subjects: Tensor,
        objects: Tensor,
    ) -> PairBatch:
        """Collect what the classifier reads of pairs; arguments as in :meth:`pair_logits`."""
        if self.predicate_box_head is None:
            return PairBatch(subjects, objects)
        return PairBatch(
            subjects,
            objects,
            lambda: self._encode_unions(entities, predicate_features, subjects, objects),
        )

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
        if torch.jit.is_tracing():
            first, second, union = distinct_unions_of_both_orders(
                subjects, objects, entities.boxes.shape[0]
            )
            boxes = [union_boxes(entities.boxes[first], entities.boxes[second])]
        else:
            first, second, union, counts = distinct_unions(
                subjects, objects, entities.image, len(entities.boxes), len(entities.sizes)
            )
            boxes = union_boxes(entities.boxes[first], entities.boxes[second]).split(counts)
        boxes = [Boxes(x) for x in boxes]
        if isinstance(self.predicate_pooler, LevelPooler):
            pooled = self.predicate_pooler.pool(predicate_features, self.in_features, boxes)
        else:
            maps = [predicate_features[name] for name in self.in_features]
            pooled = self.predicate_pooler(maps, boxes)
        return self.predicate_box_head(pooled), union

    # Weights of RelDN's modules have no "predictor" in their names, wherever names are listed.

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield all modules by name; named_parameters and named_buffers follow."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield _saved_name(name, f"{prefix}." if prefix else ""), module

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Tensor]:
        """Collect the weights by name."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in list(state):  # all, so that their order stays
            state[_saved_name(name, prefix)] = state.pop(name)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in list(state_dict):
            rest = name.removeprefix(prefix)
            if name.startswith(prefix) and rest.partition(".")[0] in MODULES:
                state_dict[f"{prefix}predictor.{rest}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _saved_name(name: str, prefix: str) -> str:
    """Leave out ``predictor`` before the name of a module of RelDN's classifier.

    Args:
        name: of a module or weight.
        prefix: of the names of the relation head's parts.
    """
    rest = name.removeprefix(f"{prefix}predictor.")
    return prefix + rest if rest != name and rest.partition(".")[0] in MODULES else name


def _rename_missing(head: RelDNHead, incompatible: Any) -> None:
    """Give missing and unexpected weights the names that they have in a state dict."""
    for names in (incompatible.missing_keys, incompatible.unexpected_keys):
        names[:] = [_saved_name(x, x.partition("predictor.")[0]) for x in names]
