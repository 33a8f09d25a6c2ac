"""Predict the relations of images with a trained model, from its checkpoint alone.

Shapes: R boxes of one image. Boxes are XYXY in pixels of the image as it was read.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Union

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
from .structures.scene_graph import SceneGraph
from .utils.image_io import ImageError, pil_to_rgb, read_rgb, to_rgb

__all__ = ["GivenBoxes", "RelationPredictor"]

_ONE_IMAGE = (str, Path, np.ndarray, PIL.Image.Image)
Image = Union[_ONE_IMAGE]
THINNEST = 0.01  # pixels; a thinner box may vanish when it is scaled in float32
GivenBoxes = Union[np.ndarray, torch.Tensor, Sequence[Sequence[float]]]


class RelationPredictor:
    """A model in eval mode, with the names of its classes and predicates.

    Examples:
        >>> predictor = RelationPredictor.from_checkpoint("model_final.pth")
        >>> predictor("street.jpg").triplets()
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
            model: a RelDN with its weights; put into eval mode.
            cfg: its config; ``INPUT`` says how images are prepared.
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
            path: a checkpoint that RelDN's training wrote, a file or a URL; it holds config and
                names.
            device: such as ``cpu`` or ``cuda:0``; None takes a GPU if there is one.
            config_file: replaces the checkpoint's own config.
            opts: ``KEY, VALUE, ...`` config options, merged last.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is the checkpoint of something else, or there is no such device.
        """
        path = str(path)
        device = check_device(device)
        description = read_description(path)
        cfg = get_cfg()
        add_reldn_config(cfg)
        if config_file is None and not description.get("config"):
            raise ValueError(
                f"{path} does not say which model it is of: this package did not write it. Name "
                "its config file."
            )
        if config_file is None:
            cfg.merge_from_other_cfg(CfgNode.load_cfg(description["config"]))
        merge_config(cfg, config_file, ["MODEL.DEVICE", device, *opts])
        relations = cfg.TEST.RELATIONS
        if config_file is None and not (relations.PREDICATES_PER_PAIR or relations.PROTOCOL):
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
            boxes: (R, 4) boxes that are taken in place of detections; for a list of images a list
                of such, None where an image's entities are to be detected.
            classes: (R,) their classes, as ids or names; for a list of images a list. Boxes without
                classes are classified by the detector.
            batch_size: images that go through the network at once, if they are of one size.
            channels: "RGB" or "BGR" (OpenCV), of the arrays.

        Returns:
            A prediction, or a list of them in the order of the images. With given boxes its
            instances are just these, in their order.

        Raises:
            ImageError: an image or boxes that cannot be used; one line that names the file.
        """
        single = isinstance(images, _ONE_IMAGE)
        if single:
            images, boxes, classes = [images], [boxes], [classes]
        if not isinstance(images, (list, tuple)):
            raise ImageError(
                f"a {type(images).__name__} is neither an image nor a list of images: give a path, "
                "an (H, W, 3) numpy array, a PIL image, or a list of these"
            )
        given = {"boxes": boxes, "classes": classes}
        for what, sets in given.items():
            given[what] = [None] * len(images) if sets is None else list(sets)
            if len(given[what]) != len(images):
                raise ImageError(
                    f"{len(images)} images came with {len(given[what])} sets of {what}; give one "
                    "for each image, None where there is none"
                )
        boxes, classes = given["boxes"], given["classes"]
        results = []
        for start in range(0, len(images), max(batch_size, 1)):
            part = slice(start, start + max(batch_size, 1))
            results += self._predict_batch(images[part], boxes[part], classes[part], channels)
        return results[0] if single else results

    def _predict_batch(self, images, boxes, classes, channels) -> list[SceneGraph]:
        inputs, kinds = [], []
        for number, (image, given, labels) in enumerate(zip(images, boxes, classes)):
            name = str(image) if isinstance(image, (str, Path)) else f"image {number}"
            rgb = load_rgb(image, channels, name)
            inputs.append(self.prepare(rgb, given, labels, name))
            task = "sgdet" if given is None else "sgcls" if labels is None else "prdcls"
            # Images of other sizes would be padded, which moves detections a little.
            kinds.append((task, tuple(inputs[-1]["image"].shape)))
        results: list[Any] = [None] * len(images)
        for kind in dict.fromkeys(kinds):
            chosen = [i for i, x in enumerate(kinds) if x == kind]
            with torch.no_grad(), self._as_task(kind[0]):
                outputs = self.model([inputs[i] for i in chosen])
            for i, output in zip(chosen, outputs):
                path = images[i] if isinstance(images[i], (str, Path)) else None
                results[i] = self.scene_graph(output, None if path is None else str(path))
        return results

    def scene_graph(self, output: Mapping[str, Instances], file_name: str | None = None):
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
        """The names as a visualiser takes them; they belong to no registered data set."""
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
        """The model's input for an (H, W, 3) image, with the caller's boxes if there are any."""
        height, width = rgb.shape[:2]
        image = rgb[:, :, ::-1] if self.cfg.INPUT.FORMAT == "BGR" else rgb
        transform = self._transform(height, width)
        resized = transform.apply_image(np.ascontiguousarray(image))
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        result = {"image": tensor, "height": height, "width": width, "file_name": name}
        if boxes is not None:
            table = check_boxes(boxes, (height, width), name)
            instances = Instances(tuple(tensor.shape[1:]))
            scaled = transform.apply_box(table) if len(table) else table
            instances.gt_boxes = Boxes(torch.as_tensor(scaled, dtype=torch.float32))
            numbers = self._class_numbers(classes, len(table), name)
            instances.gt_classes = torch.as_tensor(numbers, dtype=torch.int64)
            result["instances"] = instances
        elif classes is not None:
            raise ImageError(f"{name}: classes were given, but no boxes that they belong to")
        return result

    def _transform(self, height: int, width: int) -> T.Transform:
        """As for evaluation; no side of a very long image becomes 0."""
        wanted = self._resize.get_transform(np.empty((height, width, 0), dtype=np.uint8))
        if not isinstance(wanted, T.ResizeTransform):
            return wanted
        return T.ResizeTransform(
            height, width, max(wanted.new_h, 1), max(wanted.new_w, 1), wanted.interp
        )

    def _class_numbers(self, classes: Any, count: int, name: str) -> list[int]:
        if classes is None:
            return [0] * count
        number_of = {x: i for i, x in enumerate(self.thing_classes)}
        known = self.model.detector.num_classes
        numbers = []
        classes = classes.tolist() if hasattr(classes, "tolist") else classes
        if not isinstance(classes, (list, tuple)):
            raise ImageError(f"{name}: classes is {classes!r}; expected a list of ids or names")
        for x in classes:
            number = number_of.get(x, -1) if isinstance(x, str) else x
            whole = isinstance(number, (int, float, np.number)) and number == number // 1
            number = int(number) if whole else -1
            if not 0 <= number < known:
                kinds = ", ".join(self.thing_classes[:8]) or f"0 to {known - 1}"
                raise ImageError(f"{name}: the model has no class {x!r}; it has {kinds}, ...")
            numbers.append(number)
        if len(numbers) != count:
            raise ImageError(f"{name}: {count} boxes were given with {len(numbers)} classes")
        return numbers

    def stream(
        self, images: Iterable[Image], batch_size: int = 1, **options: Any
    ) -> Iterator[tuple[Image, SceneGraph | ImageError]]:
        """Predict image after image; one that cannot be used does not stop the others.

        Args:
            images: paths or arrays, as many as you like; they are read as they are needed.
            batch_size: images that go through the network at once.
            options: ``channels``, as for a call.

        Raises:
            TypeError: another option, or one image in place of several.

        Yields:
            the image as it was given, and its prediction or the error.
        """
        channels = options.pop("channels", "RGB")
        if options:
            raise TypeError(f"stream() has no option {', '.join(options)}")
        if isinstance(images, _ONE_IMAGE):
            raise TypeError("stream() takes several images; for one, call the predictor")
        batch: list[Image] = []

        def flush() -> Iterator[tuple[Image, SceneGraph | ImageError]]:
            loaded: list[Any] = []
            for number, image in enumerate(batch):
                path = isinstance(image, (str, Path))
                try:
                    loaded.append(
                        load_rgb(image, channels, str(image) if path else f"image {number}")
                    )
                except ImageError as error:
                    loaded.append(error)
            good = [x for x in loaded if isinstance(x, np.ndarray)]
            found = iter(self(good, batch_size=batch_size) if good else [])
            for image, x in zip(batch, loaded):
                result = x if isinstance(x, ImageError) else next(found)
                if isinstance(result, SceneGraph) and isinstance(image, (str, Path)):
                    result = replace(result, file_name=str(image))
                yield image, result

        for image in images:
            batch.append(image)
            if len(batch) >= max(batch_size, 1):
                yield from flush()
                batch = []
        yield from flush()


