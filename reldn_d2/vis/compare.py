"""Ground truth and predictions of one image side by side, with hits and misses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.matching import find_hits
from ..structures.scene_graph import SceneGraph
from .layout import entity_color
from .scene import same_entities
from .visualizer import RelationVisualizer, check_size, heading_of

__all__ = ["compare_image", "compare_models"]


def compare_image(
    img_rgb: np.ndarray,
    dataset_dict: dict[str, Any],
    predicted: SceneGraph,
    metadata: Any,
    topk: int | None = None,
    side: int = 800,
) -> np.ndarray:
    """Ground truth beside the prediction: hits and what they find in green, the rest in red.

    Arguments and result as in :func:`compare_models`, for one model.
    """
    return compare_models(img_rgb, dataset_dict, {"Prediction": predicted}, metadata, topk, side)


def compare_models(
    img_rgb: np.ndarray,
    dataset_dict: dict[str, Any],
    predictions: Mapping[str, SceneGraph],
    metadata: Any,
    topk: int | None = None,
    side: int = 480,
) -> np.ndarray:
    """Ground truth and the predictions of models in one row; equal entities have equal names.

    Args:
        img_rgb: (H, W, 3) uint8.
        dataset_dict: with ``annotations`` and ``relations`` in the image's frame.
        predictions: from each model's name to its prediction, in the image's frame.
        metadata: with ``thing_classes`` and ``predicate_classes``.
        topk: predictions drawn of each model; None takes as many as there are true relations, or
            5 where there is none.
        side: longest side in pixels of each of the images.

    Returns:
        (H', W', 3) uint8. Hits are green, misses red and dashed. The ground truth is marked only
        beside a single model.
    """
    check_size(img_rgb, dataset_dict)
    truth = SceneGraph.from_dataset_dict(dataset_dict)
    if topk is None:
        topk = len(truth.pairs) or 5
    scenes = [predicted.best(topk) for predicted in predictions.values()]
    matches = [find_hits(scene, truth) for scene in scenes]
    everything, maps = same_entities(truth, scenes)
    maps = [{entity: entity for entity in truth.related_entities}] + maps
    used = sorted({same for known in maps for same in known.values()})
    visualizer = RelationVisualizer(img_rgb, metadata, scale=side / max(img_rgb.shape[:2]))
    names = visualizer.name(everything, used)
    colors = {entity: entity_color(number) for number, entity in enumerate(used)}

    marks = [matches[0][1] if len(matches) == 1 else None] + [hits for hits, _ in matches]
    titles, headings = ["Ground truth"], [None]
    for (name, predicted), scene, (_, found) in zip(predictions.items(), scenes, matches):
        titles.append(f"{name}: {sum(found)} of {len(found)} found")
        headings.append(heading_of(scene, len(predicted.scores)))
    pictures = []
    for number, (scene, known) in enumerate(zip([truth] + scenes, maps)):
        picture = visualizer.draw_triplets(
            scene.boxes,
            scene.classes,
            scene.rows(),
            marks=marks[number],
            names={entity: names[same] for entity, same in known.items()},
            colors={entity: colors[same] for entity, same in known.items()},
            title=titles[number],
            heading=headings[number],
            panel="below",
            plain=marks[number] is None,
        )
        pictures.append(picture.get_image())
    return _in_a_row(pictures, gap=12)


def _in_a_row(pictures: Sequence[np.ndarray], gap: int) -> np.ndarray:
    """Put pictures side by side on white, aligned at their tops."""
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    row = np.full((height, width, 3), 255, dtype=np.uint8)
    left = 0
    for picture in pictures:
        row[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + gap
    return row
