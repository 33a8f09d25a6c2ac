"""Prediction with a trained model, from its checkpoint alone.

Shapes: R boxes of one image. Boxes are XYXY in pixels of the image as it was read.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Union

import numpy as np
import PIL.Image
import torch
from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager

from .checkpoint.detection_checkpoint import fetch, read_checkpoint
from .checkpoint.reldn_checkpoint import RelDNCheckpointer
from .config import add_reldn_config, merge_config
from .structures.given_boxes import GivenBoxes, check_boxes, class_ids
from .structures.scene_graph import SceneGraph
from .utils.image_io import ImageError, pil_to_rgb, read_rgb, to_rgb
from .utils.protocols import predicates_per_pair

__all__ = ["GivenBoxes", "RelationPredictor"]

_ONE_IMAGE = (str, Path, np.ndarray, PIL.Image.Image)
Image = Union[_ONE_IMAGE]


class RelationPredictor:
    """A model in eval mode, with the names of its classes and predicates.

    It returns a :class:`.structures.scene_graph.SceneGraph` per image, with ``triplets()``,
    ``best(topk, min_score)``, ``graph()``, ``to_json()``, and the model's own output as
    ``result["instances"]`` and ``result["relations"]``.

    Examples:
        >>> predictor = RelationPredictor.from_checkpoint("model_final.pth")
        >>> predictor("street.jpg").best(10).triplets()
        >>> predictor(["a.jpg", "b.jpg"], batch_size=2)
        >>> predictor("street.jpg", boxes=[[10, 20, 110, 220], [50, 60, 90, 100]])
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: CfgNode,
        thing_classes: Sequence[str] = (),
        predicate_classes: Sequence[str] = (),
    ):
        """
        Args:
            model: a RelDN with its weights; it is put into eval mode.
            cfg: its config; ``INPUT`` decides how images are prepared.
            thing_classes, predicate_classes: names by id.
        """
        self.model = model.eval()
        self.cfg = cfg
        self.thing_classes = list(thing_classes)
        self.predicate_classes = list(predicate_classes)
        self._resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | None = None,
        config_file: str | None = None,
        opts: Sequence[Any] = (),
    ) -> "RelationPredictor":
        """Build the model that a RelDN checkpoint describes; no data set is needed.

        Args:
            path: file or URL of a checkpoint written by RelDN's training, which has the config and
                the names.
            device: such as ``cpu`` or ``cuda:0``; None uses a GPU if there is one.
            config_file: replaces the checkpoint's own config.
            opts: ``KEY, VALUE, ...`` config overrides, merged last.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a RelDN checkpoint, or there is no such device.
        """
        path = str(path)
        device = check_device(device)
        description = read_description(path)
        cfg = get_cfg()
        add_reldn_config(cfg)
        if config_file is None and not description.get("config"):
            raise ValueError(
                f"{path} has no config, so this package did not write it. Give the config file of "
                "the model."
            )
        if config_file is None:
            cfg.merge_from_other_cfg(CfgNode.load_cfg(description["config"]))
        merge_config(cfg, config_file, ["MODEL.DEVICE", device, *opts])
        relations = cfg.TEST.RELATIONS
        if not relations.PREDICATES_PER_PAIR:
            # The protocol's own, not the values of all protocols that an evaluation keeps.
            values = list(predicates_per_pair(cfg))
            if config_file is None and not relations.PROTOCOL:
                values = description.get("predicates_per_pair", [])
            merge_config(cfg, None, ["TEST.RELATIONS.PREDICATES_PER_PAIR", values])
        cfg.MODEL.WEIGHTS = path
        model = build_model(cfg)
        RelDNCheckpointer(model).load(path)
        return cls(
            model,
            cfg,
            description.get("thing_classes", ()),
            description.get("predicate_classes", ()),
        )

    def __call__(
        self,
        images: Image | Sequence[Image],
        boxes: Any | None = None,
        classes: Any | None = None,
        batch_size: int = 1,
        channels: str = "RGB",
    ) -> SceneGraph | list[SceneGraph]:
        """Predict one image, or a list of images.

        Args:
            images: a path, an (H, W[, 3 or 4]) array, a PIL image, or a list of these.
            boxes: (R, 4) boxes that replace detections; for a list of images a list of these, with
                None for each image whose entities are to be detected.
            classes: (R,) their classes, as ids or names; for a list of images a list of these.
                Boxes without classes are classified by the detector.
            batch_size: max images per batch; only images of one size share a batch.
            channels: order of the channels of arrays, "RGB" or "BGR" (OpenCV).

        Returns:
            A scene graph, or a list of them in the order of the images. With given boxes its
            entities are exactly these, in their order.

        Raises:
            ImageError: an unusable image or unusable boxes; the message is one line and names the
                file.
        """
        single = isinstance(images, _ONE_IMAGE)
        if single:
            images, boxes, classes = [images], [boxes], [classes]
        if not isinstance(images, (list, tuple)):
            raise ImageError(
                f"a {type(images).__name__} is neither an image nor a list of images: give a path, "
                "an (H, W, 3) numpy array, a PIL image, or a list of these"
            )
        boxes = _one_per_image(boxes, len(images), "boxes")
        classes = _one_per_image(classes, len(images), "classes")
        batch_size = max(batch_size, 1)
        graphs: list[SceneGraph] = []
        for start in range(0, len(images), batch_size):
            batch = range(start, min(start + batch_size, len(images)))
            graphs += self._predict(
                [self._input(images[i], i, channels, boxes[i], classes[i]) for i in batch]
            )
        return graphs[0] if single else graphs

    def stream(
        self, images: Iterable[Image], batch_size: int = 1, channels: str = "RGB"
    ) -> Iterator[tuple[Image, SceneGraph | ImageError]]:
        """Predict images one after the other; an unusable one does not stop the others.

        Args:
            images: paths or arrays, any number of them; they are read when they are needed.
            batch_size, channels: as for a call.

        Raises:
            TypeError: one image instead of several.

        Yields:
            the image as it was given, and its scene graph or the error.
        """
        if isinstance(images, _ONE_IMAGE):
            raise TypeError("stream() takes several images; for one, call the predictor")
        numbered = enumerate(images)
        while batch := list(islice(numbered, max(batch_size, 1))):
            inputs: list[_Input | ImageError] = []
            for index, image in batch:
                try:
                    inputs.append(self._input(image, index, channels))
                except ImageError as error:
                    inputs.append(error)
            graphs = iter(self._predict([x for x in inputs if isinstance(x, _Input)]))
            for (_, image), x in zip(batch, inputs):
                yield image, next(graphs) if isinstance(x, _Input) else x

    def _input(
        self, image: Image, index: int, channels: str, boxes: Any = None, classes: Any = None
    ) -> "_Input":
        """Read and prepare one image."""
        file_name = str(image) if isinstance(image, (str, Path)) else None
        name = file_name or f"image {index}"
        record = self.prepare(load_rgb(image, channels, name), boxes, classes, name)
        task = "sgdet" if boxes is None else "sgcls" if classes is None else "prdcls"
        return _Input(record, task, file_name)

    def _predict(self, inputs: Sequence["_Input"]) -> list[SceneGraph]:
        """Predict prepared images, those of one task and size in one batch."""
        batches: dict[Any, list[int]] = {}
        for index, x in enumerate(inputs):
            # Images of other sizes would be padded, which moves detections a little.
            batches.setdefault((x.task, x.record["image"].shape), []).append(index)
        graphs: dict[int, SceneGraph] = {}
        for (task, _), batch in batches.items():
            with torch.no_grad(), self._as_task(task):
                outputs = self.model([inputs[i].record for i in batch])
            for i, output in zip(batch, outputs):
                graphs[i] = self.scene_graph(output, inputs[i].file_name)
        return [graphs[i] for i in range(len(inputs))]

    def scene_graph(
        self, output: Mapping[str, Instances], file_name: str | None = None
    ) -> SceneGraph:
        """Return the model's output for one image as a :class:`SceneGraph` with names."""
        return SceneGraph.from_output(
            None,
            output,
            keep_output=True,
            file_name=file_name,
            thing_classes=self.thing_classes,
            predicate_classes=self.predicate_classes,
        )

    @property
    def metadata(self) -> SimpleNamespace:
        """The names in the form that a visualizer takes, without a registered data set."""
        names = dict(thing_classes=self.thing_classes, predicate_classes=self.predicate_classes)
        return SimpleNamespace(get=lambda key, default=None: names.get(key, default), **names)

    @contextmanager
    def _as_task(self, task: str) -> Iterator[None]:
        before, self.model.task = self.model.task, task
        try:
            yield
        finally:
            self.model.task = before

    def prepare(
        self,
        rgb: np.ndarray,
        boxes: GivenBoxes | None = None,
        classes: Sequence[int | str] | None = None,
        name: str = "image",
    ) -> dict:
        """Return the model's input for an (H, W, 3) image, with the given boxes if there are any.

        Raises:
            ImageError: unusable boxes or classes.
        """
        height, width = rgb.shape[:2]
        image = rgb[:, :, ::-1] if self.cfg.INPUT.FORMAT == "BGR" else rgb
        transform = self._transform(height, width)
        resized = transform.apply_image(np.ascontiguousarray(image))
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        result = {"image": tensor, "height": height, "width": width, "file_name": name}
        if boxes is None and classes is not None:
            raise ImageError(f"{name}: classes were given without boxes")
        if boxes is not None:
            boxes = check_boxes(boxes, (height, width), name)
            ids = [0] * len(boxes)  # the detector classifies them
            if classes is not None:
                num_classes = self.model.detector.num_classes
                ids = class_ids(classes, len(boxes), self.thing_classes, num_classes, name)
            scaled = transform.apply_box(boxes) if len(boxes) else boxes
            instances = Instances(tuple(tensor.shape[1:]))
            instances.gt_boxes = Boxes(torch.as_tensor(scaled, dtype=torch.float32))
            instances.gt_classes = torch.as_tensor(ids, dtype=torch.int64)
            result["instances"] = instances
        return result

    def _transform(self, height: int, width: int) -> T.Transform:
        """Resize as in evaluation, but keep at least one pixel of a very narrow image."""
        resize = self._resize.get_transform(np.empty((height, width, 0), dtype=np.uint8))
        if not isinstance(resize, T.ResizeTransform):
            return resize
        return T.ResizeTransform(
            height, width, max(resize.new_h, 1), max(resize.new_w, 1), resize.interp
        )


