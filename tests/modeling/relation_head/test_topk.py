"""The lazy search for the best triplets against scoring every pair, ties included."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_utils import CLASSES, busy_item, empty_item, one_box_item, small_model

from reldn_d2.modeling.relation_head import head_base as head_module
from reldn_d2.modeling.relation_head import topk as topk_module
from reldn_d2.modeling.relation_head.pairs import candidate_pairs
from reldn_d2.modeling.relation_head.topk import (
    FIRST_CHUNK,
    TopTriplets,
    best_of_chunks,
    best_triplets,
    pairs_by_bound,
)

IMAGE_SIZE = (80, 90)


def exhaustive_triplets(
    score_pairs, scores, boxes, image_size, *, num_predicates, predicates_per_pair, topk, chunk
):
    """Score every pair, in the order of its id; arguments and result as of best_triplets."""
    some_boxes = torch.zeros((len(scores), 4)) if boxes is None else boxes
    pairs = candidate_pairs(some_boxes, boxes is not None).nonzero()
    best = TopTriplets(predicates_per_pair, topk, num_predicates)
    chunks = (x.unbind(1) for x in pairs.split(chunk) if len(x))
    return best_of_chunks(chunks, best, score_pairs, scores.float(), image_size)


def triplets_in_loops(table, scores, boxes, ks, topk):
    """Return the best (subject, object, predicate) and their scores, pair by pair, in float32."""
    everything = {}
    for s, o in itertools.permutations(range(len(scores)), 2):
        if boxes is not None:
            width = min(boxes[s][2], boxes[o][2]) - max(boxes[s][0], boxes[o][0])
            height = min(boxes[s][3], boxes[o][3]) - max(boxes[s][1], boxes[o][1])
            if width <= 0 or height <= 0:
                continue
        row = [float(x) for x in table[s, o]]
        order = sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))
        pair_score = np.float32(scores[s]) * np.float32(scores[o])
        for rank, e in enumerate(order):
            everything[s, o, e] = (float(np.float32(row[e]) * pair_score), rank)
    kept = set()
    for k in ks:
        allowed = [x for x, (_, rank) in everything.items() if k is None or rank < k]
        kept.update(sorted(allowed, key=lambda x: (-everything[x][0], x))[:topk])
    ranked = sorted(kept, key=lambda x: (-everything[x][0], x))
    return ranked, [everything[x][0] for x in ranked]


def random_case(count, predicates, levels, equal, seed):
    """Return probabilities, scores and boxes; with few ``levels`` there are ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand((count, count, predicates), generator=generator) ** 3
    scores = torch.rand(count, generator=generator) ** 2
    if levels:
        table, scores = (levels * table).round() / levels, (levels * scores).round() / levels
    if equal:
        scores = torch.full_like(scores, 0.7)
    low = 40 * torch.rand((count, 2), generator=generator).round(decimals=1)
    boxes = torch.cat([low, low + 30 * torch.rand((count, 2), generator=generator)], dim=1)
    return table, scores, boxes


class Scorer:
    """Look up probabilities in a table and record which pairs were asked for."""

    def __init__(self, table):
        self.table, self.pairs, self.calls = table, [], []

    def __call__(self, subjects, objects):
        self.pairs += list(zip(subjects.tolist(), objects.tolist()))
        self.calls.append(len(subjects))
        return self.table[subjects, objects]


