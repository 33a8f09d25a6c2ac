"""The rules of matching, recall and average precision on examples worked out by hand."""

import math

import numpy as np
import pytest
from evaluation_utils import ground_truth, loop_iou, prediction, random_case

from reldn_d2.evaluation import matching
from reldn_d2.evaluation.average_precision import (
    mean_average_precision,
    relation_average_precision,
)
from reldn_d2.evaluation.batches import Batch, anything_matches, found_ranks
from reldn_d2.evaluation.lu2016 import pooled_recall
from reldn_d2.structures import ranking

NUM_PREDICATES = 3

# A person holds the left one of two cups.
GT = ground_truth(
    [[0, 0, 10, 10], [10, 0, 20, 10], [30, 0, 40, 10]], [0, 1, 1], [(0, 1, 2), (0, 1, 0)]
)
TWO = ground_truth([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 1], [(0, 1, 0)])


def as_prediction(gt, score=0.9):
    return prediction(gt.boxes, gt.classes, [(s, o, p, score) for s, o, p in gt.relations.tolist()])


def test_iou_by_hand():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 5], [10, 0, 20, 10], [5, 5, 15, 15], [3, 3, 3, 9]]
    iou = matching.pairwise_iou(boxes[:1], boxes)
    assert iou.tolist() == [[1.0, 0.5, 0.0, 25 / 175, 0.0]]
    assert matching.pairwise_iou(np.zeros((0, 4)), boxes).shape == (0, 5)
    assert matching.pairwise_iou([[1, 1, 1, 1]], [[1, 1, 1, 1]]).tolist() == [[0.0]]


def test_phrase_box_encloses_both():
    boxes = np.array([[0.0, 4, 2, 6], [1, 0, 9, 5]])
    assert matching.phrase_boxes(boxes, np.array([[0, 1]])).tolist() == [[0, 0, 9, 6]]


def test_predicates_per_pair_in_rank_order():
    pairs = np.array([[0, 1], [1, 0], [0, 1], [0, 1], [1, 0]])
    assert ranking.limit_predicates_per_pair(pairs, 1).tolist() == [1, 1, 0, 0, 0]
    assert ranking.limit_predicates_per_pair(pairs, 2).tolist() == [1, 1, 1, 0, 1]
    assert ranking.limit_predicates_per_pair(pairs, 0).all()


def candidates(overlaps, threshold=0.5):
    """The combinations of a (K, M) table that overlap enough."""
    rows, columns = np.nonzero(overlaps >= threshold)
    return rows, columns, overlaps[rows, columns]


def test_one_to_one_takes_the_best_unmatched():
    overlaps = np.array([[0.6, 0.9], [0.6, 0.9], [0.7, 0.5], [0.49, 0.5]])
    found = candidates(overlaps)
    codes = np.zeros(4, dtype=np.int64)
    assert matching.match_one_to_one(*found, codes, 2).tolist() == [1, 0, -1, -1]
    overlaps[0, 1] = 0
    found = candidates(overlaps)
    assert matching.match_one_to_one(*found, codes, 2).tolist() == [0, 1, -1, -1]
    assert matching.match_one_to_one(*candidates(overlaps[:, :0]), codes, 0).tolist() == [-1] * 4
    # Average precision tests against the best one, taken or not.
    overlaps = np.array([[0.6, 0.9], [0.6, 0.9], [0.7, 0.5], [0.49, 0.5], [0.8, 0.8]])
    assert matching.best_candidates(*candidates(overlaps), 5).tolist() == [1, 1, 0, 1, 0]
    assert matching.best_overlap(overlaps, overlaps > 0).tolist() == [1, 1, 0, 1, 0]
    # Many-to-many: the rank of the first that finds it.
    rows, columns, _ = candidates(overlaps)
    ranks = np.array([4, 3, 2, 1, 0])
    assert matching.first_ranks(rows, columns, ranks, 3).tolist() == [0, 0, matching.NEVER]


def test_equal_codes_are_all_combinations():
    rows, columns = matching.equal_codes(np.array([7, 5, 7, 9]), np.array([7, 5, 7]))
    assert list(zip(rows.tolist(), columns.tolist())) == [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)]
    assert len(matching.equal_codes(np.array([1]), np.zeros(0, dtype=np.int64))[0]) == 0


