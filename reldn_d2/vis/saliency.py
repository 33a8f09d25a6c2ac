"""Feature maps of the two CNNs over the image, and the places that a triplet's score depends on.

Shapes: c channels, (h, w) one level of a feature pyramid, (H, W) the image. Maps are float32 in
[0, 1] in the frame of the image as it was read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image as PILImage
from torch import Tensor

from detectron2.structures import ImageList

from ..modeling.meta_arch import postprocess_relations
from ..predictor import RelationPredictor
from ..structures.scene_graph import SceneGraph, Triplet
from ..utils.image_io import ImageError, OneImage, load_rgb
from .canvas import pad
from .visualizer import RelationVisualizer, score_text

__all__ = [
    "FUSED",
    "Saliency",
    "draw_feature_maps",
    "draw_triplet_saliency",
    "feature_saliency",
    "triplet_saliency",
]

FUSED = "fused"
_NO_MAPS = (
    "nothing to draw: this model has no visual module, so its scores do not depend on feature maps"
)


class Saliency(NamedTuple):
    """(H, W) maps of the detector's CNN and the predicate CNN, by level and ``fused``."""

    detector: dict[str, np.ndarray]
    predicate: dict[str, np.ndarray]  # empty if the model has no predicate CNN


def feature_saliency(predictor: RelationPredictor, image: OneImage) -> Saliency:
    """Return channel-averaged feature maps (Fig 4 and 5): mean absolute activations.

    ``fused`` is the mean of the levels, each scaled to [0, 1] first.

    Args:
        predictor: predictor with the model.
        image: a path or an (H, W, 3) RGB array.
    """
    rgb = load_rgb(image)
    inputs = [predictor.prepare(rgb)]
    with torch.no_grad():
        images, features, predicate_features = _features(predictor, inputs)
    sizes = _sizes(inputs, images, rgb)
    maps = []
    for levels in (features, predicate_features or {}):
        averaged = {name: x[0].abs().mean(dim=0) for name, x in levels.items()}
        maps.append(_to_image(averaged, sizes, normalize_levels=True))
    return Saliency(*maps)


def triplet_saliency(
    predictor: RelationPredictor,
    image: OneImage,
    rank: int = 0,
    detections: Mapping[str, Any] | None = None,
) -> tuple[Saliency, SceneGraph]:
    """Return how much each place contributes to the predicate of one triplet, in both CNNs.

    That is the absolute value of the gradient of ``log p(predicate | s, o)`` with respect to each
    feature map, times the map, summed over channels.

    Args:
        predictor: predictor with the model.
        image: a path or an (H, W, 3) RGB array.
        rank: rank of the predicted triplet, 0 being the best.
        detections: as for a call of the predictor, for a model that needs them.

    Returns:
        the maps, and the prediction with this triplet alone.

    Raises:
        ImageError: there are fewer triplets, or the scores do not depend on feature maps.
    """
    name = str(image) if isinstance(image, (str, Path)) else "image"
    rgb = load_rgb(image, name=name)
    model, inputs = predictor.model, [predictor.prepare(rgb, detections=detections, name=name)]
    predictor.require_detections(inputs[0])
    head = model.relation_head
    with torch.no_grad():
        images, features, predicate_features = _features(predictor, inputs)
        detected = model.detector.detect(inputs, images, features)[0]
        entities, relations = head(features, predicate_features, [detected])[0]
    if not 0 <= rank < len(relations):
        raise ImageError(f"{name}: no triplet {rank}; there are {len(relations)}, counted from 0")
    subject, object_ = relations.pairs[rank]
    predicate = int(relations.predicates[rank])
    branches = []
    for levels in (features, predicate_features or {}):
        branches.append({n: x.detach().requires_grad_(True) for n, x in levels.items()})
    with torch.enable_grad():
        encoded = head.encode_entities(
            branches[0], [detected.pred_boxes], [detected.pred_classes], [detected.image_size]
        )
        encoded, _ = head.refine(encoded, detected, classes_given=False)
        logits = head.pair_logits(encoded, branches[1] or None, subject[None], object_[None])
        score = head.prior.adjust(logits).log_softmax(dim=1)[0, predicate]
        leaves = [x for levels in branches for x in levels.values()]
        gradients: Sequence[Tensor | None] = ()
        if score.requires_grad:
            gradients = torch.autograd.grad(score, leaves, allow_unused=True)
    if all(x is None for x in gradients):
        raise ImageError(f"{name}: {_NO_MAPS}")
    maps, gradients, sizes = [], iter(gradients), _sizes(inputs, images, rgb)
    for levels in branches:
        contributions = {}
        for (level, x), gradient in zip(levels.items(), gradients):
            if gradient is not None:
                contributions[level] = (gradient * x.detach()).sum(dim=1)[0].abs()
        maps.append(_to_image(contributions, sizes, normalize_levels=False))
    height, width = rgb.shape[:2]
    instances, relations = postprocess_relations(
        entities, relations[rank : rank + 1], height, width
    )
    output = {"instances": instances, "relations": relations}
    return Saliency(*maps), predictor.scene_graph(output)


def _features(predictor: RelationPredictor, inputs: list[dict]):
    """Return the padded input of the network and the feature maps of both CNNs.

    Raises:
        ImageError: there are no feature maps, because the model reads no pixels.
    """
    if not predictor.reads_images:
        raise ImageError(f"{inputs[0]['file_name']}: {_NO_MAPS}")
    images = predictor.model.detector.preprocess(inputs)
    return (images, *predictor.model.feature_maps(images))


