"""The converter for the authors' checkpoints: names, order of classes, anchors, probabilities."""

import importlib.util

import numpy as np
import pytest
import safetensors_stand_in
import torch
import torch.nn.functional as F
from model_utils import ROOT, TINY, busy_item, released_state, small_config

import reldn_d2
from reldn_d2 import RelDNCheckpointer
from reldn_d2.checkpoint import read_checkpoint

from detectron2.modeling import build_model
from detectron2.structures import Boxes


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "convert_released_weights", ROOT / "tools/convert_released_weights.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resnet_config():
    """ResNet-50-FPN, narrow, with the keys of the released experiments."""
    narrow = (
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", 2, "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.DEVICE", "cpu"),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", 9),
        *("MODEL.ROI_RELATION_HEAD.NUM_PREDICATES", 6, "DATASETS.TRAIN", ("toy_vrd_train",)),
    )
    return reldn_d2.load_config(str(ROOT / "configs/Base-RelDN.yaml"), narrow)


def vgg_config():
    return small_config(*TINY, config="configs/Toy/Detectors/faster_rcnn_VGG16.yaml")


@pytest.mark.parametrize("config", [resnet_config, vgg_config])
def test_to_ours_uses_every_released_value_once(tool, config):
    cfg = config()
    theirs = released_state(tool, cfg)
    unused = []
    ours = tool.to_ours(theirs, cfg, report=unused.append)
    assert unused == [] and set(ours) == set(build_model(cfg).state_dict())
    for name, value in ours.items():
        rule = tool.rule_of(name, cfg)
        if rule is not None:
            released = theirs.pop(rule.name)
            if "bbox_pred" in name:  # the background's boxes are not kept
                released = released[4:]
            assert torch.equal(value.flatten().sort()[0], released.flatten().sort()[0]), name
    assert not theirs


def test_rule_of_gives_released_names(tool):
    names = set(released_state(tool, resnet_config()))
    assert {
        "Conv_Body.conv_body.res1.conv1.weight",
        "Conv_Body.conv_body.res1.bn1.bias",
        "Conv_Body.conv_body.res2.0.downsample.0.weight",
        "Conv_Body.conv_body.res5.2.bn3.weight",
        "Conv_Body.conv_top.weight",
        "Conv_Body.topdown_lateral_modules.2.conv_lateral.bias",
        "Conv_Body.posthoc_modules.3.weight",
        "RPN.FPN_RPN_cls_score.weight",
        "Box_Head.fc1.weight",
        "Box_Outs.cls_score.bias",
        "Prd_RCNN.Conv_Body.conv_top.weight",
        "Prd_RCNN.Box_Head.fc2.weight",
        "S_Head.fc1.weight",
        "O_Head.fc2.bias",
        "RelDN.prd_cls_feats.0.weight",
        "RelDN.prd_cls_scores.weight",
        "RelDN.prd_sbj_scores.bias",
        "RelDN.prd_obj_scores.weight",
        "RelDN.spt_cls_feats.2.weight",
        "RelDN.spt_cls_scores.bias",
        "RelDN.freq_bias.rel_baseline.weight",
    } <= names


