"""Every protocol equals its rule in plain loops, on thousands of random data sets."""

import math

import evaluation_oracles as oracles
import numpy as np
import pytest
from evaluation_utils import Case, data_sets, random_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reldn_d2.evaluation import generic as relations
from reldn_d2.evaluation import lu2016, openimages_score
from reldn_d2.evaluation import sgg as motifs
from reldn_d2.evaluation.scores import Settings

NAMES = ("on", "holds", "plays")
# How many random data sets each protocol is compared on. The seed is fixed: a failure stays one.
CASES = 2000
FIXED = dict(derandomize=True, deadline=None, database=None)
FIXED["suppress_health_check"] = list(HealthCheck)
thousands = settings(max_examples=CASES, **FIXED)
TOPK = (1, 3, 50)
triplet_sets = st.none() | st.sets(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), max_size=14
)


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for task, metrics in expected.items():
        assert set(actual[task]) == set(metrics)
        for name, value in metrics.items():
            found = actual[task][name]
            same = math.isnan(found) if math.isnan(value) else abs(found - value) < 1e-9
            assert same, (task, name, found, value)


def settings_for(ks, seen=None, **options):
    table = None if seen is None else np.array(sorted(seen), dtype=np.int64).reshape(-1, 3)
    return Settings(NAMES, predicates_per_pair=ks, topk=TOPK, seen_triplets=table, **options)


@thousands
@given(data_sets(), triplet_sets, st.sampled_from(["sgdet", "prdcls"]))
def test_lu2016(cases, seen, task):
    actual = lu2016.score([c.pair() for c in cases], settings_for((1, 2, 70), seen, task=task))
    assert_equal(actual.results, oracles.lu2016(cases, (1, 2, 70), TOPK, task, seen))


@thousands
@given(data_sets(), triplet_sets)
def test_motifs(cases, seen):
    actual = motifs.score([c.pair() for c in cases], settings_for((1, 0, 2), seen))
    assert_equal(actual.results, oracles.motifs(cases, (1, 0, 2), TOPK, len(NAMES), seen=seen))


@thousands
@given(data_sets())
def test_openimages(cases):
    ks = (0, 2)
    images = [c.pair() for c in cases]
    actual = openimages_score.score_openimages(images, settings_for(ks, max_triplets=0))
    assert_equal(actual.results, oracles.openimages(cases, ks, TOPK, NAMES))


@thousands
@given(data_sets(), st.sampled_from([100, 4]))
def test_released(cases, limit):
    images = [c.pair() for c in cases]
    actual = openimages_score.score_released(images, settings_for((2, 1), max_triplets=limit))
    assert_equal(actual.results, oracles.released(cases, (2, 1), TOPK, NAMES, limit))


