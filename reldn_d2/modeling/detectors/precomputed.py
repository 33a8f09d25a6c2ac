"""Detections of any detector, read from a file; a backbone of Detectron2 computes the features.

If the relation head reads no pixels there is no backbone, and no image is needed.

Shapes: R boxes of one image, K entity classes, Q detections of one image. Boxes are XYXY in pixels
of the network's input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.roi_heads.box_head import build_box_head
from detectron2.structures import Boxes, ImageList, Instances

from ...config import reads_pixels
from .base import ENTITY_DETECTOR_REGISTRY, EntityDetector, classify_by_overlap

__all__ = ["FeatureExtractor", "NoFeatures", "PrecomputedDetector"]


class FeatureExtractor(nn.Module):
    """The parts of a ``GeneralizedRCNN`` that compute features, under their names there."""

    def __init__(
        self,
        backbone: nn.Module,
        box_head: nn.Module | None,
        pixel_mean: list[float],
        pixel_std: list[float],
    ):
        """
        Args:
            backbone: computes the feature maps.
            box_head: initializes the relation box heads; None if there is none.
            pixel_mean, pixel_std: for normalizing images.
        """
        super().__init__()
        self.backbone = backbone
        self.roi_heads = nn.Module()
        if box_head is not None:
            self.roi_heads.box_head = box_head
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalize, pad and batch the images of mapped dicts."""
        images = [x["image"].to(self.pixel_mean.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)


class NoFeatures(nn.Module):
    """Takes the place of :class:`FeatureExtractor` if no module reads pixels; has no weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("no_pixels", torch.zeros(0), persistent=False)  # knows the device

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Return the sizes of the images of mapped dicts, with an (N, 0) tensor of pixels.

        The size of an image is that of its ``instances`` or ``detections``, or else ``height`` and
        ``width``.
        """
        sizes = []
        for x in batched_inputs:
            boxes = x.get("instances", x.get("detections"))
            sizes.append((x["height"], x["width"]) if boxes is None else boxes.image_size)
        return ImageList(self.no_pixels.expand(len(sizes), 0), sizes)


@ENTITY_DETECTOR_REGISTRY.register()
class PrecomputedDetector(EntityDetector):
    """Reads the ``"detections"`` of each image, which the data loaders load from files.

    See ``DATASETS.DETECTION_FILES_TRAIN`` and ``DETECTION_FILES_TEST``. The checkpoint provides the
    backbone and, with ``MODEL.RELDN.PRECOMPUTED_BOX_HEAD``, the box head; other weights of a
    detector's checkpoint are not used. Given boxes (SGCLS) are classified by the detections that
    overlap them, see :func:`.base.classify_by_overlap`.

    If no module of the relation head reads pixels, there is no backbone and no box head, no image
    is read, and no checkpoint is needed.
    """

    backbone_only_hint = (
        "If it has no box head, set MODEL.RELDN.PRECOMPUTED_BOX_HEAD to False: the relation box "
        "heads then start from random weights."
    )

    @configurable
    def __init__(
        self,
        model: FeatureExtractor | NoFeatures,
        num_classes: int,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ):
        """
        Args:
            model: computes the features, if there are any.
            num_classes: K.
            score_threshold: only detections with a higher score are kept at test time.
            max_detections: max detections per image at test time, those with the highest scores.
        """
        super().__init__(model)
        self._num_classes = num_classes
        self.score_threshold = score_threshold
        self.max_detections = max_detections

    @classmethod
    def from_config(cls, cfg: CfgNode):
        return {
            "model": cls._build_features(cfg) if reads_pixels(cfg) else NoFeatures(),
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @staticmethod
    def _build_features(cfg: CfgNode) -> FeatureExtractor:
        backbone, box_head = build_backbone(cfg), None
        if cfg.MODEL.RELDN.PRECOMPUTED_BOX_HEAD:
            size = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
            channels = backbone.output_shape()[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
            box_head = build_box_head(cfg, ShapeSpec(channels=channels, height=size, width=size))
        return FeatureExtractor(backbone, box_head, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)

    @classmethod
    def needs_images(cls, cfg: CfgNode) -> bool:
        return reads_pixels(cfg)

    @property
    def reads_images(self) -> bool:
        return isinstance(self.model, FeatureExtractor)

    @property
    def num_classes(self) -> int:
        return self._num_classes

    @property
    def backbone(self) -> nn.Module | None:
        """Return the backbone; None without images."""
        return self.model.backbone if self.reads_images else None

    @property
    def box_head(self) -> nn.Module | None:
        return getattr(self.model.roi_heads, "box_head", None) if self.reads_images else None

    def output_shape(self) -> dict[str, ShapeSpec]:
        return super().output_shape() if self.reads_images else {}

    def extract_features(self, images: ImageList) -> dict[str, Tensor]:
        return super().extract_features(images) if self.reads_images else {}

    def _read(self, batched_inputs: list[dict], device: torch.device) -> list[Instances]:
        """Return the detections of each image; raise if any image has none attached."""
        for x in batched_inputs:
            if "detections" not in x:
                raise ValueError(
                    f"Image {x.get('image_id', '?')} ({x.get('file_name', 'no file name')}) came "
                    "without 'detections'. Name a file for each dataset in "
                    "DATASETS.DETECTION_FILES_TRAIN and DATASETS.DETECTION_FILES_TEST, or put "
                    "Instances with pred_boxes, scores and pred_classes under that key."
                )
        return [x["detections"].to(device) for x in batched_inputs]

    def propose(self, batched_inputs, images, features) -> list[Boxes]:
        return [x.pred_boxes for x in self._read(batched_inputs, images.device)]

    def detect(self, batched_inputs, images, features) -> list[Instances]:
        results = []
        for found in self._read(batched_inputs, images.device):
            found = found[found.scores > self.score_threshold]
            best = found.scores.argsort(descending=True, stable=True)[: self.max_detections]
            results.append(found[best])
        return results

    def classify(self, batched_inputs, images, features, boxes) -> list[Tensor]:
        results = []
        for given, found in zip(boxes, self._read(batched_inputs, images.device)):
            classes = F.one_hot(found.pred_classes, self.num_classes)
            scores = classes * found.scores[:, None]
            results.append(classify_by_overlap(given, found.pred_boxes, scores))
        return results
