"""Predicate classifiers: from encoded entities and pairs to the logits of predicates.

Shapes: R entities of the batch, P pairs, C predicates, d values per ROI vector, X values per
contextual vector; the last of C + 1 logits is "no relationship".
"""

from abc import ABC, abstractmethod
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry

from ...config import reads_pixels
from ...utils.registry import build_registered
from .joint import JointModule
from .pairs import EntityBatch, PairBatch
from .predictors import SemanticModule, SpatialModule, VisualModule, spatial_features

__all__ = [
    *("MODULES", "PredicateClassifier", "RELATION_PREDICTOR_REGISTRY", "RelDNPredictor"),
    "build_predicate_classifier",
]

RELATION_PREDICTOR_REGISTRY = Registry("RELATION_PREDICTOR")
RELATION_PREDICTOR_REGISTRY.__doc__ = """
Registry for classifiers of predicates, subclasses of :class:`PredicateClassifier`.

The registered object is called with ``obj(cfg, vector_size, context_size)``: d, the size of the
vectors of subjects, objects and union boxes (0 if ``MODEL.ROI_RELATION_HEAD.VISUAL`` is off), and
X, that of contextual vectors (0 without an entity context).
"""

MODULES = ("semantic", "spatial", "joint", "visual")


class PredicateClassifier(nn.Module, ABC):
    """Scores the predicates of pairs. A subclass implements :meth:`forward`.

    A :class:`.predictors.SemanticModule` under the name ``semantic`` gets its frequencies from the
    training set, as RelDN's does.

    Attributes:
        reads_context: whether the contextual vectors have an effect on the logits.
        can_shortlist: whether :meth:`shortlist_logits` is there.
    """

    reads_context: bool = True
    can_shortlist: bool = False

    @abstractmethod
    def forward(self, entities: EntityBatch, pairs: PairBatch) -> Tensor:
        """Score the pairs; called once per training step, and once per chunk of pairs in testing.

        Args:
            entities: the R encoded entities. ``subject_vectors`` and ``object_vectors`` (R, d) are
                there with ``VISUAL.SPO`` or the skip of that side, ``context`` (R, X) with an
                entity context.
            pairs: the P pairs, P may be 0; ``union_vectors()`` needs ``VISUAL.SPO``.

        Returns:
            (P, C + 1) logits.
        """

    def shortlist_logits(self, entities: EntityBatch, pairs: PairBatch) -> Tensor:
        """Score the pairs at less cost, to choose those of an image with very many given pairs.

        Arguments and result as in :meth:`forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no cheaper logits.")


@RELATION_PREDICTOR_REGISTRY.register()
class RelDNPredictor(PredicateClassifier):
    """RelDN's classifier, the fusion of its modules: their logits add up (Eq 12)."""

    @configurable
    def __init__(
        self,
        *,
        semantic: SemanticModule | None = None,
        spatial: SpatialModule | None = None,
        joint: JointModule | None = None,
        visual: VisualModule | None = None,
    ):
        """
        Args:
            semantic, spatial, joint, visual: the four modules; None switches one off.

        Raises:
            ValueError: if all modules are off.
        """
        super().__init__()
        if semantic is None and spatial is None and joint is None and visual is None:
            raise ValueError(
                "The relation head has no module left: switch on at least one of SEMANTIC.ENABLED, "
                "SPATIAL.ENABLED, JOINT.ENABLED, VISUAL.SPO, VISUAL.SUBJECT_SKIP or "
                "VISUAL.OBJECT_SKIP under MODEL.ROI_RELATION_HEAD."
            )
        self.semantic = semantic
        self.spatial = spatial
        self.joint = joint
        self.visual = visual

    @classmethod
    def from_config(cls, cfg: CfgNode, vector_size: int, context_size: int) -> dict[str, Any]:
        head = cfg.MODEL.ROI_RELATION_HEAD
        num_classes, num_predicates = cfg.MODEL.ROI_HEADS.NUM_CLASSES, head.NUM_PREDICATES
        ret: dict[str, Any] = {}
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
                shrinkage=head.JOINT.EMBEDDING_SHRINKAGE,
                context_size=context_size,
            )
        if reads_pixels(cfg):
            ret["visual"] = VisualModule(
                vector_size,
                num_predicates,
                spo=head.VISUAL.SPO,
                subject_skip=head.VISUAL.SUBJECT_SKIP,
                object_skip=head.VISUAL.OBJECT_SKIP,
            )
        return ret

    @property
    def reads_context(self) -> bool:
        """Whether a module reads contextual vectors: the joint one, or the visual one."""
        return self.joint is not None or self.visual is not None

    @property
    def can_shortlist(self) -> bool:
        """Whether there is a visual module, and another one that can choose its pairs."""
        others = any(x is not None for x in (self.semantic, self.spatial, self.joint))
        return self.visual is not None and others

    def module_logits(
        self, entities: EntityBatch, pairs: PairBatch, visual: bool = True
    ) -> dict[str, Tensor]:
        """Compute the logits of each module, (P, C + 1), by its name in :data:`MODULES`.

        Args:
            entities, pairs: see :meth:`forward`.
            visual: whether to compute those of the visual module, if there is one.
        """
        logits = {}
        subjects, objects = pairs.subjects, pairs.objects
        classes = entities.classes[subjects], entities.classes[objects]
        if self.semantic is not None:
            logits["semantic"] = self.semantic(*classes)
        if self.spatial is not None or self.joint is not None:
            sizes = entities.image_sizes[entities.image[subjects]]
            features = spatial_features(entities.boxes[subjects], entities.boxes[objects], sizes)
            if self.spatial is not None:
                logits["spatial"] = self.spatial(features)
            if self.joint is not None:
                context = None
                if entities.context is not None:
                    context = (entities.context, subjects, objects)
                logits["joint"] = self.joint(*classes, features, context)
        if self.visual is not None and visual:
            vectors = union = None
            if pairs.encode_unions is not None:
                vectors, union = pairs.encode_unions()
            of_entities = entities.subject_vectors, entities.object_vectors
            logits["visual"] = self.visual(*of_entities, vectors, subjects, objects, union)
        return logits

    def fuse(self, logits: dict[str, Tensor]) -> Tensor:
        """Fuse the modules' logits: their sum, (P, C + 1)."""
        return reduce(torch.add, logits.values())

    def forward(self, entities: EntityBatch, pairs: PairBatch) -> Tensor:
        return self.fuse(self.module_logits(entities, pairs))

    def shortlist_logits(self, entities: EntityBatch, pairs: PairBatch) -> Tensor:
        return self.fuse(self.module_logits(entities, pairs, visual=False))


def build_predicate_classifier(
    cfg: CfgNode, vector_size: int, context_size: int
) -> PredicateClassifier:
    """Build the classifier named by ``MODEL.ROI_RELATION_HEAD.PREDICTOR``.

    Args:
        cfg: config.
        vector_size, context_size: d and X, see :data:`RELATION_PREDICTOR_REGISTRY`.
    """
    key, name = "MODEL.ROI_RELATION_HEAD.PREDICTOR", cfg.MODEL.ROI_RELATION_HEAD.PREDICTOR
    registry, base = RELATION_PREDICTOR_REGISTRY, PredicateClassifier
    return build_registered(registry, name, key, base, cfg, vector_size, context_size)
