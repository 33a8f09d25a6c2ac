"""Class-balanced weights of L0: the formula, the loss with them, and the source of their counts."""

import re

import pytest
import torch
from model_utils import (
    busy_item,
    register_dataset,
    small_config,
    small_model,
    unregister_dataset,
)

from reldn_d2.engine import RelDNTrainer
from reldn_d2.modeling.losses import class_balanced_weights

from detectron2.utils.events import EventStorage

LOSS = "MODEL.ROI_RELATION_HEAD.LOSS"
BETA = f"{LOSS}.CLASS_BALANCED_BETA"
L0 = [x for i in (1, 2, 3) for x in (f"{LOSS}.LAMBDA_{i}", 0.0)]
COUNTS = torch.tensor([900, 50, 0, 7, 1, 42])


def weights_in_loops(counts, beta):
    """(1 - beta) / (1 - beta^n) for each predicate, scaled to a mean of 1 over all relations."""
    raw = [(1 - beta) / (1 - beta ** max(n, 1)) for n in counts]
    mean = sum(n * w for n, w in zip(counts, raw)) / max(sum(counts), 1)
    return [w / mean if mean else w for w in raw] + [1.0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("counts", [[900, 50, 0, 7, 1, 42], [3], [0, 0], [1, 1, 1]])
def test_class_balanced_weights_equal_loops(counts, beta):
    found = class_balanced_weights(torch.tensor(counts), beta)
    torch.testing.assert_close(found, torch.tensor(weights_in_loops(counts, beta)))


def test_class_balanced_weights_by_hand():
    # Two relations of one predicate count as 1 + 1/2, each weighs 2/3; the mean over 3 is 7/9.
    found = class_balanced_weights(torch.tensor([2, 1]), 0.5)
    torch.testing.assert_close(found, torch.tensor([6 / 7, 9 / 7, 1.0]))
    assert class_balanced_weights(torch.tensor([500, 3, 0]), 0.0).tolist() == [1, 1, 1, 1]
    # Close to 1, a weight is the inverse of the count.
    found = class_balanced_weights(torch.tensor([400, 100]), 0.9999999)
    assert float(found[1] / found[0]) == pytest.approx(4, rel=1e-4)


def l0(model, seed=3):
    """L0 of one image, and the logits and targets of its pairs, all of which are sampled."""
    seen = {}
    head = model.relation_head
    forward = head.losses["PredicateLoss"].forward

    def record(logits, targets, pairs, entities):
        seen.update(logits=logits.detach(), targets=targets)
        return forward(logits, targets, pairs, entities)

    head.losses["PredicateLoss"].forward = record
    torch.manual_seed(seed)
    with EventStorage():
        loss = model([busy_item()])["loss_predicate"]
    return float(loss.detach()), seen["logits"], seen["targets"]


@pytest.mark.parametrize("mean", ["images", "pairs"])
def test_predicate_loss_balanced_is_the_weighted_mean_over_pairs(mean):
    model = small_model(*L0, f"{LOSS}.L0_MEAN", mean, BETA, 0.9).train()
    model.relation_head.set_predicate_counts(COUNTS)
    loss, logits, targets = l0(model)
    weights = weights_in_loops(COUNTS.tolist(), 0.9)
    terms = [
        weights[int(target)] * -float(row.log_softmax(0)[target])
        for row, target in zip(logits, targets)
    ]
    assert len({weights[int(target)] for target in targets}) > 2  # also of unrelated pairs
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_predicate_loss_balanced_logs_the_weights(caplog):
    with caplog.at_level("INFO", logger="reldn_d2"):
        small_model(*L0, BETA, 0.9).relation_head.set_predicate_counts(COUNTS)
    weights = weights_in_loops(COUNTS.tolist(), 0.9)[:-1]
    shown = re.search(r"weigh (\S+) to (\S+), most those with ids \[(.+)\]", caplog.text)
    assert shown[1] == f"{min(weights):.2g}" and shown[2] == f"{max(weights):.2g}"
    ids = [int(x) for x in shown[3].split(", ")]
    assert [weights[p] for p in ids] == sorted(weights, reverse=True)[:3]


def test_predicate_loss_beta_0_is_bit_equal_to_no_weights():
    plain, zero = small_model(*L0).train(), small_model(*L0, BETA, 0.0).train()
    zero.relation_head.set_predicate_counts(COUNTS)
    assert l0(plain)[0] == l0(zero)[0]


def test_predicate_loss_balanced_without_counts_raises():
    model = small_model(*L0, BETA, 0.9).train()
    with pytest.raises(ValueError, match=f"{BETA} needs the relations of each predicate"):
        l0(model)


@pytest.mark.parametrize("beta", [1.0, -0.1, 2.0])
def test_predicate_loss_wrong_beta_raises(beta):
    with pytest.raises(ValueError, match=f"{BETA} is {beta}; expected 0 .off. to below 1"):
        small_model(BETA, beta)


def test_training_balanced_counts_at_the_start_and_resumes_exactly(tmp_path):
    register_dataset("balanced_test_set", tmp_path / "images")

    def train(folder, iterations, resume=False):
        folder.mkdir(exist_ok=True)
        cfg = small_config(
            *("DATASETS.TRAIN", ("balanced_test_set",), "DATASETS.TEST", ()),
            *("OUTPUT_DIR", str(folder), "SOLVER.IMS_PER_BATCH", 2, "SEED", 1, BETA, 0.9),
            *("SOLVER.MAX_ITER", iterations, "SOLVER.WARMUP_ITERS", 0),
            *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
        )
        torch.manual_seed(5)
        trainer = RelDNTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        weights = trainer.model.relation_head.losses["PredicateLoss"].target_weights
        expected = weights_in_loops([3, 3, 0, 6, 3, 0], 0.9)  # three times busy_item
        torch.testing.assert_close(weights, torch.tensor(expected))
        trainer.train()
        return trainer.model.state_dict()

    try:
        whole = train(tmp_path / "whole", 4)
        train(tmp_path / "parts", 2)
        parts = train(tmp_path / "parts", 4, resume=True)
    finally:
        unregister_dataset("balanced_test_set")
    assert not any("target_weights" in name for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
