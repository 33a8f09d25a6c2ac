"""Every protocol equals its rule in plain loops, on hundreds of random datasets."""

import math

import evaluation_oracles as oracles
import numpy as np
import pytest
from evaluation_utils import Case, data_sets, random_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_cases import NUM_CASES

from reldn_d2.evaluation import batches, match_relations, scoring
from reldn_d2.evaluation.confusion import ConfusionCounter
from reldn_d2.evaluation.matching import counted_relations, counted_triplets
from reldn_d2.evaluation.protocol_metrics import METRICS, Settings
from reldn_d2.evaluation.scoring import Scores, score
from reldn_d2.utils.protocols import METRIC_SETS, PROTOCOL_REGISTRY

NAMES = ("on", "holds", "plays")
# The seed is fixed: a failure stays one.
FIXED = dict(derandomize=True, deadline=None, database=None)
FIXED["suppress_health_check"] = list(HealthCheck)
hundreds = settings(max_examples=NUM_CASES, **FIXED)
RECALL_AT = (1, 3, 50)
triplet_sets = st.none() | st.sets(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), max_size=14
)
frequencies = st.none() | st.tuples(*[st.integers(0, 9)] * len(NAMES))


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
    return Settings(
        NAMES, predicates_per_pair=ks, recall_at=RECALL_AT, seen_triplets=table, **options
    )


@pytest.fixture
def no_accuracies(monkeypatch):
    """Leave out the confusions, which have tests of their own and take half of the time here."""
    monkeypatch.setattr(ConfusionCounter, "add", lambda self, batch: None)


def scored(protocol, cases, options) -> Scores:
    return score([c.pair() for c in cases], PROTOCOL_REGISTRY[protocol], options)


def blocks(protocol, cases, options):
    """The protocol's blocks of results, without the accuracies, which have tests of their own."""
    results = {}
    for block, metrics in scored(protocol, cases, options).results.items():
        if not block.startswith("confusion"):
            results[block] = {
                name: value
                for name, value in metrics.items()
                if "accuracy" not in name and "cases" not in name
            }
    return results


@pytest.mark.usefixtures("no_accuracies")
@hundreds
@given(data_sets(), triplet_sets, st.sampled_from(["sgdet", "prdcls"]))
def test_lu2016_random_cases_equal_loops(cases, seen, task):
    actual = blocks("lu2016", cases, settings_for((1, 2, 70), seen, task=task))
    assert_equal(actual, oracles.lu2016(cases, (1, 2, 70), RECALL_AT, task, seen))


@pytest.mark.usefixtures("no_accuracies")
@hundreds
@given(data_sets(), triplet_sets, frequencies, st.sampled_from([(), (5, 2)]))
def test_motifs_random_cases_equal_loops(cases, seen, training, thresholds):
    ks = (1, None, 2)
    counts = None if training is None else np.array(training)
    options = dict(training_counts=counts, group_thresholds=thresholds)
    actual = blocks("motifs", cases, settings_for(ks, seen, **options))
    options = dict(seen=seen, training=training, thresholds=thresholds)
    assert_equal(actual, oracles.motifs(cases, ks, RECALL_AT, len(NAMES), **options))


@pytest.mark.usefixtures("no_accuracies")
@hundreds
@given(data_sets(), st.sampled_from(["openimages", "openimages_text"]))
def test_openimages_random_cases_equal_loops(cases, name):
    ks = (None, 2)
    actual = blocks(name, cases, settings_for(ks, topk=None))
    assert_equal(actual, oracles.openimages(cases, ks, RECALL_AT, NAMES, name=name))


@pytest.mark.usefixtures("no_accuracies")
@hundreds
@given(data_sets(), st.sampled_from([100, 4]))
def test_released_random_cases_equal_loops(cases, limit):
    actual = blocks("released", cases, settings_for((2, 1), topk=limit))
    assert_equal(actual, oracles.released(cases, (2, 1), RECALL_AT, NAMES, limit))


