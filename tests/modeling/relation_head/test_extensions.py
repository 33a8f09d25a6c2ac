"""A head, a classifier, a context, a sampler and a loss of one's own, in a few lines each.

Each is registered, trained by the trainer, saved, loaded and evaluated.
"""

import inspect
import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from model_utils import (
    PREDICATES,
    SIZE,
    busy_item,
    register_dataset,
    small_config,
    small_model,
    unregister_dataset,
)
from torch import nn

from reldn_d2.checkpoint.class_weights import relation_weights
from reldn_d2.engine import RelDNTrainer
from reldn_d2.modeling import (
    ENTITY_CONTEXT_REGISTRY,
    PAIR_SAMPLER_REGISTRY,
    RELATION_LOSS_REGISTRY,
    RELATION_PREDICTOR_REGISTRY,
    ROI_RELATION_HEAD_REGISTRY,
    EntityContext,
    PairSampler,
    PredicateClassifier,
    RelationHead,
    RelationLoss,
    SampledPairs,
    build_relation_head,
)
from reldn_d2.modeling.relation_head.pair_sampling import training_pairs
from reldn_d2.predictor import RelationPredictor
from reldn_d2.structures.relations import ground_truth_relations

from detectron2.config import configurable
from detectron2.engine import SimpleTrainer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter

HEAD = "MODEL.ROI_RELATION_HEAD"


