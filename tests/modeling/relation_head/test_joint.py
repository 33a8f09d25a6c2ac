"""The joint module by itself, in the head, and in files of models."""

import numpy as np
import pytest
import torch
from model_utils import (
    CLASSES,
    PREDICATES,
    busy_item,
    empty_item,
    model_of,
    one_box_item,
    small_config,
    small_model,
)

from reldn_d2 import RelDNCheckpointer
from reldn_d2.engine.defaults import build_optimizer
from reldn_d2.export import RelDNExport
from reldn_d2.modeling.relation_head import predicate_classifier as classifier_module
from reldn_d2.modeling.relation_head.joint import ByteDropout, JointModule
from reldn_d2.modeling.relation_head.pairs import EntityBatch
from reldn_d2.modeling.relation_head.predictors import spatial_features
from reldn_d2.structures.name_matching import NameMismatchError

from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

HEAD = "MODEL.ROI_RELATION_HEAD"
ON = (f"{HEAD}.JOINT.ENABLED", True)
ALONE = (
    *ON,
    *(f"{HEAD}.SEMANTIC.ENABLED", False, f"{HEAD}.SPATIAL.ENABLED", False),
    *(f"{HEAD}.VISUAL.SPO", False, f"{HEAD}.VISUAL.SUBJECT_SKIP", False),
    *(f"{HEAD}.VISUAL.OBJECT_SKIP", False),
)


def module(**options):
    torch.manual_seed(0)
    return JointModule(5, 4, embedding_dim=3, hidden_dim=6, **options).eval()


def random_boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = 50 * torch.rand((count, 2), generator=generator)
    return torch.cat([low, low + 5 + 40 * torch.rand((count, 2), generator=generator)], dim=1)


def reference_logits(state, subject_class, object_class, features):
    """One pair in numpy, written from the description: embeddings, two layers of LeakyReLU."""
    x = np.concatenate(
        [
            state["subject_embedding.weight"][subject_class],
            state["object_embedding.weight"][object_class],
            features,
        ]
    )
    for layer in (0, 3):
        x = state[f"layers.{layer}.weight"] @ x + state[f"layers.{layer}.bias"]
        x = np.where(x > 0, x, 0.1 * x)
    return state["layers.6.weight"] @ x + state["layers.6.bias"]


def test_joint_module_equals_reference_pair_by_pair():
    joint = module()
    subjects, objects = torch.tensor([0, 4, 4, 2]), torch.tensor([1, 4, 0, 3])
    boxes = random_boxes(4), random_boxes(4, seed=1)
    features = spatial_features(*boxes, torch.tensor([[100.0, 120.0]]).expand(4, 2))
    logits = joint(subjects, objects, features)
    assert logits.shape == (4, 5)
    state = {name: x.double().numpy() for name, x in joint.state_dict().items()}
    for row, *pair in zip(logits.tolist(), subjects.tolist(), objects.tolist(), features.numpy()):
        assert row == pytest.approx(reference_logits(state, *pair).tolist(), abs=1e-5)
    assert joint(subjects[:0], objects[:0], features[:0]).shape == (0, 5)


def test_joint_module_default_shapes():
    shapes = [tuple(p.shape) for p in JointModule(100, 70).parameters() if p.dim() == 2]
    assert shapes == [(100, 48), (100, 48), (256, 124), (256, 256), (71, 256)]


def test_joint_module_gradients_reach_the_classes_of_the_pairs_only():
    joint = module(dropout=0.0).train()
    features = torch.randn((3, 28), generator=torch.Generator().manual_seed(0))
    joint(torch.tensor([0, 2, 2]), torch.tensor([1, 1, 4]), features).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in joint.parameters())
    for embedding, classes in ((joint.subject_embedding, [0, 2]), (joint.object_embedding, [1, 4])):
        assert embedding.weight.grad.abs().sum(1).nonzero()[:, 0].tolist() == classes


