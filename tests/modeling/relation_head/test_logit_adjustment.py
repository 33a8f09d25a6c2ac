"""Logit adjustment: its formula, the exact search with it, and the counts in checkpoints."""

import math

import numpy as np
import pytest
import torch
from model_utils import (
    PREDICATES,
    busy_item,
    model_of,
    one_iteration_config,
    register_dataset,
    register_permuted_dataset,
    small_model,
    unregister_dataset,
)
from usage_utils import picture, write_boxes_checkpoint

from reldn_d2 import RelDNCheckpointer
from reldn_d2.engine import RelDNTrainer, ensure_frequency_table
from reldn_d2.export import RelDNExport
from reldn_d2.modeling.relation_head import topk
from reldn_d2.modeling.relation_head.logit_adjustment import (
    PredicatePrior,
    adjust_logits,
    log_prior,
)
from reldn_d2.predictor import RelationPredictor

TAU = "TEST.RELATIONS.LOGIT_ADJUSTMENT"
COUNTS = [900, 50, 0, 7, 1, 42]
GIVEN = dict(
    boxes=[[5, 5, 40, 55], [30, 20, 80, 58], [1, 1, 20, 20]], classes=["person", "bike", "sky"]
)


def adjusted_in_loops(logits, counts, tau):
    """One pair: p(predicate | related) * prior^-tau, normalized; p(no relationship) as before."""
    exponentials = [math.exp(x) for x in logits]
    related = sum(exponentials[:-1])
    total = related + exponentials[-1]
    shares = [(n + 1) / (sum(counts) + len(counts)) for n in counts]
    weights = [e / related / share**tau for e, share in zip(exponentials, shares)]
    affinity = related / total
    return [affinity * w / sum(weights) for w in weights] + [1 - affinity]


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 2.5])
def test_predicate_prior_equals_loops(tau):
    prior = PredicatePrior(len(COUNTS), tau)
    prior.set_counts(torch.tensor(COUNTS))
    logits = 3 * torch.randn((40, len(COUNTS) + 1), generator=torch.Generator().manual_seed(0))
    expected = [adjusted_in_loops(row, COUNTS, tau) for row in logits.double().tolist()]
    found = prior(logits)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(40))
    if tau == 0:
        assert torch.equal(found, logits.softmax(dim=1))
    assert prior(logits.half()).dtype == torch.float32 and len(prior(logits[:0])) == 0