@ROI_RELATION_HEAD_REGISTRY.register()
class ClassPairHead(RelationHead):
    """One row of logits per pair of classes; it also halves the scores of entities."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = nn.Embedding(self.num_classes**2, self.num_predicates + 1)

    def pair_logits(self, entities, predicate_features, subjects, objects):
        classes = entities.classes
        return self.table(classes[subjects] * self.num_classes + classes[objects])

    def refine_entities(self, entities, instances, classes_given):
        refined = type(instances)(instances.image_size, **instances.get_fields())
        refined.scores = instances.scores if classes_given else 0.5 * instances.scores
        return refined


@RELATION_PREDICTOR_REGISTRY.register()
class UnionClassifier(PredicateClassifier):
    """A linear layer on subject, union and object vectors."""

    def __init__(self, cfg, vector_size, context_size):
        super().__init__()
        num_predicates = cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES
        self.layer = nn.Linear(3 * vector_size, num_predicates + 1)

    def forward(self, entities, pairs):
        subject = entities.subject_vectors[pairs.subjects]
        object_ = entities.object_vectors[pairs.objects]
        return self.layer(torch.cat([subject, pairs.union_vectors(), object_], dim=1))


@ENTITY_CONTEXT_REGISTRY.register()
class MeanContext(EntityContext):
    """The mean of the entities of the image."""

    def forward(self, entities):
        embedded = self.embed(entities)
        sums = embedded.new_zeros(len(entities.sizes), self.size)
        sums = sums.index_add(0, entities.image, embedded)
        sizes = embedded.new_tensor(entities.sizes).clamp(min=1)
        return (sums / sizes[:, None])[entities.image]


@PAIR_SAMPLER_REGISTRY.register()
class AllPairsSampler(PairSampler):
    """Use all pairs for L0 and none for L1 to L3."""

    def __init__(self, cfg):
        pass

    def sample(self, grid, generator=None):
        return SampledPairs.from_masks(grid, grid.candidates)


@RELATION_LOSS_REGISTRY.register()
class LabelSetLoss(RelationLoss):
    """Binary cross entropy of all predicates of a pair."""

    def __init__(self, cfg):
        super().__init__()

    def forward(self, logits, targets, pairs, entities):
        labels = pairs.labels.float()
        losses = F.binary_cross_entropy_with_logits(logits[:, :-1], labels, reduction="none")
        return {"loss_label_set": losses.sum() / max(len(pairs), 1)}


LOSSES = {"loss_predicate", "loss_class_agnostic", "loss_entity_class", "loss_predicate_class"}
JOINT_ONLY = (
    *(f"{HEAD}.JOINT.ENABLED", True, f"{HEAD}.VISUAL.SPO", False),
    *(f"{HEAD}.VISUAL.SUBJECT_SKIP", False, f"{HEAD}.VISUAL.OBJECT_SKIP", False),
)
CASES = {
    "head": ((f"{HEAD}.NAME", "ClassPairHead"), LOSSES),
    "classifier": ((f"{HEAD}.PREDICTOR", "UnionClassifier"), LOSSES),
    "context": ((f"{HEAD}.CONTEXT.NAME", "MeanContext"), LOSSES),
    "context, boxes only": ((f"{HEAD}.CONTEXT.NAME", "MeanContext", *JOINT_ONLY), LOSSES),
    "transformer": ((f"{HEAD}.CONTEXT.NAME", "TransformerContext"), LOSSES),
    "lstm": ((f"{HEAD}.CONTEXT.NAME", "LSTMContext", *JOINT_ONLY), LOSSES),
    "sampler": ((f"{HEAD}.SAMPLING.NAME", "AllPairsSampler"), LOSSES),
    "loss": (
        (f"{HEAD}.LOSS.NAMES", ["PredicateLoss", "LabelSetLoss"]),
        {"loss_predicate", "loss_label_set"},
    ),
    # Detectron2 logs the only loss as total_loss.
    "other loss alone": ((f"{HEAD}.LOSS.NAMES", ["LabelSetLoss"]), set()),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    register_dataset("extensions", tmp_path_factory.mktemp("extensions"))
    yield "extensions"
    unregister_dataset("extensions")


@pytest.mark.parametrize("case", CASES)
def test_registered_part_trains_saves_loads_and_evaluates(case, dataset, tmp_path):
    options, losses = CASES[case]
    cfg = small_config(
        *("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,), "OUTPUT_DIR", str(tmp_path)),
        *("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0),
        *("TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 1000, "SEED", 1),
        *(f"{HEAD}.CONTEXT.HIDDEN_DIM", 8, *options),
    )
    trainer = RelDNTrainer(cfg)
    before = {name: x.clone() for name, x in trainer.model.relation_head.state_dict().items()}
    trainer.train()
    logged = {name for name in trainer.storage.latest() if name.startswith("loss_")}
    assert logged == losses
    after = trainer.model.relation_head.state_dict()
    assert not any("predictor.visual" in name for name in after)
    moved = [name for name, x in after.items() if not torch.equal(x, before[name])]
    assert moved and (case != "context" or "context.class_embedding.weight" in moved)

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    results = RelDNTrainer.evaluate_checkpoint(cfg)
    assert 0 <= results["relations_sgdet"]["R@n"] <= 100
    predictor = RelationPredictor.from_checkpoint(cfg.MODEL.WEIGHTS, device="cpu")
    loaded = predictor.model.relation_head.state_dict()
    assert loaded.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in loaded.items())
    assert len(predictor.model.relation_head.losses) == len(cfg.MODEL.ROI_RELATION_HEAD.LOSS.NAMES)


def test_head_refined_entities_are_the_models_output_and_rank_the_triplets():
    plain, refining = (small_model(*x, seed=3).eval() for x in ((), CASES["head"][0]))
    with torch.no_grad():
        (detected,), (refined,) = plain([busy_item()]), refining([busy_item()])
    assert torch.equal(refined["instances"].scores, 0.5 * detected["instances"].scores)
    relations = refined["relations"]
    ends = refined["instances"].scores[relations.pairs].prod(dim=1)
    torch.testing.assert_close(relations.scores, ends * relations.predicate_scores)
    refining.task = "prdcls"
    with torch.no_grad():
        (given,) = refining([busy_item()])
    assert (given["instances"].scores == 1).all()  # given classes are not scored again


def test_head_refine_other_number_of_entities_raises(monkeypatch):
    model = small_model(*CASES["head"][0]).eval()
    monkeypatch.setattr(ClassPairHead, "refine_entities", lambda self, x, found, given: found[1:])
    with pytest.raises(ValueError, match="ClassPairHead.refine_entities returned 5 .* for 6: ret"):
        model([busy_item()])


def test_relation_head_two_losses_of_one_name_raises(monkeypatch):
    model = small_model(f"{HEAD}.LOSS.NAMES", ["PredicateLoss", "LabelSetLoss"]).train()
    monkeypatch.setattr(LabelSetLoss, "forward", lambda self, *x: {"loss_predicate": x[0].sum()})
    with (
        EventStorage(),
        pytest.raises(
            ValueError, match="Both PredicateLoss and LabelSetLoss return a loss 'loss_predicate'"
        ),
    ):
        model([busy_item()])


def test_loss_that_returns_no_dict_raises(monkeypatch):
    model = small_model(f"{HEAD}.LOSS.NAMES", ["LabelSetLoss"]).train()
    monkeypatch.setattr(LabelSetLoss, "forward", lambda self, *x: x[0].sum())
    with EventStorage(), pytest.raises(TypeError, match="LabelSetLoss returned a Tensor: return a"):
        model([busy_item()])


@pytest.mark.parametrize(
    ("losses", "stored", "printed"),
    [
        ({"loss_a": 1.0, "mine": 2.0}, {"total_loss", "loss_a", "mine"}, {"total_loss", "loss_a"}),
        ({"loss_a": 1.0}, {"total_loss"}, {"total_loss"}),
    ],
)
def test_losses_are_logged_as_the_docs_say(losses, stored, printed, tmp_path, caplog):
    """What Detectron2 writes: all of several losses into the file, those so named on a terminal."""
    with EventStorage() as storage, caplog.at_level("INFO", logger="detectron2"):
        values = {name: torch.tensor(x) for name, x in losses.items()}
        in_main = "cur_iter" in inspect.signature(SimpleTrainer.write_metrics).parameters
        SimpleTrainer.write_metrics(values, 0.1, *([0] if in_main else []))
        JSONWriter(str(tmp_path / "metrics.json")).write()
        CommonMetricPrinter(10).write()
        others = {"data_time", "rank_data_time"} if in_main else {"data_time"}
        assert set(storage.latest()) == {*stored, *others}
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert set(written) == {*stored, *others, "iteration"}
    assert set(re.findall(r"(\w+): [\d.]+  ", caplog.text)) >= printed
    assert ("mine:" in caplog.text, "loss_a:" in caplog.text) == (False, "loss_a" in printed)


@pytest.mark.parametrize("training", [True, False])
def test_head_logits_of_other_shape_raises(training, monkeypatch):
    model = small_model(*CASES["head"][0]).train(training)
    original = ClassPairHead.pair_logits
    monkeypatch.setattr(ClassPairHead, "pair_logits", lambda *args: original(*args)[:, :-1])
    with (
        EventStorage(),
        pytest.raises(
            ValueError,
            match=r"ClassPairHead.pair_logits returned .*, 6\) for .* 6 predicates: return",
        ),
    ):
        model([busy_item()])


@pytest.mark.parametrize("training", [True, False])
def test_classifier_logits_of_other_shape_raises_with_its_name(training, monkeypatch):
    model = small_model(*CASES["classifier"][0]).train(training)
    original = UnionClassifier.forward
    monkeypatch.setattr(UnionClassifier, "forward", lambda *args: original(*args)[:, :-1])
    message = r"^UnionClassifier.forward returned .*, 6\) for .* 6 predicates: return \(\d+, 7\)"
    with EventStorage(), pytest.raises(ValueError, match=message):
        model([busy_item()])


def test_loss_or_metric_that_is_no_scalar_raises_with_its_name(monkeypatch):
    model = small_model(f"{HEAD}.LOSS.NAMES", ["LabelSetLoss"]).train()
    for value, error, message in (
        (torch.zeros(4), ValueError, r"loss 'loss_x' has shape \(4,\): return a scalar"),
        (0.5, TypeError, r"loss 'loss_x' is a float: return a tensor of shape \(\)"),
    ):
        monkeypatch.setattr(LabelSetLoss, "forward", lambda *x, value=value: {"loss_x": value})
        with EventStorage(), pytest.raises(error, match=f"^LabelSetLoss: {message}"):
            model([busy_item()])
    monkeypatch.undo()
    monkeypatch.setattr(LabelSetLoss, "metrics", lambda *x: {"margins": torch.zeros(2)})
    with (
        EventStorage(19),
        pytest.raises(ValueError, match="^LabelSetLoss: metric 'margins' has shape"),
    ):
        model([busy_item()])


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (
            lambda grid: SampledPairs.from_masks(grid, grid.candidates.any(1)),
            *(ValueError, r"a mask is \((\d+),\) bool; expected \(\1, \1\) bool, one row per sub"),
        ),
        (
            lambda grid: SampledPairs.from_masks(grid, grid.candidates.float()),
            *(ValueError, r"a mask is \((\d+), \1\) float32; expected \(\1, \1\) bool"),
        ),
        (
            lambda grid: replace(
                SampledPairs.from_masks(grid, grid.candidates), labels=torch.zeros(1, 3)
            ),
            *(ValueError, r"returned pairs whose labels have shape \(1, 3\); expected \(\d+, 6\)"),
        ),
        (lambda grid: grid.candidates, TypeError, "returned a Tensor: return SampledPairs.from_m"),
    ],
)
def test_sampler_of_wrong_masks_or_pairs_raises_with_its_name(sample, error, message, monkeypatch):
    model = small_model(*CASES["sampler"][0]).train()
    monkeypatch.setattr(AllPairsSampler, "sample", lambda self, grid, generator=None: sample(grid))
    with EventStorage(), pytest.raises(error, match=f"^AllPairsSampler.sample:? {message}"):
        model([busy_item()])


def test_context_of_other_shape_raises(monkeypatch):
    model = small_model(*CASES["context"][0]).eval()
    monkeypatch.setattr(MeanContext, "forward", lambda self, entities: self.embed(entities)[:1])
    with pytest.raises(ValueError, match=r"MeanContext returned .* \(1, 256\) for 6 entities"):
        model([busy_item()])


def test_head_entity_losses_are_added_to_the_others(monkeypatch):
    model = small_model(*CASES["head"][0]).train()
    monkeypatch.setattr(
        *(ClassPairHead, "entity_losses"),
        lambda self, entities, proposals: {
            "loss_entity": entities.boxes.sum() * 0 + len(proposals)
        },
    )
    with EventStorage():
        losses = model([busy_item(), busy_item()])
    assert set(losses) == LOSSES | {"loss_entity"} and losses["loss_entity"] == 2


def test_own_sampler_draws_again_from_the_kept_grid():
    """What is kept with an image that comes again is none of a sampler's business."""
    boxes, classes = torch.tensor([[0.0, 0, 9, 9], [5, 5, 20, 20]]), torch.tensor([0, 1])
    entities, target = Instances((30, 30)), Instances((30, 30))
    entities.proposal_boxes, entities.gt_classes = Boxes(boxes), classes
    entities.gt_index, entities._derived = torch.arange(2), {}
    target.gt_boxes, target.gt_classes = Boxes(boxes), classes
    relations = ground_truth_relations([(0, 1, 2)], (30, 30))
    grids, sampler = [], AllPairsSampler(None)
    sampler.sample = lambda grid: grids.append(grid) or AllPairsSampler.sample(sampler, grid)
    for _ in range(2):
        pairs = training_pairs(entities, target, relations, num_predicates=3, sampler=sampler)
    assert list(entities._derived) == ["grid"] and grids[0] is grids[1]
    assert pairs.labels.tolist() == [[False, False, True], [False] * 3]
    assert pairs.for_predicate.all() and not (pairs.for_subjects | pairs.for_objects).any()


