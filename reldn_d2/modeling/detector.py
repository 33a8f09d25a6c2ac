"""What RelDN needs from a detector, and who gives it.

Shapes: N images, R boxes of one image, K entity classes. Boxes are XYXY in pixels of the network's
input.

A new kind of detector plugs in as a subclass of :class:`EntityDetector` in
:data:`ENTITY_DETECTOR_REGISTRY`; the rest of the package knows this interface only.
"""

from abc import ABC, abstractmethod
from typing import Dict, List, Optional

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.registry import Registry

from .relation_head.sampling import sample_mask

__all__ = [
    "ENTITY_DETECTOR_REGISTRY",
    "EntityDetector",
    "GeneralizedRCNNDetector",
    "build_entity_detector",
    "label_entities",
]

ENTITY_DETECTOR_REGISTRY = Registry("ENTITY_DETECTOR")
ENTITY_DETECTOR_REGISTRY.__doc__ = """
Registry for adapters from a kind of detector to :class:`EntityDetector`.

The registered object is called with ``obj(cfg)``.
"""


class EntityDetector(nn.Module, ABC):
    """A frozen detector: always in eval mode, without gradients.

    Attributes:
        model: the detector itself, a Detectron2 meta-architecture; checkpoints load into it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.model.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True):
        """Stay in eval mode whatever ``mode`` is: no statistics move, no dropout acts."""
        del mode
        return super().train(False)

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """K."""

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The backbone; its weights initialise the predicate backbone."""

    @property
    def box_head(self) -> Optional[nn.Module]:
        """The head whose weights initialise the relation box heads; None if there is none."""
        return None

    def output_shape(self) -> Dict[str, ShapeSpec]:
        """Shapes of the feature maps."""
        return self.backbone.output_shape()

    @abstractmethod
    def preprocess(self, batched_inputs: List[dict]) -> ImageList:
        """Normalise, pad and batch the images of mapped dicts."""

    def extract_features(self, images: ImageList) -> Dict[str, Tensor]:
        """Feature maps, (N, c, h, w) each."""
        return self.backbone(images.tensor)

    @abstractmethod
    def propose(
        self, batched_inputs: List[dict], images: ImageList, features: Dict[str, Tensor]
    ) -> List[Boxes]:
        """Candidate boxes of each image, of no class; training entities are chosen among them."""

    @abstractmethod
    def detect(
        self, batched_inputs: List[dict], images: ImageList, features: Dict[str, Tensor]
    ) -> List[Instances]:
        """Detections of each image: ``pred_boxes``, ``scores``, ``pred_classes``."""

    @abstractmethod
    def classify(self, features: Dict[str, Tensor], boxes: List[Boxes]) -> List[Tensor]:
        """Class probabilities (R, K) of given boxes of each image (task SGCLS)."""


@ENTITY_DETECTOR_REGISTRY.register()
class GeneralizedRCNNDetector(EntityDetector):
    """``GeneralizedRCNN`` with ``StandardROIHeads``: Faster and Mask R-CNN with FPN."""

    @configurable
    def __init__(self, model: nn.Module):
        """
        Args:
            model: a built ``GeneralizedRCNN``.

        Raises:
            TypeError: its ROI heads have no box pooler, box head and box predictor of their own.
        """
        missing = [
            name
            for name in ("box_pooler", "box_head", "box_predictor", "box_in_features")
            if not hasattr(model.roi_heads, name)
        ]
        if missing or isinstance(model.roi_heads.box_head, nn.ModuleList):
            raise TypeError(
                f"GeneralizedRCNNDetector works with StandardROIHeads, but these are "
                f"{type(model.roi_heads).__name__}. Register an EntityDetector of your own for "
                "them and name it in MODEL.RELDN.DETECTOR."
            )
        super().__init__(model)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        return {"model": META_ARCH_REGISTRY.get("GeneralizedRCNN")(cfg)}

    @property
    def num_classes(self) -> int:
        return self.model.roi_heads.num_classes

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone

    @property
    def box_head(self) -> nn.Module:
        return self.model.roi_heads.box_head

    def preprocess(self, batched_inputs: List[dict]) -> ImageList:
        return self.model.preprocess_image(batched_inputs)

    def _proposals(self, batched_inputs, images, features) -> List[Instances]:
        if self.model.proposal_generator is None:
            return [x["proposals"].to(images.device) for x in batched_inputs]
        return self.model.proposal_generator(images, features, None)[0]

    def propose(self, batched_inputs, images, features) -> List[Boxes]:
        return [x.proposal_boxes for x in self._proposals(batched_inputs, images, features)]

    def detect(self, batched_inputs, images, features) -> List[Instances]:
        proposals = self._proposals(batched_inputs, images, features)
        return self.model.roi_heads(images, features, proposals, None)[0]

    def classify(self, features: Dict[str, Tensor], boxes: List[Boxes]) -> List[Tensor]:
        heads = self.model.roi_heads
        pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
        predictions = heads.box_predictor(heads.box_head(pooled))
        return [x[:, :-1] for x in heads.box_predictor.predict_probs(predictions, boxes)]


def build_entity_detector(cfg: CfgNode) -> EntityDetector:
    """Build the adapter that ``cfg.MODEL.RELDN.DETECTOR`` names, with its detector."""
    return ENTITY_DETECTOR_REGISTRY.get(cfg.MODEL.RELDN.DETECTOR)(cfg)


@torch.no_grad()
def label_entities(
    proposals: List[Boxes], targets: List[Instances], *, iou_threshold: float, most: int
) -> List[Instances]:
    """The training entities: boxes that match a ground-truth box, with its class (section 5).

    The ground-truth boxes are appended to the proposals; of those that match, up to ``most`` are
    drawn at random.

    Args:
        proposals: candidate boxes of each image; may be empty.
        targets: ``gt_boxes`` and ``gt_classes`` of each image.
        iou_threshold: from which IoU on a box matches.
        most: at most so many an image.

    Returns:
        Of each image ``proposal_boxes`` and ``gt_classes``.
    """
    entities = []
    for boxes, target in zip(proposals, targets):
        boxes = Boxes.cat([boxes, target.gt_boxes])
        result = Instances(target.image_size)
        if len(target) == 0:
            chosen = torch.zeros(0, dtype=torch.int64, device=boxes.device)
            matched = chosen
        else:
            overlap, matched = pairwise_iou(target.gt_boxes, boxes).max(dim=0)
            drawn = sample_mask(overlap >= iou_threshold, most, most)
            chosen = drawn.nonzero().squeeze(1)
        result.proposal_boxes = boxes[chosen]
        result.gt_classes = target.gt_classes[matched[chosen]]
        entities.append(result)
    return entities
