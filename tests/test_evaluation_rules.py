"""The rules of matching, recall and average precision: by hand, and against plain loops."""

import math

import numpy as np
import pytest

from reldn_d2.evaluation import matching
from reldn_d2.evaluation.average_precision import (
    mean_average_precision,
    relation_average_precision,
)
from reldn_d2.evaluation.lu2016 import keep_best, match_triplets, pooled_recall, triplet_overlaps
from reldn_d2.evaluation.records import GroundTruth, Prediction

NUM_CLASSES, NUM_PREDICATES = 2, 3


def ground_truth(boxes, classes, relations):
    return GroundTruth(
        np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        np.asarray(classes, dtype=np.int64),
        np.asarray(relations, dtype=np.int64).reshape(-1, 3),
    )


def prediction(boxes, classes, triplets):
    """Triplets are (subject, object, predicate, score)."""
    pairs, predicates, scores = (
        [t[:2] for t in triplets],
        [t[2] for t in triplets],
        [t[3] for t in triplets],
    )
    return Prediction.from_arrays(
        "image", boxes, classes, np.ones(len(boxes)), pairs, predicates, scores
    )


def random_image(rng):
    """Small integer boxes and few scores, so that ties, exact halves and repetitions abound."""

    def boxes(count):
        low = rng.integers(0, 4, (count, 2))
        return np.concatenate([low, low + rng.integers(1, 5, (count, 2))], axis=1)

    num_gt, num_pred = rng.integers(0, 6, 2)
    gt_boxes, gt_classes = boxes(num_gt), rng.integers(0, NUM_CLASSES, num_gt)
    if num_gt > 1 and rng.random() < 0.3:
        gt_boxes[1] = gt_boxes[0]  # one box twice, under one class or two
    relations = []
    for _ in range(rng.integers(0, 6) if num_gt > 1 else 0):
        subject, object_ = rng.choice(num_gt, 2, replace=False)
        relations.append((subject, object_, rng.integers(0, NUM_PREDICATES)))
    if relations and rng.random() < 0.3:
        relations.append(relations[0])
    pred_boxes, pred_classes = boxes(num_pred), rng.integers(0, NUM_CLASSES, num_pred)
    for index in range(num_pred):
        if num_gt and rng.random() < 0.8:
            source = rng.integers(0, num_gt)
            pred_boxes[index], pred_classes[index] = gt_boxes[source], gt_classes[source]
            pred_boxes[index, 2:] += rng.integers(0, 2)
    triplets = []
    for _ in range(rng.integers(0, 25) if num_pred > 1 else 0):
        subject, object_ = rng.choice(num_pred, 2, replace=False)
        score = rng.choice([0.1, 0.2, 0.3, 0.4])
        triplets.append((subject, object_, rng.integers(0, NUM_PREDICATES), score))
    return (
        ground_truth(gt_boxes, gt_classes, relations),
        prediction(pred_boxes, pred_classes, triplets),
        triplets,
    )


# Oracles: loops over plain lists, written from the definitions.


def loop_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / (sum(areas) - width * height)


