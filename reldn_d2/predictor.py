"""Prediction with a trained model, from its checkpoint alone.

Shapes: R boxes of one image. Boxes are XYXY in pixels of the image as it was read.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from .checkpoint.description import leave_out_training_parts, read_description
from .checkpoint.reldn_checkpoint import RelDNCheckpointer
from .config import add_reldn_config, merge_config, merge_saved_config
from .data.detection_files import load_detections
from .data.prediction_input import ImageInput, InputPreparation, InputReader
from .modeling.detectors.precomputed import PrecomputedDetector
from .pretrained.weights import pretrained_file
from .structures.given_boxes import GivenBoxes, ModelClasses
from .structures.name_matching import NAME_FIELDS
from .structures.scene_graph import SceneGraph
from .utils.config_values import Options, list_options
from .utils.image_io import ONE_IMAGE, ImageError, OneImage
from .utils.protocols import predicates_per_pair
from .utils.registry import explain_missing_keys, explain_unregistered

__all__ = ["GivenBoxes", "RelationPredictor"]

logger = logging.getLogger(__name__)

UNKNOWN_CLASSES = ("error", "leave_out")


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
        >>> any_boxes = RelationPredictor.from_pretrained("vrd_boxes")
        >>> any_boxes("street.jpg", boxes=boxes, classes=["Person", "couch"], scores=[0.9, 0.6])

    A model that reads no pixels (:attr:`reads_images` is False) needs no image:

        >>> predictor(boxes=[[10, 20, 110, 220], [50, 60, 90, 100]], classes=["person", "dog"])
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: CfgNode,
        thing_classes: Sequence[str] = (),
        predicate_classes: Sequence[str] = (),
        unknown_classes: str = "error",
        attribute_classes: Sequence[str] = (),
    ):
        """
        Args:
            model: a RelDN with its weights; it is put into eval mode.
            cfg: its config; ``INPUT`` decides how images are prepared.
            thing_classes, predicate_classes: names by id.
            unknown_classes: what happens to given boxes whose class *name* the model does not have:
                "error", or "leave_out", which lists them in the result's ``left_out`` and logs
                their count whenever a new class is among them. Synonyms are names that the model
                has, see :mod:`.structures.class_matching`.
            attribute_classes: names by id, if the model predicts attributes.
        """
        if unknown_classes not in UNKNOWN_CLASSES:
            raise ValueError(
                f"unknown_classes is {unknown_classes!r}; expected {' or '.join(UNKNOWN_CLASSES)}"
            )
        self.unknown_classes = unknown_classes
        self.model = model.eval()
        self.cfg = cfg
        self.thing_classes = list(thing_classes)
        self.predicate_classes = list(predicate_classes)
        self.attribute_classes = list(attribute_classes)
        classes = ModelClasses(model.detector.num_classes, self.thing_classes)
        # From an (H, W, 3) image, boxes and detections to the model's input.
        self.prepare = InputPreparation(cfg, classes, self.reads_images, self.needs_detections)
        # The same with the checks of a call; it has no model, so worker processes can have a copy.
        self.read_input = InputReader(self.prepare, unknown_classes)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | None = None,
        config_file: str | None = None,
        opts: Options = (),
        unknown_classes: str = "error",
    ) -> "RelationPredictor":
        """Build the model that a RelDN checkpoint describes; no dataset is needed.

        Of modules of the user's that it was trained with, those with the parts that predict must be
        imported: the head, the classifier, the context, the detector, and config keys. A protocol,
        sampler or loss that is not registered is left out.

        Args:
            path: file or URL (``hf://`` included) of a checkpoint written by RelDN's training,
                which has the config and the names.
            device: such as ``cpu`` or ``cuda:0``; None uses a GPU if there is one.
            config_file: replaces the checkpoint's own config.
            opts: config overrides, ``[key, value, ...]`` or ``{key: value, ...}``, merged last.
            unknown_classes: see :class:`RelationPredictor`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a RelDN checkpoint or lacks what ``opts`` ask for, its
                config has keys or names parts of a module that is not imported
                (:func:`.config.register_config_keys`), or there is no such device.
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
            merge_saved_config(cfg, description["config"], path, description.get("config_keys"))
            leave_out_training_parts(cfg, path)
        merge_config(cfg, config_file, ["MODEL.DEVICE", device, *list_options(opts)])
        relations = cfg.TEST.RELATIONS
        if not relations.PREDICATES_PER_PAIR:
            # The protocol's own, not the values of all protocols that an evaluation keeps.
            values = list(predicates_per_pair(cfg))
            if config_file is None and not relations.PROTOCOL:
                values = description.get("predicates_per_pair", [])
            merge_config(cfg, None, ["TEST.RELATIONS.PREDICATES_PER_PAIR", values])
        cfg.MODEL.WEIGHTS = path
        modules = description.get("modules", ())
        with explain_unregistered(path, modules), explain_missing_keys(cfg, f"{path}: the model"):
            model = build_model(cfg)
        RelDNCheckpointer(model).load(path)
        model.relation_head.check_counts(path)
        return cls(
            model,
            cfg,
            description.get("thing_classes", ()),
            description.get("predicate_classes", ()),
            unknown_classes,
            description.get("attribute_classes", ()),
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        device: str | None = None,
        opts: Options = (),
        unknown_classes: str = "leave_out",
    ) -> "RelationPredictor":
        """Build a pretrained model, for boxes of anyone's detector or with its own detector.

        Args:
            name: a model of this package, a key of :data:`reldn_d2.pretrained.PRETRAINED` such as
                ``vrd_boxes``, or one of the Hugging Face Hub, ``hf://OWNER/NAME`` or
                ``hf://OWNER/NAME@REVISION``, as ``tools/push_to_hub.py`` writes it.
            device, opts: see :meth:`from_checkpoint`.
            unknown_classes: see :class:`RelationPredictor`. By default boxes of classes that the
                model does not have are left out, counted in the log and listed in the result.

        Raises:
            ValueError: there is no such model; the message lists those that exist.
            FileNotFoundError: the Hub has no such model, or there is no network and no copy of it
                in the cache.
            ImportError: huggingface_hub or safetensors is not installed.
        """
        path = pretrained_file(name)
        return cls.from_checkpoint(path, device, opts=opts, unknown_classes=unknown_classes)

    def __call__(
        self,
        images: OneImage | Sequence[OneImage | None] | None = None,
        boxes: Any | None = None,
        classes: Any | None = None,
        scores: Any | None = None,
        detections: Any | None = None,
        batch_size: int = 1,
        channels: str = "RGB",
        size: Any | None = None,
    ) -> SceneGraph | list[SceneGraph]:
        """Predict one image, or a list of images.

        For a list of images, ``boxes``, ``classes``, ``scores``, ``detections`` and ``size`` are
        lists too, with None for each image without.

        Args:
            images: a path, an (H, W[, 3 or 4]) array, a PIL image, or a list of these. A model that
                reads no pixels takes only the size from it, and None in its place.
            boxes: (R, 4) boxes that replace detections.
            classes: (R,) their classes, as ids or names; ``unknown_classes`` decides about names
                that the model does not have. Boxes without classes are classified by the detector.
            scores: (R,) their scores in [0, 1]; 1 if not given. They need classes.
            detections: ``{"boxes": (Q, 4), "classes": (Q,), "scores": (Q,)}``, for a model that was
                trained on detections from files. As in evaluation, those with a low score are
                dropped and boxes are clipped to the image. See :meth:`read_detections`.
            batch_size: max images per batch; only images of one size share a batch.
            channels: order of the channels of arrays, "RGB" or "BGR" (OpenCV).
            size: (height, width) of an image that is None; by default, the boxes and detections
                are taken to reach to its right and its lower edge.

        Returns:
            A scene graph, or a list of them in the order of the images. With given boxes its
            entities are exactly these, in their order, even where they extend beyond the image (the
            model sees the part within the image), less those in ``left_out``.

        Raises:
            ImageError: an unusable image or unusable boxes; the message is one line and names the
                file, or the index of the image in the list.
        """
        single = images is None or isinstance(images, ONE_IMAGE)
        given = dict(boxes=boxes, classes=classes, scores=scores, detections=detections, size=size)
        if single:
            return self.predict_inputs([self.read_input(images, "image", channels, **given)])[0]
        if not isinstance(images, (list, tuple)):
            raise ImageError(
                f"a {type(images).__name__} is neither an image nor a list of images: give a path, "
                "an (H, W, 3) numpy array, a PIL image, or a list of these"
            )
        given = {key: _one_per_image(x, len(images), key) for key, x in given.items()}
        graphs: list[SceneGraph] = []
        for start in range(0, len(images), max(batch_size, 1)):
            batch = range(start, min(start + max(batch_size, 1), len(images)))
            inputs = [
                self.read_input(
                    images[i], f"image {i}", channels, **{key: x[i] for key, x in given.items()}
                )
                for i in batch
            ]
            graphs += self.predict_inputs(inputs)
        return graphs

    def stream(
        self,
        images: Iterable[OneImage],
        batch_size: int = 1,
        channels: str = "RGB",
        given: Callable[[OneImage], Mapping[str, Any]] | None = None,
    ) -> Iterator[tuple[OneImage, SceneGraph | ImageError]]:
        """Predict images one after the other; an unusable one does not stop the others.

        Args:
            images: paths or arrays, any number of them; they are read when they are needed.
            batch_size, channels: as for a call.
            given: returns the arguments ``boxes``, ``classes``, ``scores`` and ``detections`` of a
                call for an image; may raise ImageError.

        Raises:
            TypeError: one image instead of several.

        Yields:
            the image as it was given, and its scene graph or the error.
        """
        if isinstance(images, ONE_IMAGE):
            raise TypeError("stream() takes several images; for one, call the predictor")
        numbered = enumerate(images)
        while batch := list(islice(numbered, max(batch_size, 1))):
            inputs: list[ImageInput | ImageError] = []
            for index, image in batch:
                try:
                    entities = {} if given is None else given(image)
                    inputs.append(self.read_input(image, f"image {index}", channels, **entities))
                except ImageError as error:
                    inputs.append(error)
            graphs = iter(self.predict_inputs([x for x in inputs if isinstance(x, ImageInput)]))
            for (_, image), x in zip(batch, inputs):
                yield image, next(graphs) if isinstance(x, ImageInput) else x

    def predict_inputs(self, inputs: Sequence[ImageInput]) -> list[SceneGraph]:
        """Predict what :attr:`read_input` returned, those of one task and size in one batch.

        Raises:
            ImageError: given boxes that the model did not keep.
        """
        batches: dict[Any, list[int]] = {}
        for index, x in enumerate(inputs):
            batches.setdefault(x.batch_key, []).append(index)
        graphs: dict[int, SceneGraph] = {}
        for batch in batches.values():
            with torch.no_grad(), self._as_task(inputs[batch[0]].task):
                outputs = self.model([inputs[i].record for i in batch])
            for i, output in zip(batch, outputs):
                graph = self._result(output, inputs[i])
                graphs[i] = replace(graph, left_out=inputs[i].left_out)
        return [graphs[i] for i in range(len(inputs))]

    def _result(self, output: dict[str, Instances], x: ImageInput) -> SceneGraph:
        """Return the scene graph of one image, with the given boxes exactly as they were given."""
        given = x.record.get("given_boxes")
        if given is None:
            return self.scene_graph(output, x.file_name)
        if len(given) != len(output["instances"]):
            raise ImageError(
                f"{x.record['file_name']}: the model kept {len(output['instances'])} of "
                f"{len(given)} given boxes; some may be too small"
            )
        # The model's boxes were clipped, scaled to its input and back.
        output["instances"].pred_boxes = Boxes(torch.as_tensor(given, dtype=torch.float32))
        return replace(self.scene_graph(output, x.file_name), boxes=given)

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
            attribute_classes=self.attribute_classes,
        )

    @property
    def metadata(self) -> SimpleNamespace:
        """The names in the form that a visualizer takes, without a registered dataset."""
        names = {field: getattr(self, field) for field in NAME_FIELDS}
        return SimpleNamespace(get=lambda key, default=None: names.get(key, default), **names)

    @contextmanager
    def _as_task(self, task: str) -> Iterator[None]:
        before, self.model.task = self.model.task, task
        try:
            yield
        finally:
            self.model.task = before

    @property
    def reads_images(self) -> bool:
        """Whether the model reads pixels; otherwise it needs boxes and classes only."""
        return self.model.detector.reads_images

    @property
    def needs_detections(self) -> bool:
        """Whether the model reads detections from files instead of detecting entities itself."""
        return isinstance(self.model.detector, PrecomputedDetector)

    def require_detections(self, record: Mapping[str, Any]) -> None:
        """Raise ImageError if the model needs detections and a prepared input has none."""
        self.read_input.require_detections(record)

    def read_detections(self, path: str | Path) -> dict[str, dict[str, np.ndarray]]:
        """Read a file as ``DATASETS.DETECTION_FILES_TEST`` takes it.

        Category ids in JSON are those of the dataset that the model was tested on if it is
        registered in this process and has ids of its own; otherwise they are 0-based.

        Returns:
            ``detections`` of a call, by image id (a string).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a file of detections, or a record is invalid; names the record.
        """
        ids = None
        for dataset in self.cfg.DATASETS.TEST:
            if ids is None and dataset in DatasetCatalog:
                metadata = MetadataCatalog.get(dataset)
                ids = getattr(metadata, "thing_dataset_id_to_contiguous_id", None)
        found = load_detections(str(path), self.model.detector.num_classes, ids)
        classes = [x["classes"].min() for x in found.values() if len(x["classes"])]
        if ids is None and str(path).endswith(".json") and min(classes, default=0) > 0:
            logger.warning(
                f"{path}: no detection has category_id 0. Ids are taken as 0-based, with 0 for "
                f"'{next(iter(self.thing_classes), 'the first class')}'; if those of the file "
                "start at 1, subtract 1."
            )
        return found


def _one_per_image(values: Any, num_images: int, what: str) -> list[Any]:
    values = [None] * num_images if values is None else list(values)
    if len(values) != num_images:
        raise ImageError(
            f"{num_images} images came with {len(values)} sets of {what}; give one per image, None "
            "for an image without"
        )
    return values


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
