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
        predicate_scores=np.array([0.9, 0.5, 0.4], np.float32),
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
        ({"boxes": outputs()["boxes"][:2]}, "boxes have the shape (2, 4), the eager model's (3, 4"),
        ({"pairs": np.zeros((0, 2), int)}, "pairs have the shape (0, 2), the eager model's (3, 2)"),
        ({"scores": outputs()["scores"] * np.nan}, "its scores or the eager model's are not all f"),
        ({"box_scores": np.array([0.9, np.nan, 0.5])}, "its box_scores or the eager model's are n"),
        ({"predicate_scores": np.zeros(3)}, "a score differs by 9.0e-01"),
        ({"pairs": [[0, 1]] * 3, "predicates": [4] * 3}, "finds 1 different triplets, the eager m"),
        (
            {name: outputs()[name][[1, 0, 2]] for name in ("pairs", "scores", "predicate_scores")},
            "its scores are not in descending order",
        ),
        # Equal scores alone do not make these the eager model's triplets.
        ({"predicates": np.array([5, 5, 6])}, "3 of 3 triplets are not among the eager model's"),
    ],
)
def test_compare_outputs_difference_is_named(changes, problem):
    changed = {name: np.asarray(values) for name, values in changes.items()}
    assert problem in compare_outputs(outputs(), outputs(**changed)).problem


def test_compare_outputs_model_without_finite_scores_is_named():
    broken = outputs(scores=np.full(3, np.nan, np.float32))
    assert "or the eager model's are not all finite" in compare_outputs(broken, outputs()).problem


def test_compare_outputs_given_boxes_have_no_entities():
    names = ("pairs", "predicates", "scores", "predicate_scores")
    given = {name: outputs()[name] for name in names}
    assert compare_outputs(given, given) == (None, 0.0, 0)
