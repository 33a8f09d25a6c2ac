"""From an image, and boxes or detections that the user gives, to the input of a model.

Shapes: R boxes of one image. Boxes are XYXY in pixels of the image as it was read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances

from ..structures.class_matching import leave_out_unknown
from ..structures.given_boxes import (
    GivenBoxes,
    GivenEntities,
    ModelClasses,
    check_detections,
    check_inside,
    check_size,
    to_array,
)
from ..utils.image_io import ImageError, OneImage, from_rgb, load_rgb
from .boxes_only import spanned_size
from .detection_files import transform_detections

__all__ = ["ImageInput", "InputPreparation", "InputReader"]


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


class ImageInput(NamedTuple):
    """One prepared image.

    Attributes:
        record: the model's input.
        task: "sgdet", or "sgcls" or "prdcls" with given boxes or given boxes and classes.
        file_name: of the image, if it came from a file.
        left_out: class names of given boxes that the model does not have, by their index.
    """

    record: dict[str, Any]
    task: str
    file_name: str | None
    left_out: dict[int, str]

    @property
    def batch_key(self) -> tuple:
        """What the images of one batch have in common: the task and the size of the input.

        Images of other sizes would be padded, which moves detections a little.
        """
        image = self.record.get("image")
        return self.task, None if image is None else tuple(image.shape)


class InputReader:
    """Reads and prepares images for a predictor: all that happens before the model runs.

    It has no model and can be pickled, so that worker processes can do this work.
    """

    def __init__(self, prepare: InputPreparation, unknown_classes: str):
        """
        Args:
            prepare: of the model.
            unknown_classes: "leave_out" leaves out given boxes whose class name the model does not
                have; with "error" they are one.
        """
        self.prepare = prepare
        self.unknown_classes = unknown_classes
        self._reported_classes: set[str] = set()

    def __call__(
        self,
        image: OneImage | None,
        name: str = "image",
        channels: str = "RGB",
        unknown_classes: str | None = None,
        **given: Any,
    ) -> ImageInput:
        """Read and prepare one image.

        Args:
            image: as for :class:`reldn_d2.predictor.RelationPredictor`.
            name: for messages about an image without a path.
            channels: order of the channels of an array.
            unknown_classes: as for the reader; None means the reader's own.
            given: ``boxes``, ``classes``, ``scores``, ``detections`` and ``size`` of the image.

        Raises:
            ImageError: an unusable image, unusable boxes, or the model needs detections.
        """
        file_name = str(image) if isinstance(image, (str, Path)) else None
        name = file_name or name
        given, left_out = self._leave_out(given, name, unknown_classes or self.unknown_classes)
        rgb = None if image is None else load_rgb(image, channels, name)
        record = self.prepare(rgb, **given, name=name)
        task = "sgdet"
        if given.get("boxes") is not None:
            task = "sgcls" if given.get("classes") is None else "prdcls"
        if task != "prdcls":
            self.require_detections(record)
        return ImageInput(record, task, file_name, left_out)

    def require_detections(self, record: Mapping[str, Any]) -> None:
        """Raise ImageError if the model needs detections and a prepared input has none."""
        if self.prepare.takes_detections and "detections" not in record:
            if "given_boxes" in record:
                raise ImageError(
                    f"{record['file_name']}: classes are missing: this model has no detector that "
                    "could classify the boxes; give the class of each box"
                )
            raise ImageError(
                f"{record['file_name']}: this model was trained on detections from files and has "
                "no detector of its own; give detections, or boxes with classes"
            )

    def _leave_out(
        self, given: Mapping[str, Any], name: str, unknown_classes: str
    ) -> tuple[dict[str, Any], dict[int, str]]:
        """Leave out boxes or detections of unknown classes if ``unknown_classes`` says so."""
        given = dict(given)
        if unknown_classes == "error":
            return given, {}
        if len(self._reported_classes) > 10_000:  # made-up names, in a process that runs for weeks
            self._reported_classes.clear()
        names, reported = self.prepare.classes.names, self._reported_classes
        entities = {key: given.get(key) for key in ("boxes", "classes", "scores")}
        entities, left_out = leave_out_unknown(entities, names, name, reported)
        given.update(entities)
        if isinstance(given.get("detections"), Mapping):
            given["detections"], more = leave_out_unknown(
                given["detections"], names, f"{name}: detections", reported
            )
            left_out = left_out or more
        return given, left_out
