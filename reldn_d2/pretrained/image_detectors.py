"""Detectors of Detectron2, torchvision and transformers as functions of an image.

They return boxes, class names and scores, which any predictor takes, because it matches names::

    detect = load_detector("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml")
    predictor = RelationPredictor.from_pretrained("vrd_boxes")
    graph = predictor("photo.jpg", **detect("photo.jpg"))

Shapes: R boxes of one image, K classes. Boxes are XYXY in pixels of the image as it was read.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.logger import log_first_n

from ..checkpoint.checkpoint_reader import UntrustedContentError, read_checkpoint
from ..checkpoint.class_weights import num_classes_of
from ..checkpoint.detection_checkpoint import DetectorCheckpointer
from ..config import add_reldn_config, merge_config
from ..utils.image_io import OneImage, from_rgb, load_rgb
from ..utils.lazy_configs import build_node, is_lazy_config, load_lazy_config
from .transformers_detectors import PREFIX, build_transformers_detector

__all__ = ["ImageDetector", "load_detector"]

logger = logging.getLogger(__name__)

_TORCHVISION = "torchvision:"

# Returns boxes (R, 4), class ids (R,) and scores (R,) of an (H, W, 3) uint8 RGB image.
_Detect = Callable[[np.ndarray], tuple[Tensor, Tensor, Tensor]]


class ImageDetector(NamedTuple):
    """A detector with the names of its classes.

    Attributes:
        detect: see ``_Detect``.
        class_names: names by class id.
        min_score: detections with a lower score are dropped.
        name: for messages.
        model: with the weights; None if ``detect`` has none.
    """

    detect: _Detect
    class_names: Sequence[str]
    min_score: float
    name: str = "the detector"
    model: nn.Module | None = None

    def __call__(self, image: OneImage, channels: str = "RGB") -> dict[str, Any]:
        """Detect the entities of one image.

        Args:
            image: a path, an (H, W[, 3 or 4]) array or a PIL image.
            channels: order of the channels of an array, "RGB" or "BGR".

        Returns:
            ``boxes`` (R, 4) float32 array, ``classes`` a list of R names, ``scores`` a list of R
            values in [0, 1]; those with the highest scores first.

        Raises:
            ImageError: an unusable image.
        """
        with torch.no_grad():
            boxes, ids, scores = (x.cpu() for x in self.detect(load_rgb(image, channels)))
        order = scores.argsort(descending=True, stable=True)
        order = order[scores[order] >= self.min_score]
        if not len(order):
            self._warn_about_nothing(image, scores)
        return {
            "boxes": boxes[order].numpy(),
            "classes": [self.class_names[x] for x in ids[order].tolist()],
            "scores": scores[order].clamp(0, 1).tolist(),
        }

    def _warn_about_nothing(self, image: OneImage, scores: Tensor) -> None:
        """Log that nothing was detected; only once for images without a path, such as frames."""
        problem = (
            f"detector {self.name} finds nothing with a score of {self.min_score} or more "
            "(min_score; in the demo --confidence-threshold)"
        )
        if isinstance(image, (str, Path)):
            best = f"{float(scores.max()):.3f}" if len(scores) else "none"
            logger.warning(f"{image}: {problem}; the highest score is {best}.")
        else:
            message = f"an image: {problem}; further such images are not reported."
            log_first_n(logging.WARNING, message, key="message", name=__name__)


def load_detector(
    name: str,
    weights: str | Path | None = None,
    device: str | None = None,
    min_score: float = 0.5,
    class_names: Sequence[str] | None = None,
) -> ImageDetector:
    """Load a trained detector.

    Args:
        name: a config of Detectron2's model zoo, such as
            ``COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml``; the path of a detector's YAML file or
            LazyConfig (``.py``, whose code is run); ``torchvision:`` and a detection model of
            torchvision, such as ``torchvision:fasterrcnn_resnet50_fpn_v2``; or ``transformers:``
            and a detector's folder or its name on the Hugging Face hub.
        weights: file or URL; default: those of the zoo or of torchvision, which are downloaded at
            the first use, a YAML file's ``MODEL.WEIGHTS``, or a LazyConfig's
            ``train.init_checkpoint``. The weights of ``transformers`` are in its folder.
        device: such as ``cpu``; None uses a GPU if there is one.
        min_score: detections with a lower score are dropped.
        class_names: names by class id (torchvision: without the background) of weights with other
            classes than the published ones, in any number; by default those that the checkpoint,
            the config's dataset or torchvision names.

    Raises:
        FileNotFoundError: no such file, or the weights cannot be downloaded.
        ValueError: an unknown name, weights that do not fit, or unknown class names.
        ImportError: torchvision or transformers is needed and not installed.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights = None if weights is None else str(weights)
    if name.startswith(_TORCHVISION):
        model_name = name.removeprefix(_TORCHVISION)
        found = _torchvision_detector(model_name, weights, device, min_score, class_names)
    elif name.startswith(PREFIX):
        if weights is not None:
            raise ValueError(
                f"detector {name}: leave out the weights ({weights}); give the folder that holds "
                f"config.json and model.safetensors as {PREFIX}FOLDER"
            )
        found = build_transformers_detector(name.removeprefix(PREFIX), device, class_names)
    else:
        found = _detectron2_detector(name, weights, device, min_score, class_names)
    detect, names, model = found
    return ImageDetector(detect, names, min_score, name, model)


