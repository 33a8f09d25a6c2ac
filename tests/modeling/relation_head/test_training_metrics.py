"""What can be watched while the relation head trains, worked out by hand and in a real step."""

import logging

import pytest
import torch
from model_utils import busy_item, empty_item, small_model, unrelated_item

from reldn_d2.modeling.losses import AnchorSides, contrastive_losses
from reldn_d2.modeling.relation_head.pair_sampling import SampledPairs
from reldn_d2.modeling.relation_head.training_metrics import (
    contrastive_metrics,
    to_scalars,
    training_metrics,
)
from reldn_d2.utils.events import RelationStatisticsPrinter

from detectron2.utils.events import EventStorage

ALPHAS = (0.2, 0.3, 0.4)


def logits_of(phi, best):
    """Two predicates: most of the affinity on ``best``."""
    shares = torch.tensor([0.2, 0.2])
    shares[best] = 0.8
    return torch.cat([phi * shares, torch.tensor([1 - phi])]).log()


def test_training_metrics_one_subject_equal_hand_computed_values():
    """Subject 0: two positives (classes 0 and 1), two negatives (of class 0 and of class 1)."""
    phis = [(0.6, 0), (0.9, 1), (0.5, 0), (0.7, 1), (0.2, 0)]
    logits = torch.stack([logits_of(*x) for x in phis])
    labels = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 0], [0, 0]]).bool()
    subjects, objects = torch.zeros(5, dtype=torch.int64), torch.arange(1, 6)
    on = torch.ones(5, dtype=torch.bool)
    for_subjects = torch.tensor([1, 1, 1, 1, 0]).bool()
    pairs = SampledPairs(subjects, objects, labels, on, for_subjects, ~on)
    sides = AnchorSides(
        torch.stack([for_subjects, ~on]),
        torch.stack([subjects, objects]),
        torch.tensor([[0, 1, 0, 1, 0], [0] * 5]),
    )
    image = torch.zeros(6, dtype=torch.int64)
    _, groups = contrastive_losses(logits, labels, sides, image, num_images=1, num_classes=2)
    targets = torch.tensor([0, 0, 2, 2, 2])
    metrics = training_metrics(logits, targets, pairs)
    values = to_scalars({**metrics, **contrastive_metrics(logits, groups, ALPHAS)})
    expected = {
        "num_positive_pairs": 2,
        "num_negative_pairs": 3,
        "predicate_accuracy": 0.5,  # the second one's highest predicate is 1, its label 0
        "affinity_positive": (0.6 + 0.9) / 2,
        "affinity_negative": (0.5 + 0.7 + 0.2) / 3,
        "affinity_hardest_negative": 0.7,
        "class_agnostic_groups": 1,
        "class_agnostic_margin": 0.6 - 0.7,
        "class_agnostic_violated": 1,
        "entity_class_groups": 2,
        "entity_class_margin": ((0.6 - 0.5) + (0.9 - 0.7)) / 2,
        "entity_class_violated": 1,
        "predicate_class_groups": 1,  # predicate 0: min(0.6, 0.9) - 0.5
        "predicate_class_margin": 0.6 - 0.5,
        "predicate_class_violated": 1,
    }
    assert values == {f"reldn/{k}": pytest.approx(v, abs=1e-6) for k, v in expected.items()}
    half = contrastive_metrics(logits, groups, (0.2, 0.15, 0.05))
    assert half["entity_class_violated"] == 0.5
    assert half["predicate_class_violated"] == 0


@pytest.mark.parametrize("batch", [[busy_item()], [unrelated_item(), busy_item()], [empty_item()]])
def test_training_step_stores_all_training_metrics(batch):
    model = small_model().train()
    with EventStorage(19) as storage:  # the trainer's writers write after this iteration
        model(batch)
    names = {name for name in storage.latest() if name.startswith("reldn/")}
    always = {"num_positive_pairs", "num_negative_pairs", "predicate_accuracy"}
    always |= {"affinity_positive", "affinity_negative"}
    assert {f"reldn/{name}" for name in always} <= names
    has_pairs = len(batch[0]["instances"]) > 0
    for loss in ("class_agnostic", "entity_class", "predicate_class"):
        for value in ("groups", "margin", "violated"):
            assert (f"reldn/{loss}_{value}" in names) == has_pairs
    assert all(value == value for value, _ in storage.latest().values())  # no NaN


def test_statistics_printer_logs_one_line_per_new_values(caplog):
    printer = RelationStatisticsPrinter()
    with EventStorage(18) as storage, caplog.at_level(logging.INFO):
        for number in range(3):
            if number == 1:
                storage.put_scalars(**{"reldn/entity_class_margin": 0.125, "loss_predicate": 1.0})
            printer.write()
            storage.step()
    assert [record.message for record in caplog.records] == [
        " pairs: iter: 19  entity_class_margin: 0.125"
    ]
