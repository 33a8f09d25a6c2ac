"""Pairs of entities: enumeration, matching with the ground truth, sampling; training entities."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reldn_d2.modeling.detectors import label_entities
from reldn_d2.modeling.relation_head.pair_sampling import (
    SampledPairs,
    leaves_no_choice,
    sample_pairs,
)
from reldn_d2.modeling.relation_head.pairs import (
    candidate_pairs,
    distinct_unions,
    distinct_unions_of_both_orders,
    match_pairs,
)
from reldn_d2.modeling.sampling import sample_mask

from detectron2.structures import Boxes, Instances

NUM_PREDICATES = 3


def area(box):
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(a, b):
    both = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    return both / (area(a) + area(b) - both) if both > 0 else 0.0


def match_in_loops(entities, own, targets, relations, overlap_filter):
    """Per pair (i, j): None if it is no candidate, else the acceptable label sets.

    ``own`` is the target that an entity is, or -1. Only pairs of proposals are filtered. The pair
    of a relation's own two boxes has exactly the labels of that relation's pair.
    """
    result = {}
    for i, (box_i, class_i) in enumerate(entities):
        for j, (box_j, class_j) in enumerate(entities):
            filtered = overlap_filter and own[i] < 0 and own[j] < 0
            if i == j or (filtered and iou(box_i, box_j) == 0):
                result[i, j] = None
                continue
            exact = {p for s, o, p in relations if (s, o) == (own[i], own[j])}
            if exact:
                result[i, j] = [exact]
                continue
            best, sets = 0.0, [set()]
            for s, o, _ in relations:
                overlap = min(iou(box_i, targets[s][0]), iou(box_j, targets[o][0]))
                if class_i != targets[s][1] or class_j != targets[o][1] or overlap < 0.5:
                    continue
                labels = {p for s2, o2, p in relations if (s2, o2) == (s, o)}
                if overlap > best + 1e-6:
                    best, sets = overlap, [labels]
                elif overlap > best - 1e-6:
                    sets.append(labels)  # two relations match equally well
            result[i, j] = sets
    return result


def as_grid(entities, targets, relations, own=None, **kwargs):
    def split(entries):
        boxes = torch.tensor([box for box, _ in entries]).reshape(-1, 4)
        return Boxes(boxes), torch.tensor([c for _, c in entries], dtype=torch.int64)

    table = torch.tensor(relations, dtype=torch.int64).reshape(-1, 3)
    return match_pairs(
        split(entities),
        split(targets),
        table[:, :2],
        table[:, 2],
        num_predicates=NUM_PREDICATES,
        gt_index=None if own is None else torch.tensor(own, dtype=torch.int64),
        **kwargs,
    )


def labels_of(grid, i, j):
    return {p for p, on in enumerate(grid.label_sets[grid.match[i, j]].tolist()) if on}


# Boxes on a coarse grid: exact halves, equal boxes and touching boxes abound.
boxes = st.tuples(*[st.integers(0, 4)] * 2, *[st.integers(1, 4)] * 2).map(
    lambda t: (float(t[0]), float(t[1]), float(t[0] + t[2]), float(t[1] + t[3]))
)
entries = st.tuples(boxes, st.integers(0, 1))


@st.composite
def scenes(draw):
    targets = draw(st.lists(entries, max_size=5))
    indices = st.integers(0, max(len(targets) - 1, 0))
    relations = draw(
        st.lists(st.tuples(indices, indices, st.integers(0, NUM_PREDICATES - 1)), max_size=6)
    )
    relations = [r for r in relations if r[0] != r[1]]
    near = st.sampled_from(targets) if targets else entries
    entities = [(x, -1) for x in draw(st.lists(st.one_of(entries, near), max_size=4))]
    kept = draw(st.sets(indices)) if targets else ()
    entities += [(targets[i], i) for i in kept]
    entities = draw(st.permutations(entities))
    return [x for x, _ in entities], [i for _, i in entities], targets, relations


@settings(deadline=None, max_examples=300)
@given(scenes(), st.booleans())
def test_match_pairs_random_scenes_equal_plain_loops(scene, overlap_filter):
    entities, own, targets, relations = scene
    grid = as_grid(entities, targets, relations, own, overlap_filter=overlap_filter)
    expected = match_in_loops(entities, own, targets, relations, overlap_filter)
    annotated = {(s, o) for s, o, _ in relations}
    assert grid.match.shape == grid.candidates.shape == (len(entities),) * 2
    for (i, j), sets in expected.items():
        assert bool(grid.candidates[i, j]) == (sets is not None)
        assert bool(grid.annotated[i, j]) == (i != j and (own[i], own[j]) in annotated)
        if sets is None:
            assert not grid.positive[i, j] and not grid.negative[i, j]
        else:
            labels = labels_of(grid, i, j)
            assert labels in sets and (bool(labels) or sets == [set()])
            assert bool(grid.positive[i, j]) == bool(labels)
            assert bool(grid.negative[i, j]) == (not labels)
    for i, (box, category) in enumerate(entities):
        for side, table in enumerate((grid.is_subject, grid.is_object)):
            wanted = any(
                iou(box, targets[r[side]][0]) >= 0.5 and targets[r[side]][1] == category
                for r in relations
            )
            assert bool(table[i]) == wanted


BIG, SMALL, FAR = (0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 6.0), (50.0, 50.0, 60.0, 60.0)


def test_match_pairs_several_matches_take_labels_of_best_pair():
    targets = [(BIG, 0), (SMALL, 0), (FAR, 1)]
    relations = [(1, 2, 1), (0, 2, 0), (0, 2, 2)]
    grid = as_grid(targets, targets, relations)
    assert labels_of(grid, 0, 2) == {0, 2}  # IoU with the small one is 0.6: it matches, but less
    assert labels_of(grid, 1, 2) == {1}
    assert labels_of(grid, 2, 0) == set()  # the direction counts


def test_match_pairs_different_class_is_negative():
    targets = [(BIG, 0), (FAR, 1)]
    for subject, object_, positive in ((0, 1, True), (1, 1, False), (0, 0, False)):
        grid = as_grid([(BIG, subject), (FAR, object_)], targets, [(0, 1, 0)])
        assert bool(grid.positive[0, 1]) == positive
        assert bool(grid.negative[0, 1]) == (not positive)


def test_match_pairs_overlap_equal_to_threshold_matches():
    half, less = (0.0, 0.0, 10.0, 5.0), (0.0, 0.0, 10.0, 4.99)
    for box, positive in ((half, True), (less, False)):
        grid = as_grid([(box, 0), (FAR, 1)], [(BIG, 0), (FAR, 1)], [(0, 1, 0)])
        assert bool(grid.positive[0, 1]) == bool(grid.is_subject[0]) == positive
        grid = as_grid([(box, 0), (FAR, 1)], [(BIG, 0), (FAR, 1)], [(0, 1, 0)], iou_threshold=0.4)
        assert grid.positive[0, 1]


def test_match_pairs_repeated_relation_is_one_label():
    grid = as_grid([(BIG, 0), (FAR, 1)], [(BIG, 0), (FAR, 1)], [(0, 1, 2), (0, 1, 2)])
    assert labels_of(grid, 0, 1) == {2}


@settings(deadline=None, max_examples=100)
@given(scenes(), st.randoms(use_true_random=False))
def test_match_pairs_dropped_relations_are_neither_positive_nor_negative(scene, random):
    """Other pairs stay as they are; a pair that loses all of its labels is no candidate."""
    entities, own, targets, relations = scene
    kept = [random.random() < 0.5 for _ in relations]
    whole = as_grid(entities, targets, relations, own)
    grid = as_grid(entities, targets, relations, own, gt_kept=torch.tensor(kept, dtype=torch.bool))
    assert grid.negative.equal(whole.negative)
    assert grid.is_subject.equal(whole.is_subject) and grid.is_object.equal(whole.is_object)
    for i, j in whole.positive.nonzero().tolist():
        pair = relations[int(whole.match[i, j])][:2]
        rest = {r[2] for r, keep in zip(relations, kept) if keep and r[:2] == pair}
        assert bool(grid.positive[i, j]) == bool(grid.candidates[i, j]) == bool(rest)
        assert labels_of(grid, i, j) == rest


def test_match_pairs_equal_boxes_of_one_class_keep_their_own_labels():
    targets = [(BIG, 0), (BIG, 0), (FAR, 1)]
    relations = [(0, 2, 0), (1, 2, 1), (1, 2, 2)]
    grid = as_grid(targets, targets, relations, own=[0, 1, 2])
    assert labels_of(grid, 0, 2) == {0} and labels_of(grid, 1, 2) == {1, 2}
    assert grid.annotated.nonzero().tolist() == [[0, 2], [1, 2]]


def test_match_pairs_overlap_filter_spares_pairs_with_a_ground_truth_box():
    apart = [((20.0 * i, 0.0, 20.0 * i + 10, 10.0), 0) for i in range(4)]
    grid = as_grid(apart, apart[:2], [(0, 1, 0)], own=[0, 1, -1, -1], overlap_filter=True)
    wanted = {(i, j) for i in range(4) for j in range(4) if i != j} - {(2, 3), (3, 2)}
    assert {tuple(pair) for pair in grid.candidates.nonzero().tolist()} == wanted
    assert grid.positive.nonzero().tolist() == [[0, 1]]


def test_candidate_pairs_overlap_filter_drops_touching_and_distant_boxes():
    table = [[0, 0, 10, 10], [10, 0, 20, 10], [5, 5, 15, 15], [0, 0, 10, 10]]
    kept = candidate_pairs(torch.tensor(table).float(), True)
    wanted = [[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1], [1, 0, 1, 0]]
    assert kept.tolist() == torch.tensor(wanted).bool().tolist()
    assert candidate_pairs(torch.tensor(table).float(), False).sum() == 12


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 10**6))
def test_distinct_unions_random_pairs_share_a_union_with_their_reverse(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    grid = (image[:, None] == image[None]) & (torch.rand(len(image), len(image)) < 0.6)
    subjects, objects = grid.fill_diagonal_(False).nonzero(as_tuple=True)
    shuffled = torch.randperm(len(subjects), generator=generator)
    subjects, objects = subjects[shuffled], objects[shuffled]
    first, second, union, counts = distinct_unions(subjects, objects, image, len(image), len(sizes))
    ends = [frozenset(pair) for pair in zip(first.tolist(), second.tolist())]
    assert len(set(ends)) == len(ends) == sum(counts)
    assert set(ends) == {frozenset(pair) for pair in zip(subjects.tolist(), objects.tolist())}
    for pair, place in zip(zip(subjects.tolist(), objects.tolist()), union.tolist()):
        assert ends[place] == frozenset(pair)
    # Image by image.
    wanted = [i for i, count in enumerate(counts) for _ in range(count)]
    assert image[first].tolist() == image[second].tolist() == wanted


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 7), st.integers(0, 10**6))
def test_distinct_unions_of_both_orders_random_pairs_equal_distinct_unions(num_entities, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = (torch.rand(num_entities, num_entities, generator=generator) < 0.6).triu(1)
    pairs = (grid | grid.T).nonzero()
    pairs = pairs[torch.randperm(len(pairs), generator=generator)].unbind(1)
    image = torch.zeros(num_entities, dtype=torch.int64)
    unions = []
    for first, second, union in (
        distinct_unions_of_both_orders(*pairs, num_entities),
        distinct_unions(*pairs, image, num_entities, 1)[:3],
    ):
        ends = torch.stack([first, second], dim=1)
        assert len(ends.unique(dim=0)) == len(ends)
        unions.append(ends[union])
    assert torch.equal(unions[0], unions[1])
    assert torch.equal(unions[0], torch.stack(pairs, dim=1).sort(dim=1).values)


masks = st.lists(st.booleans(), max_size=20).map(lambda x: torch.tensor(x, dtype=torch.bool))


@settings(deadline=None, max_examples=200)
@given(masks, st.integers(0, 25), st.integers(0, 25), st.integers(0, 10**6))
def test_sample_mask_random_candidates_draws_requested_count(candidates, number, most, seed):
    number = min(number, most)
    torch.manual_seed(seed)
    drawn = sample_mask(candidates, number, most)
    assert not (drawn & ~candidates).any()
    assert int(drawn.sum()) == min(number, int(candidates.sum()))
    torch.manual_seed(seed)
    assert torch.equal(drawn, sample_mask(candidates, number, most))
    on_device = sample_mask(candidates, torch.tensor(number), most)  # a number not yet known
    assert int(on_device.sum()) == int(drawn.sum())


def chi_square(counts, rate):
    """Of numbers that should all be ``rate``, in units of its degrees of freedom.

    Draws without replacement have less variance than independent ones, so that this is about
    1 - rate / draws for uniform draws.
    """
    return float(((counts - rate) ** 2 / rate).sum() / (len(counts) - 1))


def test_sample_mask_preferred_are_drawn_first():
    torch.manual_seed(0)
    candidates = torch.tensor([1, 1, 1, 1, 0]).bool()
    preferred = torch.tensor([0, 0, 1, 0, 1]).bool()
    drawn = sum(sample_mask(candidates, 2, 2, preferred).int() for _ in range(300))
    assert drawn[2] == 300 and (drawn[[0, 1, 3]] > 60).all() and drawn[4] == 0


def crowded_grid(num_targets=12, ground_truth=False):
    """Cups, every third on a table, every third under another; a proposal around every box.

    ``ground_truth`` says of the boxes without an offset that they are the ground truth.
    """
    targets = [((0.0, 0.0, 100.0, 50.0), 1), ((0.0, 50.0, 100.0, 90.0), 1)]
    targets += [((8.0 * i, 10.0, 8.0 * i + 7, 20.0), 0) for i in range(num_targets)]
    entities = targets + [((b[0], b[1], b[2] + 0.5, b[3] + 0.5), c) for b, c in targets]
    relations = [(i + 2, i % 3, i % 3) for i in range(num_targets) if i % 3 < 2] + [(2, 0, 2)]
    own = [*range(len(targets)), *[-1] * len(targets)] if ground_truth else None
    return as_grid(entities, targets, relations, own)


def table(pairs, mask):
    return set(zip(pairs.subjects[mask].tolist(), pairs.objects[mask].tolist()))


@pytest.mark.parametrize(
    "asked",
    [
        dict(num_pairs=512, num_positive=128, num_anchor_positive=128, num_anchor_negative=128),
        dict(num_pairs=30, num_positive=8, num_anchor_positive=5, num_anchor_negative=7),
        dict(num_pairs=10, num_positive=30, num_anchor_positive=0, num_anchor_negative=3),
        dict(num_pairs=0, num_positive=0, num_anchor_positive=0, num_anchor_negative=0),
    ],
)
def test_sample_pairs_counts_and_constraints_hold(asked):
    grid = crowded_grid()
    num_positive, num_negative = int(grid.positive.sum()), int(grid.negative.sum())
    pairs = sample_pairs(grid, **asked, generator=torch.Generator().manual_seed(1))
    indices = list(zip(pairs.subjects.tolist(), pairs.objects.tolist()))
    assert len(set(indices)) == len(indices) == len(pairs)
    assert all(i != j for i, j in indices)
    assert (pairs.for_predicate | pairs.for_subjects | pairs.for_objects).all()
    positive = pairs.labels.any(dim=1)
    assert torch.equal(positive, grid.positive[pairs.subjects, pairs.objects])
    for i, j, labels in zip(*zip(*indices), pairs.labels.tolist()) if indices else ():
        assert {p for p, on in enumerate(labels) if on} == labels_of(grid, i, j)

    drawn = int((pairs.for_predicate & positive).sum())
    assert drawn == min(num_positive, asked["num_positive"], asked["num_pairs"])
    wanted = min(num_negative, asked["num_pairs"] - drawn)
    assert int((pairs.for_predicate & ~positive).sum()) == wanted

    grids = (grid.is_subject[:, None], grid.is_object[None])
    for mask, anchors in zip((pairs.for_subjects, pairs.for_objects), grids):
        allowed = grid.negative & anchors
        wanted = min(num_positive, asked["num_anchor_positive"])
        assert int((mask & positive).sum()) == wanted
        negatives = mask & ~positive
        assert int(negatives.sum()) == min(int(allowed.sum()), asked["num_anchor_negative"])
        assert all(allowed[i, j] for i, j in table(pairs, negatives))


@pytest.mark.parametrize("less", ["", "num_pairs", "num_positive", "num_anchor_positive"])
@pytest.mark.parametrize("anchors", [True, False])
def test_leaves_no_choice_only_if_every_draw_is_the_same(less, anchors):
    grid = crowded_grid(num_targets=4, ground_truth=True)
    positive, negative = int(grid.positive.sum()), int(grid.negative.sum())
    asked = dict(num_pairs=positive + negative, num_positive=positive)
    asked.update(
        num_anchor_positive=positive if anchors else 0,
        num_anchor_negative=negative if anchors else 0,
    )
    if less:
        asked[less] = max(asked[less] - 1, 0)
    fixed = not less or (not anchors and less == "num_anchor_positive")
    assert leaves_no_choice(grid, **asked) == fixed
    draws = [
        sample_pairs(grid, **asked, generator=torch.Generator().manual_seed(seed))
        for seed in range(30)
    ]
    if fixed:
        for draw in draws[1:]:
            assert all(torch.equal(x, vars(draws[0])[name]) for name, x in vars(draw).items())


@pytest.mark.parametrize("num_pairs, num_positive", [(64, 20), (64, 3), (6, 3), (6, 20), (0, 0)])
def test_sample_pairs_annotated_pairs_always_take_part_in_l0(num_pairs, num_positive):
    grid = crowded_grid(ground_truth=True)
    annotated = {tuple(x) for x in grid.annotated.nonzero().tolist()}
    num_all = int(grid.positive.sum())
    assert len(annotated) == 8 and num_all > 20
    drawn_before = None
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        pairs = sample_pairs(
            grid, num_pairs=num_pairs, num_positive=num_positive, generator=generator
        )
        positive = table(pairs, pairs.for_predicate & pairs.labels.any(dim=1))
        assert len(positive) == min(max(len(annotated), num_positive), num_pairs)
        assert len(positive & annotated) == min(len(annotated), num_pairs)
        assert int(pairs.for_predicate.sum()) == num_pairs
        # The rest is drawn, from all other positive pairs.
        if len(positive) > len(annotated):
            assert positive != drawn_before
        drawn_before = positive


def test_sample_pairs_dropped_pairs_do_not_raise_the_limit_of_positive_pairs():
    grid = crowded_grid(ground_truth=True)
    dropped = torch.zeros_like(grid.annotated)
    dropped[tuple(grid.annotated.nonzero()[2:].T)] = True
    grid = replace(grid, candidates=grid.candidates & ~dropped)
    pairs = sample_pairs(grid, num_pairs=64, num_positive=3)
    assert int((pairs.for_predicate & pairs.labels.any(dim=1)).sum()) == 3


def test_sample_pairs_negatives_with_related_other_end_come_first():
    grid = crowded_grid()
    preferred = grid.negative & grid.is_subject[:, None] & grid.is_object[None]
    count = int(preferred.sum())
    assert count > 3
    for name in ("for_subjects", "for_objects"):
        few = sample_pairs(grid, num_anchor_negative=count - 3)
        mask = getattr(few, name) & ~few.labels.any(dim=1)
        assert all(preferred[i, j] for i, j in table(few, mask))
        more = sample_pairs(grid, num_anchor_negative=count + 3)
        mask = getattr(more, name) & ~more.labels.any(dim=1)
        assert int(sum(preferred[i, j] for i, j in table(more, mask))) == count


@pytest.mark.parametrize("loss", ["predicate", "subjects", "objects"])
@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_sample_pairs_each_draw_is_uniform(loss, kind):
    """A chi-square test: as often each candidate, whatever the other draws take."""
    grid = crowded_grid(6)
    sides = {"predicate": torch.tensor(True), "subjects": grid.is_subject[:, None]}
    sides["objects"] = grid.is_object[None]
    candidates = getattr(grid, kind)
    if kind == "negative":
        candidates = candidates & sides[loss]
        if loss != "predicate":  # the preferred ones, of which there are more than are drawn
            candidates = candidates & grid.is_subject[:, None] & grid.is_object[None]
    options = dict(num_pairs=12, num_positive=4, num_anchor_positive=3, num_anchor_negative=5)
    number = {"predicate": {"positive": 4, "negative": 8}}.get(loss, {"positive": 3, "negative": 5})
    assert int(candidates.sum()) > 2 * number[kind]
    generator, draws = torch.Generator().manual_seed(3), 1500
    counts = torch.zeros_like(candidates, dtype=torch.float64)
    for _ in range(draws):
        pairs = sample_pairs(grid, **options, generator=generator)
        mask = getattr(pairs, f"for_{loss}") & (pairs.labels.any(dim=1) == (kind == "positive"))
        counts[pairs.subjects[mask], pairs.objects[mask]] += 1
    assert counts[~candidates].sum() == 0
    rate = draws * number[kind] / int(candidates.sum())
    assert counts.sum() == draws * number[kind]
    # The chi-square per degree of freedom: mean 1 - rate / draws, and 5 standard deviations.
    freedom = int(candidates.sum()) - 1
    expected = 1 - rate / draws
    assert (
        abs(chi_square(counts[candidates], rate) - expected) < 5 * expected * (2 / freedom) ** 0.5
    )


def test_chi_square_biased_counts_are_rejected():
    counts = torch.full((40,), 1000.0)
    counts[0] = 1400
    counts[1] = 600
    assert chi_square(counts, 1000.0) > 1 + 5 * (2 / 39) ** 0.5


def test_sample_pairs_same_seed_repeats_and_draws_share_pairs():
    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return sample_pairs(crowded_grid(), **options, generator=generator)

    options = dict(num_positive=4, num_anchor_positive=4, num_anchor_negative=4)
    first, again, other = draw(0, **options), draw(0, **options), draw(1, **options)
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name))
    assert table(first, first.for_subjects) != table(other, other.for_subjects)
    positive = first.labels.any(dim=1)
    masks = (first.for_predicate, first.for_subjects, first.for_objects)
    assert len({frozenset(table(first, mask & positive)) for mask in masks}) == 1
    # Of the negatives that both may take, one draw has all that the other has.
    grid = crowded_grid()
    preferred = grid.negative & grid.is_subject[:, None] & grid.is_object[None]
    for seed in range(5):
        pairs = draw(seed, num_pairs=150, num_positive=4, num_anchor_negative=12)
        negative = ~pairs.labels.any(dim=1)
        mutual = {pair for pair in table(pairs, pairs.for_predicate & negative) if preferred[pair]}
        for mask in (pairs.for_subjects, pairs.for_objects):
            mine = {pair for pair in table(pairs, mask & negative) if preferred[pair]}
            assert mutual and mine and (mine <= mutual or mutual <= mine)
    # The smaller draw is part of the larger one.
    more = draw(0, num_positive=4, num_anchor_positive=6)
    wider = table(more, more.for_objects & more.labels.any(dim=1))
    assert table(first, first.for_objects & positive) < wider


def test_sampled_pairs_cat_indices_point_into_batch():
    grid = crowded_grid(3)
    empty = sample_pairs(as_grid([], [], []))
    one, two = sample_pairs(grid), sample_pairs(grid)
    joined = SampledPairs.cat([one, empty, two], [10, 0, 10])
    assert joined.subjects.tolist() == one.subjects.tolist() + [10 + i for i in two.subjects]
    assert joined.objects.tolist() == one.objects.tolist() + [10 + i for i in two.objects]
    assert len(joined) == len(joined.labels) == len(one) + len(two)


def target(entries):
    instances = Instances((100, 100))
    instances.gt_boxes = Boxes(torch.tensor([box for box, _ in entries]).reshape(-1, 4))
    instances.gt_classes = torch.tensor([c for _, c in entries], dtype=torch.int64)
    return instances


def test_label_entities_keeps_matching_proposals_and_ground_truth():
    proposals = Boxes(
        torch.tensor([[0, 0, 10, 5], [0, 0, 10, 4.9], [51, 50, 60, 60], [20, 20, 30, 30]])
    )
    (entities,) = label_entities(
        [proposals], [target([(BIG, 2), (FAR, 1)])], iou_threshold=0.5, max_entities=10
    )
    boxes = [tuple(box) for box in entities.proposal_boxes.tensor.tolist()]
    assert dict(zip(boxes, entities.gt_classes.tolist())) == {
        (0, 0, 10, 5): 2,  # an IoU of exactly 0.5
        (51, 50, 60, 60): 1,
        BIG: 2,
        FAR: 1,
    }
    own = dict(zip(boxes, entities.gt_index.tolist()))
    assert own == {(0, 0, 10, 5): -1, (51, 50, 60, 60): -1, BIG: 0, FAR: 1}
    assert entities.image_size == (100, 100)


def test_label_entities_respects_limit_and_may_be_empty():
    many = Boxes(torch.tensor([list(BIG)] * 30))
    bounded, none = label_entities(
        [many, many], [target([(BIG, 0)]), target([])], iou_threshold=0.5, max_entities=8
    )
    assert len(bounded) == 8 and len(none.gt_index) == 0
    assert len(none) == 0 and none.proposal_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize("num_proposals", [0, 50])
def test_label_entities_equal_boxes_keep_their_own_classes(num_proposals):
    truth = [(BIG, 4), (FAR, 1), (BIG, 2), (BIG, 4)]
    proposals = Boxes(torch.tensor([list(BIG)] * num_proposals).reshape(-1, 4))
    (entities,) = label_entities([proposals], [target(truth)], iou_threshold=0.5, max_entities=6)
    own = {i: c for i, c in zip(entities.gt_index.tolist(), entities.gt_classes.tolist()) if i >= 0}
    assert own == {0: 4, 1: 1, 2: 2, 3: 4}  # all of them, however many proposals match
    assert len(entities) == min(4 + num_proposals, 6)
    for box, index in zip(entities.proposal_boxes.tensor.tolist(), entities.gt_index.tolist()):
        assert index < 0 or tuple(box) == truth[index][0]