def _detectron2_detector(
    name: str,
    weights: str | None,
    device: str,
    min_score: float,
    class_names: Sequence[str] | None,
) -> tuple[_Detect, Sequence[str], nn.Module]:
    read = _parts_of_lazy_config if is_lazy_config(name) else _parts_of_yaml
    parts = read(name, weights, min_score)
    model = parts.model.eval().to(device)
    checkpointer = DetectorCheckpointer(model, complete=True)
    with _only_state_dicts(parts.weights):
        checkpointer.load(parts.weights)
    names = class_names or checkpointer.description["thing_classes"]
    names = names or _dataset_classes(parts.datasets)
    count = num_classes_of(model.state_dict())
    if not names or (count is not None and len(names) != count):
        problem = (
            f"{len(names)} names for {count} classes" if names else "its classes have no names"
        )
        raise ValueError(
            f"detector {name}: {problem}. Give class_names, or set {parts.datasets_key} to a "
            "registered dataset with these classes."
        )

    def detect(rgb: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        height, width = rgb.shape[:2]
        image = np.ascontiguousarray(from_rgb(rgb, parts.image_format))
        resized = T.AugInput(image)
        parts.resize(resized)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        output = model([{"image": tensor, "height": height, "width": width}])[0]
        if "instances" not in output:
            raise ValueError(f"detector {name} returns no instances, only {sorted(output)}")
        found = output["instances"]
        return found.pred_boxes.tensor, found.pred_classes, found.scores

    return detect, names, model


class _Parts(NamedTuple):
    """What a config of Detectron2 says about a detector."""

    model: nn.Module  # without its weights
    weights: str
    datasets: Sequence[str]  # whose class names are the model's
    datasets_key: str
    image_format: str
    resize: T.Augmentation


def _parts_of_yaml(name: str, weights: str | None, min_score: float) -> _Parts:
    cfg = _detectron2_config(name, weights)
    for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        node.SCORE_THRESH_TEST = min(node.SCORE_THRESH_TEST, min_score)
    cfg.MODEL.DEVICE = "cpu"  # moved by the caller
    return _Parts(
        build_model(cfg),
        cfg.MODEL.WEIGHTS,
        (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN),
        "DATASETS.TEST",
        cfg.INPUT.FORMAT,
        T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST),
    )


def _parts_of_lazy_config(name: str, weights: str | None, min_score: float) -> _Parts:
    """Read a LazyConfig: nodes ``model``, and ``train`` and ``dataloader.test`` if it has them."""
    config = load_lazy_config(name, [], "detector")
    if "_target_" not in (config.get("model") or {}):
        raise ValueError(f"detector {name}: that file has no `model = L(...)(...)`")
    if weights is None and not os.path.isfile(name):
        weights = model_zoo.get_checkpoint_url(name)
    weights = weights or OmegaConf.select(config, "train.init_checkpoint", default="")
    if not weights:
        raise ValueError(f"detector {name}: train.init_checkpoint is empty; give the weights")
    model = build_node(config.model, f"detector {name}: its model")
    for module in model.modules():  # predictors of ROI heads, dense detectors
        threshold = getattr(module, "test_score_thresh", None)
        if threshold is not None:
            module.test_score_thresh = min(threshold, min_score)
    datasets = OmegaConf.select(config, "dataloader.test.dataset.names", default=())
    mapper = OmegaConf.select(config, "dataloader.test.mapper", default={})
    steps = [instantiate(x) for x in mapper.get("augmentations", ())]
    return _Parts(
        model,
        weights,
        [datasets] if isinstance(datasets, str) else list(datasets),
        "dataloader.test.dataset.names",
        mapper.get("image_format") or getattr(model, "input_format", None) or "BGR",
        T.AugmentationList(steps) if steps else T.ResizeShortestEdge([800, 800], 1333),
    )


