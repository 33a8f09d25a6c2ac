"""VGG16 in Detectron2's registries, and the kinds of predicate backbone."""

import os
import pickle

import pytest
import torch
import torchvision
from model_utils import (
    busy_item,
    detector_config,
    give_distinct_statistics,
    model_of,
    small_config,
    small_model,
)

from reldn_d2 import RelDNCheckpointer
from reldn_d2.checkpoint.detection_checkpoint import read_checkpoint
from reldn_d2.checkpoint.reldn_checkpoint import (
    DetectorCheckpointer,
    initialize_relation_branch,
    pretrained_predicate_modules,
)
from reldn_d2.engine.optimizer import build_optimizer
from reldn_d2.modeling.backbone import VGG16, VGG16BoxHead, share_first_stages

from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

PREDICATE = "MODEL.RELDN.PREDICATE_BACKBONE"


@pytest.fixture(scope="module")
def torchvision_state():
    """The state dict of torchvision's VGG16, its wide layers cut to a sixteenth."""
    with torch.device("meta"):
        names = {n: x.shape for n, x in torchvision.models.vgg16().state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def narrow(name, shape):
        last = name.startswith("classifier.6")
        sizes = [
            x if i >= 2 or (x == 3) or (last and i == 0) else x // 16 for i, x in enumerate(shape)
        ]
        return torch.randn(sizes, generator=generator) * 0.1

    return {name: narrow(name, shape) for name, shape in names.items()}


def vgg_options():
    return (
        "MODEL.VGG.WIDTH",
        4,
        "MODEL.VGG.OUT_FEATURES",
        ["conv5"],
        "MODEL.WEIGHTS",
        "",
        "MODEL.ROI_BOX_HEAD.FC_DIM",
        256,
        "MODEL.RPN.IN_FEATURES",
        ["conv5"],
        "MODEL.ROI_HEADS.IN_FEATURES",
        ["conv5"],
        "MODEL.BACKBONE.FREEZE_AT",
        2,
    )


def test_vgg16_outputs_equal_torchvision(torchvision_state):
    """Features, and fc6 and fc7 with the same flattening."""
    backbone, head = VGG16(3, width=4), VGG16BoxHead(
        ShapeSpec(channels=32, height=7, width=7), fc_dim=256
    )
    wrapper = torch.nn.Module()
    wrapper.backbone, wrapper.roi_heads = backbone, torch.nn.Module()
    wrapper.roi_heads.box_head = head
    from reldn_d2.checkpoint.detection_checkpoint import from_torchvision_vgg16

    wrapper.load_state_dict(from_torchvision_vgg16(torchvision_state))
    x = torch.randn(1, 3, 112, 112)
    layers = torchvision.models.vgg16().features[:30]
    for name, layer in layers.named_children():
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight = torch.nn.Parameter(torchvision_state[f"features.{name}.weight"])
            layer.bias = torch.nn.Parameter(torchvision_state[f"features.{name}.bias"])
    with torch.no_grad():
        wanted, found = layers(x), backbone(x)
        assert list(found) == ["conv5"] and found["conv5"].shape == (1, 32, 7, 7)
        torch.testing.assert_close(found["conv5"], wanted)
        hidden = wanted.flatten(1)
        for i in (0, 3):
            hidden = torch.relu(
                hidden @ torchvision_state[f"classifier.{i}.weight"].T
                + torchvision_state[f"classifier.{i}.bias"]
            )
        torch.testing.assert_close(head(wanted), hidden)
    assert backbone.output_shape()["conv5"] == ShapeSpec(channels=32, stride=16)


def test_vgg16_default_shapes_equal_torchvision():
    with torch.device("meta"):
        backbone = VGG16(3, freeze_at=2)
        theirs = torchvision.models.vgg16()
        head = VGG16BoxHead(ShapeSpec(channels=512, height=7, width=7))
    ours = [x.shape for x in (*backbone.state_dict().values(), *head.state_dict().values())]
    assert ours == [x.shape for n, x in theirs.state_dict().items() if "classifier.6" not in n]
    frozen = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "conv2"}
    with pytest.raises(ValueError, match="OUT_FEATURES names .'conv6'.; VGG16 has"):
        VGG16(3, out_features=("conv6",))


