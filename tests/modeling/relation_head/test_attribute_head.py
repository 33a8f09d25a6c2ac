"""The attribute head: its loss, its place in the model, and its names in checkpoints."""

import pytest
import torch
from model_utils import busy_item, small_config, small_model

import reldn_d2
from reldn_d2.export import OUTPUT_NAMES, RelDNExport
from reldn_d2.modeling import ROI_RELATION_HEAD_REGISTRY, RelationHead
from reldn_d2.modeling.detectors import label_entities
from reldn_d2.modeling.relation_head.attribute_head import AttributeHead, attribute_loss
from reldn_d2.structures.name_matching import NameMismatchError

from detectron2.config import configurable
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

HEAD = "MODEL.ROI_ATTRIBUTE_HEAD"
ON = (f"{HEAD}.ENABLED", True, f"{HEAD}.NUM_ATTRIBUTES", 3, f"{HEAD}.HIDDEN_DIM", 8)
NAMES = ["red", "old", "wet"]
VISUAL = "MODEL.ROI_RELATION_HEAD.VISUAL"


def attributed_item(known=(True, True, False, True), seed=0):
    """Return the busy item with attributes; those of the second cup are unknown."""
    item = busy_item(seed)
    table = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
    item["instances"].gt_attributes = table
    item["instances"].gt_attributes_known = torch.tensor(known)
    return item


def losses_of(model, items):
    with EventStorage():
        return model.train()(items)


def test_attribute_loss_equals_plain_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64).float()
    targets = torch.rand(5, 3, generator=generator) < 0.5
    known = torch.tensor([True, False, True, True, False])
    total, count = 0.0, 0
    for row in range(5):
        for column in range(3):
            if known[row]:
                p = 1 / (1 + torch.exp(-logits[row, column].double()))
                total -= torch.log(p if targets[row, column] else 1 - p)
                count += 1
    found = attribute_loss(logits, targets, known)
    assert count == 9 and float(found) == pytest.approx(float(total) / count)


def test_attribute_loss_unknown_entities_have_no_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    targets = torch.zeros(2, 3, dtype=torch.bool)
    attribute_loss(logits, targets, torch.tensor([False, True])).backward()
    assert (logits.grad[0] == 0).all() and (logits.grad[1] > 0).all()


@pytest.mark.parametrize("rows", [0, 2])
def test_attribute_loss_nothing_known_is_zero_with_a_gradient(rows):
    logits = torch.ones(rows, 3, requires_grad=True)
    nothing = torch.zeros(rows, dtype=torch.bool)
    loss = attribute_loss(logits, torch.ones(rows, 3, dtype=torch.bool), nothing)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_label_entities_attributes_are_those_of_the_matched_box():
    target = attributed_item()["instances"]
    near = Boxes(target.gt_boxes.tensor[[2, 0]] + 1.0)
    (found,) = label_entities([near], [target], iou_threshold=0.5, max_entities=9)
    assert found.gt_index.tolist() == [-1, -1, 0, 1, 2, 3]
    rows = [2, 0, 0, 1, 2, 3]
    assert torch.equal(found.gt_attributes, target.gt_attributes[rows])
    assert torch.equal(found.gt_attributes_known, target.gt_attributes_known[rows])
    plain = Instances(target.image_size)
    plain.gt_boxes, plain.gt_classes = target.gt_boxes, target.gt_classes
    (found,) = label_entities([near], [plain], iou_threshold=0.5, max_entities=9)
    assert not found.has("gt_attributes")


def test_attribute_head_is_off_by_default():
    model = small_model()
    assert model.relation_head.attribute_head is None
    assert not any("attribute" in name for name in model.state_dict())
    assert "loss_attributes" not in losses_of(model, [attributed_item()])
    with torch.no_grad():
        (output,) = model.eval()([busy_item()])
    assert not output["instances"].has("pred_attributes")


@pytest.mark.parametrize("entities", ["ground_truth", "proposals"])
@pytest.mark.parametrize("switches", [(), ("SPO", "SUBJECT_SKIP"), ("SPO", "OBJECT_SKIP")])
def test_model_with_attribute_head_trains_it(entities, switches):
    off = [x for name in switches for x in (f"{VISUAL}.{name}", False)]
    model = small_model(*ON, *off, "MODEL.RELDN.TRAIN_ENTITIES", entities)
    items = [attributed_item(), attributed_item((False,) * 4, seed=1)]
    losses = losses_of(model, items)
    loss = losses["loss_attributes"]
    assert float(loss) == pytest.approx(0.7, abs=0.2), "the sigmoids start near a half"
    loss.backward()
    head = model.relation_head.attribute_head
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    some_box_head = model.relation_head.box_heads[0]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in some_box_head.parameters())


def test_attribute_loss_weight_scales_the_loss():
    losses = [
        losses_of(small_model(*ON, f"{HEAD}.LOSS_WEIGHT", x), [attributed_item()])
        for x in (1.0, 0.25)
    ]
    assert float(losses[1]["loss_attributes"]) == pytest.approx(
        0.25 * float(losses[0]["loss_attributes"])
    )


