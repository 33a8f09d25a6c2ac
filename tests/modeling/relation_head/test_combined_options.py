"""Options of the relation head that are made to be used together, all at once."""

import pytest
import torch
from model_utils import busy_item, empty_item, one_box_item, small_model

from reldn_d2.export import RelDNExport
from reldn_d2.modeling.losses.contrastive import LOSS_NAMES

from detectron2.utils.events import EventStorage

HEAD = "MODEL.ROI_RELATION_HEAD"
COUNTS = torch.tensor([900, 50, 0, 7, 1, 42])


def combined_model(context, *options):
    model = small_model(
        *("MODEL.ROI_ATTRIBUTE_HEAD.ENABLED", True, "MODEL.ROI_ATTRIBUTE_HEAD.NUM_ATTRIBUTES", 3),
        *(f"{HEAD}.CONTEXT.NAME", context, f"{HEAD}.CONTEXT.HIDDEN_DIM", 8),
        *(f"{HEAD}.JOINT.ENABLED", True, f"{HEAD}.LOSS.CLASS_BALANCED_BETA", 0.9),
        *("TEST.RELATIONS.LOGIT_ADJUSTMENT", 0.8, "TEST.RELATIONS.ENTITY_SCORE_EXPONENT", 2.0),
        *options,
    )
    model.relation_head.set_predicate_counts(COUNTS)
    return model


def training_item(item, kept=None):
    """Add attributes, and which of the relations are trained on."""
    count = len(item["instances"])
    item["instances"].gt_attributes = torch.rand(count, 3) > 0.5
    item["instances"].gt_attributes_known = torch.arange(count) % 2 == 0
    if kept is not None:
        item["relations"].gt_kept = torch.tensor(kept(len(item["relations"])))
    return item


def all_dropped(count):
    return [False] * count


def second_dropped(count):
    return [i != 1 for i in range(count)]


@pytest.mark.parametrize(
    "context, entities", [("TransformerContext", "proposals"), ("LSTMContext", "ground_truth")]
)
def test_combined_options_train_all_weights(context, entities):
    model = combined_model(context, "MODEL.RELDN.TRAIN_ENTITIES", entities).train()
    items = [
        training_item(busy_item(0), second_dropped),
        training_item(busy_item(1), all_dropped),
        training_item(busy_item(2)),
        training_item(one_box_item()),
        training_item(empty_item()),
    ]
    with EventStorage():
        losses = model(items)
    assert {"loss_predicate", "loss_attributes", *(f"loss_{x}" for x in LOSS_NAMES)} == set(losses)
    sum(losses.values()).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    without = [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_combined_options_image_without_kept_relations_has_no_contrast():
    model = combined_model("TransformerContext").train()
    with EventStorage():
        losses = model([training_item(busy_item(), all_dropped)])
    values = {name: float(loss.detach()) for name, loss in losses.items()}
    assert all(values[f"loss_{name}"] == 0 for name in LOSS_NAMES)
    assert values["loss_predicate"] > 0 and values["loss_attributes"] > 0


@pytest.mark.parametrize("context", ["TransformerContext", "LSTMContext"])
def test_combined_options_export_equals_the_model(context):
    model = combined_model(context).eval()
    item = busy_item()
    with torch.no_grad():
        (expected,) = model.inference([item], do_postprocess=False)
        exported = RelDNExport(model)(item["image"])
    relations = expected["relations"]
    assert expected["instances"].pred_attributes.shape == (len(exported[0]), 3)
    assert len(relations) > 5
    fields = ("pairs", "predicates", "scores", "predicate_scores")
    for field, value in zip(fields, exported[3:], strict=True):
        torch.testing.assert_close(value, relations.get(field))
