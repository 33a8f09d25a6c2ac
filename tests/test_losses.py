"""The losses against plain loops over the paper's equations, and by hand."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_utils import contrastive_in_loops

from reldn_d2.modeling.losses import (
    affinity,
    contrastive_losses,
    draw_predicate_targets,
    predicate_loss,
)
from reldn_d2.modeling.losses.contrastive import NORMALIZATIONS

ALPHAS = (0.2, 0.35, 0.5)


def run(case, logits, alphas=ALPHAS, normalization="paper"):
    losses, margins = contrastive_losses(
        logits,
        case["labels"],
        case["sampled"],
        case["anchor"],
        case["other_class"],
        case["anchor_image"],
        num_images=case["num_images"],
        num_classes=case["num_classes"],
        alphas=alphas,
        normalization=normalization,
    )
    assert list(margins) == ["class_agnostic", "entity_class", "predicate_class"]
    return losses


def make_case(sizes, labels, num_predicates, num_classes, classes, sampled):
    """The ordered pairs of images of these sizes; ``labels`` are bit sets, used in turn."""
    anchor, other, anchor_image = [], [], []
    start = 0
    for image, size in enumerate(sizes):
        anchor_image += [image] * size
        for i in range(size):
            for j in range(size):
                if i != j:
                    anchor.append(start + i)
                    other.append(start + j)
        start += size
    count = len(anchor)
    bits = [labels[p % len(labels)] for p in range(count)]
    return {
        "labels": torch.tensor(
            [[bool(b >> e & 1) for e in range(num_predicates)] for b in bits], dtype=torch.bool
        ).reshape(count, num_predicates),
        "sampled": torch.tensor([sampled[p % len(sampled)] for p in range(count)]).bool(),
        "anchor": torch.tensor(anchor, dtype=torch.int64),
        "other_class": torch.tensor(
            [classes[j % len(classes)] % num_classes for j in other], dtype=torch.int64
        ),
        "anchor_image": torch.tensor(anchor_image, dtype=torch.int64),
        "num_images": len(sizes),
        "num_classes": num_classes,
    }


@st.composite
def cases(draw):
    num_predicates = draw(st.integers(1, 3))
    # Mostly without a label; the others with one or several.
    bits = st.one_of(st.just(0), st.integers(0, 2**num_predicates - 1))
    case = make_case(
        sizes=draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)),
        labels=draw(st.lists(bits, min_size=1, max_size=24)),
        num_predicates=num_predicates,
        num_classes=draw(st.integers(1, 3)),
        classes=draw(st.lists(st.integers(0, 2), min_size=1, max_size=5)),
        sampled=draw(st.lists(st.sampled_from([True, True, True, False]), min_size=1, max_size=7)),
    )
    # A few distinct rows that repeat: ties between pairs; with rounding, between predicates too.
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    num_rows = draw(st.integers(1, 30))
    rows = 2 * torch.randn((num_rows, num_predicates + 1), dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        rows[:, :-1] = rows[:, :-1].round()
    chosen = torch.randint(0, num_rows, (len(case["labels"]),), generator=generator)
    return case, rows[chosen]


NO_PAIR = make_case([1, 0], [0], 2, 2, [0], [True]), torch.zeros((0, 3), dtype=torch.float64)
ONE_PAIR = make_case([2], [1], 2, 2, [0], [True, False]), torch.ones((2, 3), dtype=torch.float64)
ALL_POSITIVE = make_case([3], [1, 3], 2, 2, [0], [True]), torch.ones((6, 3), dtype=torch.float64)
NO_POSITIVE = make_case([3], [0], 2, 2, [0], [True]), torch.ones((6, 3), dtype=torch.float64)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@settings(deadline=None, max_examples=200)
@given(cases())
@example(NO_PAIR)
@example(ONE_PAIR)
@example(ALL_POSITIVE)
@example(NO_POSITIVE)
def test_losses_and_gradients_equal_plain_loops(normalization, case_and_logits):
    case, logits = case_and_logits
    ours = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    losses = run(case, ours, normalization=normalization)
    expected = contrastive_in_loops(case, theirs, ALPHAS, normalization)
    for loss, value in zip(losses, expected):
        assert loss.dtype == torch.float64 and loss.shape == ()
        assert loss.item() == pytest.approx(value.item(), abs=1e-9)
        (gradient,) = torch.autograd.grad(loss, ours, retain_graph=True)
        (wanted,) = torch.autograd.grad(value, theirs, retain_graph=True)
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-9)


def logits_of(phi, predicate=None, num_predicates=2):
    """Logits with this affinity; the rest of the probability mostly on ``predicate``."""
    shares = torch.full((num_predicates,), 0.1)
    shares[predicate or 0] = 1.0
    return torch.cat([phi * shares / shares.sum(), torch.tensor([1 - phi])]).double().log()


def test_golden_values_by_hand():
    """Subject 0 and objects 1 to 4: classes 0, 0, 1, 1; 1 is held, 3 is held and on; subject 5
    has a positive only.
    """
    case = {
        "labels": torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0], [0, 1]]).bool(),
        "sampled": torch.ones(5, dtype=torch.bool),
        "anchor": torch.tensor([0, 0, 0, 0, 5]),
        "other_class": torch.tensor([0, 0, 1, 1, 1]),
        "anchor_image": torch.zeros(6, dtype=torch.int64),
        "num_images": 1,
        "num_classes": 2,
    }
    phis = ((0.6, 0), (0.5, 1), (0.9, 0), (0.3, 0), (0.2, 0))
    logits = torch.stack([logits_of(phi, predicate) for phi, predicate in phis])
    # N = 2 anchors with a positive, of which 5 has no negative.
    # L1: margin 0.6 - 0.5. L2: class 0 the same, class 1 0.9 - 0.3, their mean.
    # L3: predicate 0: min(0.6, 0.9) - 0.3, predicate 1: 0.9 - 0.5, their mean.
    expected = (
        (0.2 - 0.1) / 2,
        ((0.35 - 0.1) + 0.0) / 2 / 2,
        ((0.5 - 0.3) + (0.5 - 0.4)) / 2 / 2,
    )
    losses = run(case, logits)
    assert [float(x) for x in losses] == pytest.approx(expected, abs=1e-7)
    # Sum over all margins that there are, by their number and one.
    expected = (0.1 / 2, 0.25 / 3, 0.3 / 3)
    losses = run(case, logits, normalization="released_code")
    assert [float(x) for x in losses] == pytest.approx(expected, abs=1e-7)


def test_an_image_without_pairs_counts_in_the_mean_over_images():
    case, logits = make_case([3], [1, 0], 2, 2, [0], [True]), torch.randn(6, 3).double()
    alone = run(case, logits)
    with_empty = run({**case, "num_images": 2}, logits)
    for one, half in zip(alone, with_empty):
        assert float(half) == pytest.approx(float(one) / 2)
    assert float(alone[0]) > 0


def test_loss_of_a_batch_is_the_mean_of_its_images():
    """So that one device with two images does what two devices with one image do."""
    torch.manual_seed(0)
    first = make_case([4], [1, 0, 2, 0, 0], 2, 2, [0, 1, 1], [True])
    second = make_case([3], [3, 0], 2, 2, [0, 1, 1], [True])
    logits = torch.randn(18, 3).double()
    joined = {
        key: torch.cat([first[key], second[key]]) for key in ("labels", "sampled", "other_class")
    }
    joined["anchor"] = torch.cat([first["anchor"], second["anchor"] + 4])
    joined["anchor_image"] = torch.tensor([0] * 4 + [1] * 3)
    joined.update(num_images=2, num_classes=2)
    apart = zip(run(first, logits[:12]), run(second, logits[12:]))
    for together, (one, two) in zip(run(joined, logits), apart):
        assert float(together) == pytest.approx(float(one + two) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(dtype, scale):
    case = make_case([3, 2], [1, 0, 2], 2, 2, [0, 1], [True])
    count = len(case["labels"])
    logits = torch.zeros((count, 3), dtype=dtype)
    logits[:, -1] = scale
    logits[::2, 0] = -scale
    logits.requires_grad_()
    losses = run(case, logits)
    assert all(loss.dtype == torch.float32 for loss in losses)
    total = sum(losses) + predicate_loss(
        logits, draw_predicate_targets(case["labels"]), torch.full((count,), 1 / count)
    )
    assert total.dtype == torch.float32 and torch.isfinite(total)
    total.backward()
    assert torch.isfinite(logits.grad).all()


def test_affinity_keeps_its_precision_where_it_is_small():
    """1 - p(no relationship) in float32 would give 0 here, and its gradient noise."""
    logits = torch.tensor([[-20.0, -21.0, 0.0]], requires_grad=True)
    exact = (math.exp(-20) + math.exp(-21)) / (1 + math.exp(-20) + math.exp(-21))
    value = affinity(logits)
    assert float(value) == pytest.approx(exact, rel=1e-5)
    value.sum().backward()
    assert float(logits.grad[0, -1]) == pytest.approx(-exact * (1 - exact), rel=1e-5)


def test_gradients_are_those_of_finite_differences():
    """Random logits have no ties, and the margins asked for leave no hinge at its corner."""
    torch.manual_seed(3)
    case = make_case([4, 3], [1, 0, 2, 0, 3, 0, 0], 2, 2, [0, 1, 1], [True])
    logits = torch.randn(18, 3, dtype=torch.float64, requires_grad=True)
    assert all(float(loss) > 0.01 for loss in run(case, logits))
    assert torch.autograd.gradcheck(lambda x: run(case, x), logits)


def test_unknown_normalization_is_named():
    case = make_case([2], [1, 0], 2, 2, [0], [True])
    with pytest.raises(ValueError, match="normalization is 'papre'; known: paper, released_code"):
        run(case, torch.zeros(2, 3), normalization="papre")


def test_losses_without_anchors_are_a_zero_with_a_gradient():
    logits = torch.zeros((0, 3), requires_grad=True)
    case = make_case([0], [0], 2, 2, [0], [True])
    for loss in run(case, logits):
        assert float(loss) == 0
        loss.backward(retain_graph=True)
    assert logits.grad.shape == (0, 3)


def test_predicate_targets_come_from_the_label_set_and_reach_all_of_it():
    torch.manual_seed(0)
    labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    drawn = torch.stack([draw_predicate_targets(labels) for _ in range(200)])
    assert set(drawn[:, 0].tolist()) == {1, 3}
    assert 60 < int((drawn[:, 0] == 1).sum()) < 140  # both about as often
    assert set(drawn[:, 1].tolist()) == {4} and set(drawn[:, 2].tolist()) == {0}


def test_predicate_loss_is_the_weighted_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, requires_grad=True)
    targets, weights = torch.tensor([0, 2, 1, 2]), torch.tensor([0.5, 0.0, 0.25, 0.25])
    expected = 0.0
    for row, target, weight in zip(logits.tolist(), targets.tolist(), weights.tolist()):
        expected -= weight * math.log(math.exp(row[target]) / sum(math.exp(x) for x in row))
    assert float(predicate_loss(logits, targets, weights)) == pytest.approx(expected, abs=1e-6)


def test_predicate_loss_of_no_pair_is_a_zero_with_a_gradient():
    logits = torch.zeros((0, 3), requires_grad=True)
    loss = predicate_loss(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    loss.backward()
    assert float(loss) == 0 and logits.grad is not None
