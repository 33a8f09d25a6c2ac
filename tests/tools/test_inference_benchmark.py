"""Tests of the benchmark of inference: it agrees with the model, and the command prints tables."""

import json

import benchmark
import pytest
import torch
from benchmarks import inference, synthetic
from usage_utils import write_checkpoint

from detectron2.structures import Boxes

SIZE, COUNT = (64, 96), 12
SHAPES = synthetic.Shapes(SIZE, channels=4, pooler_resolution=14, fc_dim=32)


def test_plain_logits_random_head_equals_pair_logits():
    head = synthetic.build_head(SHAPES, "cpu", num_predicates=9).eval()
    maps = synthetic.feature_maps(SHAPES, "cpu", seed=1)
    boxes = inference.equal_detections(1.0, COUNT, SIZE).boxes
    subjects, objects = torch.tensor([0, 1, 5, 3]), torch.tensor([1, 0, 2, 11])
    with torch.no_grad():
        entities = head.encode_entities(
            maps, [Boxes(boxes)], [torch.zeros(COUNT, dtype=torch.int64)], [SIZE]
        )
        expected = head.pair_logits(entities, maps, subjects, objects)
        logits = inference.plain_logits(head, maps, entities, subjects, objects)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, None])
def test_prepare_each_way_gives_same_triplets(k):
    generator = torch.Generator().manual_seed(0)
    case = inference.equal_detections(1.0, COUNT, SIZE)
    case = case._replace(scores=torch.rand(COUNT, generator=generator) ** 3)
    results = [inference.prepare(way, case, SHAPES, "cpu", 5, k)() for way in inference.WAYS]
    for other in results[:2]:
        assert torch.equal(results[2].pairs, other.pairs)
        assert torch.equal(results[2].predicates, other.predicates)
        torch.testing.assert_close(results[2].scores, other.scores)
        assert other.num_scored == COUNT * (COUNT - 1)


def test_rank_all_pairs_ties_sorted_by_subject_object_predicate():
    def score_pairs(subjects, objects):
        return torch.full((len(subjects), 2), 0.5)

    for together in (False, True):
        ranking = inference.rank_all_pairs(score_pairs, torch.ones(3), 1, 4, 2, together)
        assert ranking.pairs.tolist() == [[0, 1], [0, 2], [1, 0], [1, 2]]
        assert ranking.predicates.tolist() == [0, 0, 0, 0] and ranking.num_scored == 6


def test_benchmark_inference_all_cases_prints_tables(tmp_path, capsys):
    def relation(classes, predicate):
        ends = [{"category": c, "bbox": [1, 20 + c, 1, 30]} for c in classes]
        return {"subject": ends[0], "object": ends[1], "predicate": predicate}

    annotations = {"a.jpg": [relation((0, 1), 3), relation((2, 2), 1)], "b.jpg": []}
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    detections = [
        {"image_id": "a.jpg", "category_id": c, "bbox": [1, 2, 30, 40], "score": 0.9 - 0.1 * c}
        for c in range(3)
    ]
    (tmp_path / "detections.json").write_text(json.dumps(detections))
    arguments = ["--vrd-detections", tmp_path / "detections.json", "--images", 1, "--repeats", 1]
    arguments += ["--vrd-annotations", tmp_path / "annotations.json", "--no-memory", "--topk", 5]
    arguments += ["--checkpoint", write_checkpoint(tmp_path), "--count-images", 2, "--threads", 1]
    arguments += ["--detections", COUNT, "--size", *SIZE, "--channels", 4, "--fc-dim", 32]
    benchmark.main(["inference", *map(str, arguments)])
    printed = capsys.readouterr().out
    assert "pairs computed" in printed and "| all scores equal" in printed
    for case in ("built-in set, trained model", "VRD, padded with scores 0.05"):
        assert printed.count(f"| {case} ") >= 3 + 2 * len(inference.WAYS)