def test_to_ours_background_first_moves_it_to_the_end(tool):
    cfg = resnet_config()
    theirs = released_state(tool, cfg)
    ours = tool.to_ours(theirs, cfg)
    scores = "RelDN.prd_sbj_scores.bias"
    assert torch.equal(ours["relation_head.visual.subject_skip.bias"][-1], theirs[scores][0])
    assert torch.equal(ours["relation_head.visual.subject_skip.bias"][0], theirs[scores][1])
    classes = ours["detector.model.roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(classes, theirs["Box_Outs.cls_score.bias"][[*range(1, 10), 0]])
    boxes = ours["detector.model.roi_heads.box_predictor.bbox_pred.bias"]
    assert torch.equal(boxes, theirs["Box_Outs.bbox_pred.bias"][4:])
    table = theirs["RelDN.freq_bias.rel_baseline.weight"]
    assert torch.equal(ours["relation_head.semantic.table.weight"][:, -1], table[:, 0])
    # With a background class in the table, too.
    grid = torch.randn(10, 10, 7)
    grid[1:, 1:] = table.view(9, 9, 7)
    larger = {**theirs, "RelDN.freq_bias.rel_baseline.weight": grid.view(100, 7)}
    again = tool.to_ours(larger, cfg)["relation_head.semantic.table.weight"]
    assert torch.equal(again, ours["relation_head.semantic.table.weight"])


def test_to_ours_anchors_of_one_map_get_detectron2s_order(tool):
    cfg = vgg_config()  # sizes 16, 32, 64 and ratios 0.5, 1, 2
    theirs = released_state(tool, cfg)
    ours = tool.to_ours(theirs, cfg)
    head, order = "detector.model.proposal_generator.rpn_head", [0, 3, 6, 1, 4, 7, 2, 5, 8]
    scores = theirs["RPN.RPN_cls_score.bias"]
    assert torch.equal(ours[f"{head}.objectness_logits.bias"], scores[order])
    deltas = theirs["RPN.RPN_bbox_pred.bias"].view(9, 4)
    assert torch.equal(ours[f"{head}.anchor_deltas.bias"].view(9, 4), deltas[order])
    two = {**theirs, "RPN.RPN_cls_score.bias": torch.cat([torch.ones(9), scores])}
    two["RPN.RPN_cls_score.weight"] = theirs["RPN.RPN_cls_score.weight"].repeat(2, 1, 1, 1)
    again = tool.to_ours(two, cfg)[f"{head}.objectness_logits.bias"]
    torch.testing.assert_close(again, scores[order] - 1)


def test_to_ours_vgg_under_other_container_names_gives_the_same(tool):
    cfg = vgg_config()
    theirs = released_state(tool, cfg)
    renamed = {
        name.replace("Conv_Body.features", "Conv_Body.convs")
        .replace("Head.fc1", "Head.heads.0")
        .replace("Head.fc2", "Head.heads.3"): value
        for name, value in theirs.items()
    }
    assert set(renamed) != set(theirs)
    ours, again = tool.to_ours(theirs, cfg), tool.to_ours(renamed, cfg)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def released_spatial_vector(subject, object_, height, width):
    """The released code's 28 values of one pair of XYXY boxes, written down from its formula."""

    def delta(first, second):
        w1, h1 = first[2] - first[0], first[3] - first[1]
        w2, h2 = second[2] - second[0], second[3] - second[1]
        x1, y1 = first[0] + 0.5 * w1, first[1] + 0.5 * h1
        x2, y2 = second[0] + 0.5 * w2, second[1] + 0.5 * h2
        return [
            (x2 - x1) / w1,
            (y2 - y1) / h1,
            np.log(w2 / w1),
            np.log(h2 / h1),
            (x1 - x2) / w2,
            (y1 - y2) / h2,
        ]

    def position(box):
        w, h = box[2] - box[0], box[3] - box[1]
        relative = [box[0] / width, box[1] / height, (box[0] + w) / width, (box[1] + h) / height]
        return [*relative, w * h / (width * height)]

    union = np.concatenate([np.minimum(subject, object_)[:2], np.maximum(subject, object_)[2:]])
    deltas = [*delta(subject, object_), *delta(subject, union), *delta(union, object_)]
    return np.array([*deltas, *position(subject), *position(object_)])


def test_converted_head_gives_the_probabilities_of_the_released_formula(tool):
    """The released relation head, written out on the released weights."""
    cfg = resnet_config()
    theirs = {name: 0.1 * x for name, x in released_state(tool, cfg).items()}
    model = build_model(cfg)
    model.load_state_dict(tool.to_ours(theirs, cfg))
    head, size = model.relation_head, (64, 96)
    torch.manual_seed(1)
    features = {f"p{i}": torch.randn(1, 8, 64 // 2**i + 1, 96 // 2**i + 1) for i in range(2, 6)}
    predicate = {name: torch.randn_like(x) for name, x in features.items()}
    boxes = busy_item()["instances"].gt_boxes
    classes = busy_item()["instances"].gt_classes
    pairs = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 1]])
    s, o = pairs.T
    with torch.no_grad():
        entities = head.encode_entities(features, [boxes], [classes], [size])
        ours = head.pair_logits(entities, predicate, s, o).softmax(dim=1)

        def layer(name, x):
            return F.linear(x, theirs[f"{name}.weight"], theirs[f"{name}.bias"])

        def vectors(name, pooled):
            hidden = F.relu(layer(f"{name}.fc1", pooled.flatten(1)))
            return layer(f"{name}.fc2", hidden)  # NO_FC7_RELU

        maps = [features[n] for n in head.in_features]
        union = torch.cat(
            [
                torch.minimum(boxes.tensor[s], boxes.tensor[o])[:, :2],
                torch.maximum(boxes.tensor[s], boxes.tensor[o])[:, 2:],
            ],
            dim=1,
        )
        pooled = head.entity_pooler(maps, [boxes])
        maps = [predicate[n] for n in head.in_features]
        subject, thing = vectors("S_Head", pooled)[s], vectors("O_Head", pooled)[o]
        relation = vectors("Prd_RCNN.Box_Head", head.predicate_pooler(maps, [Boxes(union)]))
        x = torch.cat([subject, relation, thing], dim=1)
        x = F.leaky_relu(layer("RelDN.prd_cls_feats.0", x), 0.1)
        x = F.leaky_relu(layer("RelDN.prd_cls_feats.2", x), 0.1)
        scores = layer("RelDN.prd_cls_scores", x)
        scores = scores + layer("RelDN.prd_sbj_scores", subject)
        scores = scores + layer("RelDN.prd_obj_scores", thing)
        table = theirs["RelDN.freq_bias.rel_baseline.weight"]
        scores = scores + table[classes[s] * 9 + classes[o]]
        table = boxes.tensor.double().numpy()
        x = [released_spatial_vector(table[i], table[j], *size) for i, j in pairs.tolist()]
        x = torch.tensor(np.array(x), dtype=torch.float32)
        x = F.leaky_relu(layer("RelDN.spt_cls_feats.0", x), 0.1)
        x = F.leaky_relu(layer("RelDN.spt_cls_feats.2", x), 0.1)
        spatial = layer("RelDN.spt_cls_scores", x)
        probabilities = (scores + spatial).softmax(dim=1)
    assert spatial.std() > 0.01  # the spatial part matters
    torch.testing.assert_close(ours[:, :-1], probabilities[:, 1:])  # their first is ours last
    torch.testing.assert_close(ours[:, -1], probabilities[:, 0])
    assert ours.std() > 1e-3


