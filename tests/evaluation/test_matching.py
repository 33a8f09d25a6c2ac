"""The rules of matching, recall and average precision on examples worked out by hand."""

import math

import numpy as np
import pytest
from evaluation_utils import ground_truth, loop_iou, prediction, random_case

from reldn_d2.evaluation import matching, metrics
from reldn_d2.evaluation.batches import NEVER, Batch, equal_codes
from reldn_d2.evaluation.protocol_metrics import Settings
from reldn_d2.evaluation.scoring import match_images
from reldn_d2.structures import boxes_np, ranking
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.protocols import PROTOCOL_REGISTRY

NUM_PREDICATES = 3

# A person holds the left one of two cups.
GT = ground_truth(
    [[0, 0, 10, 10], [10, 0, 20, 10], [30, 0, 40, 10]], [0, 1, 1], [(0, 1, 2), (0, 1, 0)]
)
TWO = ground_truth([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 1], [(0, 1, 0)])


def matches_of(images, k=None, topk=100):
    """Matches by the protocol lu2016."""
    options = Settings(("a", "b", "c")[:NUM_PREDICATES], predicates_per_pair=(k,), topk=topk)
    return match_images(images, PROTOCOL_REGISTRY["lu2016"], options)[0][k]


def pooled_recall(images, recall_at, k=None, overlap="relationship"):
    found = matches_of(images, k)
    return metrics.pooled_recall(found.ranks[overlap], found.truth, recall_at)


def average_precision(images):
    found = matches_of(images)
    return found.triplets["relationship"].average_precision(found.truth, NUM_PREDICATES)


def as_prediction(gt, score=0.9):
    return prediction(gt.boxes, gt.classes, [(s, o, p, score) for s, o, p in gt.relations.tolist()])


def test_pairwise_iou_by_hand():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 5], [10, 0, 20, 10], [5, 5, 15, 15], [3, 3, 3, 9]]
    iou = boxes_np.pairwise_iou(boxes[:1], boxes)
    assert iou.tolist() == [[1.0, 0.5, 0.0, 25 / 175, 0.0]]
    assert boxes_np.pairwise_iou(np.zeros((0, 4)), boxes).shape == (0, 5)
    assert boxes_np.pairwise_iou([[1, 1, 1, 1]], [[1, 1, 1, 1]]).tolist() == [[0.0]]


def test_phrase_boxes_enclose_subject_and_object():
    boxes = np.array([[0.0, 4, 2, 6], [1, 0, 9, 5]])
    assert boxes_np.phrase_boxes(boxes, np.array([[0, 1]])).tolist() == [[0, 0, 9, 6]]


def test_limit_predicates_per_pair_keeps_the_first_of_each_pair():
    pairs = np.array([[0, 1], [1, 0], [0, 1], [0, 1], [1, 0]])
    assert ranking.limit_predicates_per_pair(pairs, 1).tolist() == [1, 1, 0, 0, 0]
    assert ranking.limit_predicates_per_pair(pairs, 2).tolist() == [1, 1, 1, 0, 1]
    assert ranking.limit_predicates_per_pair(pairs, None).all()
    assert ranking.limit_predicates_per_pair(pairs, 0).all()  # what None was called before


def candidates(overlaps, threshold=0.5):
    """The combinations of a (K, M) table that overlap enough."""
    rows, columns = np.nonzero(overlaps >= threshold)
    return rows, columns, overlaps[rows, columns]


def test_match_one_to_one_takes_the_best_free_relation():
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
    # Many-to-many: the rank of the first that finds it.
    rows, columns, _ = candidates(overlaps)
    ranks = np.array([4, 3, 2, 1, 0])
    assert matching.first_ranks(rows, columns, ranks, 3).tolist() == [0, 0, NEVER]


def test_equal_codes_gives_all_combinations():
    rows, columns = equal_codes(np.array([7, 5, 7, 9]), np.array([7, 5, 7]))
    assert list(zip(rows.tolist(), columns.tolist())) == [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)]
    assert len(equal_codes(np.array([1]), np.zeros(0, dtype=np.int64))[0]) == 0


