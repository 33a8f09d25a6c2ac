"""The comparison of an exported file's outputs with the model's."""

import numpy as np
import pytest

from reldn_d2.export.comparison import compare_outputs


def outputs(**changes):
    values = dict(
        boxes=np.array([[0, 0, 9, 9], [5, 5, 20, 20], [1, 1, 8, 30]], np.float32),
        classes=np.array([1, 2, 3]),
        box_scores=np.array([0.9, 0.5, 0.5], np.float32),
        pairs=np.array([[0, 1], [1, 0], [2, 0]]),
        predicates=np.array([4, 4, 5]),
        scores=np.array([0.6, 0.3, 0.2], np.float32),
    )
    return {**values, **changes}


def test_compare_outputs_rounding_finds_no_problem():
    result = compare_outputs(outputs(), outputs(scores=np.array([0.6, 0.30001, 0.2])))
    assert result.problem is None and result.difference == pytest.approx(1e-5, rel=0.01)
    assert result.exchanged == 0


def test_compare_outputs_entities_in_another_order_finds_no_problem():
    order = [0, 2, 1]
    moved = {name: outputs()[name][order] for name in ("boxes", "classes", "box_scores")}
    moved["pairs"] = np.array([[0, 2], [2, 0], [1, 0]])
    assert compare_outputs(outputs(), outputs(**moved)) == (None, 0.0, 0)


def test_compare_outputs_triplets_exchanged_for_equal_scores_are_counted():
    assert compare_outputs(outputs(), outputs(predicates=np.array([4, 4, 6]))) == (None, 0.0, 1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"predicates": np.array([4, 4, 6]), "scores": np.array([0.6, 0.3, 0.25])}, "1 of 3 trip"),
        ({"scores": np.array([0.6, 0.31, 0.2])}, "a score differs by 1.0e-02"),
        ({"box_scores": np.array([0.9, 0.5, 0.4])}, "a score differs by 1.0e-01"),
        ({"classes": np.array([1, 2, 4])}, "finds no entity like 2"),
        ({"boxes": outputs()["boxes"] + 1}, "finds no entity like 0"),
        ({"boxes": outputs()["boxes"][:2]}, "finds 2 entities, the eager model 3"),
        ({"pairs": np.zeros((0, 2), int)}, "finds 0 relations, the eager model 3"),
    ],
)
def test_compare_outputs_difference_is_named(changes, problem):
    assert problem in compare_outputs(outputs(), outputs(**changes)).problem


def test_compare_outputs_given_boxes_have_no_entities():
    given = {name: outputs()[name] for name in ("pairs", "predicates", "scores")}
    assert compare_outputs(given, given) == (None, 0.0, 0)