def test_torchvision_checkpoint_initializes_detector(tmp_path, torchvision_state, caplog):
    torch.save(torchvision_state, tmp_path / "vgg16.pth")
    detector = build_model(
        detector_config(
            "faster_rcnn_VGG16", *vgg_options(), "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"
        )
    )
    with caplog.at_level("INFO", logger="reldn_d2.checkpoint"):
        DetectorCheckpointer(detector).load(str(tmp_path / "vgg16.pth"))
    assert "26 into backbone, 4 into roi_heads.box_head" in caplog.text
    state = detector.state_dict()
    assert torch.equal(
        state["backbone.conv3.conv3_2.weight"], torchvision_state["features.12.weight"]
    )
    assert torch.equal(state["roi_heads.box_head.fc7.bias"], torchvision_state["classifier.3.bias"])
    # And features for detections from a file, box head included.
    model = model_of(
        "precomputed",
        *vgg_options(),
        "MODEL.BACKBONE.NAME",
        "build_vgg16_backbone",
        "MODEL.ROI_BOX_HEAD.NAME",
        "VGG16BoxHead",
    )
    RelDNCheckpointer(model).load(str(tmp_path / "vgg16.pth"))
    for box_head in model.relation_head.box_heads:
        assert torch.equal(box_head.fc6.weight, torchvision_state["classifier.0.weight"])


def loaded(*options):
    model = small_model(*options)
    give_distinct_statistics(model.detector.model, seed=3)
    initialize_relation_branch(model)
    return model


def losses(model, seed=0):
    torch.manual_seed(seed)
    with EventStorage():
        return model([busy_item(0), busy_item(1)])


@pytest.mark.parametrize("until", ["res2", "res3", "res4"])
def test_share_first_stages_equals_copied_stages(until):
    same = loaded().eval()
    shared = loaded(f"{PREDICATE}.KIND", "shared", f"{PREDICATE}.SHARE_UNTIL", until).eval()
    shared.relation_head.load_state_dict(same.relation_head.state_dict())
    names = set(shared.predicate_backbone.state_dict())
    assert names < set(same.predicate_backbone.state_dict())
    assert not any(f"bottom_up.{until}" in n or "stem" in n for n in names)
    for x, y in zip(same([busy_item(0)]), shared([busy_item(0)])):
        assert torch.equal(x["relations"].pairs, y["relations"].pairs)
        torch.testing.assert_close(x["relations"].scores, y["relations"].scores)
    shared.train()
    sum(losses(shared).values()).backward()
    assert all(p.grad is not None for p in shared.predicate_backbone.parameters())
    assert all(p.grad is None for p in shared.detector.parameters())


def test_share_first_stages_frozen_stages_train_like_copies():
    """With frozen BatchNorm, stages that are not trained are the detector's anyway."""
    frozen = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", 2)
    same = loaded(*frozen).train()
    shared = loaded(
        *frozen, f"{PREDICATE}.KIND", "shared", f"{PREDICATE}.SHARE_UNTIL", "res2"
    ).train()
    shared.relation_head.load_state_dict(same.relation_head.state_dict())
    for name, value in losses(same).items():
        torch.testing.assert_close(losses(shared)[name], value)


@pytest.mark.parametrize("kind", ["faster_rcnn_C4", "faster_rcnn_VGG16", "retinanet_FPN"])
def test_share_first_stages_other_backbones_train(kind):
    until = {"faster_rcnn_VGG16": "conv2"}.get(kind, "res2")
    model = model_of(kind, f"{PREDICATE}.KIND", "shared", f"{PREDICATE}.SHARE_UNTIL", until)
    initialize_relation_branch(model)
    assert model.predicate_backbone.shared_stages[-1] == until
    with EventStorage():
        sum(model.train()([busy_item(0)]).values()).backward()
    assert all(p.grad is not None for p in model.predicate_backbone.parameters() if p.requires_grad)


def test_share_first_stages_unknown_stage_raises():
    with pytest.raises(ValueError, match="SHARE_UNTIL is 'res9'.*res2, res3, res4"):
        small_model(f"{PREDICATE}.KIND", "shared", f"{PREDICATE}.SHARE_UNTIL", "res9")
    with pytest.raises(ValueError, match="'conv5'.*conv1, conv2, conv3, conv4.$"):
        share_first_stages(VGG16(3, width=4), "conv5")  # nothing would be left
    with pytest.raises(ValueError, match="KIND is 'none'; known: same, shared, other"):
        small_model(f"{PREDICATE}.KIND", "none")


def other(*options):
    wider = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 12, "MODEL.FPN.OUT_CHANNELS", 16]
    return small_model(f"{PREDICATE}.KIND", "other", f"{PREDICATE}.OPTIONS", wider, *options)