def test_rank_in_group_counts_earlier_equals():
    assert ranking.rank_in_group(np.array([3, 1, 3, 3, 1])).tolist() == [0, 0, 1, 2, 1]
    assert ranking.rank_in_group(np.zeros(0, dtype=np.int64)).tolist() == []


def test_candidates_overlap_of_exactly_one_half_matches():
    gt = ground_truth([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 1], [(0, 1, 0)])
    half = prediction([[0, 0, 10, 5], [20, 0, 30, 10]], [0, 1], [(0, 1, 0, 0.9)])
    less = prediction([[0, 0, 10, 4.9], [20, 0, 30, 10]], [0, 1], [(0, 1, 0, 0.9)])
    assert pooled_recall([(gt, half)], [50]) == [100.0]
    assert pooled_recall([(gt, less)], [50]) == [0.0]
    # The enclosing boxes are equal all the same up to the subject's height.
    assert pooled_recall([(gt, less)], [50], overlap="phrase") == [100.0]


def test_voc_average_precision_by_hand():
    # Precision 1, 1/2, 2/3 at the ranks; two of three ground truths are found.
    ap = metrics.voc_average_precision(np.array([True, False, True]), 3)
    assert ap == pytest.approx((1 + 2 / 3) / 3)
    # The envelope lifts 1/2 to 2/3.
    ap = metrics.voc_average_precision(np.array([False, True, True]), 2)
    assert ap == pytest.approx(2 / 3)
    assert metrics.voc_average_precision(np.zeros(0, dtype=bool), 2) == 0.0
    assert math.isnan(metrics.voc_average_precision(np.zeros(2, dtype=bool), 0))


def test_average_precision_second_hit_of_a_relation_is_a_false_positive():
    gt = ground_truth([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 1], [(0, 1, 0)])
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 9]]
    twice = prediction(boxes, [0, 1, 1], [(0, 2, 0, 0.9), (0, 1, 0, 0.8)])
    assert average_precision([(gt, twice)])[0] == 100.0
    other = ground_truth(gt.boxes, gt.classes, [(0, 1, 0)])
    # With one more image, found later than the repeated hit: (1 + 2/3) / 2.
    late = prediction(boxes[:2], [0, 1], [(0, 1, 0, 0.5)])
    ap = average_precision([(gt, twice), (other, late)])
    assert ap[0] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert np.isnan(ap[1:]).all() and metrics.mean_of_defined(ap) == ap[0]


def test_pooled_recall_k_limits_a_pair_with_two_predicates():
    images = [(GT, as_prediction(GT))]
    assert pooled_recall(images, ["n", 1, 50]) == [100.0, 50.0, 100.0]
    assert pooled_recall(images, ["n", 1, 50], 1) == [50.0, 50.0, 50.0]


def test_pooled_recall_counts_images_without_predictions():
    none = prediction([], [], [])
    assert pooled_recall([(GT, as_prediction(GT)), (GT, none)], [50]) == [50.0]
    empty = ground_truth([], [], [])
    assert pooled_recall([(GT, as_prediction(GT)), (empty, as_prediction(GT))], [50]) == [100.0]
    assert math.isnan(pooled_recall([(empty, none)], [50])[0])
    assert math.isnan(pooled_recall([], [50])[0])


def test_pooled_recall_wrong_label_or_box_finds_nothing():
    right = (0, 1, 2, 0.9)
    assert pooled_recall([(GT, prediction(GT.boxes, [0, 1, 1], [right]))], [50]) == [50.0]
    assert pooled_recall([(GT, prediction(GT.boxes, [1, 1, 1], [right]))], [50]) == [0.0]
    assert pooled_recall([(GT, prediction(GT.boxes, [0, 0, 1], [right]))], [50]) == [0.0]
    assert pooled_recall([(GT, prediction(GT.boxes, [0, 1, 1], [(0, 1, 1, 0.9)]))], [50]) == [0.0]
    assert pooled_recall([(GT, prediction(GT.boxes, [0, 1, 1], [(0, 2, 2, 0.9)]))], [50]) == [0.0]
    assert pooled_recall([(GT, prediction(GT.boxes, [0, 1, 1], [(1, 0, 2, 0.9)]))], [50]) == [0.0]