def test_adjust_logits_at_tau_1_balances_a_model_of_the_prior():
    """A model that knows nothing but the frequencies then prefers no predicate."""
    prior = log_prior(torch.tensor(COUNTS))
    logits = torch.cat([prior, torch.zeros(1)])[None]
    probabilities = adjust_logits(logits, prior, 1.0).softmax(dim=1)[0]
    torch.testing.assert_close(probabilities[:-1], torch.full((6,), float(probabilities[0])))
    assert probabilities[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_predicate_prior_wrong_tau_raises(value):
    with pytest.raises(ValueError, match=f"{TAU} is .*expected 0 .off. or more"):
        small_model(TAU, value)


def test_predicate_prior_wrong_number_of_counts_raises():
    with pytest.raises(ValueError, match="counts of 5 predicates, but the model has 6"):
        PredicatePrior(6).set_counts(torch.zeros(5))


def adjusted_model(*options, tau=0.8):
    model = small_model(TAU, tau, *options).eval()
    model.relation_head.prior.set_counts(torch.tensor(COUNTS))
    return model


@pytest.mark.parametrize("task", ["sgdet", "prdcls", "preddet"])
def test_predict_adjusted_equals_scoring_every_pair(task, monkeypatch):
    """The lazy search stops early, so bounds that no longer held would lose triplets."""
    limits = ("TEST.RELATIONS.TOPK", 12, "TEST.RELATIONS.PAIR_CHUNK", 2)
    limits += ("TEST.RELATIONS.PREDICATES_PER_PAIR", [1, 2, None])
    model = adjusted_model(*limits, "TEST.RELATIONS.TASK", task)
    items = [busy_item(seed) for seed in range(3)]
    with torch.no_grad():
        found = [x["relations"] for x in model(items)]
        monkeypatch.setattr(topk.TopTriplets, "threshold", lambda self: 0.0)
        expected = [x["relations"] for x in model(items)]
        model.relation_head.prior.tau = 0.0
        plain = [x["relations"] for x in model(items)]
    assert any(not torch.equal(x.predicates, y.predicates) for x, y in zip(found, plain))
    for one, other in zip(found, expected):
        for field in ("pairs", "predicates", "scores", "predicate_scores"):
            assert torch.equal(one.get(field), other.get(field))


@pytest.mark.parametrize("task", ["sgdet", "prdcls", "preddet"])
@pytest.mark.parametrize("exponent, max_visual_pairs", [(0.0, 40_000), (2.0, 40_000), (2.0, 5)])
def test_predict_adjusted_with_powers_and_shortlist_equals_loops(task, exponent, max_visual_pairs):
    model = adjusted_model(
        *("TEST.RELATIONS.TOPK", 12, "TEST.RELATIONS.PAIR_CHUNK", 2, "TEST.RELATIONS.TASK", task),
        *("TEST.RELATIONS.PREDICATES_PER_PAIR", [None]),
        *("TEST.RELATIONS.ENTITY_SCORE_EXPONENT", exponent),
        *("TEST.RELATIONS.MAX_VISUAL_PAIRS", max_visual_pairs),
    )
    head, scored = model.relation_head, []
    pair_logits = head.pair_logits

    def listen(entities, maps, subjects, objects):
        logits = pair_logits(entities, maps, subjects, objects)
        scored.extend(zip(subjects.tolist(), objects.tolist(), logits.tolist()))
        return logits

    head.pair_logits = listen
    with torch.no_grad():
        result = model([busy_item(1)])[0]
    factors = result["instances"].scores.double() ** exponent
    expected = []
    for subject, object_, logits in scored:
        probabilities = adjusted_in_loops(logits, COUNTS, 0.8)[:-1]
        expected += [float(p * factors[subject] * factors[object_]) for p in probabilities]
    relations = result["relations"]
    assert len(relations) == 12
    if task == "prdcls" and max_visual_pairs == 5:
        assert len(scored) == 5
    best = torch.tensor(sorted(expected, reverse=True)[:12])
    torch.testing.assert_close(relations.scores, best, rtol=1e-4, atol=1e-7)


def test_export_adjusted_equals_the_model():
    model = adjusted_model("TEST.RELATIONS.PREDICATES_PER_PAIR", [1, None])
    image = torch.as_tensor(picture(64, 96).transpose(2, 0, 1).copy()).float()
    with torch.no_grad():
        outputs = RelDNExport(model)(image)
        expected = model.inference([{"image": image}], do_postprocess=False)[0]["relations"]
    assert torch.equal(outputs[3], expected.pairs) and torch.equal(outputs[4], expected.predicates)
    torch.testing.assert_close(outputs[5], expected.scores, rtol=0, atol=1e-6)
    model.relation_head.prior.predicate_counts.zero_()
    with pytest.raises(ValueError, match=f"{TAU} is 0.8"):
        RelDNExport(model)


def test_predict_unknown_counts_raise():
    model = small_model(TAU, 0.5).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=f"{TAU} is 0.5, but this model does not"):
        model([busy_item()])


# ---------------------------------------------------------------------------- counts in checkpoints


@pytest.fixture
def dataset(tmp_path):
    register_dataset("prior_test_set", tmp_path / "images")
    yield "prior_test_set"
    unregister_dataset("prior_test_set")


def counts_of(model):
    return model.relation_head.prior.predicate_counts.tolist()


OF_DATASET = [3, 3, 0, 6, 3, 0]  # of three images with the relations of busy_item


@pytest.mark.parametrize("semantic", [True, False])
def test_training_saves_the_counts_and_resumes_with_them(dataset, tmp_path, semantic):
    more = ("MODEL.ROI_RELATION_HEAD.SEMANTIC.ENABLED", semantic)
    trainer = RelDNTrainer(one_iteration_config(dataset, tmp_path, *more))
    trainer.resume_or_load(resume=False)
    assert counts_of(trainer.model) == OF_DATASET
    trainer.train()
    path = str(tmp_path / "model_final.pth")
    content = torch.load(path, weights_only=True)
    assert content["reldn"]["statistics"]["predicate_counts"] == OF_DATASET
    other = small_model(*more)
    RelDNCheckpointer(other).load(path)
    assert counts_of(other) == OF_DATASET
    # A resumed run keeps those of its checkpoint, a new one on top of it counts its own data.
    content["model"]["relation_head.prior.predicate_counts"][:] = torch.tensor(COUNTS)
    torch.save(content, path)
    resumed = RelDNTrainer(one_iteration_config(dataset, tmp_path, *more))
    resumed.resume_or_load(resume=True)
    assert counts_of(resumed.model) == COUNTS
    tuned = RelDNTrainer(
        one_iteration_config(dataset, tmp_path / "new", *more, "MODEL.WEIGHTS", path)
    )
    tuned.resume_or_load(resume=False)
    assert counts_of(tuned.model) == OF_DATASET


def test_training_counts_have_the_order_of_the_checkpoint(dataset, tmp_path):
    trainer = RelDNTrainer(one_iteration_config(dataset, tmp_path))
    trainer.resume_or_load(resume=False)
    trainer.checkpointer.save("mine")
    register_permuted_dataset("prior_permuted", dataset)
    try:
        cfg = one_iteration_config(
            "prior_permuted", tmp_path / "new", "MODEL.WEIGHTS", str(tmp_path / "mine.pth")
        )
        tuned = RelDNTrainer(cfg)
        tuned.resume_or_load(resume=False)
        assert tuned.checkpointer.description["predicate_classes"] == PREDICATES
        assert counts_of(tuned.model) == OF_DATASET
        assert tuned.checkpointer.description["statistics"]["predicate_counts"] == OF_DATASET
    finally:
        unregister_dataset("prior_permuted")