@pytest.mark.parametrize(
    ("case", "weight"),
    [("head", "relation_head.table.weight"), ("classifier", "relation_head.predictor.layer.bias")],
)
def test_relation_weights_of_own_parts_depend_on_all_names(case, weight):
    """Nothing is known of them, so none is given to classes or predicates of other names."""
    state = small_model(*CASES[case][0]).state_dict()
    for field in ("thing_classes", "predicate_classes"):
        assert weight in relation_weights(state, field)
        assert not any("box_head" in name for name in relation_weights(state, field))


class NoLogitsHead(RelationHead):
    pass


class HidesBoxHeads(ClassPairHead):
    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.box_heads = nn.ModuleList()


class NoSuperCall(ClassPairHead):
    def __init__(self, cfg, *shapes):
        nn.Module.__init__(self)


class NoHead(nn.Module):
    def __init__(self, *args):
        super().__init__()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (NoLogitsHead, "NAME is 'NoLogitsHead', but that class lacks pair_logits: implement it"),
        (HidesBoxHeads, "HidesBoxHeads has a submodule 'box_heads', .* override the property"),
        (NoSuperCall, "NoSuperCall does not initialize RelationHead: call super"),
        (
            NoHead,
            "'NoHead', but that class is not a subclass of RelationHead: "
            "derive it from .*RelationHead",
        ),
        (
            lambda *x: NoHead(),
            "which built a NoHead, and that class is not a subclass of RelationHead",
        ),
    ],
)
def test_build_relation_head_broken_contract_raises(head, message, monkeypatch):
    name = getattr(head, "__name__", "").strip("<>")
    monkeypatch.setitem(ROI_RELATION_HEAD_REGISTRY._obj_map, name, head)
    with pytest.raises(TypeError, match=message):
        build_relation_head(small_config(f"{HEAD}.NAME", name), {}, {})


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("PREDICTOR", "Nobody", "RelDNPredictor"),
        ("CONTEXT.NAME", "Nobody", "TransformerContext"),
        ("SAMPLING.NAME", "Nobody", "RelDNPairSampler"),
        ("LOSS.NAMES", ["Nobody"], "PredicateLoss"),
    ],
)
def test_build_unknown_part_raises_with_known_names(key, value, known):
    with pytest.raises(ValueError, match=rf"{key} is 'Nobody'; known: .*{known}.*--module"):
        small_model(f"{HEAD}.{key}", value)


