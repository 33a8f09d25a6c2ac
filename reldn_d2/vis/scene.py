"""Which entities of several scene graphs of one image are the same."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..evaluation.matching import pairwise_iou
from ..structures.scene_graph import SceneGraph

__all__ = ["same_entities"]


def same_entities(
    truth: SceneGraph, others: Sequence[SceneGraph]
) -> tuple[SceneGraph, list[dict[int, int]]]:
    """Find out which entities of several scenes are the same, to name and colour them alike.

    They are the same if their classes are equal and their boxes overlap by a half or more; in one
    scene no two are the same.

    Returns:
        all entities, those of the ground truth first, without relations; and for each of
        ``others`` the map from its drawn entities to them.
    """
    everything = truth.select(slice(0))
    maps = []
    for scene in others:
        iou = pairwise_iou(scene.boxes, everything.boxes)
        iou *= np.equal.outer(scene.classes, everything.classes)
        known: dict[int, int] = {}
        drawn = scene.related_entities
        candidates = [
            (-iou[e, same], e, same) for e in drawn for same in np.flatnonzero(iou[e] >= 0.5)
        ]
        for _, entity, same in sorted(candidates):
            if entity not in known and same not in known.values():
                known[entity] = same
        for entity in drawn:
            if entity not in known:
                known[entity] = len(everything.classes)
                boxes = np.concatenate([everything.boxes, scene.boxes[entity][None]])
                classes = np.append(everything.classes, scene.classes[entity])
                everything = replace(everything, boxes=boxes, classes=classes)
        maps.append(known)
    return everything, maps