def test_pooled_recall_repeated_relation_must_be_found_twice():
    gt = ground_truth(GT.boxes, GT.classes, [(0, 1, 2), (0, 1, 2)])
    once = prediction(gt.boxes, gt.classes, [(0, 1, 2, 0.9)])
    assert pooled_recall([(gt, once)], [50]) == [50.0]
    boxes, classes = [*gt.boxes, gt.boxes[1]], [*gt.classes, gt.classes[1]]
    again = prediction(boxes, classes, [(0, 1, 2, 0.9), (0, len(gt.boxes), 2, 0.8)])
    assert pooled_recall([(gt, again)], [50]) == [100.0]


def test_best_equal_scores_keep_their_order():
    triplets = [(0, 2, 2, 0.5), (0, 1, 2, 0.5)]
    assert prediction(GT.boxes, GT.classes, triplets).best(1).pairs.tolist() == [[0, 2]]


def test_reduced_is_the_union_of_the_best_for_every_k():
    triplets = [(0, 1, 0, 0.9), (0, 1, 1, 0.8), (0, 2, 0, 0.7), (1, 0, 0, 0.6), (0, 1, 2, 0.5)]
    pred = prediction(GT.boxes, GT.classes, triplets)
    assert pred.reduced((1,), 2).scores.tolist() == [0.9, 0.7]
    assert pred.reduced((None,), 2).scores.tolist() == [0.9, 0.8]
    assert pred.reduced((1, None), 2).scores.tolist() == [0.9, 0.8, 0.7]
    assert pred.reduced((1, None), None).scores.tolist() == pred.scores.tolist()
    # What is reduced to again is what would have been reduced to at first.
    rng = np.random.default_rng(0)
    for _ in range(100):
        _, pred = random_case(rng, 5, 5, 2, 3).pair()
        for k in (None, 1, 2):
            once = pred.reduced((k,), 4)
            twice = pred.reduced((2, None, 1), 4).reduced((k,), 4)
            np.testing.assert_equal(vars(once), vars(twice))


def test_ranks_count_after_k_and_among_the_considered():
    triplets = [(0, 1, 0, 0.9), (0, 1, 1, 0.8), (0, 2, 0, 0.7), (1, 0, 0, 0.6)]
    images = [(GT, prediction(GT.boxes, GT.classes, triplets))] * 2
    never = NEVER
    assert Batch(images).ranks(None).tolist() == [0, 1, 2, 3] * 2
    assert Batch(images).ranks(1).tolist() == [0, never, 1, 2] * 2
    considered = np.array([False, False, True, True] * 2)
    assert Batch(images).ranks(1, considered).tolist() == [never, never, 0, 1] * 2


def test_candidates_unknown_overlap_raises():
    with pytest.raises(ValueError, match="'union'.*relationship, phrase"):
        Batch([(GT, as_prediction(GT))]).candidates("union")


def test_codes_too_many_labels_raises():
    huge = ground_truth(GT.boxes, [0, 2**30, 1], [(0, 1, 2**30)])
    with pytest.raises(ValueError, match="too many"):
        Batch([(huge, prediction(GT.boxes, [2**30, 1, 1], []))] * 9).candidates()


def test_pairwise_iou_random_boxes_equal_loop():
    rng = np.random.default_rng(1)
    low = rng.integers(0, 5, (60, 2))
    boxes = np.concatenate([low, low + rng.integers(0, 4, (60, 2))], axis=1).astype(float)
    expected = [[loop_iou(a, b) for b in boxes.tolist()] for a in boxes.tolist()]
    assert boxes_np.pairwise_iou(boxes, boxes).tolist() == expected


def ranks_of(truth, predicted, rule):
    """The rank at which each relation of one image is found."""
    batch = Batch([(truth, predicted)])
    ranks = batch.ranks(None)
    finds = matching.find_relations(batch, rule, "relationship", ranks)
    return matching.first_ranks(*finds, ranks, len(truth.pairs))


