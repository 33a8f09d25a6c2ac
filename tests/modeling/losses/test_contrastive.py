"""The losses against plain loops over the paper's equations, and by hand."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_oracle import all_pairs, anchor_sides, contrastive_in_loops, groups_in_loops
from random_cases import NUM_CASES
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from reldn_d2.modeling.losses import (
    AnchorSides,
    affinity,
    contrastive_losses,
    draw_predicate_targets,
    predicate_loss,
)
from reldn_d2.modeling.losses.contrastive import NORMALIZATIONS

ALPHAS = (0.2, 0.35, 0.5)
WEIGHTS = torch.tensor([1.0, 0.5, 0.1])


def run(case, logits, alphas=ALPHAS, normalization="paper"):
    losses, groups = contrastive_losses(
        logits,
        case["labels"],
        case.get("sides") or anchor_sides(case),
        case["anchor_image"],
        num_images=case["num_images"],
        num_classes=case["num_classes"],
        alphas=alphas,
        normalization=normalization,
    )
    assert (groups is None) == (len(logits) == 0)
    return losses


def make_case(sizes, bits, num_predicates, num_classes, classes=(0,), sampled=((True,), (True,))):
    """The ordered pairs of images of these sizes; bit sets, classes, samples used in turn."""
    case = all_pairs(sizes)
    count, num_entities = len(case["subjects"]), sum(sizes)
    table = [[b >> e & 1 for e in range(num_predicates)] for b in bits]
    return {
        **case,
        "labels": torch.tensor(table).bool()[torch.arange(count) % len(bits)],
        "classes": torch.tensor(classes)[torch.arange(num_entities) % len(classes)] % num_classes,
        "sampled": torch.stack(
            [torch.tensor(x).bool()[torch.arange(count) % len(x)] for x in sampled]
        ),
        "num_classes": num_classes,
    }


@st.composite
def cases(draw):
    num_predicates = draw(st.integers(1, 4))
    any_set = st.integers(0, 2**num_predicates - 1)
    bits = draw(
        st.one_of(
            st.lists(st.one_of(st.just(0), any_set), min_size=1, max_size=24),
            st.lists(any_set.filter(bool), min_size=1, max_size=5),  # all pairs are positive
        )
    )
    some = st.lists(st.sampled_from([True, True, True, False]), min_size=1, max_size=7)
    case = make_case(
        sizes=draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        bits=bits,
        num_predicates=num_predicates,
        num_classes=draw(st.integers(1, 3)),
        classes=draw(st.lists(st.integers(0, 2), min_size=1, max_size=5)),
        sampled=draw(st.tuples(some, some)),
    )
    # A few distinct rows that repeat: ties between pairs; with rounding, between predicates too.
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    num_rows = draw(st.integers(1, 30))
    rows = 2 * torch.randn((num_rows, num_predicates + 1), dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        rows[:, :-1] = rows[:, :-1].round()
    chosen = torch.randint(0, num_rows, (len(case["labels"]),), generator=generator)
    return case, rows[chosen]


def kinds_of(case, logits):
    """What is special about a case, to see that the random ones have everything."""
    kinds = set()
    used = case["sampled"].any(dim=0)
    positive = case["labels"].any(dim=1) & used
    negative = ~case["labels"].any(dim=1) & used
    sizes = case["anchor_image"].bincount(minlength=case["num_images"]).tolist()
    if not positive.any():
        kinds.add("no positives")
    elif not negative.any():
        kinds.add("all pairs positive")
    if len(positive) == 0:
        kinds.add("no pair")
    if used.sum() == 1:
        kinds.add("one pair")
    if (case["labels"].sum(dim=1)[used] > 1).any():
        kinds.add("several predicates on one pair")
    if len(set(sizes)) > 1:
        kinds.add("images of different sizes")
    if 0 in sizes:
        kinds.add("an image without boxes")
    if case["num_classes"] == 1:
        kinds.add("one class")
    for image in range(case["num_images"]):
        for groups_of in groups_in_loops(case, logits, "subject", image):
            for positives, negatives in (group for x in groups_of.values() for group in x):
                low = min(logits[p].tolist() for p in positives)
                if [logits[p].tolist() for p in positives].count(low) > 1:
                    kinds.add("ties")
                if not negatives:
                    kinds.add("a group without negatives")
    return kinds


def check_against_loops(case, logits, normalization):
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


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_contrastive_losses_random_cases_equal_plain_loops(normalization):
    seen = Counter()

    # The seed is fixed, so that the same special cases are among them each time.
    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=NUM_CASES,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def check(case_and_logits):
        check_against_loops(*case_and_logits, normalization)
        seen.update(kinds_of(*case_and_logits) | {"case"})

    check()
    assert seen["case"] >= NUM_CASES
    special = {
        "no positives",
        "all pairs positive",
        "no pair",
        "one pair",
        "several predicates on one pair",
        "images of different sizes",
        "an image without boxes",
        "one class",
        "ties",
        "a group without negatives",
    }
    if NUM_CASES >= 500:
        assert special <= set(seen), f"the random cases have no: {special - set(seen)}"


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_contrastive_losses_thousands_of_pairs_equal_plain_loops(normalization):
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(0, 60, (997,), generator=generator)  # some 7 of 60 bit sets are labels
    case = make_case(
        [50, 0, 35],
        torch.where(bits < 8, bits, 0).tolist(),
        num_predicates=3,
        num_classes=4,
        classes=torch.randint(0, 4, (41,), generator=generator).tolist(),
        sampled=((True, True, False), (True, False)),
    )
    assert len(case["labels"]) == 50 * 49 + 35 * 34
    logits = torch.randn((len(case["labels"]), 4), dtype=torch.float64, generator=generator)
    check_against_loops(case, logits, normalization)


def test_contrastive_losses_nothing_to_compare_give_zero_loss_and_gradient():
    """No positive, no negative, one pair; each alone and beside others."""
    for sizes, bits in (([3], [0]), ([3], [1, 3]), ([2, 1, 0], [1]), ([2], [1, 0])):
        case = make_case(sizes, bits, 2, 2)
        logits = torch.randn((len(case["labels"]), 3), requires_grad=True)
        total = sum(run(case, logits))
        total.backward()
        assert total.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def logits_of(phi, predicate=None, num_predicates=2):
    """Logits with this affinity; the rest of the probability mostly on ``predicate``."""
    shares = torch.full((num_predicates,), 0.1)
    shares[predicate or 0] = 1.0
    return torch.cat([phi * shares / shares.sum(), torch.tensor([1 - phi])]).double().log()


def test_contrastive_losses_small_case_equal_hand_computed_values():
    """Subject 0 and objects 1 to 4: classes 0, 0, 1, 1; 1 is held, 3 is held and on; subject 5
    has a positive only.
    """
    case = {
        "labels": torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0], [0, 1]]).bool(),
        "sides": AnchorSides(
            sampled=torch.ones((1, 5), dtype=torch.bool),
            anchor=torch.tensor([[0, 0, 0, 0, 5]]),
            other_class=torch.tensor([[0, 0, 1, 1, 1]]),
        ),
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


def test_contrastive_losses_two_sides_add_up():
    """Subjects as anchors and objects as anchors, each alone, give both together."""
    case = make_case([4, 3], [1, 0, 2, 0, 0], 2, 2, [0, 1, 1], ((True, True, False), (True,)))
    logits = torch.randn(18, 3).double()
    sides = anchor_sides(case)
    alone = [
        run({**case, "sides": AnchorSides(*(x[i : i + 1] for x in vars(sides).values()))}, logits)
        for i in (0, 1)
    ]
    for both, one, other in zip(run(case, logits), *alone):
        assert float(one) != float(other)
        assert float(both) == pytest.approx(float(one + other))


def test_contrastive_losses_image_without_pairs_counts_in_mean():
    case, logits = make_case([3], [1, 0], 2, 2), torch.randn(6, 3).double()
    alone = run(case, logits)
    with_empty = run({**case, "num_images": 2}, logits)
    for one, half in zip(alone, with_empty):
        assert float(half) == pytest.approx(float(one) / 2)
    assert float(alone[0]) > 0


def test_contrastive_losses_batch_equals_mean_of_images():
    """So that one device with two images does what two devices with one image do."""
    torch.manual_seed(0)
    first = make_case([4], [1, 0, 2, 0, 0], 2, 2, [0, 1, 1])
    second = make_case([3], [3, 0], 2, 2, [0, 1, 1])
    joined = {
        **all_pairs([4, 3]),
        "labels": torch.cat([first["labels"], second["labels"]]),
        "classes": torch.cat([first["classes"], second["classes"]]),
        "sampled": torch.ones((2, 18), dtype=torch.bool),
        "num_classes": 2,
    }
    logits = torch.randn(18, 3).double()
    apart = zip(run(first, logits[:12]), run(second, logits[12:]))
    for together, (one, two) in zip(run(joined, logits), apart):
        assert float(together) == pytest.approx(float(one + two) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_losses_extreme_logits_stay_finite(dtype, scale, normalization):
    case = make_case([3, 2], [1, 0, 2], 2, 2, [0, 1])
    count = len(case["labels"])
    logits = torch.zeros((count, 3), dtype=dtype)
    logits[:, -1] = scale
    logits[::2, 0] = -scale
    logits.requires_grad_()
    losses = run(case, logits, normalization=normalization)
    assert all(loss.dtype == torch.float32 for loss in losses)
    total = sum(losses) + predicate_loss(
        logits, draw_predicate_targets(case["labels"]), torch.full((count,), 1 / count)
    )
    assert total.dtype == torch.float32 and torch.isfinite(total)
    total.backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("row", [[-math.inf, -math.inf, 0.0], [-math.inf, 2.0, -math.inf]])
def test_contrastive_losses_infinite_logits_give_no_nan(row):
    case = make_case([3], [1, 0, 2], 2, 2, [0, 1])
    logits = torch.randn(6, 3)
    logits[2:4] = torch.tensor(row)
    logits.requires_grad_()
    total = sum(run(case, logits))
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_autocast_on_cpu_stay_in_float32(dtype):
    """A linear layer under autocast gives logits of few bits; what follows is not rounded again."""
    torch.manual_seed(0)
    case = make_case([4, 3], [1, 0, 2, 0, 0], 2, 2, [0, 1, 1])
    layer, vectors = torch.nn.Linear(5, 3), torch.randn(18, 5)
    weights, targets = torch.full((18,), 1 / 18), draw_predicate_targets(case["labels"])
    with torch.autocast("cpu", dtype=dtype):
        logits = layer(vectors)
        assert logits.dtype == dtype
        losses = [*run(case, logits), predicate_loss(logits, targets, weights)]
        assert all(loss.dtype == torch.float32 for loss in losses)
    wide = logits.detach().double()
    exact = [*run(case, wide), predicate_loss(wide, targets, weights)]
    for loss, value in zip(losses, exact):
        assert float(loss) == pytest.approx(float(value), abs=1e-6)
    sum(losses).backward()
    assert layer.weight.grad.dtype == torch.float32 and torch.isfinite(layer.weight.grad).all()


@pytest.fixture
def autocast_for_a_gpu():
    """As ``torch.autocast("cuda", torch.bfloat16)``, which does nothing where there is none."""
    try:
        before = torch.get_autocast_dtype("cuda")
    except AttributeError:
        pytest.skip("torch before 2.4 sets autocast of a GPU in another way")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


def test_losses_autocast_on_gpu_stay_in_float32(autocast_for_a_gpu):
    """Other operations are rounded there than on a CPU. Fake tensors tell their types anywhere."""
    case = make_case([4, 3], [1, 0, 2, 0, 0], 2, 2, [0, 1, 1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = {
            name: torch.empty(x.shape, dtype=x.dtype, device="cuda")
            for name, x in case.items()
            if isinstance(x, torch.Tensor)
        }
        vectors, weight = torch.empty((18, 5), device="cuda"), torch.empty((3, 5), device="cuda")
        logits = torch.nn.functional.linear(vectors, weight)
        assert logits.dtype == torch.bfloat16
        targets = draw_predicate_targets(on_gpu["labels"])
        weights = torch.empty(18, device="cuda")
        losses = [*run({**case, **on_gpu}, logits), predicate_loss(logits, targets, weights)]
    assert [loss.dtype for loss in losses] == [torch.float32] * 4
    assert all(loss.device.type == "cuda" for loss in losses)


def test_contrastive_losses_hinge_corner_gives_zero_gradient():
    case = make_case([3], [1, 0], 2, 2)
    logits = torch.ones((6, 3), requires_grad=True)
    sum(run(case, logits, alphas=(0.0, 0.0, 0.0))).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_contrastive_losses_shape_mismatch_raises():
    case = make_case([3], [1, 0], 2, 2)
    with pytest.raises(ValueError, match=r"\(6, 4\) and labels of shape \(6, 2\) do not match"):
        run(case, torch.zeros(6, 4))


def test_affinity_small_values_keep_precision():
    """1 - p(no relationship) in float32 would give 0 here, and its gradient noise."""
    logits = torch.tensor([[-20.0, -21.0, 0.0]], requires_grad=True)
    exact = (math.exp(-20) + math.exp(-21)) / (1 + math.exp(-20) + math.exp(-21))
    value = affinity(logits)
    assert float(value) == pytest.approx(exact, rel=1e-5)
    value.sum().backward()
    assert float(logits.grad[0, -1]) == pytest.approx(-exact * (1 - exact), rel=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_contrastive_losses_gradients_equal_finite_differences(normalization):
    """Random logits have no ties, and the margins asked for leave no hinge at its corner."""
    torch.manual_seed(3)
    case = make_case([4, 3], [1, 0, 2, 0, 3, 0, 0], 2, 2, [0, 1, 1])
    logits = torch.randn(18, 3, dtype=torch.float64, requires_grad=True)
    assert all(float(loss) > 0.01 for loss in run(case, logits))
    assert torch.autograd.gradcheck(lambda x: run(case, x, normalization=normalization), logits)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_contrastive_losses_compiled_equal_eager(normalization):
    """One graph with dynamic shapes has values and gradients; no C++ compiler is needed here."""
    generator = torch.Generator().manual_seed(3)

    def total(case, x):
        return torch.stack(run(case, x, normalization=normalization)).mul(WEIGHTS).sum()

    torch._dynamo.reset()
    counter, num_graphs = CompileCounterWithBackend("aot_eager"), set()
    compiled_total = torch.compile(total, backend=counter, fullgraph=True, dynamic=True)
    for sizes in ([4, 3], [5, 2, 3]):
        case = make_case(sizes, [1, 0, 2, 0, 3, 0, 0], 2, 2, [0, 1, 1])
        shape = (len(case["labels"]), 3)
        logits = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        compiled, eager = compiled_total(case, logits), total(case, logits)
        assert eager.item() > 0.01 and torch.equal(compiled, eager)
        (gradient,) = torch.autograd.grad(compiled, logits)
        (expected,) = torch.autograd.grad(eager, logits)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
        num_graphs.add(counter.frame_count)
    assert len(num_graphs) == 1  # other numbers of pairs and images need no other graph


def test_contrastive_losses_unknown_normalization_raises():
    case = make_case([2], [1, 0], 2, 2)
    with pytest.raises(ValueError, match="normalization is 'papre'; known: paper, released_code"):
        run(case, torch.zeros(2, 3), normalization="papre")


def test_contrastive_losses_no_anchors_give_zero_with_gradient():
    logits = torch.zeros((0, 3), requires_grad=True)
    case = make_case([0], [0], 2, 2)
    for loss in run(case, logits):
        assert float(loss) == 0
        loss.backward(retain_graph=True)
    assert logits.grad.shape == (0, 3)


def test_draw_predicate_targets_draws_every_label():
    torch.manual_seed(0)
    labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    drawn = torch.stack([draw_predicate_targets(labels) for _ in range(200)])
    assert set(drawn[:, 0].tolist()) == {1, 3}
    assert 60 < int((drawn[:, 0] == 1).sum()) < 140  # both about as often
    assert set(drawn[:, 1].tolist()) == {4} and set(drawn[:, 2].tolist()) == {0}


def test_predicate_loss_equals_weighted_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, requires_grad=True)
    targets, weights = torch.tensor([0, 2, 1, 2]), torch.tensor([0.5, 0.0, 0.25, 0.25])
    expected = 0.0
    for row, target, weight in zip(logits.tolist(), targets.tolist(), weights.tolist()):
        expected -= weight * math.log(math.exp(row[target]) / sum(math.exp(x) for x in row))
    assert float(predicate_loss(logits, targets, weights)) == pytest.approx(expected, abs=1e-6)


def test_predicate_loss_no_pair_gives_zero_with_gradient():
    logits = torch.zeros((0, 3), requires_grad=True)
    loss = predicate_loss(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    loss.backward()
    assert float(loss) == 0 and logits.grad is not None
