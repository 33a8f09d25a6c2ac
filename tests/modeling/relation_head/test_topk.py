"""The best triplets found lazily are those of computing everything, ties included."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_utils import CLASSES, busy_item, empty_item, one_box_item, small_model

from reldn_d2.modeling.relation_head import relation_head as head_module
from reldn_d2.modeling.relation_head import topk as inference
from reldn_d2.modeling.relation_head.topk import best_triplets, exhaustive_triplets, pairs_by_bound


def in_plain_loops(table, scores, boxes, ks, topk):
    """Triplets (subject, object, predicate) and scores: every pair, one by one, in float32."""
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
        allowed = [x for x, (_, rank) in everything.items() if k == 0 or rank < k]
        kept.update(sorted(allowed, key=lambda x: (-everything[x][0], x))[:topk])
    ranked = sorted(kept, key=lambda x: (-everything[x][0], x))
    return ranked, [everything[x][0] for x in ranked]


def random_case(count, predicates, levels, equal, seed):
    """Scores, boxes and probabilities; with few ``levels`` there are ties and zeros."""
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
    """Probabilities from a table; remembers which pairs it was asked for."""

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
    ks=st.lists(st.sampled_from([0, 1, 2, 7]), min_size=1, max_size=3),
    topk=st.integers(1, 15),
    chunk=st.integers(1, 20),
    first=st.sampled_from([1, 4, 256]),
    seed=st.integers(0, 10**6),
)
def test_lazy_equals_plain_loops(
    count, predicates, levels, equal, overlap, ks, topk, chunk, first, seed
):
    table, scores, boxes = random_case(count, predicates, levels, equal, seed)
    boxes = boxes if overlap else None
    expected, values = in_plain_loops(table, scores, boxes, ks, topk)
    arguments = dict(num_predicates=predicates, predicates_per_pair=ks, topk=topk, chunk=chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_by_bound, "__defaults__", (pairs_by_bound.__defaults__[0], first))
        lazy = Scorer(table)
        found = best_triplets(lazy, scores, boxes, **arguments)
    for best in (found, exhaustive_triplets(Scorer(table), scores, boxes, **arguments)):
        triplets = [(*p, e) for p, e in zip(best.pairs.tolist(), best.predicates.tolist())]
        assert triplets == expected
        assert best.scores.tolist() == pytest.approx(values, abs=1e-7)
        assert best.predicate_scores.tolist() == [float(table[t]) for t in expected]
    assert len(set(lazy.pairs)) == len(lazy.pairs) == found.num_scored
    assert max(lazy.calls, default=0) <= chunk
    assert best.num_scored == len(list(itertools.permutations(range(count), 2))) or overlap


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 40),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
    st.integers(1, 60),
    st.integers(0, 10**6),
)
def test_visit_takes_every_pair_once(count, levels, overlap, chunk, seed):
    _, scores, boxes = random_case(count, 1, levels, False, seed)
    visited = []
    for subjects, objects in pairs_by_bound(scores, boxes if overlap else None, chunk, lambda: 0.0):
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
def test_little_more_is_computed_than_the_bound_asks_for(count, topk, chunk, seed):
    """Pairs whose bound reaches the K-th best, and no more than half as many again."""
    table, scores, _ = random_case(count, 2, 0, False, seed)
    arguments = dict(num_predicates=2, predicates_per_pair=[1], topk=topk, chunk=chunk)
    best = best_triplets(Scorer(table), scores, None, **arguments)
    bounds = (scores[:, None] * scores)[~torch.eye(count, dtype=torch.bool)]
    least = best.scores[-1] if len(best.scores) == topk else 0.0
    needed = int((bounds >= least).sum())
    assert needed <= best.num_scored <= 1.6 * needed + inference.FIRST_CHUNK + count
    if best.num_scored > inference.FIRST_CHUNK + count:
        assert best.num_scored <= 1.6 * needed + 2 * count


def test_pairs_that_cannot_come_in_are_not_computed():
    """Three good detections among 60 poor ones: their six pairs fill the best four."""
    table = torch.full((63, 63, 2), 0.2)
    table[:3, :3] = torch.tensor([0.6, 0.3])
    scores = torch.cat([torch.full((3,), 0.9), torch.full((60,), 0.1)])
    lazy = Scorer(table)
    best = best_triplets(
        lazy, scores, None, num_predicates=2, predicates_per_pair=[1], topk=4, chunk=6
    )
    assert best.num_scored == 6 and set(lazy.pairs) == set(itertools.permutations(range(3), 2))
    assert best.pairs.tolist() == [[0, 1], [0, 2], [1, 0], [1, 2]]
    # With every predicate allowed and eight asked for, the same six pairs still suffice.
    lazy = Scorer(table)
    best_triplets(lazy, scores, None, num_predicates=2, predicates_per_pair=[0], topk=8, chunk=6)
    assert len(lazy.pairs) == 6
    # k = 1 has six triplets there and needs a seventh, one of the next bound.
    lazy = Scorer(table)
    best = best_triplets(
        lazy, scores, None, num_predicates=2, predicates_per_pair=[0, 1], topk=7, chunk=400
    )
    assert best.num_scored == 6 + 2 * 3 * 60  # ties at the border: all of them are looked at
    assert best.pairs[-1].tolist() == [0, 3]


def test_pairs_of_equal_bounds_are_visited_in_whole_chunks():
    """No triplet of theirs beats their bound, so the visit cannot end among them."""
    scores, table = torch.full((80,), 0.3), torch.full((80, 80, 1), 0.01)
    table[:4] = 0.9
    arguments = dict(num_predicates=1, predicates_per_pair=[1], topk=5, chunk=2000)
    lazy = Scorer(table)
    assert best_triplets(lazy, scores, None, **arguments).num_scored == 80 * 79
    assert lazy.calls == [2000, 2000, 2000, 320]


@pytest.mark.parametrize("topk", [6, 100, 588])
def test_better_pairs_do_not_wait_for_the_many_equal_ones(topk):
    """Few detections of a detector, and many at its threshold: their pairs are a band alone."""
    scores = torch.cat([torch.tensor([0.9, 0.6, 0.3]), torch.full((97,), 0.05)])
    table = torch.full((100, 100, 1), 0.9)
    arguments = dict(num_predicates=1, predicates_per_pair=[1], topk=topk, chunk=2048)
    best = best_triplets(Scorer(table), scores, None, **arguments)
    bounds = (scores[:, None] * scores)[~torch.eye(100, dtype=torch.bool)]
    needed = int((bounds >= best.scores[-1]).sum())
    assert needed <= best.num_scored <= needed + inference.FIRST_CHUNK  # all would be 9,900


def test_scores_that_round_to_the_bound_are_found():
    """Certain predicates: a triplet equals its bound, and ties with the K-th best count."""
    scores = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3, 0.1])
    table = torch.ones((5, 5, 1))
    for topk in range(1, 21):
        expected, _ = in_plain_loops(table, scores, None, [1], topk)
        best = best_triplets(
            Scorer(table),
            scores,
            None,
            num_predicates=1,
            predicates_per_pair=[1],
            topk=topk,
            chunk=2,
        )
        assert [(*p, 0) for p in best.pairs.tolist()] == expected


@pytest.mark.parametrize(
    "scores, certain",
    [
        # Of two pairs with one score in float32, the one of the larger product comes first.
        ([0.9040973782539368, 0.6458731889724731, 0.904097318649292, 0.6458732485771179], 1),
        # Products so small that float32 has few digits for them.
        ([9.69e-23, 9.69e-23, 1.01e-22, 1.01e-22], 1),
        # A probability that is more than 1 by a rounding.
        ([0.8, 0.5, 0.8, 0.5], 1.0000002),
    ],
)
def test_equal_scores_of_different_bounds_rank_by_their_pair(scores, certain):
    scores, table = torch.tensor(scores), torch.zeros((4, 4, 1))
    table[0, 1], table[2, 3] = min(certain, 1.0), certain
    arguments = dict(num_predicates=1, predicates_per_pair=[1], topk=1, chunk=1)
    for best_of in (best_triplets, exhaustive_triplets):
        best = best_of(Scorer(table), scores, None, **arguments)
        assert best.pairs.tolist() == [[0, 1]]
        assert best.predicate_scores.tolist() == [1.0]


def test_the_visit_goes_on_until_every_k_has_its_best():
    """With all predicates the first pairs suffice, with one a pair they do not."""
    scores = torch.tensor([1.0, 1.0, 0.4, 0.4])
    table = torch.zeros((4, 4, 4))
    table[0, 1] = table[1, 0] = 0.24
    table[0, 2], table[2, 3] = torch.tensor([0.4, 0, 0, 0]), torch.tensor([0.9, 0, 0, 0])
    for chunk in (1, 2, 100):
        arguments = dict(num_predicates=4, predicates_per_pair=[0, 1], topk=4, chunk=chunk)
        lazy = best_triplets(Scorer(table), scores, None, **arguments)
        whole = exhaustive_triplets(Scorer(table), scores, None, **arguments)
        assert lazy.pairs.tolist() == whole.pairs.tolist() and [2, 3] in lazy.pairs.tolist()
        assert torch.equal(lazy.scores, whole.scores)


def test_memory_is_that_of_a_chunk_whatever_the_number_of_detections():
    scores = torch.rand(6000, generator=torch.Generator().manual_seed(0))
    tracemalloc.start()
    taken = sum(len(x) for x, _ in itertools.islice(pairs_by_bound(scores, None, 2048), 10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken > 8000
    assert peak < 8e6  # one number for each of the 36 million pairs would take 144 MB


def test_not_a_number_is_kept_to_be_reported():
    table = torch.rand((4, 4, 2), generator=torch.Generator().manual_seed(0))
    table[0, 1, 1] = float("nan")
    best = best_triplets(
        Scorer(table),
        torch.tensor([0.9, 0.8, 0.7, 0.6]),
        None,
        num_predicates=2,
        predicates_per_pair=[1],
        topk=3,
        chunk=2,
    )
    assert [0, 1] in best.pairs.tolist() and best.scores.isnan().any()


@pytest.mark.parametrize("chunk", [1, 4, 2048])
def test_entities_and_pairs_are_pooled_in_chunks(chunk, monkeypatch):
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


@pytest.mark.parametrize("task", ["sgdet", "sgcls", "prdcls"])
@pytest.mark.parametrize("ks, topk", [((1,), 5), ((0,), 20), ((1, 2, 70), 7)])
def test_model_predicts_lazily_what_it_predicts_exhaustively(task, ks, topk, monkeypatch):
    model = small_model(
        *("TEST.RELATIONS.TASK", task, "TEST.RELATIONS.PREDICATES_PER_PAIR", list(ks)),
        *("TEST.RELATIONS.TOPK", topk, "TEST.DETECTIONS_PER_IMAGE", 12),
        *("MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER", task == "sgcls"),
        seed=topk,
    ).eval()
    with torch.no_grad():  # a table that tells classes apart, as after training
        model.relation_head.semantic.table.weight.normal_(0, 3)
    assert model.relation_head.num_classes == len(CLASSES)
    inputs = [busy_item(), empty_item(), one_box_item()]
    counts = []
    monkeypatch.setattr(pairs_by_bound, "__defaults__", (lambda: 0.0, 4))

    def spy(*arguments, **options):
        best = best_triplets(*arguments, **options)
        counts.append(best.num_scored)
        return best

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
    assert len(counts) == 3 and inference.FIRST_CHUNK >= 1
