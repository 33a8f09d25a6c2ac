"""Tests that the benchmarks' plain formulations give the package's numbers, and of the command."""

import benchmark
import pytest
import torch
from benchmarks import data, head, losses, plain, synthetic

from reldn_d2.data.datasets import (
    load_openimages_vrd,
    load_relation_instances,
    load_visual_genome,
)
from reldn_d2.modeling.losses import contrastive_losses
from reldn_d2.modeling.relation_head import RelDNHead

from detectron2.utils.events import EventStorage


@pytest.mark.parametrize("num_pairs", [60, 256])
def test_losses_in_loops_random_case_equals_contrastive_losses(num_pairs):
    case = losses.draw_case(num_pairs, 10, 6, 4, "cpu", seed=num_pairs)
    logits = case.pop("logits")
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    pairs_of = zip(contrastive_losses(ours, **case)[0], plain.losses_in_loops(theirs, **case))
    for loss, expected in pairs_of:
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, ours, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, theirs, retain_graph=True)
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-6)


def test_plain_head_losses_same_seed_equals_head():
    results = []
    for losses_of in (RelDNHead.forward, plain.plain_head_losses):
        shapes = synthetic.Shapes((800, 1333), channels=4, pooler_resolution=7, fc_dim=16)
        module, batch = synthetic.build_head(shapes, "cpu"), head.draw_batch(40, shapes, "cpu")
        torch.manual_seed(0)
        with EventStorage(1):
            values = losses_of(module, *batch)
        sum(values.values()).backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        gradients.update((name, x.grad) for name, x in batch[1].items())
        results.append((values, gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for name, loss in ours.items():
        assert loss.item() > 0
        assert loss.item() == pytest.approx(theirs[name].item(), abs=1e-5)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-5)


def test_benchmark_losses_prints_table(capsys):
    benchmark.main(["losses", "--pairs", "20", "--anchors", "6", "--predicates", "4"])
    printed = capsys.readouterr().out
    assert "pairs per side" in printed and "loops / here" in printed


def test_benchmark_evaluation_small_prints_equal_results(capsys):
    benchmark.main(["evaluation", "--images", "30", "--relations", "90", "--plain-images", "0"])
    printed = capsys.readouterr().out
    assert "with equal results" in printed and "| R, mR and zR in a loop (30 images)" in printed


def test_benchmark_unknown_name_exits():
    with pytest.raises(SystemExit):
        benchmark.main(["no_such_benchmark"])


def test_draw_dataset_sizes_match():
    dicts = synthetic.draw_dataset(20, 100, 5, 3, boxes_per_image=(2, 6))
    assert len(dicts) == 20 and sum(len(x["relations"]) for x in dicts) == 100
    for record in dicts:
        count = len(record["annotations"])
        assert 2 <= count < 6 and record["relations"]
        for subject, object_, predicate in record["relations"]:
            assert subject != object_ and max(subject, object_) < count and predicate < 3


def test_data_writers_small_data_set_loads_completely(tmp_path):
    dicts = synthetic.draw_dataset(30, 90, 150, 50, boxes_per_image=(2, 6))
    num_boxes = sum(len(x["annotations"]) for x in dicts)
    genome = data.write_visual_genome(tmp_path / "vg", dicts)
    coco = data.write_coco(tmp_path / "coco", dicts)
    for records in (
        [
            record
            for split in ("train", "val", "test")
            for record in load_visual_genome(**genome, split=split, merge_duplicates=False)
        ],
        load_relation_instances(**coco),
    ):
        assert sum(len(x["annotations"]) for x in records) == num_boxes
        assert sum(len(x["relations"]) for x in records) == 90
    openimages = load_openimages_vrd(**data.write_openimages(tmp_path / "openimages", 20, 100))
    assert len(openimages) == 20
    assert any("attributes" in a for x in openimages for a in x["annotations"])