def test_joint_module_dropout_acts_in_training_only():
    joint, features = module(dropout=0.5), torch.ones(400, 28)
    classes = torch.zeros(400, dtype=torch.int64)
    row, *others = joint(classes, classes, features)
    torch.testing.assert_close(torch.stack(others), row.expand(399, -1))
    joint.train()
    assert len({tuple(x) for x in joint(classes, classes, features).tolist()}) > 100
    without = module(dropout=0.0).train()
    torch.testing.assert_close(without(classes, classes, features)[0], row)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_byte_dropout_drops_each_column_alike_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones((20_000, 11), requires_grad=True)  # the last bytes are cut off
    y = ByteDropout(p).train()(x)
    rounded = round(256 * p) / 256
    values = sorted({round(v, 4) for v in y.unique().tolist()})
    assert values == pytest.approx([0, 1 / (1 - rounded)], abs=1e-4)
    assert (y == 0).float().mean(0).tolist() == pytest.approx([rounded] * 11, abs=0.02)
    assert float(y.mean()) == pytest.approx(1, abs=0.02)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(ByteDropout(p).eval()(x), x)
    assert torch.equal(ByteDropout(0.0).train()(x), x)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("EMBEDDING_DIM", 0),
        ("HIDDEN_DIM", -1),
        ("DROPOUT", 1.0),
        ("DROPOUT", -0.1),
        ("EMBEDDING_STD", -1.0),
        ("EMBEDDING_SHRINKAGE", -20.0),
        ("EMBEDDING_SHRINKAGE", float("inf")),
    ],
)
def test_joint_module_invalid_option_raises(key, value):
    with pytest.raises(ValueError, match=rf"RELATION_HEAD\.JOINT\.{key} is {value}; expected"):
        small_model(*ON, f"{HEAD}.JOINT.{key}", value)


def test_config_joint_keys_reach_the_module():
    options = ("EMBEDDING_DIM", 7, "HIDDEN_DIM", 9, "DROPOUT", 0.25, "EMBEDDING_STD", 3.0)
    options = [x if i % 2 else f"{HEAD}.JOINT.{x}" for i, x in enumerate(options)]
    joint = small_model(*ON, *options).relation_head.joint
    assert joint.subject_embedding.weight.shape == (len(CLASSES), 7)
    assert joint.layers[0].weight.shape == (9, 2 * 7 + 28)
    assert joint.layers[-1].weight.shape == (len(PREDICATES) + 1, 9)
    assert {x.p for x in joint.layers if isinstance(x, torch.nn.Dropout)} == {0.25}
    assert float(joint.subject_embedding.weight.detach().std()) == pytest.approx(3, rel=0.5)
    default = small_model(*ON).relation_head.joint
    assert float(default.object_embedding.weight.detach().std()) == pytest.approx(0.1, rel=0.2)


def entities():
    boxes = [Boxes(random_boxes(3)), Boxes(random_boxes(2, seed=1))]
    classes = [torch.tensor([0, 4, 8]), torch.tensor([2, 2])]
    return EntityBatch.stack(boxes, classes, [(64, 96), (50, 80)])


def test_pair_logits_joint_is_one_more_summand():
    """Two images with different sizes; the spatial features are computed once."""
    off = ("VISUAL.SPO", "VISUAL.SUBJECT_SKIP", "VISUAL.OBJECT_SKIP")
    head = small_model(*ON, *(x for key in off for x in (f"{HEAD}.{key}", False))).relation_head
    head.eval().semantic.set_log_frequencies(torch.randn(9, 9, 7))
    subjects, objects = torch.tensor([[0, 1], [2, 0], [3, 4], [4, 3]]).T
    batch, calls = entities(), []

    def counted(*args):
        calls.append(len(args[0]))
        return spatial_features(*args)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_module, "spatial_features", counted)
        logits = head.pair_logits(batch, None, subjects, objects)
        joint, head.predictor.joint = head.joint, None
        others = head.pair_logits(batch, None, subjects, objects)
        sizes = torch.tensor([[64.0, 96], [64, 96], [50, 80], [50, 80]])
        features = spatial_features(batch.boxes[subjects], batch.boxes[objects], sizes)
        expected = others + joint(batch.classes[subjects], batch.classes[objects], features)
    torch.testing.assert_close(logits, expected)
    assert calls == [4, 4]


def test_model_without_joint_module_predicts_as_with_one_that_adds_nothing():
    cfg = small_config()
    assert not cfg.MODEL.ROI_RELATION_HEAD.JOINT.ENABLED
    model = small_model()
    assert model.relation_head.joint is None
    assert not any("joint" in name for name in model.state_dict())
    with_joint = small_model(*ON)
    own = {name: x for name, x in with_joint.state_dict().items() if ".joint." not in name}
    assert own.keys() == model.state_dict().keys()
    model.load_state_dict(own)
    torch.nn.init.zeros_(with_joint.relation_head.joint.layers[-1].weight)
    torch.nn.init.zeros_(with_joint.relation_head.joint.layers[-1].bias)
    outputs = [x.eval()([busy_item()])[0]["relations"] for x in (model, with_joint)]
    assert torch.equal(outputs[0].scores, outputs[1].scores)
    assert torch.equal(outputs[0].pairs, outputs[1].pairs)


def test_joint_module_alone_trains_on_any_batch_and_learns():
    model = small_model(*ALONE, f"{HEAD}.JOINT.DROPOUT", 0.0).train()
    head = model.relation_head
    assert head.box_heads == [] and model.predicate_backbone is None
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        with EventStorage():
            loss = sum(model([busy_item(), one_box_item(), empty_item()]).values())
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in head.parameters())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    with EventStorage():
        assert float(sum(model([empty_item()]).values())) == 0