class _Input(NamedTuple):
    """One prepared image."""

    record: dict[str, Any]  # the model's input
    task: str
    file_name: str | None


def _one_per_image(values: Any, num_images: int, what: str) -> list[Any]:
    values = [None] * num_images if values is None else list(values)
    if len(values) != num_images:
        raise ImageError(
            f"{num_images} images came with {len(values)} sets of {what}; give one per image, None "
            "for an image without"
        )
    return values


def read_description(path: str) -> dict:
    """Return names and config of a checkpoint, as written by :class:`RelDNCheckpointer`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or has no relation head.
    """
    if "://" in path:
        fetch(path)
        path = PathManager.get_local_path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"No checkpoint '{path}'. Training RelDN writes it as OUTPUT_DIR/model_final.pth."
        )
    try:
        checkpoint = read_checkpoint(path)
    except ValueError as error:  # its advice is for checkpoints of other programs
        raise ValueError(
            f"{path} cannot be read as a RelDN checkpoint, which has only tensors and plain types: "
            "it is broken, truncated or of another format"
        ) from error
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not any("relation_head." in x for x in weights):
        raise ValueError(
            f"{path} has no relation head: it is the checkpoint of a detector alone, or of another "
            f"program. Train RelDN on it (MODEL.WEIGHTS {path}) and give the checkpoint that this "
            "writes."
        )
    return checkpoint.get("reldn") or {}


def check_device(device: str | None) -> str:
    """Return the device; if None, a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device '{device}' is unknown; use cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device '{device}': torch {torch.__version__} sees no GPU here; use cpu")
    return device


def load_rgb(image: Image, channels: str = "RGB", name: str = "image") -> np.ndarray:
    """Read a path, an array or a PIL image as (H, W, 3) uint8 in RGB order.

    Raises:
        ImageError: the image cannot be used; the message starts with the path or ``name``.
    """
    if isinstance(image, (str, Path)):
        return read_rgb(image)
    if isinstance(image, PIL.Image.Image):
        return pil_to_rgb(image)
    if not isinstance(image, np.ndarray):
        raise ImageError(
            f"{name}: a {type(image).__name__} is not an image; give a path, an (H, W, 3) numpy "
            "array or a PIL image"
        )
    return to_rgb(image, channels, name)
