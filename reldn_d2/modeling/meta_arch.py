"""RelDN: a frozen detector, a predicate backbone and a relation head.

Shapes: N images, R entities and M relations of one image.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, detector_postprocess
from detectron2.structures import ImageList, Instances

from ..structures.relations import TASKS, remap_relations
from ..utils.registry import find_registered
from .backbone import (
    FrozenStages,
    build_predicate_backbone,
    maps_on_demand,
    prepare_folding,
    record_stages,
    set_folding,
)
from .detectors import (
    ENTITY_DETECTOR_REGISTRY,
    EntityDetector,
    build_entity_detector,
    label_entities,
)
from .precision import at_least_float32
from .relation_head import RelationHead, build_relation_head

__all__ = ["RelDN", "needs_images", "postprocess_relations", "predicts_relations"]

TRAIN_ENTITIES = ("proposals", "ground_truth")
PRECISIONS = {"": None, "float32": torch.float32, "bf16": torch.bfloat16}
"""Values of MODEL.RELDN.DETECTOR_PRECISION; the empty one is that of the trained part."""


@META_ARCH_REGISTRY.register()
class RelDN(nn.Module):
    """The relationship detection network (section 4, Fig 3).

    Entities and their features come from a detector that stays frozen (``conv_body_det``); the
    features of a pair come from a second backbone of the same structure (``conv_body_rel``), which
    starts from the detector's weights and is trained.
    """

    @configurable
    def __init__(
        self,
        *,
        detector: EntityDetector,
        relation_head: RelationHead,
        predicate_backbone: nn.Module | None = None,
        predicate_weights: str | None = None,
        task: str = "sgdet",
        train_entities: str = "proposals",
        entity_iou_threshold: float = 0.5,
        entities_per_image: int = 128,
        detector_precision: str = "",
        share_frozen_stages: bool = True,
        fold_normalization: bool = True,
        maps_on_demand: bool = True,
    ):
        """
        Args:
            detector: the frozen detector.
            relation_head: see :class:`reldn_d2.modeling.relation_head.RelationHead`.
            predicate_backbone: computes the feature maps of union boxes; None if the head needs
                none. With ``shared_stages`` its input is these maps of the detector, not images.
            predicate_weights: initial weights of the predicate backbone: a file or URL; None means
                the detector's weights, an empty string random ones.
            task: at test time, ``"sgdet"`` (predict everything), ``"sgcls"`` (ground-truth boxes
                are given, predict classes), ``"prdcls"`` (boxes and classes are given) or
                ``"preddet"`` (only the annotated pairs are scored).
            train_entities: ``"proposals"`` or ``"ground_truth"``.
            entity_iou_threshold, entities_per_image: see :func:`.detectors.label_entities`.
            detector_precision: one of :data:`PRECISIONS`, of the detector alone, in training and at
                test time.
            share_frozen_stages: compute stages once that are frozen and equal in both backbones,
                see :class:`.backbone.frozen_stages.FrozenStages`. Same values.
            fold_normalization: in training, see :mod:`.backbone.folding`. Same up to rounding.
            maps_on_demand: in training on the CPU, see :mod:`.backbone.lazy_fpn`. Same up to
                rounding.
        """
        super().__init__()
        for value, choices, key in (
            (detector_precision, tuple(PRECISIONS), "MODEL.RELDN.DETECTOR_PRECISION"),
            (task, TASKS, "TEST.RELATIONS.TASK"),
            (train_entities, TRAIN_ENTITIES, "MODEL.RELDN.TRAIN_ENTITIES"),
        ):
            if value not in choices:
                raise ValueError(f"{key} is '{value}'; known: {', '.join(choices)}")
        self.detector = detector
        self.predicate_backbone = predicate_backbone
        self.predicate_weights = predicate_weights
        self.relation_head = relation_head
        self.task = task
        self.train_entities = train_entities
        self.entity_iou_threshold = entity_iou_threshold
        self.entities_per_image = entities_per_image
        self.detector_precision = detector_precision
        self.fold_normalization = fold_normalization
        self.maps_on_demand = maps_on_demand
        prepare_folding(self)
        self._frozen_stages = FrozenStages() if share_frozen_stages else None

    @classmethod
    def from_config(cls, cfg: CfgNode):
        detector = build_entity_detector(cfg)
        cfg = detector.relation_config(cfg).clone()
        cfg.defrost()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = detector.num_classes
        predicate_backbone, predicate_shape = None, {}
        if detector.reads_images:
            predicate_backbone = build_predicate_backbone(cfg)
            predicate_shape = predicate_backbone.output_shape()
        head = build_relation_head(cfg, detector.output_shape(), predicate_shape)
        predicate = cfg.MODEL.RELDN.PREDICATE_BACKBONE
        return {
            "detector": detector,
            "predicate_backbone": predicate_backbone if head.needs_predicate_features else None,
            "predicate_weights": predicate.WEIGHTS if predicate.KIND == "other" else None,
            "relation_head": head,
            "task": cfg.TEST.RELATIONS.TASK,
            "train_entities": cfg.MODEL.RELDN.TRAIN_ENTITIES,
            "entity_iou_threshold": cfg.MODEL.RELDN.ENTITY_IOU_THRESHOLD,
            "entities_per_image": cfg.MODEL.RELDN.ENTITIES_PER_IMAGE,
            "detector_precision": cfg.MODEL.RELDN.DETECTOR_PRECISION,
            "share_frozen_stages": cfg.MODEL.RELDN.SHARE_FROZEN_STAGES,
            "fold_normalization": cfg.MODEL.RELDN.FOLD_NORMALIZATION,
            "maps_on_demand": cfg.MODEL.RELDN.MAPS_ON_DEMAND,
        }

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(chain(self.parameters(), self.buffers())).device

    def train(self, mode: bool = True):
        """Set the mode; the detector stays in eval mode, but folds like the trained backbone."""
        super().train(mode)
        set_folding(self, mode and self.fold_normalization)
        return self

    def forward(self, batched_inputs: list[dict]):
        """Compute losses in training, predictions otherwise.

        Args:
            batched_inputs: mapped dicts, one per image:

                * ``image``: (3, H, W) tensor; not needed if ``detector.reads_images`` is False.
                * ``instances``: ground truth ``gt_boxes``, ``gt_classes``, in pixels of ``image``;
                  for training and for all tasks but SGDET.
                * ``relations``: ground truth ``gt_pairs``, ``gt_predicates``; for training and
                  PREDDET.
                * ``derived``: in training, a dict of an image that comes again unchanged and
                  without ``image``; the model keeps there what it would compute again.
                * ``height``, ``width``: size that the output refers to; by default that of
                  ``image``.

        Returns:
            In training a dict of losses. Otherwise one dict per image with ``instances``
            (``pred_boxes``, ``scores``, ``pred_classes``) and ``relations`` (see
            :mod:`reldn_d2.structures.relations`), in the frame of ``height`` and ``width``.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.detector.preprocess(batched_inputs)
        with torch.no_grad():
            features, stages = self._detector_features(images)
            if all("derived" in x for x in batched_inputs):
                entities, targets = self._repeated_entities(batched_inputs)
            else:
                entities, targets = self._training_entities(batched_inputs, images, features)
        predicate_features = self._predicate_features(images, stages)
        return self.relation_head(features, predicate_features, entities, targets)

    def _training_entities(self, batched_inputs, images, features, generator=None):
        """Return the entities of each image, and its ground truth: instances and relations."""
        instances = self._ground_truth(batched_inputs, "training")
        device = self.device
        relations = [x["relations"].to(device) for x in batched_inputs]
        if self.train_entities == "proposals":
            with self._precision():
                proposals = self.detector.propose(batched_inputs, images, features)
        else:
            proposals = [x.gt_boxes[:0] for x in instances]
        entities = label_entities(
            proposals,
            instances,
            iou_threshold=self.entity_iou_threshold,
            max_entities=self.entities_per_image,
            generator=generator,
        )
        return entities, list(zip(instances, relations))

    def _repeated_entities(self, batched_inputs: list[dict]):
        """See :meth:`_training_entities`, for images that come again unchanged, without pixels.

        Entities that are not drawn at random are chosen once and then kept with the image; the
        relation head keeps its pairs in their ``_derived``.
        """
        entities, targets = [], []
        for x in batched_inputs:
            kept = x["derived"].get("entities")
            if kept is None:
                candidates = len(x["instances"])
                if self.train_entities == "proposals":
                    candidates += len(x.get("detections", ()))
                all_fit = candidates <= self.entities_per_image
                # A generator of its own, so that a resumed run, which has kept nothing yet, draws
                # the same from the default one as the interrupted run.
                own = torch.Generator(self.device) if all_fit else None
                images = self.detector.preprocess([x])
                chosen, target = self._training_entities([x], images, {}, own)
                kept = chosen[0], target[0]
                if all_fit:
                    kept[0]._derived = {}
                    x["derived"]["entities"] = kept
            entities.append(kept[0])
            targets.append(kept[1])
        return entities, targets

    def inference(self, batched_inputs: list[dict], do_postprocess: bool = True) -> list[dict]:
        """Predict; arguments and result as in :meth:`forward`.

        Args:
            batched_inputs: see :meth:`forward`.
            do_postprocess: scale boxes to ``height`` and ``width``; otherwise they stay in pixels
                of the network's input.
        """
        assert not self.training
        images = self.detector.preprocess(batched_inputs)
        features, stages = self._detector_features(images)
        with self._precision():
            entities = self._entities(batched_inputs, images, features)
        predicate_features = self._predicate_features(images, stages)
        options: dict[str, Any] = {
            "boxes_given": self.task != "sgdet",
            "classes_given": self.task not in ("sgdet", "sgcls"),
        }
        if self.task == "preddet":
            options["pairs"] = self._annotated_pairs(batched_inputs)
        predicted = self.relation_head(features, predicate_features, entities, **options)
        results = []
        for x, size, (found, related) in zip(batched_inputs, images.image_sizes, predicted):
            if do_postprocess:
                height, width = x.get("height", size[0]), x.get("width", size[1])
                found, related = postprocess_relations(found, related, height, width)
            results.append({"instances": found, "relations": related})
        return results

    def feature_maps(self, images: ImageList) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Compute the detector's and the predicate backbone's feature maps, (N, c, h, w) each."""
        features, stages = self._detector_features(images)
        return features, self._predicate_features(images, stages)

    def _detector_features(self, images: ImageList):
        """Compute the detector's feature maps, and those that the predicate backbone shares.

        Those for the detector's heads and the relation head are float32 or wider: Detectron2's
        RoIAlign rounds boxes to the type of its map.
        """
        later = self._later_backbone()
        names = getattr(later, "shared_stages", ())
        with record_stages(self.detector.backbone, names) as recorded, self._precision():
            features = at_least_float32(self.detector.extract_features(images))
        stages, inputs = recorded
        if later is not self.predicate_backbone and not (
            len(inputs) == 1 and inputs[0] is images.tensor
        ):
            stages = {}  # a detector of the user's, which computes them from something else
        if self.detector_precision:
            stages = at_least_float32(stages)
        return features, stages

    def _precision(self) -> AbstractContextManager:
        """Return a context in which the detector has its own precision, if it has one."""
        dtype, kind = PRECISIONS[self.detector_precision], self.device.type
        if dtype is None:  # as outside
            return nullcontext()
        return torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def _later_backbone(self) -> nn.Module | None:
        """Return the predicate backbone without the stages that the detector computes for it."""
        backbone = self.predicate_backbone
        if self._frozen_stages is None or self.detector_precision or backbone is None:
            return backbone
        if hasattr(backbone, "shared_stages"):
            return backbone
        return self._frozen_stages.later_backbone(self.detector.backbone, backbone) or backbone

    def _predicate_features(self, images: ImageList, stages: dict[str, Tensor]):
        """Compute the predicate backbone's feature maps; None without one."""
        if self.predicate_backbone is None:
            return None
        backbone, x = self.predicate_backbone, images.tensor
        if stages:
            backbone, x = self._later_backbone(), stages
        if self.training and self.maps_on_demand and images.tensor.device.type == "cpu":
            return maps_on_demand(backbone, x)
        return backbone(x)

    def _ground_truth(self, batched_inputs: list[dict], purpose: str) -> list[Instances]:
        """Return the ground-truth instances on the model's device; raise if any are missing."""
        for x in batched_inputs:
            relations_needed = self.training or self.task == "preddet"
            if "instances" not in x or (relations_needed and "relations" not in x):
                raise ValueError(
                    f"{purpose} needs ground truth, but image {x.get('image_id', '?')} "
                    f"({x.get('file_name', 'no file name')}) has no 'instances' or no "
                    "'relations'. Use reldn_d2.data.RelationDatasetMapper on an annotated dataset."
                )
        device = self.device
        return [x["instances"].to(device) for x in batched_inputs]

    def _annotated_pairs(self, batched_inputs: list[dict]) -> list[Tensor]:
        """Return the distinct (P, 2) pairs of entities with an annotated relation, by image."""
        self._ground_truth(batched_inputs, f"task {self.task}")
        return [x["relations"].gt_pairs.to(self.device).unique(dim=0) for x in batched_inputs]

    def _entities(self, batched_inputs, images, features) -> list[Instances]:
        """Return detections (SGDET) or ground-truth boxes in their place (other tasks)."""
        if self.task == "sgdet":
            return at_least_float32(self.detector.detect(batched_inputs, images, features))
        given = self._ground_truth(batched_inputs, f"task {self.task}")
        boxes = [x.gt_boxes for x in given]
        if self.task != "sgcls":
            classes = [x.gt_classes for x in given]
            # The predictor's users may give scores; ground truth has none.
            scores = [
                x.scores if x.has("scores") else torch.ones(len(x), device=self.device)
                for x in given
            ]
        else:
            classified = self.detector.classify(batched_inputs, images, features, boxes)
            best = [x.max(dim=1) for x in at_least_float32(classified)]
            scores, classes = [x.values for x in best], [x.indices for x in best]
        entities = []
        for x, image_boxes, image_scores, image_classes in zip(given, boxes, scores, classes):
            instances = Instances(x.image_size)
            instances.pred_boxes = image_boxes
            instances.scores = image_scores
            instances.pred_classes = image_classes
            entities.append(instances)
        return entities


