"""Repeat factors of predicates and images, dropped relations, and training with both."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from model_utils import CLASSES, PREDICATES, register_dataset, small_config, unregister_dataset
from sandbox import merged

from reldn_d2.data import RelationDatasetMapper
from reldn_d2.data.repeat_factors import (
    DROP_KEY,
    PREDICATE_SAMPLER,
    check_sampler,
    predicate_repeats,
    with_drop_probabilities,
)
from reldn_d2.engine import RelDNTrainer

from detectron2.data import DatasetCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm

BOXES_ONLY = "configs/VRD/reldn_boxes.yaml"


def record(*predicates, crowd=()):
    """An image whose relations have these predicates, all between its first two entities."""
    boxes = [[0, 0, 10, 10], [5, 5, 20, 20], [30, 30, 40, 40]]
    annotations = [
        {"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": int(i in crowd)}
        for i, b in enumerate(boxes)
    ]
    relations = [(0, 1, p) for p in predicates]
    return {"annotations": annotations, "relations": relations, "height": 50, "width": 50}


def loop_factors(records, threshold, num_predicates):
    """The definition in loops: r(p) = max(1, sqrt(t / f(p))), r(image) = max of its r(p)."""
    of_predicate = []
    for p in range(num_predicates):
        images = sum(any(x[2] == p for x in r["relations"]) for r in records)
        share = images / len(records)
        of_predicate.append(max(1.0, math.sqrt(threshold / share)) if images else 1.0)
    of_image = [max([1.0, *(of_predicate[x[2]] for x in r["relations"])]) for r in records]
    return of_predicate, of_image


def test_predicate_repeats_random_images_equal_loops():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shares = rng.random(6) ** 3
        records = [
            record(*np.flatnonzero(rng.random(6) < shares).repeat(2).tolist())
            for _ in range(int(rng.integers(1, 40)))
        ]
        threshold = float(rng.random())
        repeats = predicate_repeats(records, threshold, 6)
        of_predicate, of_image = loop_factors(records, threshold, 6)
        np.testing.assert_allclose(repeats.predicates, of_predicate, rtol=1e-12)
        np.testing.assert_allclose(repeats.images, of_image, rtol=1e-6)
        rate = float(rng.random())
        for index, x in enumerate(with_drop_probabilities(records, repeats, rate)):
            expected = [
                max((of_image[index] - of_predicate[p]) / of_image[index] * rate, 0)
                for _, _, p in x["relations"]
            ]
            found = x.get(DROP_KEY, [0.0] * len(expected))
            np.testing.assert_allclose(found, expected, atol=1e-6)
            assert DROP_KEY in x or not any(v > 1e-6 for v in expected)


def test_predicate_repeats_by_hand():
    records = [record(0) for _ in range(99)] + [record(0, 1)]
    repeats = predicate_repeats(records, 0.04, 3)
    assert repeats.predicates.tolist() == [1, 2, 1]  # in all images, in 1 % of them, in none
    assert repeats.images.tolist() == [1] * 99 + [2]
    assert with_drop_probabilities(records, repeats, 0.7)[99][DROP_KEY] == [0.35, 0]


def test_predicate_repeats_crowd_and_empty_images_count_without_relations():
    records = [record(1, crowd=(0,)), {"annotations": []}, record()]
    repeats = predicate_repeats(records, 1.0)
    assert repeats.images.tolist() == [1, 1, 1] and repeats.predicates.tolist() == [1, 1]
    assert not any(DROP_KEY in x for x in with_drop_probabilities(records, repeats, 0.7))
    assert len(predicate_repeats([], 1.0, 2).images) == 0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sampler_processes_share_the_repeated_images(world, monkeypatch):
    factors = predicate_repeats([record(0) for _ in range(15)] + [record(0, 1)], 0.25, 2).images
    assert factors.tolist() == [1] * 15 + [2]
    monkeypatch.setattr(comm, "get_world_size", lambda: world)
    streams = []
    for rank in range(world):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        sampler = RepeatFactorTrainingSampler(factors, seed=3)
        streams.append(list(itertools.islice(sampler, 34 * 6 // world)))
    together = [x for step in zip(*streams) for x in step]
    for epoch in range(12):
        counts = Counter(together[17 * epoch : 17 * (epoch + 1)])
        assert counts == {**dict.fromkeys(range(15), 1), 15: 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("SAMPLER_TRAIN", PREDICATE_SAMPLER), "REPEAT_THRESHOLD is 0, so no image"),
        (("SAMPLER_TRAIN", "RepeatFactorTrainingSampler"), "REPEAT_THRESHOLD is 0, so no image"),
        (("SAMPLER_TRAIN", "Sampler"), f"RepeatFactorTrainingSampler, {PREDICATE_SAMPLER}"),
        (("REPEAT_THRESHOLD", 5.0), "REPEAT_THRESHOLD is 5; expected a share of the images"),
        (("RELATION_DROP_RATE", 0.5), f"Set DATALOADER.SAMPLER_TRAIN to '{PREDICATE_SAMPLER}'"),
        (("RELATION_DROP_RATE", 1.5), "RELATION_DROP_RATE is 1.5; expected 0 to 1"),
        (("RELATION_DROP_RATE", -0.1), "RELATION_DROP_RATE is -0.1; expected 0 to 1"),
    ],
)
def test_check_sampler_wrong_key_raises_before_data_is_loaded(options, message):
    key, value = options
    cfg = small_config(f"DATALOADER.{key}", value, "DATASETS.TRAIN", ("not registered",))
    with pytest.raises(ValueError, match=message):
        RelDNTrainer.build_train_loader(cfg)


def test_check_sampler_threshold_without_sampler_warns(caplog):
    check_sampler(small_config("DATALOADER.REPEAT_THRESHOLD", 0.05), with_relations=True)
    assert "REPEAT_THRESHOLD is 0.05, but no image is repeated" in caplog.text


def test_check_sampler_detector_has_no_predicates():
    cfg = small_config(
        *("DATALOADER.SAMPLER_TRAIN", PREDICATE_SAMPLER, "DATALOADER.REPEAT_THRESHOLD", 0.1)
    )
    check_sampler(cfg, with_relations=True)
    with pytest.raises(ValueError, match="trains no relations"):
        check_sampler(cfg, with_relations=False)


def test_mapper_drops_relations_with_their_probability():
    """All relations stay, because their pairs are related; ``gt_kept`` says which are trained."""
    image = {**record(0, 1, 2, crowd=(2,)), DROP_KEY: [0.25, 0.0, 1.0]}
    options = dict(augmentations=[], image_format="BGR", with_images=False)
    mapper = RelationDatasetMapper(is_train=True, **options)
    np.random.seed(0)
    mapped = [mapper(image) for _ in range(2000)]
    assert all(x["relations"].gt_predicates.tolist() == [0, 1, 2] for x in mapped)
    kept = torch.stack([x["relations"].gt_kept for x in mapped])
    assert kept[:, 1].all() and not kept[:, 2].any()
    assert kept[:, 0].double().mean() == pytest.approx(0.75, abs=0.04)
    assert not any("derived" in x or DROP_KEY in x for x in mapped)
    assert DROP_KEY in image
    at_test_time = RelationDatasetMapper(is_train=False, **options)(image)
    assert not at_test_time["relations"].has("gt_kept") and DROP_KEY not in at_test_time
    # A relation that goes with its entity takes its value along.
    image["relations"] = [(0, 2, 0), (0, 1, 1), (1, 0, 2)]
    image[DROP_KEY] = [0.0, 1.0, 0.0]
    relations = mapper(image)["relations"]
    assert relations.gt_predicates.tolist() == [1, 2] and relations.gt_kept.tolist() == [
        False,
        True,
    ]


# --------------------------------------------------------------------------------------- training

REPEAT = ("DATALOADER.SAMPLER_TRAIN", PREDICATE_SAMPLER)
DROP = (*REPEAT, "DATALOADER.REPEAT_THRESHOLD", 1.0, "DATALOADER.RELATION_DROP_RATE", 1.0)


@pytest.fixture
def long_tail(tmp_path):
    """Four images; the last has no entities, and the first has a predicate of its own."""
    register_dataset("long_tail", tmp_path / "images")
    DatasetCatalog.get("long_tail")[0]["relations"].append((0, 3, 2))
    yield "long_tail"
    unregister_dataset("long_tail")


def boxes_config(name, *options):
    counts = ("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES))
    counts += ("MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", len(PREDICATES))
    few = ("SOLVER.IMS_PER_BATCH", 2, "SEED", 1, "DATASETS.TEST", "()", "DATASETS.TRAIN", (name,))
    return merged(BOXES_ONLY, *counts, *few, *options)


def test_train_loader_without_images_repeats_and_seeks(long_tail):
    cfg = boxes_config(long_tail, *DROP)
    whole = list(itertools.islice(RelDNTrainer.build_train_loader(cfg), 30))
    loader = RelDNTrainer.build_train_loader(cfg)
    loader.seek(10)
    for batch, again in zip(whole[10:], loader):
        for x, y in zip(batch, again, strict=True):
            assert x["image_id"] == y["image_id"]
            assert x["relations"].has("gt_kept") == y["relations"].has("gt_kept")
            if x["relations"].has("gt_kept"):
                assert x["relations"].gt_kept.equal(y["relations"].gt_kept)
                assert "derived" not in x
    kept = [x["relations"].gt_kept for x in itertools.chain(*whole) if x["image_id"] == 0]
    assert 20 < len(kept) < 30  # 60 images in epochs of 2 + sqrt(3) on average
    assert len({tuple(x.tolist()) for x in kept}) > 5


def test_train_loader_without_drops_keeps_mapped_images(long_tail):
    cfg = boxes_config(long_tail, *REPEAT, "DATALOADER.REPEAT_THRESHOLD", 1.0)
    batches = list(itertools.islice(RelDNTrainer.build_train_loader(cfg), 10))
    by_id = {}
    for x in itertools.chain(*batches):
        assert "derived" in x
        assert by_id.setdefault(x["image_id"], x)["instances"] is x["instances"]


def test_build_train_loader_logs_the_repeated_predicates(long_tail, caplog):
    options = ("DATASETS.TRAIN", (long_tail,), "DATASETS.TEST", (), *REPEAT)
    with caplog.at_level("INFO"):
        RelDNTrainer.build_train_loader(small_config(*options, "DATALOADER.REPEAT_THRESHOLD", 0.9))
    (line,) = [x.getMessage() for x in caplog.records if "repeat_factors" in x.name]
    # In one of four images (the filter keeps three with annotations): sqrt(0.9 * 3).
    assert line == (
        f"{PREDICATE_SAMPLER}: 1 predicates are in fewer than a share of 0.9 of the images; most "
        f"repeated: '{PREDICATES[2]}' 1.6 x. An epoch has 4 images instead of 3 (1.21 x)."
    )
    caplog.clear()
    with caplog.at_level("INFO"):
        RelDNTrainer.build_train_loader(small_config(*options, *DROP))
    (line,) = [x.getMessage() for x in caplog.records if "repeat_factors" in x.name]
    # The first image comes sqrt(3) times; five of its six relations are dropped with 1 - 1/sqrt(3).
    dropped = 100 * 5 * (3**0.5 - 1) / (6 * 3**0.5 + 2 * 5)
    assert line.endswith(f"(1.24 x), and {dropped:.1f} % of their relations are dropped.")
    caplog.clear()
    with caplog.at_level("WARNING"):
        RelDNTrainer.build_train_loader(small_config(*options, "DATALOADER.REPEAT_THRESHOLD", 0.1))
    assert f"{PREDICATE_SAMPLER} repeats nothing: no predicate" in caplog.text


def test_training_with_dropped_relations_resumes_exactly(long_tail, tmp_path):
    def train(folder, iterations, resume=False):
        cfg = small_config(
            *("DATASETS.TRAIN", (long_tail,), "DATASETS.TEST", (), "OUTPUT_DIR", str(folder)),
            *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", iterations, "SEED", 1, *DROP),
            *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_ITERS", 0),
        )
        folder.mkdir(exist_ok=True)
        torch.manual_seed(5)
        trainer = RelDNTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer.model.state_dict()

    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    np.random.seed(99)
    parts = train(tmp_path / "parts", 6, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