def test_optimizer_joint_module_learns_at_the_base_rate_with_weight_decay():
    rates = ("SOLVER.BASE_LR", 0.5, "SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.0)
    decay = ("SOLVER.WEIGHT_DECAY", 0.01)
    cfg = small_config(*ALONE, *rates, *decay)
    model = small_model(*ALONE)
    groups = build_optimizer(cfg, model).param_groups
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    joint = dict(model.relation_head.joint.named_parameters())
    assert len(found) == len(joint) == 8
    for name, parameter in joint.items():
        wanted = (1.0, 0.0) if name.endswith("bias") else (0.5, 0.01)
        assert found[id(parameter)] == wanted, name


@pytest.mark.filterwarnings("ignore")  # tracing warns of each size that it fixes
@pytest.mark.parametrize("more", [(), ALONE])
def test_reldn_export_with_joint_module_equals_the_model(more):
    model = small_model(*ON, *more, f"{HEAD}.OVERLAP_FILTER", True, "TEST.RELATIONS.TOPK", 9)
    model.eval()
    image, other = (busy_item(seed)["image"] for seed in (0, 5))
    with torch.no_grad():
        traced = torch.jit.trace(RelDNExport(model), (image,), check_trace=False)
        for x in (image, other):
            outputs = traced(x)
            expected = model.inference([{"image": x}], do_postprocess=False)[0]["relations"]
            assert torch.equal(outputs[3], expected.pairs)
            assert torch.equal(outputs[4], expected.predicates)
            torch.testing.assert_close(outputs[5], expected.scores, rtol=0, atol=1e-6)


NAMES = {"thing_classes": CLASSES, "predicate_classes": PREDICATES}


def test_checkpoint_with_joint_module_roundtrip(tmp_path):
    source, model = small_model(*ON, seed=1), small_model(*ON, seed=2)
    RelDNCheckpointer(source, str(tmp_path), **NAMES).save("reldn")
    RelDNCheckpointer(model, **NAMES).load(str(tmp_path / "reldn.pth"))
    for name, value in source.relation_head.joint.state_dict().items():
        assert torch.equal(model.relation_head.joint.state_dict()[name], value)


def test_checkpoint_without_joint_module_names_the_missing_weights(tmp_path):
    RelDNCheckpointer(small_model(), str(tmp_path), **NAMES).save("reldn")
    with pytest.raises(ValueError, match=r"lacks 8 weights.*relation_head\.joint"):
        RelDNCheckpointer(small_model(*ON), **NAMES).load(str(tmp_path / "reldn.pth"))


@pytest.mark.parametrize("count", [8, 10])
def test_checkpoint_with_other_number_of_classes_raises_with_both_counts(tmp_path, count):
    """A detector without class weights: only the embeddings show the number of classes."""
    options = (*ALONE, "MODEL.ROI_HEADS.NUM_CLASSES")
    RelDNCheckpointer(model_of("precomputed", *options, 9), str(tmp_path)).save("reldn")
    message = f"it was trained with 9 entity classes, the config has {count}"
    with pytest.raises(ValueError, match=message):
        RelDNCheckpointer(model_of("precomputed", *options, count)).load(
            str(tmp_path / "reldn.pth")
        )


@pytest.mark.parametrize("field", NAMES)
def test_checkpoint_of_other_names_trains_their_layers_from_scratch(tmp_path, field, caplog):
    """With MATCHING_ONLY; weights of names that both have would be those of other names."""
    source = model_of("precomputed", *ALONE)
    RelDNCheckpointer(source, str(tmp_path), **NAMES).save("reldn")
    path = str(tmp_path / "reldn.pth")
    other = {**NAMES, field: [*NAMES[field][1:], "other"]}
    model = model_of("precomputed", *ALONE)
    for parameter in model.relation_head.joint.parameters():
        torch.nn.init.constant_(parameter, 0.25)
    with pytest.raises(NameMismatchError, match="'other'.*MATCHING_ONLY to True"):
        RelDNCheckpointer(model, **other).load(path)
    RelDNCheckpointer(model, matching_only=True, **other).load(path)
    kept = {
        name
        for name, x in model.relation_head.joint.state_dict().items()
        if bool((x == 0.25).all())
    }
    assert (
        kept
        == {
            "thing_classes": {"subject_embedding.weight", "object_embedding.weight"},
            "predicate_classes": {"layers.6.weight", "layers.6.bias"},
        }[field]
    )
    assert f"{len(kept)} weights stay as initialized" in caplog.text