@pytest.mark.usefixtures("no_accuracies")
@settings(max_examples=NUM_CASES // 2, **FIXED)
@given(data_sets(), st.sampled_from([100, 4]))
def test_relations_random_cases_equal_loops(cases, limit):
    actual = blocks("relations", cases, settings_for((None, 1), topk=limit))
    assert_equal(actual, oracles.relations(cases, (None, 1), RECALL_AT, NAMES, limit))


@pytest.mark.usefixtures("no_accuracies")
@pytest.mark.parametrize("protocol", PROTOCOL_REGISTRY)
@settings(max_examples=100, **FIXED)
@given(cases=data_sets(), shown=st.sampled_from([1, 3, 50]), k=st.sampled_from([None, 1, 2]))
def test_match_relations_found_is_the_recall_numerator(protocol, cases, shown, k):
    """Of the triplets shown, the protocol counts as many finds as a picture of each image shows."""
    images = [c.pair() for c in cases]
    options = Settings(NAMES, "sgdet", (k,), (shown,), topk=None)
    metrics, *_ = score(images, PROTOCOL_REGISTRY[protocol], options).results.values()
    numerators, totals, shares = 0, 0, []
    for truth, predicted in images:
        kept = counted_triplets(predicted, truth, PROTOCOL_REGISTRY[protocol], k, shown)
        hits, found = match_relations(kept, truth, protocol, k)
        counted = len(counted_relations(truth, PROTOCOL_REGISTRY[protocol]).pairs)
        assert len(hits) == len(kept.pairs) and len(found) == len(truth.pairs)
        assert found.sum() <= counted and hits.any() == found.any()
        if PROTOCOL_REGISTRY[protocol].matching != "many_to_many":
            assert hits.sum() == found.sum()
        numerators, totals = numerators + int(found.sum()), totals + counted
        shares += [found.sum() / counted] if counted else []
    name = f"relationship R@{shown}" if protocol == "lu2016" else f"R@{shown}"
    expected = 100 * np.mean(shares) if protocol == "motifs" and shares else math.nan
    if protocol != "motifs" and totals:
        expected = 100 * numerators / totals
    np.testing.assert_allclose(metrics[name], expected, rtol=1e-12)


def test_random_cases_have_varied_recall():
    """Most have something to find, and what is found differs by k, n, kind and protocol."""
    rng = np.random.default_rng(3)
    cases = [random_case(rng, 5, 5, 2, 3, ("near", "ties", "repeated")) for _ in range(200)]
    found = oracles.lu2016(cases, (1, 70), (1, 3, 50))
    values = [v for metrics in found.values() for v in metrics.values()]
    assert 1 < min(values) < max(values) < 99
    assert len(set(values)) == len(values) - 2  # the best triplet is the same for every k
    official = oracles.openimages(cases, (None,), (50,), NAMES)["openimages_sgdet"]
    text = oracles.openimages(cases, (None,), (50,), NAMES, name="openimages_text")
    authors = oracles.released(cases, (None,), (50,), NAMES, 100)["released_sgdet"]
    for name in ("R@50", "mAP_rel", "mAP_phr", "score"):
        assert abs(official[name] - authors[name]) > 0.1, name
        assert name == "R@50" or official[name] != text["openimages_text_sgdet"][name]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("protocol", PROTOCOL_REGISTRY)
def test_score_batch_size_changes_nothing(protocol, size, monkeypatch):
    rng = np.random.default_rng(5)
    cases = [random_case(rng, 5, 5, 2, 3) for _ in range(20)]
    options = settings_for((1, None), seen={(0, 1, 1)})
    whole = scored(protocol, cases, options)
    monkeypatch.setattr(batches.batches, "__defaults__", (size,))
    np.testing.assert_equal(scored(protocol, cases, options).results, whole.results)


def test_score_builds_each_batch_once(monkeypatch):
    built = []

    def counted(images):
        built.extend(batches.batches(images))
        return iter(built)

    monkeypatch.setattr(scoring, "batches", counted)
    rng = np.random.default_rng(5)
    scored("motifs", [random_case(rng, 5, 5, 2, 3) for _ in range(20)], settings_for((1, None)))
    assert len(built) == 1


def test_protocols_all_have_metrics():
    assert tuple(METRICS) == METRIC_SETS
    assert {protocol.metrics for protocol in PROTOCOL_REGISTRY.values()} == set(METRICS)


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


def score_cases(protocol, cases, ks, recall_at=(1, 2, 50), seen=None, **options):
    table = None if seen is None else np.array(seen).reshape(-1, 3)
    given_ = Settings(NAMES, "sgdet", ks, recall_at, seen_triplets=table, **options)
    return blocks(protocol, cases, given_)


def test_motifs_by_hand():
    # A wrong triplet first, then both predicates of the first pair, the rarer one first.
    first = scene([(0, 3, 1, 0.9), (0, 2, 0, 0.8), (0, 2, 1, 0.7)])
    second = scene([])  # counts 0
    results = score_cases("motifs", [first, second], (1, None), seen=[(0, 1, 1)])
    constrained = results["motifs_sgdet_graph_constraint"]
    free = results["motifs_sgdet_no_constraint"]
    # With the constraint only "looks at" is found, one of three: (1/3 + 0) / 2.
    assert constrained["R@1"] == 0
    assert constrained["R@2"] == constrained["R@50"] == pytest.approx(100 / 6)
    assert free["R@2"] == pytest.approx(100 / 6) and free["R@50"] == pytest.approx(100 / 3)
    # Per predicate: "on" (0) 1 of 1, "holds" (1) 1 of 2, each averaged with the second image's 0.
    assert free["mR@50"] == pytest.approx((50 + 25) / 2)
    assert constrained["mR@50"] == pytest.approx((50 + 0) / 2)
    assert free["F1@50"] == pytest.approx(2 / (3 / 100 + 1 / 37.5))
    assert constrained["F1@1"] == 0  # both are 0
    # Unseen is person looks at (0) cup only.
    assert free["zR@50"] == free["zR@2"] == 50 and free["zR@1"] == 0
    # Three relations, so three triplets: two of them are found, one of each predicate.
    assert free["relative R"] == pytest.approx(100 / 3) and free["relative mR"] == 37.5
    assert constrained["relative R"] == pytest.approx(100 / 6)
    # A second wrong triplet in front moves the second right one past the limit.
    later = scene([(0, 3, 1, 0.9), (0, 3, 0, 0.85), (0, 2, 0, 0.8), (0, 2, 1, 0.7)])
    metrics = score_cases("motifs", [later], (None,))["motifs_sgdet_no_constraint"]
    assert metrics["relative R"] == pytest.approx(100 / 3) and metrics["relative mR"] == 50
    assert metrics["R@50"] == pytest.approx(200 / 3)
    assert not any("information" in name for name in free)  # nothing is known of the training set


def test_motifs_information_recall_by_hand():
    case = scene([(0, 2, 0, 0.9)])  # "on" alone, of "holds" twice and "on" once
    # With 2 + 1, 6 + 1 and 5 + 1 of 16 training relations "on" tells 2.415 bits, "holds" 1.193.
    training = np.array([2, 6, 5])
    results = score_cases("motifs", [case], (None,), training_counts=training)
    bits = -np.log2(np.array([3, 7]) / 16)
    expected = 100 * bits[0] / (bits[0] + 2 * bits[1])
    metrics = results["motifs_sgdet_no_constraint"]
    assert metrics["information R@50"] == pytest.approx(expected)
    assert metrics["R@50"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("thresholds", "training", "expected"),
    [
        (
            (),
            [9, 1, 5],
            [100, 0, math.nan],
        ),  # two predicates occur: one in the head, one in the body
        ((), [1, 9, 5], [0, 100, math.nan]),
        ((9, 2), [9, 1, 5], [100, math.nan, 0]),
        ((10, 1), [9, 1, 5], [math.nan, 50, math.nan]),
        ((10, 1), None, None),
    ],
)
def test_motifs_groups_by_hand(thresholds, training, expected):
    case = scene([(0, 2, 0, 0.9)])  # finds "on" (0), but not "holds" (1)
    options = dict(training_counts=None if training is None else np.array(training))
    given_ = Settings(NAMES, "sgdet", (1,), (50,), group_thresholds=thresholds, **options)
    scores = scored("motifs", [case], given_)
    metrics = scores.results["motifs_sgdet_graph_constraint"]
    (table,) = scores.predicates.values()
    means = table.group_means()
    if expected is None:
        assert not any(name.startswith(("head", "body", "tail")) for name in metrics)
        assert all(values["number"] == 0 for values in means.values())
        return
    for name, value in zip(("head", "body", "tail"), expected):
        np.testing.assert_equal(metrics[f"{name} mR@50"], value)
        np.testing.assert_equal(means[name]["R@50"], None if math.isnan(value) else value)


def test_many_to_many_one_triplet_finds_several_relations():
    twice = Case(
        gt_boxes=[PERSON_1, CUP_1, [*CUP_1[:3], 5]],
        gt_classes=[0, 1, 1],
        relations=[(0, 1, 1), (0, 2, 1)],
        boxes=[PERSON_1, CUP_1],
        classes=[0, 1],
        triplets=[(0, 1, 1, 0.9)],
    )
    found = score_cases("motifs", [twice], (1,))["motifs_sgdet_graph_constraint"]
    assert found["R@1"] == 100
    assert score_cases("released", [twice], (2,))["released_sgdet_k2"]["R@1"] == 100
    assert score_cases("lu2016", [twice], (1,))["lu2016_sgdet_k1"]["relationship R@1"] == 50
    official = score_cases("openimages", [twice], (None,))["openimages_sgdet"]
    assert official["R@1"] == 50


def test_lu2016_second_triplet_takes_the_free_relation():
    """Two equal detections of one of two cups that overlap: the second one takes the other cup."""
    overlapping = Case(
        gt_boxes=[PERSON_1, [10, 0, 20, 10], [10, 0, 20, 8]],
        gt_classes=[0, 1, 1],
        relations=[(0, 1, 1), (0, 2, 1)],
        boxes=[PERSON_1, [10, 0, 20, 10], [10, 0, 20, 10]],
        classes=[0, 1, 1],
        triplets=[(0, 1, 1, 0.9), (0, 2, 1, 0.8)],
    )
    assert score_cases("lu2016", [overlapping], (1,))["lu2016_sgdet_k1"]["relationship R@2"] == 100
    official = score_cases("openimages", [overlapping], (None,))["openimages_sgdet"]
    assert official["R@2"] == 50 and official["AP_rel-holds"] == 50


def test_openimages_score_by_hand():
    # "holds": hit, miss, hit of 2: (1 + 2/3) / 2. "on": found: 1. The phrase of the swapped cup
    # differs too much from both true phrases to count.
    triplets = [(0, 2, 1, 0.9), (0, 3, 1, 0.8), (1, 3, 1, 0.7), (0, 2, 0, 0.6)]
    metrics = score_cases("openimages", [scene(triplets)], (None,))["openimages_sgdet"]
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
    metrics = score_cases("released", [scene(triplets)], (2,))["released_sgdet_k2"]
    holds = 100 * (1 + 2 / 3) / 2
    assert metrics["mAP_rel"] == pytest.approx((holds + 100 + 0) / 3)  # "plays" counts 0
    assert metrics["wmAP_rel"] == pytest.approx(2 / 3 * holds + 1 / 3 * 100)
    assert metrics["score"] == pytest.approx(20 + 0.8 * (holds + 100) / 3)
    assert metrics["score_wtd"] == pytest.approx(20 + 0.8 * (2 / 3 * holds + 1 / 3 * 100))


def test_overlap_of_one_half_counts_for_openimages_but_not_for_released():
    half = scene([(0, 2, 1, 0.9)], [[0, 0, 10, 10], PERSON_2, CUP_1, CUP_2])
    official = score_cases("openimages", [half], (None,))["openimages_sgdet"]
    authors = score_cases("released", [half], (2,))["released_sgdet_k2"]
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
def test_openimages_verified_labels_by_hand(verified, precision):
    boxes = [*SCENE["gt_boxes"], [50, 50, 60, 60]]
    triplets = [(0, 4, 0, 0.9), (0, 2, 0, 0.8)]
    case = scene(triplets, boxes, [0, 0, 1, 1, 2], verified=verified)
    metrics = score_cases("openimages_text", [case], (None,))["openimages_text_sgdet"]
    assert metrics["AP_rel-on"] == precision
    official = score_cases("openimages", [case], (None,))["openimages_sgdet"]
    np.testing.assert_equal(official, metrics)  # class 2 has no box
    # The rank among an image's best is that among those that are not ignored.
    assert metrics["R@1"] == (pytest.approx(100 / 3) if precision == 100 else 0)
    # The authors' code knows nothing of it.
    assert score_cases("released", [case], (2,))["released_sgdet_k2"]["AP_rel-on"] == 50


def test_openimages_one_class_absent_other_unknown_is_a_false_positive():
    boxes = [*SCENE["gt_boxes"], [50, 50, 60, 60], [70, 50, 80, 60]]
    triplets = [(4, 5, 0, 0.9), (0, 2, 0, 0.8)]
    case = scene(triplets, boxes, [0, 0, 1, 1, 2, 3], verified={2: 0})
    for name in ("openimages", "openimages_text"):
        metrics = score_cases(name, [case], (None,))[f"{name}_sgdet"]
        assert metrics["AP_rel-on"] == 50
    # Present, the other unknown: nothing can be said, but the challenge's code does not know that.
    case.verified = {2: 1}
    metrics = score_cases("openimages_text", [case], (None,))["openimages_text_sgdet"]
    assert metrics["AP_rel-on"] == 100
    metrics = score_cases("openimages", [case], (None,))["openimages_sgdet"]
    assert metrics["AP_rel-on"] == 50


@pytest.mark.parametrize(
    ("verified", "code", "text"),
    [
        ({}, 100, 50),  # a box without a relation: unknown to the code, annotated by the text
        ({2: 1}, 50, 50),  # verified: negative for the code
        ({2: 0}, 50, 50),
    ],
)
def test_openimages_class_with_a_box_but_no_relation(verified, code, text):
    case = scene([(0, 4, 0, 0.9), (0, 2, 0, 0.8)], verified=verified)
    case.boxes = case.gt_boxes = [*SCENE["gt_boxes"], [50, 50, 60, 60]]
    case.classes = case.gt_classes = [0, 0, 1, 1, 2]
    for name, precision in (("openimages", code), ("openimages_text", text)):
        metrics = score_cases(name, [case], (None,))[f"{name}_sgdet"]
        assert metrics["AP_rel-on"] == precision


def test_lu2016_zero_shot_by_hand():
    case = scene([(0, 2, 0, 0.9), (0, 2, 1, 0.8)])
    metrics = score_cases("lu2016", [case], (70,), seen=[(0, 0, 1)])["lu2016_sgdet_k70"]
    # Unseen: "holds", twice, of which one is found, behind "on" as before.
    assert metrics["zero-shot relationship R@1"] == 0
    assert metrics["zero-shot relationship R@2"] == 50
    nothing_unseen = score_cases("lu2016", [case], (70,), seen=[(0, 0, 1), (0, 1, 1)])
    assert math.isnan(nothing_unseen["lu2016_sgdet_k70"]["zero-shot phrase R@50"])


@pytest.mark.parametrize(
    ("protocol", "ks", "recall"),
    [
        ("lu2016", (None,), [100, 50, math.nan]),
        ("motifs", (None,), [50, 25, math.nan]),  # the second image counts 0
        ("openimages", (None,), [100, 50, math.nan]),
        ("openimages_text", (None,), [100, 50, math.nan]),
        ("released", (2,), [100, 50, math.nan]),
        ("relations", (None,), [100, 50, math.nan]),
    ],
)
def test_score_predicate_tables_use_the_largest_n(protocol, ks, recall):
    first = scene([(0, 3, 1, 0.9), (0, 2, 0, 0.8), (0, 2, 1, 0.7)])
    cases = [first, scene([])] if protocol == "motifs" else [first]
    given_ = Settings(NAMES, "sgdet", ks, (50, 1, 2), training_counts=np.array([1, 7, 0]))
    (table,) = scored(protocol, cases, given_).predicates.values()
    assert table.recall_at == 50
    np.testing.assert_allclose(table.recall, recall)
    assert table.counts.tolist() == [len(cases), 2 * len(cases), 0]
    assert table.average_precision[0] == 100 / len(cases)
    assert table.order.tolist() == [1, 0, 2]  # by frequency in training
