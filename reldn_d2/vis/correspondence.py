"""Entities that are the same in several scene graphs of one image."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..structures.boxes_np import pairwise_iou
from ..structures.scene_graph import SceneGraph

__all__ = ["same_entities"]


def same_entities(
    truth: SceneGraph, others: Sequence[SceneGraph]
) -> tuple[SceneGraph, list[dict[int, int]]]:
    """Find the entities that are the same in several scenes, to give them one name and color.

    Two entities are the same if their classes are equal and their boxes have an IoU of at least
    0.5; the best overlap goes first, and no two entities of one scene are the same.

    Returns:
        all distinct entities, those of the ground truth first, without relations and attributes,
        which differ between the scenes; and per scene of
        ``others`` the map from the entities that take part in its relations to these.
    """
    distinct = replace(truth.select(slice(0)), attributes=None)
    maps = []
    for scene in others:
        iou = pairwise_iou(scene.boxes, distinct.boxes)
        iou *= np.equal.outer(scene.classes, distinct.classes)
        drawn = scene.related_entities
        candidates = [
            (-iou[entity, same], entity, same)
            for entity in drawn
            for same in np.flatnonzero(iou[entity] >= 0.5).tolist()
        ]
        same_as: dict[int, int] = {}
        for _, entity, same in sorted(candidates):
            if entity not in same_as and same not in same_as.values():
                same_as[entity] = same
        new = [entity for entity in drawn if entity not in same_as]
        same_as.update(zip(new, range(len(distinct.classes), len(distinct.classes) + len(new))))
        distinct = replace(
            distinct,
            boxes=np.concatenate([distinct.boxes, scene.boxes[new]]),
            classes=np.append(distinct.classes, scene.classes[new]),
        )
        maps.append(same_as)
    return distinct, maps
