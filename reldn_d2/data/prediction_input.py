"""From an image, and boxes or detections that the user gives, to the input of a model.

Shapes: R boxes of one image. Boxes are XYXY in pixels of the image as it was read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances

from ..structures.given_boxes import (
    GivenBoxes,
    GivenEntities,
    ModelClasses,
    check_detections,
    check_inside,
    check_size,
    to_array,
)
from ..utils.image_io import ImageError, from_rgb
from .boxes_only import spanned_size
from .detection_files import transform_detections

__all__ = ["InputPreparation"]


class InputPreparation:
    """Prepares one image after the other as a model's test images are prepared."""

    def __init__(
        self, cfg: CfgNode, classes: ModelClasses, reads_images: bool, takes_detections: bool
    ):
        """
        Args:
            cfg: config of the model, for ``INPUT``.
            classes: of the model.
            reads_images: whether the model reads pixels.
            takes_detections: whether it reads detections instead of detecting entities itself.
        """
        self.image_format = cfg.INPUT.FORMAT
        self.classes = classes
        self.reads_images = reads_images
        self.takes_detections = takes_detections
        self._resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    def __call__(
        self,
        rgb: np.ndarray | None,
        boxes: GivenBoxes | None = None,
        classes: Sequence[int | str] | None = None,
        scores: Sequence[float] | None = None,
        detections: Mapping[str, Any] | None = None,
        name: str = "image",
        size: Sequence[int] | None = None,
    ) -> dict:
        """Return the model's input for an (H, W, 3) image, with the given boxes if there are any.

        The result has no ``image`` if the model reads no pixels.

        Args:
            rgb: the image; None if the model reads no pixels and there is none.
            boxes, classes, scores, detections, size: as for
                :class:`reldn_d2.predictor.RelationPredictor`, of one image.
            name: of the image, for messages.

        Raises:
            ImageError: unusable boxes, classes, scores or detections.
        """
        if rgb is None and self.reads_images:
            raise ImageError(f"{name}: this model reads pixels; give an image")
        if rgb is not None and size is not None:
            raise ImageError(f"{name}: size was given with an image, which has its own size")
        arrays = None
        if detections is not None:
            if not self.takes_detections:
                raise ImageError(
                    f"{name}: this model has its own detector and takes no detections; give boxes, "
                    "classes and scores instead"
                )
            arrays = check_detections(detections, self.classes, name)
        if rgb is None:
            height, width = check_size(size, name) or spanned_size(
                [to_array(x, name) for x in (boxes, arrays and arrays["boxes"]) if x is not None]
            )
        else:
            height, width = rgb.shape[:2]
        if arrays is not None:
            check_inside(arrays["boxes"], (height, width), f"{name}: detections")
        result: dict[str, Any] = {"height": height, "width": width, "file_name": name}
        transform: T.Transform = T.NoOpTransform()
        size = height, width
        if self.reads_images:
            transform = self._transform(height, width)
            pixels = np.ascontiguousarray(from_rgb(rgb, self.image_format))
            resized = transform.apply_image(pixels).transpose(2, 0, 1)
            result["image"] = torch.as_tensor(np.ascontiguousarray(resized))
            size = tuple(resized.shape[1:])
        if arrays is not None:
            result["detections"] = transform_detections(arrays, transform, size)
        if boxes is None:
            for key, values in (("classes", classes), ("scores", scores)):
                if values is not None:
                    raise ImageError(f"{name}: {key} were given without boxes")
            return result
        given = GivenEntities.from_user(boxes, classes, scores, (height, width), self.classes, name)
        count = len(given.boxes)
        scaled = transform.apply_box(given.clipped) if count else given.clipped
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.as_tensor(scaled, dtype=torch.float32))
        # Without classes, the detector classifies the boxes and ignores these.
        ids = np.zeros(count, np.int64) if given.classes is None else given.classes
        instances.gt_classes = torch.as_tensor(ids)
        if given.scores is not None:
            instances.scores = torch.as_tensor(given.scores)
        result.update(instances=instances, given_boxes=given.boxes)
        return result

    def _transform(self, height: int, width: int) -> T.Transform:
        """Resize as in evaluation, but keep at least one pixel of a very narrow image."""
        resize = self._resize.get_transform(np.empty((height, width, 0), dtype=np.uint8))
        if not isinstance(resize, T.ResizeTransform):
            return resize
        return T.ResizeTransform(
            height, width, max(resize.new_h, 1), max(resize.new_w, 1), resize.interp
        )