def test_rank_in_group_counts_earlier_equals():
    assert ranking.rank_in_group(np.array([3, 1, 3, 3, 1])).tolist() == [0, 0, 1, 2, 1]
    assert ranking.rank_in_group(np.zeros(0, dtype=np.int64)).tolist() == []


def test_overlap_of_exactly_one_half_matches():
    gt = ground_truth([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 1], [(0, 1, 0)])
    half = prediction([[0, 0, 10, 5], [20, 0, 30, 10]], [0, 1], [(0, 1, 0, 0.9)])
    less = prediction([[0, 0, 10, 4.9], [20, 0, 30, 10]], [0, 1], [(0, 1, 0, 0.9)])
    assert pooled_recall([(gt, half)], [50]) == [100.0]
    assert pooled_recall([(gt, less)], [50]) == [0.0]
    # The enclosing boxes are equal all the same up to the subject's height.
    assert pooled_recall([(gt, less)], [50], kind="phrase") == [100.0]


def test_average_precision_by_hand():
    # Precision 1, 1/2, 2/3 at the ranks; two of three ground truths are found.
    ap = matching.voc_average_precision(np.array([True, False, True]), 3)
    assert ap == pytest.approx((1 + 2 / 3) / 3)
    # The envelope lifts 1/2 to 2/3.
    ap = matching.voc_average_precision(np.array([False, True, True]), 2)
    assert ap == pytest.approx(2 / 3)
    assert matching.voc_average_precision(np.zeros(0, dtype=bool), 2) == 0.0
    assert math.isnan(matching.voc_average_precision(np.zeros(2, dtype=bool), 0))


def test_second_hit_of_a_ground_truth_is_a_false_positive():
    gt = ground_truth([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 1], [(0, 1, 0)])
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 9]]
    twice = prediction(boxes, [0, 1, 1], [(0, 2, 0, 0.9), (0, 1, 0, 0.8)])
    ap, counts = relation_average_precision([(gt, twice)], NUM_PREDICATES)
    assert ap[0] == 100.0 and counts.tolist() == [1, 0, 0]
    other = ground_truth(gt.boxes, gt.classes, [(0, 1, 0)])
    # With one more image, found later than the repeated hit: (1 + 2/3) / 2.
    late = prediction(boxes[:2], [0, 1], [(0, 1, 0, 0.5)])
    ap, _ = relation_average_precision([(gt, twice), (other, late)], NUM_PREDICATES)
    assert ap[0] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert np.isnan(ap[1:]).all() and mean_average_precision(ap) == ap[0]


def test_k_limits_a_pair_with_two_predicates():
    images = [(GT, as_prediction(GT))]
    assert pooled_recall(images, ["n", 1, 50], 0) == [100.0, 50.0, 100.0]
    assert pooled_recall(images, ["n", 1, 50], 1) == [50.0, 50.0, 50.0]


def test_recall_is_pooled_and_images_without_predictions_count():
    none = prediction([], [], [])
    assert pooled_recall([(GT, as_prediction(GT)), (GT, none)], [50]) == [50.0]
    empty = ground_truth([], [], [])
    assert pooled_recall([(GT, as_prediction(GT)), (empty, as_prediction(GT))], [50]) == [100.0]
    assert math.isnan(pooled_recall([(empty, none)], [50])[0])
    assert math.isnan(pooled_recall([], [50])[0])


def test_one_wrong_label_or_box_matches_nothing():
    right = (0, 1, 2, 0.9)
    assert pooled_recall([(GT, prediction(GT.boxes, [0, 1, 1], [right]))], [50]) == [50.0]
    assert pooled_recall([(GT, prediction(GT.boxes, [1, 1, 1], [right]))], [50]) == [0.0]
    assert pooled_recall([(GT, prediction(GT.boxes, [0, 0, 1], [right]))], [50]) == [0.0]
    assert pooled_recall([(GT, prediction(GT.boxes, [0, 1, 1], [(0, 1, 1, 0.9)]))], [50]) == [0.0]
    assert pooled_recall([(GT, prediction(GT.boxes, [0, 1, 1], [(0, 2, 2, 0.9)]))], [50]) == [0.0]
    assert pooled_recall([(GT, prediction(GT.boxes, [0, 1, 1], [(1, 0, 2, 0.9)]))], [50]) == [0.0]