def test_model_with_attribute_head_needs_attributes_in_training():
    with pytest.raises(ValueError, match=r"ENABLED is True, but the training images have no attri"):
        losses_of(small_model(*ON), [busy_item()])


@pytest.mark.parametrize("task", ["sgdet", "sgcls", "prdcls", "preddet"])
def test_model_with_attribute_head_predicts_scores(task):
    model = small_model(*ON, "TEST.RELATIONS.TASK", task).eval()
    with torch.no_grad():
        (output,) = model([busy_item(height=128, width=192)])
    instances = output["instances"]
    assert len(instances) > 0 and instances.pred_attributes.shape == (len(instances), 3)
    assert 0 < instances.pred_attributes.min() and instances.pred_attributes.max() < 1


@ROI_RELATION_HEAD_REGISTRY.register()
class HeadWithoutAttributes(RelationHead):
    """A head of one's own that knows nothing of attributes."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    def pair_logits(self, entities, predicate_features, subjects, objects):
        return torch.zeros(len(subjects), self.num_predicates + 1)


def test_relation_head_without_attribute_head_says_so():
    name = ("MODEL.ROI_RELATION_HEAD.NAME", "HeadWithoutAttributes")
    assert build_model(small_config(*name)).relation_head.attribute_head is None
    with pytest.raises(
        ValueError, match="'HeadWithoutAttributes' has no attribute head: pass attr"
    ):
        build_model(small_config(*ON, *name))


def test_export_leaves_attributes_out():
    model = small_model(*ON)
    image = busy_item()["image"]
    with torch.no_grad():
        outputs = RelDNExport(model)(image)
        plain = RelDNExport(small_model())(image)
    assert len(outputs) == len(plain) == len(OUTPUT_NAMES)


def test_attribute_head_without_hidden_layer_is_linear():
    head = AttributeHead(vector_size=4, num_attributes=2, hidden_dim=0, loss_weight=1.0)
    assert head.hidden is None
    vectors = torch.randn(3, 4)
    assert torch.equal(head(vectors), head.classifier(vectors))
    assert torch.equal(head.predict(vectors), head(vectors).sigmoid())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((f"{HEAD}.NUM_ATTRIBUTES", 0), "NUM_ATTRIBUTES is 0; set it to the number of attribute_c"),
        (
            [x for name in ("SPO", "SUBJECT_SKIP", "OBJECT_SKIP") for x in (f"{VISUAL}.{name}", 0)],
            "reads the vectors that the visual module computes of each entity, and .*VISUAL is off",
        ),
    ],
)
def test_attribute_head_that_cannot_work_raises(options, message):
    options = [bool(x) if x == 0 and "VISUAL" in str(options) else x for x in options]
    with pytest.raises(ValueError, match=message):
        build_model(small_config(*ON, *options))


# ------------------------------------------------------------------------------------- checkpoints


def save(folder, model, **names):
    reldn_d2.RelDNCheckpointer(model, str(folder), **names).save("model")
    return str(folder / "model.pth")


def test_checkpoint_names_attributes_and_their_order_wins(tmp_path):
    path = save(tmp_path, small_model(*ON), attribute_classes=NAMES)
    model = small_model(*ON, seed=1)
    reldn_d2.RelDNCheckpointer(model, attribute_classes=["wet", "red", "old"]).load(path)
    assert model.names["attribute_classes"] == NAMES


def test_checkpoint_other_attributes_raise_or_are_trained_again(tmp_path, caplog):
    source = small_model(*ON)
    path = save(tmp_path, source, attribute_classes=NAMES)
    names = ["red", "old", "dry"]
    with pytest.raises(NameMismatchError, match=r"attribute_classes of .*'wet' \(1 of 3\)"):
        reldn_d2.RelDNCheckpointer(small_model(*ON), attribute_classes=names).load(path)
    model = small_model(*ON, seed=1)
    before = model.relation_head.attribute_head.classifier.weight.clone()
    checkpointer = reldn_d2.RelDNCheckpointer(model, attribute_classes=names, matching_only=True)
    checkpointer.load(path)
    head = model.relation_head.attribute_head
    assert torch.equal(head.classifier.weight, before)
    assert torch.equal(head.hidden.weight, source.relation_head.attribute_head.hidden.weight)
    assert model.names["attribute_classes"] == names


def test_checkpoint_without_attribute_head_loads_where_one_is_added(tmp_path, caplog):
    path = save(tmp_path, small_model())
    with pytest.raises(ValueError, match="attribute_head"):
        reldn_d2.RelDNCheckpointer(small_model(*ON)).load(path)
    model = small_model(*ON, seed=1)
    reldn_d2.RelDNCheckpointer(model, matching_only=True).load(path)
    assert "attribute_head" in caplog.text


def test_checkpoint_with_attribute_head_loads_without_one(tmp_path):
    path = save(tmp_path, small_model(*ON), attribute_classes=NAMES)
    model = small_model(seed=1)
    reldn_d2.RelDNCheckpointer(model).load(path)
    assert "attribute_classes" not in model.names