@pytest.mark.parametrize("names", [[], ["PredicateLoss", "PredicateLoss"]])
def test_build_no_loss_or_one_twice_raises(names):
    with pytest.raises(ValueError, match="LOSS.NAMES is .*; expected one or more losses, each on"):
        small_model(f"{HEAD}.LOSS.NAMES", names)


@pytest.mark.parametrize("names", [["PredicateLoss"], ["PredicateLoss", "LabelSetLoss"]])
def test_losses_without_anchors_switch_their_sampling_off(names):
    sampler = small_model(f"{HEAD}.LOSS.NAMES", names).relation_head.sampler
    assert not sampler.for_anchors and sampler.limits["num_anchor_positive"] == 0
    assert small_model().relation_head.sampler.limits["num_anchor_positive"] > 0


def test_reldn_predictor_fuse_sums_module_logits():
    model = small_model(f"{HEAD}.JOINT.ENABLED", True).eval()
    head, x = model.relation_head, busy_item()
    features, maps = model.feature_maps(model.detector.preprocess([x]))
    given = x["instances"]
    entities = head.encode_entities(features, [given.gt_boxes], [given.gt_classes], [SIZE])
    pair = torch.tensor([0, 1]), torch.tensor([1, 3])
    logits = head.predictor.module_logits(entities, head.pair_batch(entities, maps, *pair))
    assert list(logits) == ["semantic", "spatial", "joint", "visual"]
    assert all(x.shape == (2, len(PREDICATES) + 1) for x in logits.values())
    fused = head.pair_logits(entities, maps, *pair)
    assert torch.equal(fused, head.predictor.fuse(logits))
    torch.testing.assert_close(fused, sum(logits.values()))


def test_reldn_head_names_of_weights_have_no_predictor():
    """So that models load weights that were saved before there were other classifiers."""
    head = small_model(f"{HEAD}.JOINT.ENABLED", True).relation_head
    listed = {
        "state": list(head.state_dict()),
        "parameters": [name for name, _ in head.named_parameters()],
    }
    for names in listed.values():
        assert not any("predictor" in name for name in names)
        assert {name.partition(".")[0] for name in names} - {"prior"} == {
            *("semantic", "spatial", "joint", "visual"),
            *("subject_box_head", "object_box_head", "predicate_box_head"),
        }
    assert head.get_parameter("semantic.table.weight") is head.semantic.table.weight
    state = head.state_dict()
    del state["spatial.0.bias"]
    state["visual.surplus"] = torch.zeros(1)
    result = head.load_state_dict(state, strict=False)
    assert result.missing_keys == ["spatial.0.bias"]
    assert result.unexpected_keys == ["visual.surplus"]