@settings(deadline=None, max_examples=400)
@given(
    count=st.integers(0, 9),
    predicates=st.integers(1, 5),
    levels=st.sampled_from([0, 1, 2, 4]),
    equal=st.booleans(),
    overlap=st.booleans(),
    ks=st.lists(st.sampled_from([None, 1, 2, 7]), min_size=1, max_size=3),
    topk=st.integers(1, 15),
    chunk=st.integers(1, 20),
    first=st.sampled_from([1, 4, 256]),
    sorted_pairs=st.sampled_from([1, 20, 2**16]),
    seed=st.integers(0, 10**6),
)
def test_best_triplets_random_cases_equal_plain_loops(
    count, predicates, levels, equal, overlap, ks, topk, chunk, first, sorted_pairs, seed
):
    table, scores, boxes = random_case(count, predicates, levels, equal, seed)
    boxes = boxes if overlap else None
    expected, values = triplets_in_loops(table, scores, boxes, ks, topk)
    arguments = dict(num_predicates=predicates, predicates_per_pair=ks, topk=topk, chunk=chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_by_bound, "__defaults__", (pairs_by_bound.__defaults__[0], first))
        patch.setattr(topk_module, "SORTED_PAIRS", sorted_pairs)
        lazy = Scorer(table)
        found, num_lazy = best_triplets(lazy, scores, boxes, IMAGE_SIZE, **arguments)
    exhaustive = Scorer(table)
    whole, num_exhaustive = exhaustive_triplets(exhaustive, scores, boxes, IMAGE_SIZE, **arguments)
    for best in (found, whole):
        triplets = [(*p, e) for p, e in zip(best.pairs.tolist(), best.predicates.tolist())]
        assert triplets == expected
        assert best.scores.tolist() == pytest.approx(values, abs=1e-7)
        assert best.predicate_scores.tolist() == [float(table[t]) for t in expected]
        assert best.image_size == IMAGE_SIZE
    assert len(set(lazy.pairs)) == len(lazy.pairs) == num_lazy
    assert max(lazy.calls, default=0) <= chunk
    assert len(exhaustive.pairs) == num_exhaustive
    assert num_exhaustive == len(list(itertools.permutations(range(count), 2))) or overlap


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 40),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
    st.integers(1, 60),
    st.sampled_from([1, 100, 2**16]),
    st.integers(0, 10**6),
)
def test_pairs_by_bound_without_threshold_yields_every_pair_once(
    count, levels, overlap, chunk, sorted_pairs, seed
):
    _, scores, boxes = random_case(count, 1, levels, False, seed)
    visited = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_module, "SORTED_PAIRS", sorted_pairs)
        for subjects, objects in pairs_by_bound(scores, boxes if overlap else None, chunk):
            assert 0 < len(subjects) <= chunk
            visited += list(zip(subjects.tolist(), objects.tolist()))
    wanted = set(itertools.permutations(range(count), 2))
    if overlap:
        wanted = {
            (i, j)
            for i, j in wanted
            if (
                torch.minimum(boxes[i, 2:], boxes[j, 2:])
                > torch.maximum(boxes[i, :2], boxes[j, :2])
            )
            .all()
            .item()
        }
    assert len(visited) == len(set(visited)) and set(visited) == wanted


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60), st.integers(1, 40), st.integers(1, 200), st.integers(0, 10**6))
def test_best_triplets_random_scores_score_few_unneeded_pairs(count, topk, chunk, seed):
    """The pairs whose bound reaches the K-th best score, and at most about half as many again."""
    table, scores, _ = random_case(count, 2, 0, False, seed)
    arguments = dict(num_predicates=2, predicates_per_pair=[1], topk=topk, chunk=chunk)
    best, num_scored = best_triplets(Scorer(table), scores, None, IMAGE_SIZE, **arguments)
    bounds = (scores[:, None] * scores)[~torch.eye(count, dtype=torch.bool)]
    lowest = best.scores[-1] if len(best.scores) == topk else 0.0
    needed = int((bounds >= lowest).sum())
    assert needed <= num_scored <= 1.6 * needed + FIRST_CHUNK + count
    if num_scored > FIRST_CHUNK + count:
        assert num_scored <= 1.6 * needed + 2 * count


