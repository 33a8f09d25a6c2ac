"""The whole model: training steps, switches, tasks, output; frozen means frozen."""

import itertools

import pytest
import torch
from model_utils import (
    SIZE,
    busy_item,
    empty_item,
    give_distinct_statistics,
    item,
    one_box_item,
    small_config,
    small_model,
    unrelated_item,
)

from reldn_d2.engine.defaults import build_optimizer
from reldn_d2.modeling.meta_arch import postprocess_relations
from reldn_d2.structures.relations import predicted_relations

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

HEAD = "MODEL.ROI_RELATION_HEAD"
SWITCHES = {
    "semantic": f"{HEAD}.SEMANTIC.ENABLED",
    "spatial": f"{HEAD}.SPATIAL.ENABLED",
    "joint": f"{HEAD}.JOINT.ENABLED",
    "SPO": f"{HEAD}.VISUAL.SPO",
    "S skip": f"{HEAD}.VISUAL.SUBJECT_SKIP",
    "O skip": f"{HEAD}.VISUAL.OBJECT_SKIP",
}
BATCHES = {
    "normal": [busy_item(0), busy_item(1)],
    "one image": [busy_item(0)],
    "all kinds": [busy_item(0), unrelated_item(), one_box_item(), empty_item()],
    "no relation": [unrelated_item()],
    "one box": [one_box_item()],
    "no annotation": [empty_item(), empty_item()],
}


def train_step(model, batch):
    """Losses of one step, after their gradients were computed; a clean slate before."""
    model.train()
    model.zero_grad(set_to_none=True)
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}


def without_gradient(model):
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def predict(model, batch):
    model.eval()
    with torch.no_grad():
        return model(batch)


def check_output(results, batch):
    for result, x in zip(results, batch):
        instances, relations = result["instances"], result["relations"]
        assert instances.image_size == relations.image_size == (x["height"], x["width"])
        assert {"pred_boxes", "scores", "pred_classes"} <= set(instances.get_fields())
        count = len(relations)
        assert relations.pairs.shape == (count, 2)
        assert (relations.scores[1:] <= relations.scores[:-1]).all()
        assert torch.isfinite(relations.scores).all() and (relations.scores >= 0).all()
        for pair, score, probability in zip(
            relations.pairs, relations.scores, relations.predicate_scores
        ):
            assert pair[0] != pair[1]
            product = instances.scores[pair].prod() * probability
            assert score.item() == pytest.approx(product.item(), rel=1e-5)


@pytest.mark.parametrize("entities", ["ground_truth", "proposals"])
@pytest.mark.parametrize("kind", BATCHES)
def test_training_step_any_batch_gives_finite_losses_and_all_gradients(kind, entities):
    """The latter is what distributed training asks for."""
    model = small_model("MODEL.RELDN.TRAIN_ENTITIES", entities)
    losses = train_step(model, BATCHES[kind])
    assert set(losses) == {
        "loss_predicate",
        "loss_class_agnostic",
        "loss_entity_class",
        "loss_predicate_class",
    }
    assert all(torch.isfinite(torch.tensor(x)) for x in losses.values())
    assert without_gradient(model) == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if kind in ("one box", "no annotation"):
        assert all(x == 0 for x in losses.values())
    if kind == "normal":
        assert losses["loss_predicate"] > 0 and losses["loss_class_agnostic"] > 0


@pytest.mark.parametrize("kind", ["all kinds", "no annotation"])
@pytest.mark.parametrize("off", SWITCHES)
def test_reldn_one_module_off_trains_and_predicts(off, kind):
    switches = (SWITCHES["joint"], True, SWITCHES[off], False)
    model = small_model(*switches, "TEST.RELATIONS.TASK", "prdcls")
    head, visual = model.relation_head, model.relation_head.visual
    there = {
        "semantic": head.semantic,
        "spatial": head.spatial,
        "joint": head.joint,
        "SPO": visual.first,
        "S skip": visual.subject_skip,
        "O skip": visual.object_skip,
    }
    assert [name for name, part in there.items() if part is None] == [off]
    assert (model.predicate_backbone is None) == (off == "SPO")
    assert len(head.box_heads) == (2 if off == "SPO" else 3)
    losses = train_step(model, BATCHES[kind])
    assert all(torch.isfinite(torch.tensor(x)) for x in losses.values())
    assert without_gradient(model) == []
    batch = [{**x, "height": SIZE[0], "width": SIZE[1]} for x in BATCHES[kind]]
    results = predict(model, batch)
    check_output(results, batch)
    assert kind != "all kinds" or len(results[0]["relations"]) > 0


