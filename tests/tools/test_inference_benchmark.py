"""The benchmark of inference: its parts agree with the model, and the command prints its tables."""

import json

import benchmark
import pytest
import torch
from benchmarks import _inference_cases
from benchmarks import inference as measured
from usage_utils import write_checkpoint

from detectron2.structures import Boxes


@pytest.fixture
def small_shapes(monkeypatch):
    """The same code on a small image with few detections."""
    for module in (measured, _inference_cases):
        monkeypatch.setattr(module, "IMAGE_SIZE", (64, 96))
        monkeypatch.setattr(module, "NUMBER", 12)
    monkeypatch.setattr(measured, "CHANNELS", 4)


def test_plain_pairs_have_the_logits_of_the_head(small_shapes):
    head, maps = measured.big_head("cpu", 9), measured.feature_maps("cpu")
    boxes = measured.alike_detections(1.0).boxes
    subjects, objects = torch.tensor([0, 1, 5, 3]), torch.tensor([1, 0, 2, 11])
    with torch.no_grad():
        entities = head.encode_entities(
            maps, [Boxes(boxes)], [torch.zeros(12, dtype=torch.int64)], [(64, 96)]
        )
        expected = head.pair_logits(entities, maps, subjects, objects)
        found = measured.plain_pair_logits(head, entities, maps, subjects, objects)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_all_ways_give_the_same_triplets(small_shapes):
    generator = torch.Generator().manual_seed(0)
    case = measured.alike_detections(1.0)._replace(scores=torch.rand(12, generator=generator) ** 3)
    results = [measured.prepare(way, case, "cpu", 5, 1)() for way in measured.WAYS]
    for other, num_scored in results[:2]:
        assert torch.equal(results[2][0].pairs, other.pairs)
        torch.testing.assert_close(results[2][0].scores, other.scores)
        assert num_scored == 12 * 11


def test_the_command_prints_its_tables(small_shapes, tmp_path, capsys):
    def relation(classes, predicate):
        ends = [{"category": c, "bbox": [1, 20 + c, 1, 30]} for c in classes]
        return {"subject": ends[0], "object": ends[1], "predicate": predicate}

    annotations = {"a.jpg": [relation((0, 1), 3), relation((2, 2), 1)], "b.jpg": []}
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    found = [{"image_id": "a.jpg", "category_id": c, "bbox": [1, 2, 30, 40]} for c in range(3)]
    found = [dict(x, score=0.9 - 0.1 * x["category_id"]) for x in found]
    (tmp_path / "detections.json").write_text(json.dumps(found))
    arguments = ["--vrd-detections", tmp_path / "detections.json", "--images", 1, "--repeats", 1]
    arguments += ["--vrd-annotations", tmp_path / "annotations.json", "--no-memory", "--topk", 5]
    arguments += ["--checkpoint", write_checkpoint(tmp_path), "--count-images", 2, "--threads", 1]
    benchmark.main(["inference", *map(str, arguments)])
    printed = capsys.readouterr().out
    assert "pairs computed" in printed and "| all scores equal" in printed
    for case in ("built-in set, trained model", "VRD, padded with scores 0.05"):
        assert printed.count(f"| {case} ") >= 3 + 2 * len(measured.WAYS)