def loop_overlap(kind, subject, object_, gt_subject, gt_object):
    if kind == "relationship":
        return min(loop_iou(subject, gt_subject), loop_iou(object_, gt_object))
    enclosing = []
    for a, b in ((subject, object_), (gt_subject, gt_object)):
        enclosing.append([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    return loop_iou(*enclosing)


def loop_keep(triplets, k, limit):
    kept, seen = [], {}
    for triplet in sorted(triplets, key=lambda t: -t[3]):
        count = seen.get((triplet[0], triplet[1]), 0)
        if k == 0 or count < k:
            kept.append(triplet)
        seen[(triplet[0], triplet[1])] = count + 1
    return kept[:limit]


def loop_candidates(gt, pred, triplet, kind):
    """(overlap, index) of the ground truth with the three labels of a predicted triplet."""
    subject, object_, predicate, _ = triplet
    for index, (gt_subject, gt_object, gt_predicate) in enumerate(gt.relations.tolist()):
        labels = (pred.classes[subject], predicate, pred.classes[object_])
        if labels == (gt.classes[gt_subject], gt_predicate, gt.classes[gt_object]):
            boxes = pred.boxes[subject].tolist(), pred.boxes[object_].tolist()
            gt_boxes = gt.boxes[gt_subject].tolist(), gt.boxes[gt_object].tolist()
            yield loop_overlap(kind, *boxes, *gt_boxes), index


def loop_recall(cases, n, k, kind):
    hits = total = 0
    for gt, pred, triplets in cases:
        total += len(gt.relations)
        taken = set()
        for triplet in loop_keep(triplets, k, len(gt.relations) if n == "n" else n):
            best, best_overlap = None, 0.0
            for overlap, index in loop_candidates(gt, pred, triplet, kind):
                if index not in taken and overlap >= 0.5 and overlap > best_overlap:
                    best, best_overlap = index, overlap
            if best is not None:
                taken.add(best)
                hits += 1
    return 100 * hits / total if total else math.nan


def loop_average_precision(cases, predicate, k, limit):
    detections, total = [], 0
    for image, (gt, pred, triplets) in enumerate(cases):
        total += sum(r[2] == predicate for r in gt.relations.tolist())
        for triplet in loop_keep(triplets, k, limit):
            if triplet[2] == predicate:
                best, best_overlap = None, 0.0
                for overlap, index in loop_candidates(gt, pred, triplet, "relationship"):
                    if overlap > best_overlap:
                        best, best_overlap = (image, index), overlap
                detections.append((triplet[3], best if best_overlap >= 0.5 else None))
    if total == 0:
        return math.nan
    curve, taken = [(0.0, 0.0)], set()
    for rank, (_, match) in enumerate(sorted(detections, key=lambda d: -d[0]), 1):
        if match is not None:
            taken.add(match)
        curve.append((len(taken) / total, len(taken) / rank))
    area, previous = 0.0, 0.0
    for recall in sorted({r for r, _ in curve}):
        area += (recall - previous) * max(p for r, p in curve if r >= recall)
        previous = recall
    return 100 * area


# A person holds the left one of two cups.
GT = ground_truth(
    [[0, 0, 10, 10], [10, 0, 20, 10], [30, 0, 40, 10]], [0, 1, 1], [(0, 1, 2), (0, 1, 0)]
)


def as_prediction(gt, score=0.9):
    triplets = [(s, o, p, score) for s, o, p in gt.relations.tolist()]
    return prediction(gt.boxes, gt.classes, triplets)


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
    assert matching.limit_predicates_per_pair(pairs, 1).tolist() == [1, 1, 0, 0, 0]
    assert matching.limit_predicates_per_pair(pairs, 2).tolist() == [1, 1, 1, 0, 1]
    assert matching.limit_predicates_per_pair(pairs, 0).all()


def test_one_to_one_takes_the_best_unmatched():
    overlaps = np.array([[0.6, 0.9], [0.6, 0.9], [0.7, 0.5], [0.49, 0.5]])
    candidates = np.ones((4, 2), dtype=bool)
    assert matching.match_one_to_one(overlaps, candidates).tolist() == [1, 0, -1, -1]
    candidates[0, 1] = False
    assert matching.match_one_to_one(overlaps, candidates).tolist() == [0, 1, -1, -1]
    # Average precision tests against the best one, taken or not.
    assert matching.best_overlap(overlaps, np.ones((4, 2), dtype=bool)).tolist() == [1, 1, 0, 1]


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
    assert keep_best(prediction(GT.boxes, GT.classes, triplets), limit=1).pairs.tolist() == [[0, 2]]


def test_unknown_overlap_is_an_error():
    with pytest.raises(ValueError, match="'union'.*relationship, phrase"):
        triplet_overlaps(GT, as_prediction(GT), "union")


@pytest.mark.parametrize("kind", ["relationship", "phrase"])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_recall_equals_the_loops(kind, k):
    rng = np.random.default_rng(10 * k + (kind == "phrase"))
    values = []
    for _ in range(150):
        cases = [random_image(rng) for _ in range(rng.integers(1, 4))]
        topk = ["n", 1, 2, 5, 100]
        expected = [loop_recall(cases, n, k, kind) for n in topk]
        actual = pooled_recall([c[:2] for c in cases], topk, k, kind)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
        values.extend(expected)
    assert 0 < np.nanmean(values) < 100  # the cases are neither hopeless nor trivial


@pytest.mark.parametrize("k, limit", [(0, 100), (1, 100), (2, 4)])
def test_average_precision_equals_the_loops(k, limit):
    rng = np.random.default_rng(k)
    values = []
    for _ in range(150):
        cases = [random_image(rng) for _ in range(rng.integers(1, 5))]
        expected = [loop_average_precision(cases, p, k, limit) for p in range(NUM_PREDICATES)]
        actual, counts = relation_average_precision(
            [c[:2] for c in cases], NUM_PREDICATES, k, limit
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-9)
        assert counts.sum() == sum(len(c[0].relations) for c in cases)
        values.extend(expected)
    assert 0 < np.nanmean(values) < 100


def test_matches_of_the_best_n_are_the_first_n_matches():
    rng = np.random.default_rng(3)
    for _ in range(100):
        gt, pred, _ = random_image(rng)
        matched = match_triplets(gt, pred)
        for n in range(len(matched)):
            assert (match_triplets(gt, keep_best(pred, limit=n or 1))[:n] == matched[:n]).all()