def _detectron2_config(name: str, weights: str | None) -> CfgNode:
    """Return the config of a YAML file or of the model zoo, with the weights to load."""
    file = name
    if not os.path.isfile(name):
        try:
            file = model_zoo.get_config_file(name)
            weights = weights or model_zoo.get_checkpoint_url(name)
        except (RuntimeError, ImportError) as error:
            raise ValueError(
                f"detector '{name}': no such file, and the installed Detectron2 has no such config "
                f"in its model zoo ({error}). Give the path of the YAML in a copy of Detectron2's "
                "configs, with the weights' file or URL, or torchvision:MODEL."
            ) from None
    cfg = get_cfg()
    add_reldn_config(cfg)
    merge_config(cfg, file, [] if weights is None else ["MODEL.WEIGHTS", weights])
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(f"detector {name}: MODEL.WEIGHTS is empty; give the weights")
    return cfg


def _dataset_classes(datasets: Sequence[str]) -> list[str]:
    """Return the class names of the first registered dataset; empty if there is none."""
    for dataset in datasets:
        if dataset in DatasetCatalog:
            return list(MetadataCatalog.get(dataset).get("thing_classes", []))
    return []


def _torchvision_detector(
    name: str,
    weights: str | None,
    device: str,
    min_score: float,
    class_names: Sequence[str] | None,
) -> tuple[_Detect, Sequence[str], nn.Module]:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"detector {_TORCHVISION}{name} needs torchvision ({error}): install the torchvision "
            "that belongs to the installed torch, e.g. pip install torchvision"
        ) from error
    known = models.list_models(module=models.detection)
    if name not in known:
        raise ValueError(
            f"torchvision has no detection model '{name}'; known: {', '.join(sorted(known))}"
        )
    published = models.get_model_weights(name).DEFAULT
    names = published.meta["categories"]
    if class_names is not None:
        names = ["__background__", *class_names]
    if weights is None:
        if len(names) != len(published.meta["categories"]):
            raise ValueError(f"detector {_TORCHVISION}{name}: give the weights for class_names")
        try:
            # Not load_state_dict: torchvision changes an epsilon for some of its weights.
            model = models.get_model(name, weights=published)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"the weights of {_TORCHVISION}{name} could not be fetched: {error}. Download "
                f"{published.url} on another machine and put the file into "
                f"{torch.hub.get_dir()}/checkpoints."
            ) from error
    else:
        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=len(names))
        _load_torchvision(model, weights, f"{_TORCHVISION}{name} with {len(names) - 1} classes")
    model = model.eval().to(device)
    # torchvision's detectors drop low scores themselves, by default those below 0.05 (FCOS: 0.2).
    owner = getattr(model, "roi_heads", model)
    owner.score_thresh = min(owner.score_thresh, min_score)

    def detect(rgb: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        image = torch.as_tensor(rgb.transpose(2, 0, 1).copy()).to(device).float() / 255
        found = model([image])[0]
        return found["boxes"], found["labels"], found["scores"]

    return detect, names, model


@contextmanager
def _only_state_dicts(weights: str) -> Iterator[None]:
    """Say how to save the weights if the file holds a whole model, which is not unpickled."""
    try:
        yield
    except UntrustedContentError as error:
        raise ValueError(
            f"{weights}: expected a state dict, as torch.save(model.state_dict(), FILE) writes it, "
            f"but {error.reason}. A whole model, torch.save(model, FILE), is not read, because "
            "that can run code: load it where it was made, and save its state dict."
        ) from error


def _load_torchvision(model: nn.Module, weights: str, what: str) -> None:
    """Load a file of weights as torchvision's training scripts write it."""
    if not os.path.isfile(weights):
        raise FileNotFoundError(f"detector {what}: there is no file '{weights}'")
    with _only_state_dicts(weights):
        state = read_checkpoint(weights)
    try:
        model.load_state_dict(state.get("model", state))
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{weights} does not fit {what}: {reason}") from None
