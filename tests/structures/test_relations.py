"""Relations of an image: fields, checks, and indices after entities are dropped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reldn_d2.structures.relations import (
    check_relation_triplets,
    ground_truth_relations,
    predicted_relations,
    remap_relations,
)


def predictions(pairs):
    count = len(pairs)
    return predicted_relations(
        (10, 20),
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        torch.arange(count),
        torch.linspace(1, 0.1, count) if count else torch.zeros(0),
        torch.full((count,), 0.5),
    )


def test_ground_truth_relations_fields_and_types():
    relations = ground_truth_relations([(0, 2, 5), (1, 0, 3)], (10, 20))
    assert relations.gt_pairs.tolist() == [[0, 2], [1, 0]]
    assert relations.gt_predicates.tolist() == [5, 3]
    assert relations.gt_pairs.dtype == relations.gt_predicates.dtype == torch.int64
    assert relations.image_size == (10, 20) and len(relations) == 2


def test_ground_truth_relations_empty():
    relations = ground_truth_relations([], (10, 20))
    assert relations.gt_pairs.shape == (0, 2) and relations.gt_predicates.shape == (0,)
    assert len(remap_relations(relations, torch.zeros(0, dtype=torch.bool))) == 0
    assert len(remap_relations(relations, torch.tensor([True, False]))) == 0


@pytest.mark.parametrize(
    ("triplet", "message"),
    [
        ((0, 3, 1), "object index 3 is outside the 3 annotations"),
        ((-1, 0, 1), "subject index -1 is outside the 3 annotations"),
        ((1, 1, 1), "relates annotation 1 to itself"),
        ((0, 1, 4), "predicate 4 is outside the 4 predicates"),
        ((0, 1, -1), "predicate -1 is outside"),
        ((0, 1), r"expected \(subject_index, object_index, predicate_id\)"),
    ],
)
def test_check_relation_triplets_invalid_triplet_raises(triplet, message):
    with pytest.raises(ValueError, match=rf"img\.jpg: relation 1 is .*{message}") as error:
        check_relation_triplets([(0, 1, 2), triplet], 3, 4, "img.jpg")
    assert (
        "expected" in str(error.value)
        or "outside" in str(error.value)
        or ("Fix" in str(error.value))
    )


def test_check_relation_triplets_valid_triplets_pass():
    check_relation_triplets([(0, 2, 3), (2, 0, 3), (0, 2, 3)], 3, 4)
    check_relation_triplets([(0, 1, 400)], 2)
    check_relation_triplets([], 0, 4)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.data())
def test_remap_relations_equals_lookup(kept, data):
    indices = st.integers(0, len(kept) - 1)
    pairs = data.draw(st.lists(st.tuples(indices, indices), max_size=8))
    entities = [i for i, keep in enumerate(kept) if keep]
    survivors = [n for n, (s, o) in enumerate(pairs) if kept[s] and kept[o]]
    result = remap_relations(predictions(pairs), torch.tensor(kept))
    expected = [[entities.index(s), entities.index(o)] for s, o in (pairs[n] for n in survivors)]
    assert result.pairs.tolist() == expected
    assert result.predicates.tolist() == survivors  # the other fields follow
    assert len(result.scores) == len(result.predicate_scores) == len(survivors)


def test_remap_relations_does_not_modify_argument():
    relations = ground_truth_relations([(0, 2, 5), (2, 1, 3)], (10, 20))
    result = remap_relations(relations, torch.tensor([True, False, True]), (5, 6))
    assert result.gt_pairs.tolist() == [[0, 1]] and result.gt_predicates.tolist() == [5]
    assert result.image_size == (5, 6)
    assert relations.gt_pairs.tolist() == [[0, 2], [2, 1]] and relations.image_size == (10, 20)