def test_predicate_backbone_other_kind_loads_its_own_weights(tmp_path, caplog):
    """Wider, from weights of its own; the box head of its vectors cannot be the detector's."""
    source = small_model(
        "MODEL.RESNETS.STEM_OUT_CHANNELS", 12, "MODEL.FPN.OUT_CHANNELS", 16, seed=8
    )
    DetectorCheckpointer(source.detector.model, str(tmp_path)).save("wide")
    random, model = other(), other(f"{PREDICATE}.WEIGHTS", str(tmp_path / "wide.pth"))
    with caplog.at_level("INFO", logger="reldn_d2.checkpoint"):
        initialize_relation_branch(model)
    assert "1 box heads start from random weights" in caplog.text
    wanted = source.detector.model.backbone.state_dict()
    for name, value in model.predicate_backbone.state_dict().items():
        assert torch.equal(value, wanted[name])
    head = model.relation_head
    assert torch.equal(head.subject_box_head.fc1.weight, model.detector.box_head.fc1.weight)
    assert pretrained_predicate_modules(model) == [model.predicate_backbone]
    assert random.predicate_backbone not in pretrained_predicate_modules(random)
    sum(losses(model.train()).values()).backward()
    assert all(p.grad is not None for p in model.predicate_backbone.parameters())
    with pytest.raises(ValueError, match="predicate backbone has no map .*'p4'.*IN_FEATURES"):
        small_model(
            f"{PREDICATE}.KIND",
            "other",
            f"{PREDICATE}.OPTIONS",
            ["MODEL.FPN.IN_FEATURES", ["res2", "res3"]],
        )


def test_predicate_backbone_without_weights_learns_at_full_rate(tmp_path):
    cfg = small_config("SOLVER.OPTIMIZER", "SGD", "SOLVER.BACKBONE_MULTIPLIER", 0.1)
    for weights, factor in (("", 1.0), ("file.pth", 0.1)):
        model = other(f"{PREDICATE}.WEIGHTS", weights)
        optimizer = build_optimizer(cfg, model)
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        weight = model.predicate_backbone.bottom_up.stem.conv1.weight
        assert rates[id(weight)] == pytest.approx(cfg.SOLVER.BASE_LR * factor)


def test_precomputed_detector_without_box_head_loads_backbone(tmp_path):
    source = small_model(seed=4).detector.model.backbone
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="lacks 4 weights.*PRECOMPUTED_BOX_HEAD to False"):
        RelDNCheckpointer(model_of("precomputed")).load(str(tmp_path / "backbone.pth"))
    model = model_of("precomputed", "MODEL.RELDN.PRECOMPUTED_BOX_HEAD", False)
    RelDNCheckpointer(model).load(str(tmp_path / "backbone.pth"))
    assert model.detector.box_head is None and len(pretrained_predicate_modules(model)) == 1
    for name, value in source.state_dict().items():
        assert torch.equal(model.predicate_backbone.state_dict()[name], value)


def test_vgg16_relation_box_heads_drop_values_in_training_only():
    """The released rate, after fc6 of all three; the detector's own head has none."""
    model = model_of("faster_rcnn_VGG16")
    assert model.detector.box_head.fc6_dropout.p == 0.0
    assert set(model.detector.box_head.state_dict()) == {
        f"{layer}.{kind}" for layer in ("fc6", "fc7") for kind in ("weight", "bias")
    }
    x = torch.randn(64, 32, 7, 7)
    assert len(model.relation_head.box_heads) == 3
    for box_head in model.relation_head.box_heads:
        names = list(dict(box_head.named_children()))
        assert names[1:4] == ["fc6", "fc6_relu", "fc6_dropout"]
        box_head.train()
        first, dropout = torch.nn.Sequential(*list(box_head)[:3]), box_head.fc6_dropout
        before = first(x)
        after = dropout(before)
        kept = after != 0
        torch.testing.assert_close(after[kept], 2 * before[kept])  # a rate of a half
        assert 0.3 < kept[before > 0].float().mean() < 0.7
        box_head.eval()
        assert torch.equal(dropout(before), before)
    off = model_of("faster_rcnn_VGG16", "MODEL.ROI_RELATION_HEAD.FC6_DROPOUT", 0.0)
    assert all(head.fc6_dropout.p == 0.0 for head in off.relation_head.box_heads)


class Evil:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