def test_best_triplets_few_good_detections_score_only_their_pairs():
    """Three good detections among 60 poor ones: their six pairs contain the best four triplets."""
    table = torch.full((63, 63, 2), 0.2)
    table[:3, :3] = torch.tensor([0.6, 0.3])
    scores = torch.cat([torch.full((3,), 0.9), torch.full((60,), 0.1)])
    lazy = Scorer(table)
    best, num_scored = best_triplets(
        lazy, scores, None, IMAGE_SIZE, num_predicates=2, predicates_per_pair=[1], topk=4, chunk=6
    )
    assert num_scored == 6 and set(lazy.pairs) == set(itertools.permutations(range(3), 2))
    assert best.pairs.tolist() == [[0, 1], [0, 2], [1, 0], [1, 2]]
    # With every predicate allowed and eight asked for, the same six pairs still suffice.
    lazy = Scorer(table)
    best_triplets(
        lazy,
        scores,
        None,
        IMAGE_SIZE,
        num_predicates=2,
        predicates_per_pair=[None],
        topk=8,
        chunk=6,
    )
    assert len(lazy.pairs) == 6
    # k = 1 has six triplets there and needs a seventh, one of the next bound.
    lazy = Scorer(table)
    arguments = dict(num_predicates=2, predicates_per_pair=[None, 1], topk=7, chunk=400)
    best, num_scored = best_triplets(lazy, scores, None, IMAGE_SIZE, **arguments)
    assert num_scored == 6 + 2 * 3 * 60  # bounds tied with the K-th score: all of them are scored
    assert best.pairs[-1].tolist() == [0, 3]


def test_best_triplets_equal_bounds_are_scored_in_full_chunks():
    """None of their triplets beats their bound, so the search cannot end among them."""
    scores, table = torch.full((80,), 0.3), torch.full((80, 80, 1), 0.01)
    table[:4] = 0.9
    arguments = dict(num_predicates=1, predicates_per_pair=[1], topk=5, chunk=2000)
    lazy = Scorer(table)
    assert best_triplets(lazy, scores, None, IMAGE_SIZE, **arguments)[1] == 80 * 79
    assert lazy.calls == [2000, 2000, 2000, 320]


@pytest.mark.parametrize("topk", [6, 100, 588])
def test_best_triplets_many_detections_at_the_threshold_are_not_all_scored(topk):
    """A few good detections and many at the score threshold, as detectors often give them."""
    scores = torch.cat([torch.tensor([0.9, 0.6, 0.3]), torch.full((97,), 0.05)])
    table = torch.full((100, 100, 1), 0.9)
    arguments = dict(num_predicates=1, predicates_per_pair=[1], topk=topk, chunk=2048)
    best, num_scored = best_triplets(Scorer(table), scores, None, IMAGE_SIZE, **arguments)
    bounds = (scores[:, None] * scores)[~torch.eye(100, dtype=torch.bool)]
    needed = int((bounds >= best.scores[-1]).sum())
    assert needed <= num_scored <= needed + FIRST_CHUNK  # all would be 9,900


def test_best_triplets_scores_equal_to_their_bound_are_kept():
    """With probability 1 a triplet equals its bound; ties with the K-th best must be scored."""
    scores = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3, 0.1])
    table = torch.ones((5, 5, 1))
    for topk in range(1, 21):
        expected, _ = triplets_in_loops(table, scores, None, [1], topk)
        arguments = dict(num_predicates=1, predicates_per_pair=[1], topk=topk, chunk=2)
        best, _ = best_triplets(Scorer(table), scores, None, IMAGE_SIZE, **arguments)
        assert [(*p, 0) for p in best.pairs.tolist()] == expected


@pytest.mark.parametrize(
    "scores, certain",
    [
        # Two pairs have the same score in float32; the one with the larger product is scored first.
        ([0.9040973782539368, 0.6458731889724731, 0.904097318649292, 0.6458732485771179], 1),
        # The products are denormal in float32, which then has few digits.
        ([9.69e-23, 9.69e-23, 1.01e-22, 1.01e-22], 1),
        # A probability exceeds 1 because of rounding.
        ([0.8, 0.5, 0.8, 0.5], 1.0000002),
    ],
)
def test_best_triplets_equal_scores_of_different_bounds_rank_by_pair(scores, certain):
    scores, table = torch.tensor(scores), torch.zeros((4, 4, 1))
    table[0, 1], table[2, 3] = min(certain, 1.0), certain
    arguments = dict(num_predicates=1, predicates_per_pair=[1], topk=1, chunk=1)
    for search in (best_triplets, exhaustive_triplets):
        best, _ = search(Scorer(table), scores, None, IMAGE_SIZE, **arguments)
        assert best.pairs.tolist() == [[0, 1]]
        assert best.predicate_scores.tolist() == [1.0]


