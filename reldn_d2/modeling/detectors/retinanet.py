"""RetinaNet and FCOS: one-stage detectors, without ROI heads.

Shapes: N images, R boxes of one image, K entity classes, Q predictions of one image (one for each
anchor).
"""

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes, Instances

from ..precision import at_least_float32
from .base import (
    ENTITY_DETECTOR_REGISTRY,
    EntityDetector,
    classify_by_overlap,
    is_meta_architecture,
)

__all__ = ["FCOSDetector", "RetinaNetDetector"]

_NUM_PROPOSALS = 300  # per image


@ENTITY_DETECTOR_REGISTRY.register()
class RetinaNetDetector(EntityDetector):
    """Detectron2's ``RetinaNet``.

    There is no box head to copy: the relation box heads (by default two fully connected layers, as
    in an FPN detector) start from random weights and learn at the full rate. They pool from the
    feature maps up to stride 32. Given boxes (SGCLS) are classified by the dense head's predictions
    that overlap them, see :func:`.base.classify_by_overlap`, because a dense head cannot classify a
    given box.
    """

    num_classes_key = "MODEL.RETINANET.NUM_CLASSES"
    meta_architecture: type[nn.Module] = RetinaNet

    @configurable
    def __init__(self, model: nn.Module):
        """
        Args:
            model: a built ``RetinaNet``.
        """
        super().__init__(model)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        return {"model": META_ARCH_REGISTRY.get("RetinaNet")(cfg)}

    @classmethod
    def accepts(cls, cfg: CfgNode) -> bool:
        """Tell whether the config's detector is a RetinaNet.

        If its meta-architecture is not known, it is one if nothing chooses ROI heads and the
        backbone has the maps of the dense head but not those of ROI heads.
        """
        name = cfg.MODEL.RELDN.DETECTOR_META_ARCHITECTURE
        if name:
            return is_meta_architecture(name, RetinaNet)
        if cfg.MODEL.ROI_HEADS.NAME != get_cfg().MODEL.ROI_HEADS.NAME:
            return False
        with torch.device("meta"):  # takes neither memory nor the time to initialize weights
            maps = set(build_backbone(cfg).output_shape())
        return maps.issuperset(cfg.MODEL.RETINANET.IN_FEATURES) and not maps.issuperset(
            cfg.MODEL.ROI_HEADS.IN_FEATURES
        )

    @classmethod
    def accepts_model(cls, model: nn.Module) -> bool:
        return isinstance(model, cls.meta_architecture)

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    def relation_config(self, cfg: CfgNode) -> CfgNode:
        cfg = cfg.clone()
        cfg.defrost()
        model, shapes = cfg.MODEL, self.output_shape()
        model.ROI_HEADS.IN_FEATURES = [
            name for name in self.model.head_in_features if shapes[name].stride <= 32
        ]
        if not model.ROI_BOX_HEAD.NAME:
            model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
            model.ROI_BOX_HEAD.NUM_FC = model.ROI_BOX_HEAD.NUM_FC or 2
            model.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
        return cfg

    def _head(self, features) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return the maps of the dense head, and its predictions by kind and map.

        They are float32: sigmoids in half precision would tie, and FCOS rounds boxes to their type.
        """
        maps = [features[name] for name in self.model.head_in_features]
        return maps, at_least_float32(self.model.head(maps))

    def _predict(self, features) -> tuple[list[Boxes], list[Tensor], list[Tensor]]:
        """Return anchors, (N, Q, K) class probabilities and (N, Q, 4) deltas of each map."""
        maps, (logits, deltas) = self._head(features)
        probabilities = [permute_to_N_HWA_K(x, self.num_classes).sigmoid() for x in logits]
        deltas = [permute_to_N_HWA_K(x, 4) for x in deltas]
        return self.model.anchor_generator(maps), probabilities, deltas

    def _dense(self, features) -> tuple[list[Tensor], list[Tensor]]:
        """Predict (Q, 4) boxes and their (Q, K) class probabilities for each image."""
        anchors, probabilities, deltas = self._predict(features)
        positions = Boxes.cat(anchors).tensor
        transform = self.model.box2box_transform
        boxes = [transform.apply_deltas(x, positions) for x in torch.cat(deltas, dim=1)]
        return boxes, list(torch.cat(probabilities, dim=1))

    def propose(self, batched_inputs, images, features) -> list[Boxes]:
        """Return the predictions with the highest class probability, before suppression."""
        proposals = []
        for boxes, probabilities, size in zip(*self._dense(features), images.image_sizes):
            best = probabilities.amax(dim=1).topk(min(_NUM_PROPOSALS, len(boxes))).indices
            found = Boxes(boxes[best])
            found.clip(size)
            proposals.append(found[found.nonempty()])
        return proposals

    def detect(self, batched_inputs, images, features) -> list[Instances]:
        found = self.model.forward_inference(images, *self._head(features))
        for x in found:
            x.pred_boxes.clip(x.image_size)  # Detectron2 does this when it scales the result
        return [x[x.pred_boxes.nonempty()] for x in found]

    def classify(self, batched_inputs, images, features, boxes) -> list[Tensor]:
        return [
            classify_by_overlap(given, Boxes(found), probabilities)
            for given, found, probabilities in zip(boxes, *self._dense(features))
        ]


@ENTITY_DETECTOR_REGISTRY.register()
class FCOSDetector(RetinaNetDetector):
    """Detectron2's ``FCOS``, which only a LazyConfig can describe.

    As in its own inference, the score of a class is the geometric mean of its probability and the
    center-ness. Everything else is as for RetinaNet.
    """

    num_classes_key = "num_classes of the FCOS"
    meta_architecture = FCOS

    @classmethod
    def from_config(cls, cfg: CfgNode):
        raise ValueError(
            "MODEL.RELDN.DETECTOR is 'FCOSDetector', but Detectron2's FCOS has no YAML keys: name "
            "its LazyConfig in MODEL.RELDN.DETECTOR_LAZY_CONFIG."
        )

    @classmethod
    def accepts(cls, cfg: CfgNode) -> bool:
        return False

    def _predict(self, features) -> tuple[list[Boxes], list[Tensor], list[Tensor]]:
        maps, (logits, deltas, centers) = self._head(features)
        scores = []
        for x, center in zip(logits, centers):
            probabilities = permute_to_N_HWA_K(x, self.num_classes).sigmoid()
            scores.append((probabilities * permute_to_N_HWA_K(center, 1).sigmoid()).sqrt())
        return self.model.anchor_generator(maps), scores, [permute_to_N_HWA_K(x, 4) for x in deltas]