@pytest.mark.parametrize("on", SWITCHES)
def test_reldn_one_module_on_trains_and_predicts(on):
    options = [part for name, key in SWITCHES.items() for part in (key, name == on)]
    model = small_model(*options)
    train_step(model, BATCHES["all kinds"])
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert without_gradient(model) == [] and all(n.startswith("detector.") for n in frozen)
    assert len(predict(model, BATCHES["normal"])) == 2
    assert len(model.relation_head.box_heads) == {"SPO": 3, "S skip": 1, "O skip": 1}.get(on, 0)


def test_reldn_all_modules_off_raises():
    options = [part for key in SWITCHES.values() for part in (key, False)]
    with pytest.raises(ValueError, match="no module left.*SEMANTIC.ENABLED"):
        small_model(*options)


def test_semantic_module_frozen_table_gets_no_gradient():
    model = small_model(f"{HEAD}.SEMANTIC.FREEZE", True)
    train_step(model, BATCHES["normal"])
    assert model.relation_head.semantic.table.weight.grad is None
    assert without_gradient(model) == []


@pytest.mark.parametrize(
    "lambdas", [x for x in itertools.product([0.0, 0.7], repeat=3) if x != (0.7, 0.7, 0.7)]
)
def test_losses_zero_lambda_switches_loss_off(lambdas):
    options = [part for i in range(3) for part in (f"{HEAD}.LOSS.LAMBDA_{i + 1}", lambdas[i])]
    model = small_model(*options)
    losses = train_step(model, BATCHES["all kinds"])
    names = ("class_agnostic", "entity_class", "predicate_class")
    wanted = {f"loss_{name}" for name, weight in zip(names, lambdas) if weight}
    assert set(losses) == {"loss_predicate"} | wanted
    assert without_gradient(model) == []


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def snapshot(module):
    return {name: tensor.detach().clone() for name, tensor in tensors(module).items()}


def changed(module, before):
    after = tensors(module)
    assert set(after) == set(before)
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("entities", ["ground_truth", "proposals"])
def test_detector_training_steps_leave_it_unchanged(entities, optimizer):
    options = ("MODEL.RELDN.TRAIN_ENTITIES", entities, "SOLVER.OPTIMIZER", optimizer)
    cfg, model = small_config(*options), small_model(*options)
    give_distinct_statistics(model.detector.model.backbone)
    optimizer = build_optimizer(cfg, model)
    frozen, trained = snapshot(model.detector), snapshot(model.predicate_backbone)
    assert any("running_mean" in name for name in frozen)
    for step in range(3):
        train_step(model, [busy_item(2 * step), busy_item(2 * step + 1)])
        assert not any(module.training for module in model.detector.modules())
        assert all(p.grad is None and not p.requires_grad for p in model.detector.parameters())
        optimizer.step()
    assert changed(model.detector, frozen) == set()
    its_parameters = {id(p) for p in model.detector.parameters()}
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not its_parameters & (grouped | {id(p) for p in optimizer.state})
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    # The predicate backbone and the rest learn, its BatchNorm statistics move.
    moved = changed(model.predicate_backbone, trained)
    assert any("running_var" in name for name in moved) and any("conv" in name for name in moved)
    assert all(module.training for module in model.predicate_backbone.modules())
    assert model.relation_head.training and model.training


def test_reldn_train_mode_keeps_detector_in_eval():
    model = small_model()
    model.eval()
    assert not model.predicate_backbone.training and not model.relation_head.training
    model.train()
    assert model.predicate_backbone.training and not model.detector.training
    model.detector.train()
    assert not any(module.training for module in model.detector.modules())


