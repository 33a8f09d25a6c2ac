"""Shortcuts of the backbones give the values and gradients of the plain computation."""

import copy

import pytest
import torch
from model_utils import (
    busy_item,
    detector_config,
    give_distinct_statistics,
    small_model,
    unrelated_item,
)

from reldn_d2.modeling.backbone import FrozenStages, frozen_stages, maps_on_demand
from reldn_d2.modeling.backbone.folding import FoldingConv2d
from reldn_d2.modeling.backbone.lazy_fpn import MapsOnDemand
from reldn_d2.modeling.relation_head.poolers import LevelPooler

from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

LEVELS = ["p2", "p3", "p4"]
PLAIN = (
    *("MODEL.RELDN.SHARE_FROZEN_STAGES", False, "MODEL.RELDN.FOLD_NORMALIZATION", False),
    *("MODEL.RELDN.MAPS_ON_DEMAND", False),
)
FROZEN = ("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.RESNETS.NORM", "FrozenBN")


def frozen_model(*options):
    """Build a small RelDN whose backbones have equal, frozen first stages."""
    model = small_model(*FROZEN, *options)
    give_distinct_statistics(model.detector.backbone)
    model.predicate_backbone.load_state_dict(model.detector.backbone.state_dict(), strict=False)
    return model


def losses_and_gradients(model, batch):
    model.train()
    torch.manual_seed(0)
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in losses.items()}, gradients


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_training_step_shortcuts_equal_plain(norm):
    model = frozen_model("MODEL.RESNETS.NORM", norm)
    plain = frozen_model("MODEL.RESNETS.NORM", norm, *PLAIN)
    plain.load_state_dict(model.state_dict())
    batch = [busy_item(0), unrelated_item()]
    losses, gradients = losses_and_gradients(model, batch)
    expected, expected_gradients = losses_and_gradients(plain, batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        wanted = expected_gradients[name]
        tolerance = 1e-4 * wanted.abs().max().item() + 1e-9
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=tolerance, msg=name)


def test_training_step_shared_stages_only_is_bit_equal():
    others = ("MODEL.RELDN.FOLD_NORMALIZATION", False, "MODEL.RELDN.MAPS_ON_DEMAND", False)
    model, plain = frozen_model(*others), frozen_model(*PLAIN)
    plain.load_state_dict(model.state_dict())
    assert model._later_backbone().shared_stages == ("res2",)
    batch = [busy_item(0), busy_item(1)]
    results = [losses_and_gradients(x, batch) for x in (model, plain)]
    for ours, theirs in zip(*results):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("kind", ["faster_rcnn_FPN", "faster_rcnn_C4", "faster_rcnn_VGG16"])
def test_predictions_shared_stages_are_bit_equal(kind):
    models = []
    for options in ((), PLAIN):
        torch.manual_seed(0)
        cfg = detector_config(kind, "MODEL.WEIGHTS", "", *FROZEN, *options)
        model = build_model(cfg).eval()
        model.predicate_backbone.load_state_dict(model.detector.backbone.state_dict(), strict=False)
        models.append(model)
    assert models[0]._later_backbone() is not models[0].predicate_backbone
    assert models[1]._later_backbone() is models[1].predicate_backbone
    with torch.no_grad():
        ours, theirs = (model([busy_item(0)])[0] for model in models)
    assert torch.equal(ours["relations"].scores, theirs["relations"].scores)
    assert torch.equal(ours["relations"].pairs, theirs["relations"].pairs)


