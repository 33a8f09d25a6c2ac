"""Ground truth and predictions of one image side by side, with hits and misses."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..evaluation.matching import counted_relations, counted_triplets, match_relations
from ..structures.scene_graph import SceneGraph
from ..utils.protocols import Protocol, find_protocol
from .canvas import pad
from .correspondence import same_entities
from .layout import entity_color
from .visualizer import RelationVisualizer, check_size, heading_of

__all__ = ["compare_models", "rule_name"]


def rule_name(protocol: Protocol) -> str:
    """Return what counted the hits of a picture: a protocol, at the first of its values of k."""
    k = protocol.predicates_per_pair[0]
    return protocol.name if k is None else f"{protocol.name}, k = {k}"


def compare_models(
    img_rgb: np.ndarray,
    dataset_dict: dict[str, Any],
    predictions: Mapping[str, SceneGraph],
    metadata: Any,
    topk: int | None = None,
    side: int = 480,
    protocol: str = "",
) -> np.ndarray:
    """Draw ground truth and the predictions of one or several models in one row.

    Equal entities have equal names and colors.

    Args:
        img_rgb: (H, W, 3) uint8.
        dataset_dict: with ``annotations`` and ``relations`` in the image's frame.
        predictions: prediction by name of the model, in the image's frame.
        metadata: with ``thing_classes``, ``predicate_classes`` and ``evaluator_type``.
        topk: relations drawn per model; None draws the top n, n being the number of ground-truth
            relations, or 5 if there is none.
        side: longest side in pixels of each of the images.
        protocol: evaluation protocol that counts the hits, at the first of its values of k; empty
            means the dataset's own.

    Returns:
        (H', W', 3) uint8. Hits are green, misses red and dashed. The ground truth is marked only
        next to a single model.

    Raises:
        ValueError: the image does not have the size of ``dataset_dict``, the protocol is unknown,
            or the dataset has none.
    """
    rules = find_protocol(protocol, metadata.get("evaluator_type", None))
    check_size(img_rgb, dataset_dict)
    truth = counted_relations(SceneGraph.from_dataset_dict(dataset_dict), rules)
    if topk is None:
        topk = len(truth.pairs) or 5
    k = rules.predicates_per_pair[0]
    scenes = [counted_triplets(x, truth, rules, k, topk) for x in predictions.values()]
    matches = [[x.tolist() for x in match_relations(scene, truth, rules, k)] for scene in scenes]
    distinct, maps = same_entities(truth, scenes)
    maps = [{entity: entity for entity in truth.related_entities}] + maps
    drawn = sorted({same for same_as in maps for same in same_as.values()})
    visualizer = RelationVisualizer(img_rgb, metadata, scale=side / max(img_rgb.shape[:2]))
    names = visualizer.name(distinct, drawn)
    colors = {entity: entity_color(index) for index, entity in enumerate(drawn)}

    marks = [matches[0][1] if len(matches) == 1 else None] + [hits for hits, _ in matches]
    titles, headings = ["Ground truth"], [None]
    for (name, predicted), scene, (_, found) in zip(predictions.items(), scenes, matches):
        titles.append(f"{name}: {sum(found)} of {len(found)} found ({rule_name(rules)})")
        headings.append(heading_of(scene, len(predicted.scores)))
    pictures = [
        visualizer.draw_scene(
            scene,
            marks=mark,
            names={entity: names[same] for entity, same in same_as.items()},
            colors={entity: colors[same] for entity, same in same_as.items()},
            title=title,
            heading=heading,
            panel="below",
            plain=mark is None,
        ).get_image()
        for scene, mark, same_as, title, heading in zip(
            [truth] + scenes, marks, maps, titles, headings
        )
    ]
    height, gap = max(picture.shape[0] for picture in pictures), 12
    padded = [pad(picture, height, picture.shape[1] + gap) for picture in pictures]
    return np.concatenate(padded, axis=1)[:, :-gap]