def rates(optimizer):
    return {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_build_optimizer_parameter_groups_have_expected_rates():
    cfg = small_config(
        *("SOLVER.BASE_LR", 0.01, "SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.OPTIMIZER", "SGD"),
        *("SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.0),
        *("SOLVER.WEIGHT_DECAY", 1e-4, "SOLVER.WEIGHT_DECAY_NORM", 0.0),
    )
    model = small_model()
    found = rates(build_optimizer(cfg, model))
    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for p in module.parameters()
    }
    slow_names = ("predicate_backbone.", "relation_head.predicate_box_head.")
    table = "relation_head.semantic.table.weight"
    kinds = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in found
            continue
        slow, bias = name.startswith(slow_names), name.endswith(".bias") or name == table
        rate, decay = found[id(parameter)]
        assert rate == pytest.approx(0.01 * (0.1 if slow else 1) * (2 if bias else 1)), name
        assert decay == (0.0 if bias or id(parameter) in norms else 1e-4), name
        kinds.add((slow, bias))
    assert len(kinds) == 4 and model.get_parameter(table).requires_grad


def test_build_optimizer_unknown_name_raises():
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER is 'Adagrad'; known: SGD, AdamW"):
        build_optimizer(small_config("SOLVER.OPTIMIZER", "Adagrad"), small_model())


@pytest.mark.parametrize("key", ["TEST.RELATIONS.TASK", "MODEL.RELDN.TRAIN_ENTITIES"])
def test_reldn_unknown_choice_raises(key):
    with pytest.raises(ValueError, match=f"{key} is 'nonsense'; known: "):
        small_model(key, "nonsense")


def test_reldn_unknown_detector_raises():
    with pytest.raises(ValueError, match="DETECTOR is 'NoSuchDetector'; known: C4RCNNDetector"):
        small_model("MODEL.RELDN.DETECTOR", "NoSuchDetector")


@pytest.mark.parametrize("task", ["sgdet", "sgcls", "prdcls", "preddet"])
def test_reldn_each_task_output_contract_holds(task):
    limits = ("TEST.RELATIONS.TOPK", 30, "TEST.RELATIONS.PREDICATES_PER_PAIR", [1])
    model = small_model("TEST.RELATIONS.TASK", task, *limits)
    batch = [{**x, "height": 128, "width": 96} for x in BATCHES["all kinds"]]
    results = predict(model, batch)
    check_output(results, batch)
    assert 0 < len(results[0]["relations"]) <= 30
    given = batch[0]["instances"]
    found = results[0]["instances"]
    if task == "sgdet":
        assert len(found) <= 6
        return
    wanted = given.gt_boxes.tensor * torch.tensor([1.0, 2.0, 1.0, 2.0])  # 64x96 to 128x96
    torch.testing.assert_close(found.pred_boxes.tensor, wanted)
    assert len(results[2]["instances"]) == 1 and len(results[2]["relations"]) == 0
    assert len(results[3]["instances"]) == 0 and len(results[3]["relations"]) == 0
    if task != "sgcls":
        assert torch.equal(found.pred_classes, given.gt_classes)
        assert (found.scores == 1).all()
        relations = results[0]["relations"]
        torch.testing.assert_close(relations.scores, relations.predicate_scores)
    else:
        assert ((found.scores > 1 / 10) & (found.scores < 1)).all()


@pytest.mark.parametrize("task", ["sgcls", "prdcls"])
def test_reldn_given_boxes_are_all_paired_and_keep_their_classes(task):
    """The overlap filter concerns detected boxes only. The first three boxes are equal."""
    model = small_model(
        *("TEST.RELATIONS.TASK", task, "TEST.RELATIONS.TOPK", 1000, f"{HEAD}.OVERLAP_FILTER", True)
    )
    boxes = [[10, 5, 40, 60]] * 3 + [[60, 25, 75, 40]]
    (result,) = predict(model, [item(boxes, [3, 1, 3, 7])])
    pairs = {tuple(x) for x in result["relations"].pairs.tolist()}
    assert pairs == set(itertools.permutations(range(4), 2))
    if task == "prdcls":
        assert result["instances"].pred_classes.tolist() == [3, 1, 3, 7]


def test_reldn_preddet_equals_prdcls_on_the_annotated_pairs():
    options = ("TEST.RELATIONS.TOPK", 1000, "TEST.RELATIONS.PREDICATES_PER_PAIR", [None])
    every, given = (small_model("TEST.RELATIONS.TASK", x, *options) for x in ("prdcls", "preddet"))
    batch = [busy_item(0), unrelated_item()]
    wanted, found = ([x["relations"] for x in predict(model, batch)] for model in (every, given))
    annotated = {(0, 1), (1, 3), (2, 3), (3, 2)}
    kept = [i for i, pair in enumerate(wanted[0].pairs.tolist()) if tuple(pair) in annotated]
    assert len(kept) == 4 * given.relation_head.num_predicates
    for name, value in wanted[0][torch.tensor(kept)].get_fields().items():
        torch.testing.assert_close(found[0].get(name), value)
    assert len(found[1]) == 0
    del batch[0]["relations"]
    with pytest.raises(ValueError, match="task preddet needs ground truth, but image image-0"):
        predict(given, batch)


def test_reldn_sgcls_takes_best_class_but_not_background():
    model = small_model("TEST.RELATIONS.TASK", "sgcls")
    shares = torch.tensor([1.0, 1, 1, 1, 1, 1, 5, 1, 1, 7]) / 20  # the last one is background
    classifier = model.detector.model.roi_heads.box_predictor.cls_score
    with torch.no_grad():
        classifier.weight.zero_()
        classifier.bias.copy_(shares.log())
    (result,) = predict(model, [busy_item(0)])
    assert result["instances"].pred_classes.tolist() == [6] * 4
    assert result["instances"].scores.tolist() == pytest.approx([0.25] * 4)
    relations = result["relations"]
    torch.testing.assert_close(relations.scores, relations.predicate_scores / 16)


def test_reldn_predicting_twice_leaves_input_and_result_unchanged():
    model = small_model("TEST.RELATIONS.TASK", "prdcls")
    batch = [busy_item(0, height=128, width=192)]
    boxes = batch[0]["instances"].gt_boxes.tensor.clone()
    first, again = predict(model, batch), predict(model, batch)
    assert torch.equal(batch[0]["instances"].gt_boxes.tensor, boxes)
    assert not batch[0]["instances"].has("pred_boxes")
    for name, value in first[0]["relations"].get_fields().items():
        assert torch.equal(value, again[0]["relations"].get(name))


def test_reldn_batch_equals_single_images():
    model = small_model("TEST.RELATIONS.TASK", "prdcls")
    batch = [busy_item(0), empty_item(), unrelated_item()]
    for together, x in zip(predict(model, batch), batch):
        (alone,) = predict(model, [x])
        assert together["relations"].pairs.shape == alone["relations"].pairs.shape
        torch.testing.assert_close(together["relations"].scores, alone["relations"].scores)


def test_reldn_pair_chunk_does_not_change_result():
    whole, chunked = (
        predict(small_model("TEST.RELATIONS.TASK", "prdcls", *options), [busy_item(0)])[0]
        for options in ((), ("TEST.RELATIONS.PAIR_CHUNK", 5))
    )
    assert torch.equal(whole["relations"].pairs, chunked["relations"].pairs)
    torch.testing.assert_close(whole["relations"].scores, chunked["relations"].scores)


def test_reldn_image_without_size_or_ground_truth_predicts():
    """No ground truth, no size: the output refers to the image as given."""
    model = small_model()
    image = {"image": busy_item(0)["image"]}
    (result,) = predict(model, [image])
    check_output([result], [{"height": SIZE[0], "width": SIZE[1]}])
    (raw,) = model.inference([image], do_postprocess=False)
    torch.testing.assert_close(raw["relations"].scores, result["relations"].scores)


@pytest.mark.parametrize("task", ["sgcls", "prdcls", None])
def test_reldn_missing_ground_truth_raises(task):
    model = small_model(*(("TEST.RELATIONS.TASK", task) if task else ()))
    model.train(task is None)
    purpose = f"task {task}" if task else "training"
    x = {"image": busy_item(0)["image"], "file_name": "a.jpg", "image_id": 5}
    with EventStorage(), pytest.raises(ValueError, match=f"{purpose} needs.* image 5 .a.jpg."):
        model([x])


def test_postprocess_relations_empty_box_drops_its_relations():
    """The second box lies outside the image: it is clipped to nothing."""
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(
        torch.tensor([[0.0, 0, 50, 50], [100, 20, 130, 40], [10, 10, 80, 90], [60, 60, 90, 90]])
    )
    instances.scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    instances.pred_classes = torch.tensor([0, 1, 2, 3])
    relations = predicted_relations(
        (100, 100),
        torch.tensor([[0, 2], [1, 2], [3, 0], [2, 1]]),
        torch.tensor([4, 5, 6, 7]),
        torch.tensor([0.4, 0.3, 0.2, 0.1]),
        torch.tensor([0.5, 0.5, 0.5, 0.5]),
    )
    found, related = postprocess_relations(instances, relations, 200, 300)
    assert found.pred_classes.tolist() == [0, 2, 3]
    assert found.pred_boxes.tensor[1].tolist() == [30, 20, 240, 180]
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
    assert related.pairs.tolist() == [[0, 1], [2, 0]]
    assert related.predicates.tolist() == [4, 6]
    assert found.image_size == related.image_size == (200, 300)