@pytest.mark.parametrize("config, ratio", [(resnet_config, 2), (vgg_config, 0)])
def test_main_writes_released_anchors_pooling_and_pixels(tool, tmp_path, config, ratio):
    cfg = config()
    source, yaml = tmp_path / "model_step1.pth", tmp_path / "experiment.yaml"
    torch.save({"model": released_state(tool, cfg)}, source)
    yaml.write_text(cfg.dump())
    tool.main([str(source), str(tmp_path / "oi.pth"), "--config-file", str(yaml)])
    model = reldn_d2.load_config(str(tmp_path / "oi.yaml")).MODEL
    assert model.ANCHOR_GENERATOR.OFFSET == 0.5
    assert model.PIXEL_MEAN == [102.9801, 115.9465, 122.7717] and model.PIXEL_STD == [1.0] * 3
    for head in (model.ROI_BOX_HEAD, model.ROI_RELATION_HEAD):
        assert (head.POOLER_TYPE, head.POOLER_SAMPLING_RATIO) == ("ROIAlign", ratio)
    # The poolers and anchors of the model that the YAML file describes.
    built = build_model(reldn_d2.load_config(str(tmp_path / "oi.yaml")))
    poolers = [built.detector.model.roi_heads.box_pooler, built.relation_head.entity_pooler]
    for pooler in (*poolers, built.relation_head.predicate_pooler):
        for level in pooler.level_poolers:
            assert (level.aligned, level.sampling_ratio) == (False, ratio)
    assert built.detector.model.proposal_generator.anchor_generator.offset == 0.5


def test_converted_frozen_norms_equal_the_released_affine_maps(tool):
    cfg = resnet_config()
    theirs = released_state(tool, cfg)
    model = build_model(cfg)
    model.load_state_dict(tool.to_ours(theirs, cfg))
    norm = model.detector.model.backbone.bottom_up.res2[0].conv1.norm
    x = torch.randn(2, norm.num_features, 3, 3)
    name = "Conv_Body.conv_body.res2.0.bn1"
    wanted = x * theirs[f"{name}.weight"].view(1, -1, 1, 1) + theirs[f"{name}.bias"].view(
        1, -1, 1, 1
    )
    torch.testing.assert_close(norm(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_main_writes_a_checkpoint_that_loads(tool, tmp_path, suffix, monkeypatch):
    safetensors_stand_in.install(monkeypatch)
    cfg = resnet_config()
    source, yaml = tmp_path / "model_step1.pth", tmp_path / "experiment.yaml"
    torch.save({"step": 1, "model": {**released_state(tool, cfg), "extra": torch.ones(1)}}, source)
    yaml.write_text(cfg.dump())
    target = tmp_path / "out" / f"released{suffix}"
    tool.main([str(source), str(target), "--config-file", str(yaml)])
    again = reldn_d2.load_config(str(target.with_suffix(".yaml")))
    assert again.MODEL.PIXEL_STD == [1.0, 1.0, 1.0] and again.MODEL.WEIGHTS == str(target)
    model = build_model(again)
    RelDNCheckpointer(model).load(str(target))
    assert bool(model.relation_head.semantic.counted)
    content = read_checkpoint(str(target))
    assert len(content["reldn"]["predicate_classes"]) == 6


def test_to_ours_wrong_weights_raises_or_reports(tool):
    cfg = resnet_config()
    theirs = released_state(tool, cfg)
    missing = {name: x for name, x in theirs.items() if not name.startswith("S_Head")}
    with pytest.raises(ValueError, match="no S_Head.fc1.weight.*subject_box_head.fc1.weight"):
        tool.to_ours(missing, cfg)
    cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES = 9
    with pytest.raises(ValueError, match=r"shape \(.*the model has \(.*numbers of classes"):
        tool.to_ours(theirs, cfg)
    lines = []
    tool.to_ours({**theirs, "Mask_Head.x": torch.ones(1)}, resnet_config(), report=lines.append)
    assert lines == ["Ignored 1 unexpected weights: Mask_Head.x"]