@settings(max_examples=CASES // 2, **FIXED)  # the accuracies, tested elsewhere, take the time
@given(data_sets(), st.sampled_from([100, 4]))
def test_relations(cases, limit):
    images = [c.pair() for c in cases]
    actual = relations.score(images, settings_for((0, 1), max_triplets=limit)).results
    for metrics in actual.values():
        for name in [x for x in metrics if "accuracy" in x or "cases" in x]:
            del metrics[name]
    assert_equal(actual, oracles.relations(cases, (0, 1), TOPK, NAMES, limit))


def test_the_random_cases_are_neither_hopeless_nor_trivial():
    """Most have something to find, and what is found differs by k, n, kind and protocol."""
    rng = np.random.default_rng(0)
    cases = [random_case(rng, 5, 5, 2, 3, ("near", "ties", "repeated")) for _ in range(200)]
    found = oracles.lu2016(cases, (1, 70), (1, 3, 50))
    values = [v for metrics in found.values() for v in metrics.values()]
    assert 1 < min(values) < max(values) < 99
    assert len(set(values)) == len(values) - 2  # the best triplet is the same for every k
    official = oracles.openimages(cases, (0,), (50,), NAMES)["openimages_sgdet"]
    authors = oracles.released(cases, (0,), (50,), NAMES, 100)["released_sgdet"]
    for name in ("R@50", "mAP_rel", "mAP_phr", "score"):
        assert abs(official[name] - authors[name]) > 0.1, name


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_batches_do_not_matter(size, monkeypatch):
    from reldn_d2.evaluation import batches as tables

    rng = np.random.default_rng(5)
    images = [random_case(rng, 5, 5, 2, 3).pair() for _ in range(20)]
    whole = [motifs.score(images, settings_for((1, 0))), lu2016.score(images, settings_for((1,)))]
    whole.append(openimages_score.score_openimages(images, settings_for((0,))))
    monkeypatch.setattr(tables.batches, "__defaults__", (size,))
    parts = [motifs.score(images, settings_for((1, 0))), lu2016.score(images, settings_for((1,)))]
    parts.append(openimages_score.score_openimages(images, settings_for((0,))))
    for a, b in zip(whole, parts):
        np.testing.assert_equal(a.results, b.results)


# By hand. Two persons (class 0), each holding (1) a cup (class 1); the first also looks at (0) it.
PERSON_1, PERSON_2, CUP_1, CUP_2 = [0, 0, 10, 20], [30, 0, 40, 20], [10, 0, 14, 4], [26, 0, 30, 4]
SCENE = dict(
    gt_boxes=[PERSON_1, PERSON_2, CUP_1, CUP_2],
    gt_classes=[0, 0, 1, 1],
    relations=[(0, 2, 1), (1, 3, 1), (0, 2, 0)],
)


def scene(triplets, boxes=None, classes=None, **options):
    boxes = SCENE["gt_boxes"] if boxes is None else boxes
    return Case(
        **SCENE, boxes=boxes, classes=classes or SCENE["gt_classes"], triplets=triplets, **options
    )


def score(module, cases, ks, topk=(1, 2, 50), seen=None, **options):
    table = None if seen is None else np.array(seen).reshape(-1, 3)
    given_ = Settings(NAMES, "sgdet", ks, topk, seen_triplets=table, **options)
    return module([c.pair() for c in cases], given_).results


def test_motifs_by_hand():
    # A wrong triplet first, then both predicates of the first pair, the rarer one first.
    first = scene([(0, 3, 1, 0.9), (0, 2, 0, 0.8), (0, 2, 1, 0.7)])
    second = scene([])  # counts 0
    results = score(motifs.score, [first, second], (1, 0), seen=[(0, 1, 1)])
    constrained = results["motifs_sgdet_graph_constraint"]
    free = results["motifs_sgdet_no_constraint"]
    # With the constraint only "looks at" is found, one of three: (1/3 + 0) / 2.
    assert constrained["R@1"] == 0
    assert constrained["R@2"] == constrained["R@50"] == pytest.approx(100 / 6)
    assert free["R@2"] == pytest.approx(100 / 6) and free["R@50"] == pytest.approx(100 / 3)
    # Per predicate: "on" (0) 1 of 1, "holds" (1) 1 of 2, each averaged with the second image's 0.
    assert free["mR@50"] == pytest.approx((50 + 25) / 2)
    assert constrained["mR@50"] == pytest.approx((50 + 0) / 2)
    # Unseen is person looks at (0) cup only.
    assert free["zR@50"] == free["zR@2"] == 50 and free["zR@1"] == 0


def test_one_prediction_may_find_several_with_motifs_only():
    twice = Case(
        gt_boxes=[PERSON_1, CUP_1, [*CUP_1[:3], 5]],
        gt_classes=[0, 1, 1],
        relations=[(0, 1, 1), (0, 2, 1)],
        boxes=[PERSON_1, CUP_1],
        classes=[0, 1],
        triplets=[(0, 1, 1, 0.9)],
    )
    found = score(motifs.score, [twice], (1,))["motifs_sgdet_graph_constraint"]
    assert found["R@1"] == 100
    assert score(openimages_score.score_released, [twice], (2,))["released_sgdet_k2"]["R@1"] == 100
    assert score(lu2016.score, [twice], (1,))["lu2016_sgdet_k1"]["relationship R@1"] == 50
    official = score(openimages_score.score_openimages, [twice], (0,))["openimages_sgdet"]
    assert official["R@1"] == 50


def test_lu2016_takes_the_next_best_where_average_precision_does_not():
    """Two equal detections of one of two cups that overlap: the second one takes the other cup."""
    overlapping = Case(
        gt_boxes=[PERSON_1, [10, 0, 20, 10], [10, 0, 20, 8]],
        gt_classes=[0, 1, 1],
        relations=[(0, 1, 1), (0, 2, 1)],
        boxes=[PERSON_1, [10, 0, 20, 10], [10, 0, 20, 10]],
        classes=[0, 1, 1],
        triplets=[(0, 1, 1, 0.9), (0, 2, 1, 0.8)],
    )
    assert score(lu2016.score, [overlapping], (1,))["lu2016_sgdet_k1"]["relationship R@2"] == 100
    official = score(openimages_score.score_openimages, [overlapping], (0,))["openimages_sgdet"]
    assert official["R@2"] == 50 and official["AP_rel-holds"] == 50


def test_official_score_by_hand():
    # "holds": hit, miss, hit of 2: (1 + 2/3) / 2. "on": found: 1. The phrase of the swapped cup
    # differs too much from both true phrases to count.
    triplets = [(0, 2, 1, 0.9), (0, 3, 1, 0.8), (1, 3, 1, 0.7), (0, 2, 0, 0.6)]
    metrics = score(openimages_score.score_openimages, [scene(triplets)], (0,))["openimages_sgdet"]
    holds = 100 * (1 + 2 / 3) / 2
    assert metrics["AP_rel-holds"] == metrics["AP_phr-holds"] == pytest.approx(holds)
    assert metrics["AP_rel-on"] == 100 and math.isnan(metrics["AP_rel-plays"])
    assert metrics["mAP_rel"] == pytest.approx((holds + 100) / 2)
    # All in one list: hits at ranks 1, 3, 4 of 3: precision 1, 2/3, 3/4 with the envelope 3/4.
    assert metrics["pooled_AP_rel"] == pytest.approx(100 * (1 + 0.75 + 0.75) / 3)
    assert metrics["R@2"] == pytest.approx(100 / 3) and metrics["R@50"] == 100
    assert metrics["score"] == pytest.approx(0.2 * 100 + 0.8 * (holds + 100) / 2)


def test_released_score_by_hand():
    triplets = [(0, 2, 1, 0.9), (0, 3, 1, 0.8), (1, 3, 1, 0.7), (0, 2, 0, 0.6)]
    metrics = score(openimages_score.score_released, [scene(triplets)], (2,))["released_sgdet_k2"]
    holds = 100 * (1 + 2 / 3) / 2
    assert metrics["mAP_rel"] == pytest.approx((holds + 100 + 0) / 3)  # "plays" counts 0
    assert metrics["wmAP_rel"] == pytest.approx(2 / 3 * holds + 1 / 3 * 100)
    assert metrics["score"] == pytest.approx(20 + 0.8 * (holds + 100) / 3)
    assert metrics["score_wtd"] == pytest.approx(20 + 0.8 * (2 / 3 * holds + 1 / 3 * 100))


def test_an_overlap_of_one_half_separates_official_and_released():
    half = scene([(0, 2, 1, 0.9)], [[0, 0, 10, 10], PERSON_2, CUP_1, CUP_2])
    official = score(openimages_score.score_openimages, [half], (0,))["openimages_sgdet"]
    authors = score(openimages_score.score_released, [half], (2,))["released_sgdet_k2"]
    assert official["AP_rel-holds"] == 50 and authors["AP_rel-holds"] == 0
    assert official["R@1"] == authors["R@1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("verified", "precision"),
    [
        ({}, 100),  # class 2 was never looked for: the wrong triplet is ignored
        ({2: 0}, 50),  # verified absent: a false positive
        ({2: 1}, 50),  # verified present, so that an annotation was to be expected
        ({3: 0}, 100),  # something else is absent
    ],
)
def test_verified_labels_by_hand(verified, precision):
    boxes = [*SCENE["gt_boxes"], [50, 50, 60, 60]]
    triplets = [(0, 4, 0, 0.9), (0, 2, 0, 0.8)]
    case = scene(triplets, boxes, [0, 0, 1, 1, 2], verified=verified)
    metrics = score(openimages_score.score_openimages, [case], (0,))["openimages_sgdet"]
    assert metrics["AP_rel-on"] == precision
    # The rank among an image's best is that among those that are not ignored.
    assert metrics["R@1"] == (pytest.approx(100 / 3) if precision == 100 else 0)
    # The authors' code knows nothing of it.
    assert (
        score(openimages_score.score_released, [case], (2,))["released_sgdet_k2"]["AP_rel-on"] == 50
    )


def test_one_class_absent_and_the_other_unknown_is_a_false_positive():
    boxes = [*SCENE["gt_boxes"], [50, 50, 60, 60], [70, 50, 80, 60]]
    triplets = [(4, 5, 0, 0.9), (0, 2, 0, 0.8)]
    case = scene(triplets, boxes, [0, 0, 1, 1, 2, 3], verified={2: 0})
    metrics = score(openimages_score.score_openimages, [case], (0,))["openimages_sgdet"]
    assert metrics["AP_rel-on"] == 50
    case.verified = {2: 1}  # present, the other unknown: nothing can be said
    metrics = score(openimages_score.score_openimages, [case], (0,))["openimages_sgdet"]
    assert metrics["AP_rel-on"] == 100


def test_zero_shot_of_lu2016_by_hand():
    case = scene([(0, 2, 0, 0.9), (0, 2, 1, 0.8)])
    metrics = score(lu2016.score, [case], (70,), seen=[(0, 0, 1)])["lu2016_sgdet_k70"]
    # Unseen: "holds", twice, of which one is found, behind "on" as before.
    assert metrics["zero-shot relationship R@1"] == 0
    assert metrics["zero-shot relationship R@2"] == 50
    nothing_unseen = score(lu2016.score, [case], (70,), seen=[(0, 0, 1), (0, 1, 1)])
    assert math.isnan(nothing_unseen["lu2016_sgdet_k70"]["zero-shot phrase R@50"])


@pytest.mark.parametrize(
    ("module", "ks", "recall"),
    [
        (lu2016.score, (0,), [100, 50, math.nan]),
        (motifs.score, (0,), [50, 25, math.nan]),  # the second image counts 0
        (openimages_score.score_openimages, (0,), [100, 50, math.nan]),
        (openimages_score.score_released, (2,), [100, 50, math.nan]),
        (relations.score, (0,), [100, 50, math.nan]),
    ],
)
def test_predicates_one_by_one_at_the_largest_n(module, ks, recall):
    first = scene([(0, 3, 1, 0.9), (0, 2, 0, 0.8), (0, 2, 1, 0.7)])
    cases = [first, scene([])] if module is motifs.score else [first]
    given_ = Settings(NAMES, "sgdet", ks, (50, 1, 2), training_counts=np.array([1, 7, 0]))
    (table,) = module([c.pair() for c in cases], given_).predicates.values()
    assert table.recall_at == 50
    np.testing.assert_allclose(table.recall, recall)
    assert table.counts.tolist() == [len(cases), 2 * len(cases), 0]
    assert table.average_precision[0] == 100 / len(cases)
    assert table.order.tolist() == [1, 0, 2]  # by frequency in training