def test_repeated_ground_truth_must_be_found_twice():
    gt = ground_truth(GT.boxes, GT.classes, [(0, 1, 2), (0, 1, 2)])
    once = prediction(gt.boxes, gt.classes, [(0, 1, 2, 0.9)])
    assert pooled_recall([(gt, once)], [50]) == [50.0]
    assert pooled_recall([(gt, as_prediction(gt))], [50]) == [100.0]


def test_equal_scores_keep_the_order_given():
    triplets = [(0, 2, 2, 0.5), (0, 1, 2, 0.5)]
    assert prediction(GT.boxes, GT.classes, triplets).best(1).pairs.tolist() == [[0, 2]]


def test_reduced_is_the_union_of_the_best_for_every_k():
    triplets = [(0, 1, 0, 0.9), (0, 1, 1, 0.8), (0, 2, 0, 0.7), (1, 0, 0, 0.6), (0, 1, 2, 0.5)]
    pred = prediction(GT.boxes, GT.classes, triplets)
    assert pred.reduced((1,), 2).scores.tolist() == [0.9, 0.7]
    assert pred.reduced((0,), 2).scores.tolist() == [0.9, 0.8]
    assert pred.reduced((1, 0), 2).scores.tolist() == [0.9, 0.8, 0.7]
    assert pred.reduced((1, 0), 0).scores.tolist() == pred.scores.tolist()
    # What is reduced to again is what would have been reduced to at first.
    rng = np.random.default_rng(0)
    for _ in range(100):
        _, pred = random_case(rng, 5, 5, 2, 3).pair()
        for k in (0, 1, 2):
            once = pred.reduced((k,), 4)
            twice = pred.reduced((2, 0, 1), 4).reduced((k,), 4)
            np.testing.assert_equal(vars(once), vars(twice))


def test_ranks_after_k_and_among_the_considered():
    triplets = [(0, 1, 0, 0.9), (0, 1, 1, 0.8), (0, 2, 0, 0.7), (1, 0, 0, 0.6)]
    images = [(GT, prediction(GT.boxes, GT.classes, triplets))] * 2
    never = matching.NEVER
    assert Batch(images).ranks(0).tolist() == [0, 1, 2, 3] * 2
    assert Batch(images).ranks(1).tolist() == [0, never, 1, 2] * 2
    considered = np.array([False, False, True, True] * 2)
    assert Batch(images).ranks(1, considered).tolist() == [never, never, 0, 1] * 2


def test_unknown_overlap_is_an_error():
    with pytest.raises(ValueError, match="'union'.*relationship, phrase"):
        Batch([(GT, as_prediction(GT))]).candidates("union")


def test_labels_too_many_for_the_codes_are_an_error():
    huge = ground_truth(GT.boxes, [0, 2**30, 1], [(0, 1, 2**30)])
    with pytest.raises(ValueError, match="too many"):
        anything_matches([(huge, prediction(GT.boxes, [2**30, 1, 1], []))] * 9)


def test_iou_of_random_boxes_equals_the_loop():
    rng = np.random.default_rng(1)
    low = rng.integers(0, 5, (60, 2))
    boxes = np.concatenate([low, low + rng.integers(0, 4, (60, 2))], axis=1).astype(float)
    expected = [[loop_iou(a, b) for b in boxes.tolist()] for a in boxes.tolist()]
    assert matching.pairwise_iou(boxes, boxes).tolist() == expected


def test_matches_of_the_best_n_are_the_first_n_matches():
    rng = np.random.default_rng(3)
    for _ in range(100):
        gt, pred = random_case(rng, 5, 5, 2, 3).pair()
        for one_to_one in (True, False):
            (whole,) = found_ranks([(gt, pred)], [0], one_to_one=one_to_one).values()
            for n in range(1, len(pred.scores)):
                (part,) = found_ranks([(gt, pred.best(n))], [0], one_to_one=one_to_one).values()
                assert (part == np.where(whole < n, whole, matching.NEVER)).all()