def test_old_checkpoint_takes_the_counts_of_its_statistics(dataset, tmp_path):
    trainer = RelDNTrainer(one_iteration_config(dataset, tmp_path))
    trainer.resume_or_load(resume=False)
    trainer.checkpointer.save("old")
    path = str(tmp_path / "old.pth")
    content = torch.load(path, weights_only=True)
    del content["model"]["relation_head.prior.predicate_counts"]
    torch.save(content, path)
    predictor = RelationPredictor.from_checkpoint(path, "cpu", opts=[TAU, 0.5])
    assert counts_of(predictor.model) == OF_DATASET
    del content["reldn"]["statistics"]
    torch.save(content, path)
    assert RelationPredictor.from_checkpoint(path, "cpu").model.relation_head.prior.tau == 0
    with pytest.raises(ValueError, match=rf"{TAU} is 0.5, but {path} does not say how often"):
        RelationPredictor.from_checkpoint(path, "cpu", opts=[TAU, 0.5])
    with pytest.raises(ValueError, match=rf"{TAU} is 0.5, but the checkpoint {path} does not say"):
        cfg = one_iteration_config(
            dataset, tmp_path, "MODEL.WEIGHTS", path, TAU, 0.5, "DATASETS.TEST", (dataset,)
        )
        RelDNTrainer.evaluate_checkpoint(cfg)
    # A run that continues from it counts them.
    (tmp_path / "last_checkpoint").write_text("old.pth")
    with pytest.raises(ValueError, match=rf"{TAU} is 0.5, but the checkpoint {path} does not say"):
        test_set = ("DATASETS.TEST", (dataset,))
        cfg = one_iteration_config(
            dataset, tmp_path, "MODEL.WEIGHTS", "other.pth", TAU, 0.5, *test_set
        )
        RelDNTrainer.evaluate_checkpoint(cfg, resume=True)
    resumed = RelDNTrainer(one_iteration_config(dataset, tmp_path, TAU, 0.5))
    resumed.resume_or_load(resume=True)
    assert counts_of(resumed.model) == OF_DATASET


def test_load_other_predicates_forgets_the_counts(dataset, tmp_path):
    trainer = RelDNTrainer(one_iteration_config(dataset, tmp_path))
    trainer.resume_or_load(resume=False)
    trainer.checkpointer.save("mine")
    for name in ("model", "names"):
        other = ["a", "b", "c", "d", "e", "f"]
        options = ("MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", 7) if name == "model" else ()
        model = small_model(*options)
        names = [*other, "g"] if options else other
        checkpointer = RelDNCheckpointer(model, predicate_classes=names, matching_only=True)
        checkpointer.load(str(tmp_path / "mine.pth"))
        assert not model.relation_head.prior.known


def test_ensure_frequency_table_evaluation_counts_only_with_the_table(dataset, tmp_path):
    with_table, without = small_model(), small_model(
        "MODEL.ROI_RELATION_HEAD.SEMANTIC.ENABLED", False
    )
    for model, counts in ((with_table, OF_DATASET), (without, [0] * 6)):
        ensure_frequency_table(one_iteration_config(dataset, tmp_path), model)
        assert counts_of(model) == counts


def test_predictor_adjusted_by_opts_changes_predicates_only(tmp_path):
    path = write_boxes_checkpoint(tmp_path)
    content = torch.load(path, weights_only=True)
    counts = content["model"]["relation_head.prior.predicate_counts"]
    counts[:] = torch.arange(len(counts)) ** 2
    torch.save(content, path)
    options = ["TEST.RELATIONS.TOPK", 10_000, "TEST.RELATIONS.PREDICATES_PER_PAIR", [None]]
    plain, adjusted = (
        RelationPredictor.from_checkpoint(path, "cpu", opts=[*options, TAU, tau])(**GIVEN)
        for tau in (0.0, 1.0)
    )

    def affinities(prediction):
        sums = {}
        for (s, o, _), score in zip(prediction.relations.tolist(), prediction.scores):
            sums[s, o] = sums.get((s, o), 0) + float(score)
        return sums

    before, after = affinities(plain), affinities(adjusted)
    assert before.keys() == after.keys()
    assert all(after[pair] == pytest.approx(before[pair], abs=1e-5) for pair in before)
    assert not np.array_equal(plain.relations, adjusted.relations)


def test_checkpoint_of_every_kind_of_detector_has_counts():
    for kind in ("precomputed", "retinanet_FPN"):
        assert "relation_head.prior.predicate_counts" in model_of(kind).state_dict()
