"""Drawing on frames of a video, with names and colors that entities keep."""

import cv2
import numpy as np
import pytest
from usage_utils import picture

from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.vis.video import EntityTracker, draw_frame


@pytest.mark.parametrize("size", [(60, 90), (320, 180), (50, 960), (700, 1000)])
def test_draw_frame_keeps_other_pixels(size):
    frame = picture(*size)
    boxes = [[2.0, 2, 20, 30], [10.0, 20, 30, 40]]
    predicted = SceneGraph.from_triplets(boxes, [0, 1], [(0, 1, 0, 1.0)])
    drawn = draw_frame(frame, predicted, EntityTracker(["person", "cup"]), None)
    scale = max(960 / max(size), 1)
    height, width = (2 * int(round(x * scale) // 2) for x in size)
    assert drawn.shape == (height, width, 3)
    plain = cv2.resize(frame, (width, height))
    equal = (np.abs(drawn.astype(int) - plain).max(axis=2) < 40).mean()
    assert 0.5 < equal < 1
    empty = predicted.best(0)
    drawn = draw_frame(frame, empty, EntityTracker(["person", "cup"]), None)
    assert np.abs(drawn.astype(int) - plain).max() < 40


def test_entity_tracker_moving_entities_keep_name_and_color():
    tracker = EntityTracker(["person", "cup"], patience=2)
    triplets = [(0, 1, 0, 0.9)]

    def scene(shift, order=(0, 1)):
        boxes = np.array([[0, 0, 40, 90], [30, 40, 60, 70]])[list(order)] + [shift, 0, shift, 0]
        return SceneGraph.from_triplets(boxes, [[0, 1][i] for i in order], triplets)

    names, colors = tracker.update(scene(0))
    assert sorted(names.values()) == ["cup 1", "person 1"]
    for shift in range(5, 60, 5):
        moved, new_colors = tracker.update(scene(shift, order=(1, 0)))  # in another order
        assert (moved[0], moved[1]) == (names[1], names[0])
        assert (new_colors[0], new_colors[1]) == (colors[1], colors[0])
    jumped, _ = tracker.update(scene(300))
    assert sorted(jumped.values()) == ["cup 2", "person 2"]
    for _ in range(3):
        tracker.update(SceneGraph.empty())
    assert sorted(tracker.update(scene(300))[0].values()) == ["cup 3", "person 3"]  # forgotten