def predicts_relations(cfg: CfgNode) -> bool:
    """Tell whether the config's meta-architecture is RelDN or a subclass, not just a detector."""
    key, name = "MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE
    meta_arch = find_registered(META_ARCH_REGISTRY, name, key)
    return isinstance(meta_arch, type) and issubclass(meta_arch, RelDN)


def needs_images(cfg: CfgNode) -> bool:
    """Tell whether the config's model reads images.

    Every model does, except a RelDN whose boxes come from files or ground truth and whose head
    reads no pixels.
    """
    if not predicts_relations(cfg) or cfg.MODEL.RELDN.DETECTOR == "auto":
        return True
    key, name = "MODEL.RELDN.DETECTOR", cfg.MODEL.RELDN.DETECTOR
    detector = find_registered(ENTITY_DETECTOR_REGISTRY, name, key)
    return not hasattr(detector, "needs_images") or detector.needs_images(cfg)


def postprocess_relations(
    instances: Instances, relations: Instances, height: int, width: int
) -> tuple[Instances, Instances]:
    """Scale an image's result to its output size; drop empty boxes and their relations.

    Args:
        instances: R entities in pixels of the network's input.
        relations: relations between them.
        height, width: size that the result refers to.

    Returns:
        Instances and relations in the frame of ``height`` and ``width``.
    """
    # detector_postprocess drops empty boxes without saying which: carry each entity's index along.
    indexed = Instances(instances.image_size, **instances.get_fields())
    indexed.pred_boxes = instances.pred_boxes.clone()  # detector_postprocess scales in place
    indexed.set("entity_index", torch.arange(len(instances), device=relations.pairs.device))
    scaled = detector_postprocess(indexed, height, width)
    index: Tensor = scaled.get("entity_index")
    scaled.remove("entity_index")
    kept = torch.zeros(len(instances), dtype=torch.bool, device=index.device)
    kept[index] = True
    return scaled, remap_relations(relations, kept, (height, width))