def test_best_triplets_several_limits_search_until_each_is_complete():
    """Without a limit the first pairs suffice, with one predicate per pair they do not."""
    scores = torch.tensor([1.0, 1.0, 0.4, 0.4])
    table = torch.zeros((4, 4, 4))
    table[0, 1] = table[1, 0] = 0.24
    table[0, 2], table[2, 3] = torch.tensor([0.4, 0, 0, 0]), torch.tensor([0.9, 0, 0, 0])
    for chunk in (1, 2, 100):
        arguments = dict(num_predicates=4, predicates_per_pair=[None, 1], topk=4, chunk=chunk)
        lazy, _ = best_triplets(Scorer(table), scores, None, IMAGE_SIZE, **arguments)
        whole, _ = exhaustive_triplets(Scorer(table), scores, None, IMAGE_SIZE, **arguments)
        assert lazy.pairs.tolist() == whole.pairs.tolist() and [2, 3] in lazy.pairs.tolist()
        assert torch.equal(lazy.scores, whole.scores)


def test_pairs_by_bound_thousands_of_entities_need_little_memory():
    scores = torch.rand(6000, generator=torch.Generator().manual_seed(0))
    tracemalloc.start()
    taken = sum(len(x) for x, _ in itertools.islice(pairs_by_bound(scores, None, 2048), 10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken > 8000
    assert peak < 8e6  # one float32 for each of the 36 million pairs would take 144 MB


def test_best_triplets_thousand_entities_equal_exhaustive_search():
    """Enough entities for several blocks of sorted pairs; some scores and probabilities tie."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(1000, generator=generator) ** 3 * 200).round() / 200
    rows = torch.rand((977, 2), generator=generator) ** 4
    arguments = dict(num_predicates=2, predicates_per_pair=[1, None], topk=100, chunk=100_000)

    def score_pairs(subjects, objects):
        return rows[(subjects * 31 + objects * 7) % len(rows)]

    lazy, num_scored = best_triplets(score_pairs, scores, None, IMAGE_SIZE, **arguments)
    whole, num_all = exhaustive_triplets(score_pairs, scores, None, IMAGE_SIZE, **arguments)
    assert torch.equal(lazy.pairs, whole.pairs) and torch.equal(lazy.predicates, whole.predicates)
    assert torch.equal(lazy.scores, whole.scores)
    assert num_all == 1000 * 999 > 2 * topk_module.SORTED_PAIRS and num_scored < num_all / 10


def test_best_triplets_nan_probability_stays_in_the_result():
    table = torch.rand((4, 4, 2), generator=torch.Generator().manual_seed(0))
    table[0, 1, 1] = float("nan")
    arguments = dict(num_predicates=2, predicates_per_pair=[1], topk=3, chunk=2)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    best, _ = best_triplets(Scorer(table), scores, None, IMAGE_SIZE, **arguments)
    assert [0, 1] in best.pairs.tolist() and best.scores.isnan().any()


@pytest.mark.parametrize("chunk", [1, 4, 2048])
def test_relation_head_pair_chunk_bounds_the_boxes_pooled_at_once(chunk):
    model = small_model(
        *("TEST.RELATIONS.PAIR_CHUNK", chunk, "TEST.DETECTIONS_PER_IMAGE", 12), seed=3
    ).eval()
    expected = small_model("TEST.DETECTIONS_PER_IMAGE", 12, seed=3).eval()
    head, sizes = model.relation_head, []
    for pooler in (head.entity_pooler, head.predicate_pooler):
        pooler.register_forward_pre_hook(lambda _, given: sizes.append(sum(map(len, given[1]))))
    with torch.no_grad():
        found, wanted = (x([busy_item()])[0]["relations"] for x in (model, expected))
    assert max(sizes) <= chunk and (len(sizes) > 2 or chunk == 2048)
    assert torch.equal(found.pairs, wanted.pairs) and len(found) > 5
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-6)


def test_relation_head_many_given_pairs_visual_module_scores_the_shortlist(caplog):
    options = ("TEST.RELATIONS.TASK", "prdcls", "TEST.RELATIONS.PREDICATES_PER_PAIR", [None])
    limit = ("TEST.RELATIONS.MAX_VISUAL_PAIRS", 5)
    model = small_model(*options, *limit, seed=3).eval()
    every = small_model(*options, seed=3).eval()
    for x in (model, every):
        with torch.no_grad():
            x.relation_head.semantic.table.weight.copy_(
                torch.randn(81, 7, generator=torch.Generator().manual_seed(1)) * 3
            )
    scored, head = [], model.relation_head
    head.visual.register_forward_pre_hook(lambda _, x: scored.extend(zip(*map(list, x[3:5]))))
    with torch.no_grad():
        found, wanted = (x([busy_item()])[0]["relations"] for x in (model, every))
        entities, _, *chosen = _encoded(model)
        cheap = head.shortlist_logits(entities, *chosen).softmax(dim=1)[:, :-1].amax(dim=1)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    shortlist = {pairs[i] for i in cheap.topk(5).indices.tolist()}
    assert {(int(i), int(j)) for i, j in scored} == shortlist and len(scored) == 5
    kept = [i for i, pair in enumerate(wanted.pairs.tolist()) if tuple(pair) in shortlist]
    assert found.pairs.tolist() == wanted.pairs[kept].tolist() and len(kept) == 5 * 6
    assert found.predicates.tolist() == wanted.predicates[kept].tolist()
    torch.testing.assert_close(found.scores, wanted.scores[kept], rtol=0, atol=1e-6)
    assert "4 given boxes has more than 5 pairs" in caplog.text


def _encoded(model):
    """Return the arguments of ``pair_logits`` for all pairs of ``busy_item()``."""
    item, head = busy_item(), model.relation_head
    images = model.detector.preprocess([item])
    features, predicate_features = model.feature_maps(images)
    given = item["instances"]
    entities = head.encode_entities(
        features, [given.gt_boxes], [given.gt_classes], [given.image_size]
    )
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    return entities, predicate_features, *torch.tensor(pairs).unbind(dim=1)


@pytest.mark.parametrize("task", ["sgdet", "sgcls", "prdcls"])
@pytest.mark.parametrize("ks, topk", [((1,), 5), ((None,), 20), ((1, 2, 70), 7)])
def test_model_lazy_search_predicts_what_exhaustive_search_does(task, ks, topk, monkeypatch):
    model = small_model(
        *("TEST.RELATIONS.TASK", task, "TEST.RELATIONS.PREDICATES_PER_PAIR", list(ks)),
        *("TEST.RELATIONS.TOPK", topk, "TEST.DETECTIONS_PER_IMAGE", 12),
        *("MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER", task == "sgcls"),
        *("TEST.RELATIONS.ENTITY_SCORE_EXPONENT", 1.0 if topk == 20 else 2.0),
        seed=topk,
    ).eval()
    with torch.no_grad():  # logits that depend on the classes, as after training
        model.relation_head.semantic.table.weight.normal_(0, 3)
    assert model.relation_head.num_classes == len(CLASSES)
    inputs = [busy_item(), empty_item(), one_box_item()]
    counts = []
    monkeypatch.setattr(pairs_by_bound, "__defaults__", (lambda: 0.0, 4))

    def spy(*arguments, **options):
        relations, num_scored = best_triplets(*arguments, **options)
        counts.append(num_scored)
        return relations, num_scored

    with torch.no_grad():
        monkeypatch.setattr(head_module, "best_triplets", spy)
        lazy = model(inputs)
        monkeypatch.setattr(head_module, "best_triplets", exhaustive_triplets)
        whole = model(inputs)
    for one, other in zip(lazy, whole):
        one, other = one["relations"], other["relations"]
        assert torch.equal(one.pairs, other.pairs)
        assert torch.equal(one.predicates, other.predicates)
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.predicate_scores, other.predicate_scores, rtol=0, atol=1e-6)
    assert len(lazy[0]["relations"]) >= min(topk, 5)
    assert len(counts) == 3 and counts[0] <= 12 * 11
