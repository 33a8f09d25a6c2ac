"""The benchmarks' plain formulations give the numbers of the package, and the command runs."""

import sys

import pytest
import torch
from model_utils import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import benchmark  # noqa: E402
from benchmarks import head, losses, plain  # noqa: E402

from reldn_d2.modeling.losses import contrastive_losses  # noqa: E402


@pytest.mark.parametrize("pairs", [60, 256])
def test_plain_losses_are_the_losses(pairs):
    case = losses.draw_case(pairs, 10, 6, 4, "cpu", seed=pairs)
    logits = case.pop("logits")
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    pairs_of = zip(contrastive_losses(ours, **case)[0], plain.losses_in_loops(theirs, **case))
    for loss, expected in pairs_of:
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, ours, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, theirs, retain_graph=True)
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-6)


def test_plain_head_gives_the_losses_and_gradients_of_the_head():
    results = []
    for take in (head.RelDNHead.forward, plain.plain_head_losses):
        module, batch = head.build_head(4, 16, "cpu"), head.draw_batch(40, 4, "cpu")
        torch.manual_seed(0)
        with head.EventStorage(1):
            found = take(module, *batch)
        sum(found.values()).backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        gradients.update((name, x.grad) for name, x in batch[1].items())
        results.append((found, gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for name, loss in ours.items():
        assert loss.item() > 0
        assert loss.item() == pytest.approx(theirs[name].item(), abs=1e-5)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-5)


def test_the_command_prints_a_table(capsys):
    benchmark.main(["losses", "--pairs", "20", "--anchors", "6", "--predicates", "4"])
    printed = capsys.readouterr().out
    assert "pairs a side" in printed and "faster" in printed
    with pytest.raises(SystemExit):
        benchmark.main(["no_such_benchmark"])