def _sizes(inputs: list[dict], images: ImageList, rgb: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of the input with padding, without it, and of the image."""
    padded = tuple(images.tensor.shape[-2:])
    return padded, tuple(inputs[0]["image"].shape[-2:]), rgb.shape[:2]


def _to_image(
    levels: dict[str, Tensor], sizes: Sequence[tuple[int, int]], normalize_levels: bool
) -> dict[str, np.ndarray]:
    """Resize (h, w) maps of the padded input to (H, W) maps of the image, and add their fusion."""
    padded, inner, original = sizes
    plain = {}
    for name, x in levels.items():
        x = F.interpolate(x.float()[None, None], padded, mode="bilinear", align_corners=False)
        x = x[..., : inner[0], : inner[1]]
        x = F.interpolate(x, original, mode="bilinear", align_corners=False)
        plain[name] = x[0, 0].cpu().numpy()
    scaled = {name: _to_unit(x) for name, x in plain.items()}
    if scaled:
        parts = scaled.values() if normalize_levels else plain.values()
        scaled[FUSED] = _to_unit(sum(parts) / len(plain))
    return scaled


def _to_unit(values: np.ndarray) -> np.ndarray:
    """Scale to [0, 1]; the top 0.1 % saturates, so that one place does not hide the others."""
    low, high = float(values.min()), float(np.quantile(values, 0.999))
    if high <= low:
        high = float(values.max())
    return ((values - low) / max(high - low, 1e-12)).clip(0, 1).astype(np.float32)


def overlay(rgb: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Blend a map in [0, 1] with the image to (H, W, 3) uint8: dark and gray where it is low."""
    color = colormaps["inferno"](values)[..., :3] * 255
    gray = rgb.mean(axis=2, keepdims=True)
    share = 0.35 + 0.5 * values[..., None]
    return ((1 - share) * gray + share * color).round().astype(np.uint8)


def draw_feature_maps(
    predictor: RelationPredictor, image: OneImage, levels: Sequence[str] = (FUSED,)
) -> np.ndarray:
    """Draw the image, the detector's CNN and the predicate CNN side by side, one row per level.

    Raises:
        ImageError: the model has no such level.
    """
    rgb = load_rgb(image)
    saliency = feature_saliency(predictor, rgb)
    rows = []
    for level in levels:
        maps = _maps_of(saliency, level)
        rows.append([("image", rgb), *((caption, overlay(rgb, x)) for caption, x in maps)])
    return _sheet(rows)


def draw_triplet_saliency(
    predictor: RelationPredictor,
    image: OneImage,
    rank: int = 0,
    level: str = FUSED,
    detections: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, Triplet]:
    """Draw a triplet on the image, and its saliency in both CNNs, side by side.

    Arguments as for :func:`triplet_saliency`; ``level`` is that of the feature maps.

    Returns:
        the picture and the triplet.

    Raises:
        ImageError: as in :func:`triplet_saliency`, or the model has no such level.
    """
    rgb = load_rgb(image)
    saliency, prediction = triplet_saliency(predictor, image, rank, detections)
    maps = _maps_of(saliency, level)
    triplet = prediction.triplets()[0]
    words = f"{triplet.subject} {triplet.predicate} {triplet.object}, {score_text(triplet.score)}"
    pictures = [(words, rgb), *((caption, overlay(rgb, x)) for caption, x in maps)]
    row = [(title, _draw_triplet(predictor, x, prediction)) for title, x in pictures]
    return _sheet([row]), triplet


def _maps_of(saliency: Saliency, level: str) -> list[tuple[str, np.ndarray]]:
    """Return the caption and the map of each CNN at one level."""
    if level not in saliency.detector:
        known = ", ".join(saliency.detector)
        raise ImageError(f"the model has no feature map '{level}'; it has {known}")
    named = (("detector CNN", saliency.detector), ("predicate CNN", saliency.predicate))
    return [(f"{cnn}, {level}", maps[level]) for cnn, maps in named if level in maps]


def _draw_triplet(predictor: RelationPredictor, rgb: np.ndarray, scene: SceneGraph) -> np.ndarray:
    visualizer = RelationVisualizer(rgb, predictor.metadata, scale=_scale(rgb))
    return visualizer.draw_scene(scene, panel="none").get_image()


def _scale(rgb: np.ndarray) -> float:
    return 560 / max(rgb.shape[:2])


def _sheet(rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> np.ndarray:
    """Arrange pictures with titles in rows and columns on white."""
    lines = []
    for row in rows:
        cells = []
        for title, picture in row:
            scale = _scale(picture)
            size = [max(1, round(x * scale)) for x in picture.shape[1::-1]]
            picture = np.asarray(PILImage.fromarray(picture).resize(size, PILImage.BICUBIC))
            visualizer = RelationVisualizer(picture, scale=1.0)  # leaves room for titles
            empty = SceneGraph.empty()
            cells.append(visualizer.draw_scene(empty, title=title, panel="none").get_image())
        height = max(x.shape[0] for x in cells)
        cells = [pad(x, height, x.shape[1] + 10) for x in cells]
        lines.append(np.concatenate(cells, axis=1))
    width = max(x.shape[1] for x in lines)
    return np.concatenate([pad(x, x.shape[0] + 8, width) for x in lines])