@pytest.mark.parametrize("rule", ["one_to_one", "many_to_many", "true_positives"])
def test_find_relations_best_n_triplets_find_what_they_find_among_all(rule):
    rng = np.random.default_rng(3)
    for _ in range(100):
        gt, pred = random_case(rng, 5, 5, 2, 3).pair()
        whole = ranks_of(gt, pred, rule)
        for n in range(1, len(pred.scores)):
            part = ranks_of(gt, pred.best(n), rule)
            assert (part == np.where(whole < n, whole, NEVER)).all()


def hits_and_found(predicted, truth, protocol, k=None):
    return tuple(x.tolist() for x in matching.match_relations(predicted, truth, protocol, k))


def test_match_relations_by_hand():
    twice = ground_truth(GT.boxes, GT.classes, [(0, 1, 2), (0, 1, 2), (0, 1, 0)])
    boxes = [*GT.boxes.tolist(), [10, 0, 20, 9], [10, 0, 20, 9]]
    triplets = [(0, 1, 2, 0.9), (0, 3, 2, 0.8), (0, 4, 2, 0.7), (0, 2, 0, 0.6)]
    predicted = prediction(boxes, [0, 1, 1, 1, 1], triplets)
    both = [True, True, False]
    for protocol, hits, found in (
        ("lu2016", [True, True, False, False], both),  # the second takes the repetition
        ("relations", [True, False, False, False], [True, False, False]),  # counted once
        ("motifs", [True, True, True, False], both),
        ("released", [True, True, True, False], both),
        ("openimages", [True, False, False, False], [True, False, False]),  # then it is taken
    ):
        assert hits_and_found(predicted, twice, protocol) == (hits, found), protocol
        assert hits_and_found(predicted, twice, PROTOCOL_REGISTRY[protocol]) == (
            hits,
            found,
        ), protocol
    assert len(matching.counted_relations(twice, PROTOCOL_REGISTRY["relations"]).pairs) == 2
    assert len(matching.counted_relations(twice, PROTOCOL_REGISTRY["lu2016"]).pairs) == 3
    assert hits_and_found(predicted, twice, "lu2016", 1) == ([True, True, False, False], both)


@pytest.mark.parametrize("protocol", PROTOCOL_REGISTRY)
def test_match_relations_empty(protocol):
    nothing, gt = prediction([], [], []), ground_truth([], [], [])
    assert hits_and_found(nothing, gt, protocol) == ([], [])
    assert hits_and_found(nothing, GT, protocol) == ([], [False, False])
    assert hits_and_found(as_prediction(GT), gt, protocol) == ([False, False], [])
    assert hits_and_found(GT, GT, protocol) == ([True, True], [True, True])  # without scores


def test_match_relations_needs_all_labels_and_both_boxes():
    boxes = [[10, 20, 40, 120], [45, 60, 60, 75], [90, 58, 105, 73], [40, 74, 150, 130]]
    classes = [0, 1, 1, 2]
    relations = [(0, 1, 0, None), (2, 3, 1, None), (1, 3, 1, None)]
    truth = SceneGraph.from_triplets(boxes, classes, relations)
    moved = [*boxes, [45, 60, 60, 67.5], [45, 60, 60, 67.4], [45, 60, 60, 75]]
    expected = {
        (0, 1, 0): True,  # the relation itself
        (0, 4, 0): True,  # the object's box overlaps by exactly a half
        (0, 5, 0): False,  # by a little less
        (0, 6, 0): False,  # the object's class differs
        (0, 1, 1): False,  # the predicate differs
        (1, 0, 0): False,  # subject and object are swapped
        (0, 2, 0): False,  # the other cup
    }
    triplets = [(*triplet, 0.5) for triplet in expected]
    predicted = SceneGraph.from_triplets(moved, [*classes, 1, 1, 2], triplets)
    hits, found = matching.match_relations(predicted, truth, "motifs")
    assert dict(zip(expected, hits.tolist())) == expected
    assert found.tolist() == [True, False, False]