def test_frozen_stages_changed_weight_is_noticed():
    model = frozen_model()
    assert model._later_backbone().shared_stages == ("res2",)
    state = copy.deepcopy(model.state_dict())
    name = "predicate_backbone.bottom_up.res2.0.conv1.weight"
    state[name][0, 0] += 1.0
    model.load_state_dict(state)
    assert model._later_backbone() is model.predicate_backbone
    state[name][0, 0] -= 1.0
    model.load_state_dict(state)
    torch.testing.assert_close(
        model.state_dict()[name], model.state_dict()[name.replace("predicate_", "detector.model.")]
    )
    with torch.no_grad():  # the very same bits
        weights = model.detector.backbone.bottom_up.res2[0].conv1.weight
        model.predicate_backbone.bottom_up.res2[0].conv1.weight.copy_(weights)
    assert model._later_backbone().shared_stages == ("res2",)
    model.predicate_backbone.bottom_up.res2.requires_grad_(True)
    assert model._later_backbone() is model.predicate_backbone


def test_frozen_stages_changed_statistics_are_noticed():
    model = frozen_model()
    model.predicate_backbone.bottom_up.stem.conv1.norm.running_mean += 1.0
    assert model._later_backbone() is model.predicate_backbone


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.BACKBONE.FREEZE_AT", 0),
        ("MODEL.RELDN.DETECTOR_PRECISION", "bf16"),
        ("MODEL.RELDN.SHARE_FROZEN_STAGES", False),
    ],
)
def test_frozen_stages_not_equal_or_switched_off_are_not_shared(options):
    model = frozen_model(*options)
    assert model._later_backbone() is model.predicate_backbone


def test_frozen_stages_leave_state_dict_and_copies_alone():
    model, plain = frozen_model(), frozen_model(*PLAIN)
    model._later_backbone()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    other = copy.deepcopy(model)
    stage = other._later_backbone().bottom_up.res3
    assert stage is other.predicate_backbone.bottom_up.res3
    assert stage is not model.predicate_backbone.bottom_up.res3


def test_frozen_stages_different_structures_have_none():
    first, second = (frozen_model("MODEL.RESNETS.STEM_OUT_CHANNELS", x) for x in (8, 4))
    backbones = first.detector.backbone, second.predicate_backbone
    assert FrozenStages().later_backbone(*backbones) is None


def test_frozen_stages_training_the_later_ones_compares_no_second_time(monkeypatch):
    model, compared = frozen_model().train(), []
    are_equal = frozen_stages._are_equal
    monkeypatch.setattr(
        frozen_stages, "_are_equal", lambda *x: bool(compared.append(x)) or are_equal(*x)
    )
    optimizer = torch.optim.SGD((x for x in model.parameters() if x.requires_grad), lr=1e-4)
    stage = model.predicate_backbone.bottom_up.res3
    before = copy.deepcopy(stage.state_dict())
    for _ in range(3):
        with EventStorage():
            sum(model([busy_item(0)]).values()).backward()
        optimizer.step()
    assert any(not torch.equal(x, before[name]) for name, x in stage.state_dict().items())
    assert len(compared) == 1


def replace_backbone(model):
    model.predicate_backbone = copy.deepcopy(model.predicate_backbone)
    return model.predicate_backbone.bottom_up.res3


def replace_later_stage(model):
    model.predicate_backbone.bottom_up.res3 = copy.deepcopy(model.predicate_backbone.bottom_up.res3)
    return model.predicate_backbone.bottom_up.res3


def replace_part_of_fpn(model):
    model.predicate_backbone.fpn_output3 = copy.deepcopy(model.predicate_backbone.fpn_output3)
    return model.predicate_backbone.fpn_output3


@pytest.mark.parametrize("replace", [replace_backbone, replace_later_stage, replace_part_of_fpn])
def test_frozen_stages_replaced_module_is_used(replace):
    model = frozen_model()
    model._later_backbone()
    module = replace(model)
    later = model._later_backbone()
    assert later is not model.predicate_backbone and module in list(later.modules())


def test_frozen_stages_replaced_frozen_stage_is_compared():
    model = frozen_model()
    model._later_backbone()
    body = model.predicate_backbone.bottom_up
    body.res2 = copy.deepcopy(body.res2)
    assert model._later_backbone().shared_stages == ("res2",)
    body.res2[0].conv1.stride = (3, 3)
    body.res2 = copy.deepcopy(body.res2)
    assert model._later_backbone() is model.predicate_backbone


