"""Box rules on torch tensors and numpy arrays, by hand."""

import numpy as np
import pytest
import torch

from reldn_d2.structures.box_ops import boxes_overlap, union_boxes

LIBRARIES = pytest.mark.parametrize("array", [torch.tensor, np.array])
BOXES = [[0.0, 0, 10, 10], [10, 0, 20, 10], [5, 5, 15, 15], [0, 0, 10, 10], [5, 5, 5, 9]]


@LIBRARIES
def test_union_boxes_is_the_tightest_box_around_both(array):
    union = union_boxes(array([[1.0, 8.0, 5.0, 9.0]]), array([[0.0, 2.0, 7.0, 8.5]]))
    assert union.tolist() == [[0.0, 2.0, 7.0, 9.0]]
    assert union_boxes(array(BOXES)[:0], array(BOXES)[:0]).shape == (0, 4)


@LIBRARIES
def test_union_boxes_leading_dimensions_broadcast(array):
    unions = union_boxes(array(BOXES)[:, None], array(BOXES)[None])
    assert unions.shape == (5, 5, 4) and unions[0, 1].tolist() == [0, 0, 20, 10]
    assert unions[2, 2].tolist() == BOXES[2]


@LIBRARIES
def test_boxes_overlap_touching_and_empty_boxes_do_not(array):
    overlap = boxes_overlap(array(BOXES)[:, None], array(BOXES)[None])
    assert overlap.tolist() == [
        [True, False, True, True, False],
        [False, True, True, False, False],
        [True, True, True, True, False],
        [True, False, True, True, False],
        [False, False, False, False, False],
    ]
    assert boxes_overlap(array(BOXES)[:0], array(BOXES)[:0]).shape == (0,)