@pytest.mark.parametrize("suffix", ["pth", "pkl", "pyth"])
def test_checkpointer_file_with_code_is_not_executed(tmp_path, suffix):
    made = tmp_path / "made by the file"
    content = {"model": {}, "__author__": "x", "evil": Evil(made)}
    path = tmp_path / f"evil.{suffix}"
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="evil.*can run code.*LOAD.ALLOW_PICKLE.*mkdir") as error:
        RelDNCheckpointer(small_model()).load(str(path))
    assert not made.exists() and "weights_only" not in str(error.value)
    read_checkpoint(str(path), allow_pickle=True)  # it would have run
    assert made.exists()


def test_checkpointer_allow_pickle_loads_objects(tmp_path):
    model = small_model(seed=1)
    content = {
        "model": model.state_dict(),
        "size": torch.Size([1]),
        "note": Ellipsis,
        "x": range(3),
    }
    torch.save(content, tmp_path / "objects.pth")
    with pytest.raises(ValueError, match="ALLOW_PICKLE"):
        RelDNCheckpointer(small_model()).load(str(tmp_path / "objects.pth"))
    rest = RelDNCheckpointer(small_model(), allow_pickle=True).load(str(tmp_path / "objects.pth"))
    assert rest["x"] == range(3)


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_checkpointer_truncated_file_raises(tmp_path, suffix):
    torch.save({"model": small_model().state_dict()}, tmp_path / "whole.pth")
    half = (tmp_path / "whole.pth").read_bytes()[:5000]
    (tmp_path / f"half.{suffix}").write_bytes(half)
    with pytest.raises(ValueError, match=rf"half\.{suffix} (is|cannot be read).*broken"):
        RelDNCheckpointer(small_model()).load(str(tmp_path / f"half.{suffix}"))


def test_checkpointer_matching_only_loads_fitting_layers(tmp_path, caplog):
    """Another number of predicates: an error, or with the key what fits."""
    source = small_model(seed=1)
    source.relation_head.semantic.set_log_frequencies(torch.randn(9, 9, 7))
    RelDNCheckpointer(source, str(tmp_path)).save("reldn")
    path, more = str(tmp_path / "reldn.pth"), ("MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", 8)
    with pytest.raises(ValueError, match="6 predicates, the config has 8.*MATCHING_ONLY to True"):
        RelDNCheckpointer(small_model(*more)).load(path)
    model = small_model(*more)
    with caplog.at_level("INFO", logger="reldn_d2.checkpoint"):
        RelDNCheckpointer(model, matching_only=True).load(path)
    first = model.relation_head.visual.first.weight
    assert torch.equal(first, source.relation_head.visual.first.weight)
    assert not bool(model.relation_head.semantic.counted)  # the table is counted anew
    assert "stay as initialized" in caplog.text and "Loaded" in caplog.text
    # A detector of other classes, to train it on.
    DetectorCheckpointer(source.detector.model, str(tmp_path)).save("detector")
    wanted = small_model("MODEL.ROI_HEADS.NUM_CLASSES", 4).detector.model
    with pytest.raises(ValueError, match="9 entity classes, the config has 4"):
        DetectorCheckpointer(wanted).load(str(tmp_path / "detector.pth"))
    DetectorCheckpointer(wanted, matching_only=True).load(str(tmp_path / "detector.pth"))
    found = wanted.roi_heads.box_head.fc1.weight
    assert torch.equal(found, source.detector.box_head.fc1.weight)


def test_checkpointer_unrelated_file_raises(tmp_path):
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "other.pth")
    detector = small_model().detector.model
    with pytest.raises(ValueError, match="None of the 1 weights.*other.pth fits this model"):
        DetectorCheckpointer(detector).load(str(tmp_path / "other.pth"))


def test_detector_checkpointer_incomplete_file_raises(tmp_path):
    detector = small_model().detector.model
    state = {n: x for n, x in detector.state_dict().items() if n.startswith("backbone.")}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    DetectorCheckpointer(detector).load(str(tmp_path / "backbone.pth"))
    with pytest.raises(ValueError, match="lacks .* weights.*backbone only"):
        DetectorCheckpointer(detector, complete=True).load(str(tmp_path / "backbone.pth"))
    del state["backbone.bottom_up.stem.conv1.weight"]
    torch.save({"model": state}, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="lacks 1 weights.*stem.conv1.weight"):
        DetectorCheckpointer(detector).load(str(tmp_path / "backbone.pth"))