@pytest.mark.parametrize(
    "extract",
    [
        lambda backbone, x: backbone(0.5 * x),
        lambda backbone, x: [backbone(x), backbone(x.flip(3))][0],
    ],
)
def test_frozen_stages_detector_that_changes_images_shares_none(extract, monkeypatch):
    model = frozen_model().eval()
    backbone = model.detector.backbone
    monkeypatch.setattr(model.detector, "extract_features", lambda x: extract(backbone, x.tensor))
    images = model.detector.preprocess([busy_item(0)])
    with torch.no_grad():
        maps, expected = model.feature_maps(images)[1], model.predicate_backbone(images.tensor)
    assert all(torch.equal(maps[name], x) for name, x in expected.items())


@pytest.mark.parametrize("bias", [False, True])
def test_folding_conv_values_and_gradients_equal_unfolded(bias):
    torch.manual_seed(0)
    plain = Conv2d(
        *(4, 6, 3), padding=1, bias=bias, norm=get_norm("FrozenBN", 6), activation=torch.relu
    )
    give_distinct_statistics(plain)
    folding = copy.deepcopy(plain)
    folding.__class__ = FoldingConv2d
    x = torch.randn(2, 4, 8, 9)
    assert torch.equal(folding(x), plain(x))
    folding.folds = True
    results = []
    for conv in (folding, plain):
        own = x.clone().requires_grad_()
        out = conv(own)
        out.square().sum().backward()
        results.append([out.detach(), own.grad, conv.weight.grad])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_folding_is_off_in_eval_mode():
    model = frozen_model().train()
    folding = [x for x in model.modules() if isinstance(x, FoldingConv2d)]
    assert len(folding) > 10 and all(x.folds for x in folding)
    assert any(x in folding for x in model.detector.modules())
    assert not any(x.folds for x in model.eval().modules() if isinstance(x, FoldingConv2d))
    model = frozen_model("MODEL.RELDN.FOLD_NORMALIZATION", False).train()
    assert not any(x.folds for x in model.modules() if isinstance(x, FoldingConv2d))


def pyramid():
    """Build a small FPN and a batch of images."""
    torch.manual_seed(0)
    fpn = build_backbone(detector_config("faster_rcnn_FPN"))
    return fpn, torch.randn(2, 3, 160, 192)