def read_description(path: str) -> dict:
    """Names and config in a checkpoint, as :class:`RelDNCheckpointer` writes them.

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
    except ValueError as error:  # whose advice is for checkpoints of others
        raise ValueError(
            f"{path} cannot be read as a checkpoint of RelDN, which holds tensors and plain types "
            "only: it is broken, cut off or of another kind"
        ) from error
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not any("relation_head." in x for x in weights):
        raise ValueError(
            f"{path} has no relation head: it is the checkpoint of a detector alone, or of another "
            f"program. Train RelDN on it (MODEL.WEIGHTS {path}) and name what that writes."
        )
    return checkpoint.get("reldn") or {}


def check_device(device: str | None) -> str:
    """The device; a GPU, if there is one, where none is named.

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
    """(H, W, 3) uint8 in RGB order of a path, an array or a PIL image."""
    if isinstance(image, (str, Path)):
        return read_rgb(image)
    if isinstance(image, PIL.Image.Image):
        return pil_to_rgb(image)
    if not isinstance(image, np.ndarray):
        raise ImageError(
            f"{name}: a {type(image).__name__} is no image; give a path, an (H, W, 3) numpy array "
            "or a PIL image"
        )
    return to_rgb(image, channels, name)


def check_boxes(boxes: GivenBoxes, image_size: tuple[int, int], name: str) -> np.ndarray:
    """(R, 4) float64 of the caller's boxes.

    Raises:
        ImageError: another shape, numbers that are not finite, or a box without area or outside
            of the image; with the box.
    """
    if isinstance(boxes, Boxes):
        boxes = boxes.tensor
    if isinstance(boxes, torch.Tensor):
        boxes = boxes.detach().cpu().numpy()
    try:
        table = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError):
        raise ImageError(f"{name}: the boxes are no table of numbers x0, y0, x1, y1") from None
    if table.size == 0:
        return np.zeros((0, 4))
    if table.ndim != 2 or table.shape[1] != 4:
        raise ImageError(f"{name}: boxes of shape {table.shape}; expected (R, 4): x0, y0, x1, y1")
    height, width = image_size
    clipped = table.clip(0, [width, height, width, height])
    bad = ~np.isfinite(table).all(1) | (clipped[:, 2:] - clipped[:, :2] < THINNEST).any(1)
    if bad.any():
        number = int(bad.argmax())
        raise ImageError(
            f"{name}: box {number}, {table[number].tolist()}, has no area within the image of "
            f"{width} x {height} pixels; expected x0, y0, x1, y1"
        )
    return clipped