def draw_boxes(small: int = 6, large: int = 5) -> list[Boxes]:
    """Draw boxes of two images: a few small ones, some reach out of the image, one is empty."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(small + large, 2, generator=generator) * torch.tensor([170.0, 140.0]) - 3
    sides = torch.rand(small + large, 2, generator=generator) * 20 + 2
    sides[small:] *= 8
    boxes = torch.cat([low, low + sides], dim=1)
    boxes[0, 2:] = boxes[0, :2]
    return [Boxes(boxes[::2]), Boxes(boxes[1::2])]


def pooler(pooler_type="ROIAlignV2", base=LevelPooler):
    scales = (1 / 4, 1 / 8, 1 / 16)
    return base(
        output_size=7, scales=scales, sampling_ratio=2, pooler_type=pooler_type,
        canonical_box_size=48, canonical_level=3,
    )  # fmt: skip


@pytest.mark.parametrize("pooler_type", ["ROIAlignV2", "ROIAlign"])
@pytest.mark.parametrize("share, is_sparse", [(0.25, True), (0.0, False)])
def test_maps_on_demand_pooled_rows_equal_pooled_maps(pooler_type, share, is_sparse, monkeypatch):
    monkeypatch.setattr("reldn_d2.modeling.backbone.lazy_fpn._DENSE_SHARE", share)
    fpn, images = pyramid()
    boxes, results = draw_boxes(), []
    for lazy in (True, False):
        fpn.zero_grad()
        if lazy:
            maps = maps_on_demand(fpn, images)
            pooled = pooler(pooler_type).pool(maps, LEVELS, boxes)
            assert isinstance(maps, MapsOnDemand) and ("p2" in maps._maps) != is_sparse
        else:
            maps = fpn(images)
            pooled = pooler(pooler_type, ROIPooler)([maps[x] for x in LEVELS], boxes)
        (pooled * torch.arange(pooled.numel()).view_as(pooled).sin()).sum().backward()
        gradients = {n: p.grad for n, p in fpn.named_parameters() if p.grad is not None}
        results.append((pooled.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        tolerance = 1e-4 * their_gradients[name].abs().max().item() + 1e-9
        torch.testing.assert_close(gradient, their_gradients[name], rtol=0, atol=tolerance)


def test_maps_on_demand_no_small_box_keeps_all_parameters_in_the_graph():
    fpn, images = pyramid()
    maps = maps_on_demand(fpn, images)
    boxes = [Boxes(torch.tensor([[0.0, 0.0, 150.0, 150.0]])), Boxes(torch.zeros(0, 4))]
    pooler().pool(maps, LEVELS, boxes).sum().backward()
    assert fpn.fpn_output2.weight.grad.abs().max() == 0  # distributed training needs one


def test_maps_on_demand_no_box_at_all_pools_nothing():
    fpn, images = pyramid()
    pooled = pooler().pool(maps_on_demand(fpn, images), LEVELS, [Boxes(torch.zeros(0, 4))] * 2)
    assert pooled.shape == (0, fpn.output_shape()["p2"].channels, 7, 7)
    pooled.sum().backward()
    assert fpn.fpn_output3.weight.grad.abs().max() == 0


def test_maps_on_demand_read_as_mapping_equals_fpn():
    fpn, images = pyramid()
    maps, expected = maps_on_demand(fpn, images), fpn(images)
    assert list(maps) == list(expected) and len(maps) == len(expected)
    for name in reversed(list(maps)):
        assert torch.equal(maps[name], expected[name])
        if name in LEVELS:
            assert maps.shape(name) == (2, *expected[name].shape[-2:])


def test_training_step_entity_boxes_are_pooled_without_gradients():
    """The detector is frozen, so RoIAlign has a backward pass for union boxes only."""
    model, pooled = frozen_model("MODEL.RELDN.MAPS_ON_DEMAND", False).train(), []
    for pool in (model.relation_head.entity_pooler, model.relation_head.predicate_pooler):
        pool.register_forward_hook(lambda _, inputs, output: pooled.append(output))
    with EventStorage():
        model([busy_item(0)])
    assert [x.requires_grad for x in pooled] == [False, True]


def test_level_pooler_is_bit_equal_to_roi_pooler():
    fpn, images = pyramid()
    with torch.no_grad():
        maps = fpn(images)
    for boxes in (draw_boxes(), draw_boxes(0, 3), [Boxes(torch.zeros(0, 4))] * 2):
        x = [maps[name].clone().requires_grad_() for name in LEVELS]
        y = [maps[name].clone().requires_grad_() for name in LEVELS]
        ours, theirs = pooler()(x, boxes), pooler(base=ROIPooler)(y, boxes)
        assert torch.equal(ours, theirs)
        ours.square().sum().backward()
        theirs.square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(x, y))


def test_level_pooler_bfloat16_maps_keep_coordinates():
    torch.manual_seed(0)
    maps = [torch.randn(1, 2, 256 // 2**i, 256 // 2**i).bfloat16() for i in range(3)]
    boxes = [Boxes(torch.tensor([[701.3, 702.9, 731.3, 741.1], [21.3, 30.9, 701.3, 702.9]]))]
    for number in (3, 1):
        parts = dict(scales=(1 / 4, 1 / 8, 1 / 16)[:number], sampling_ratio=2)
        ours, theirs = (
            kind(7, pooler_type="ROIAlignV2", **parts) for kind in (LevelPooler, ROIPooler)
        )
        expected = theirs([x.float() for x in maps[:number]], boxes)
        torch.testing.assert_close(ours(maps[:number], boxes), expected)
