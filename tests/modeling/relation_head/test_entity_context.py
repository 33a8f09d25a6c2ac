"""Entity contexts against plain references, image by image, in the head and in export."""

import math

import pytest
import torch
from model_utils import (
    CLASSES,
    busy_item,
    detector_config,
    empty_item,
    one_box_item,
    small_config,
    small_model,
)

from reldn_d2.checkpoint.class_weights import relation_weights
from reldn_d2.checkpoint.reldn_checkpoint import RelDNCheckpointer
from reldn_d2.export import RelDNExport
from reldn_d2.modeling import EntityBatch, LSTMContext, TransformerContext
from reldn_d2.modeling.relation_head.predictors import box_position

from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

HEAD = "MODEL.ROI_RELATION_HEAD"
HIDDEN, VECTOR, NAMES = 8, 3, ("TransformerContext", "LSTMContext")
NO_VISUAL = (
    *(f"{HEAD}.VISUAL.SPO", False, f"{HEAD}.VISUAL.SUBJECT_SKIP", False),
    *(f"{HEAD}.VISUAL.OBJECT_SKIP", False),
)


def context_of(name, vector_size=2 * VECTOR, seed=0):
    torch.manual_seed(seed)
    options = dict(num_classes=5, vector_size=vector_size, hidden_dim=HIDDEN, layers=2, dropout=0)
    if name == "TransformerContext":
        return TransformerContext(**options, heads=2)
    return LSTMContext(**options)


def batch_of(*sizes, vectors=True, seed=0, dtype=torch.float32):
    """Images with these numbers of entities, each (height, width) = (80, 90)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=dtype)

    boxes = []
    for count in sizes:
        low = 40 * draw(count, 2)
        boxes.append(Boxes(torch.cat([low, low + 1 + 30 * draw(count, 2)], dim=1).float()))
    classes = [torch.randint(5, (count,), generator=generator) for count in sizes]
    of_roles = [draw(sum(sizes), VECTOR) for _ in range(2)] if vectors else (None, None)
    return EntityBatch.stack(boxes, classes, [(80, 90)] * len(sizes), *of_roles)


def part_of(batch, index):
    """The entities with these indices, as one image."""
    return EntityBatch(
        batch.boxes[index],
        batch.classes[index],
        torch.zeros_like(batch.image[index]),
        batch.image_sizes[:1],
        [len(index)],
        batch.subject_vectors[index],
        batch.object_vectors[index],
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_context_batch_equals_image_by_image(name, training):
    context, sizes = context_of(name).train(training), (3, 0, 1, 5)
    batch = batch_of(*sizes)
    with torch.set_grad_enabled(training):
        together = context(batch)
        alone = [context(part_of(batch, x)) for x in torch.arange(9).split(sizes)]
    assert together.shape == (9, HIDDEN)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_context_other_image_has_no_effect_and_own_image_has(name):
    context = context_of(name)
    batch, changed = batch_of(3, 4), batch_of(3, 4)
    changed.subject_vectors[5] += 1.0
    with torch.no_grad():
        moved = (context(batch) - context(changed)).abs().amax(dim=1)
    assert (moved[:3] == 0).all() and (moved[3:] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_context_permuted_entities_give_permuted_vectors(name):
    """The LSTM sorts them by their boxes, the Transformer knows no order."""
    context, batch = context_of(name), batch_of(6)
    order = torch.tensor([3, 5, 0, 2, 1, 4])
    with torch.no_grad():
        torch.testing.assert_close(
            context(part_of(batch, order)), context(batch)[order], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(), (0,), (0, 0), (1,), (0, 2)])
def test_context_few_entities_give_finite_vectors_and_all_gradients(name, sizes):
    if not sizes:
        sizes = (2, 0, 1)
    context = context_of(name).train()
    batch = batch_of(*sizes)
    values = context(batch)
    assert values.shape == (sum(sizes), HIDDEN) and torch.isfinite(values).all()
    values.square().sum().backward()
    for parameter in context.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
    if sum(sizes) > 1:
        assert any(p.grad.abs().sum() > 0 for p in context.parameters())


def test_transformer_context_one_image_equals_plain_attention():
    context, batch = context_of("TransformerContext").double(), batch_of(4, dtype=torch.float64)
    position = box_position(batch.boxes, batch.image_sizes.expand(4, -1)).double()
    joined = torch.cat([batch.subject_vectors, batch.object_vectors], dim=1)
    x = context.class_embedding(batch.classes) + context.position(position)
    x = x + context.vectors(joined)
    with torch.no_grad():
        for layer in context.encoder.layers:
            y, mixed = layer.norm1(x), torch.zeros_like(x)
            query, key, value = (
                (y @ layer.self_attn.in_proj_weight.T)
                .add(layer.self_attn.in_proj_bias)
                .split(HIDDEN, dim=1)
            )
            for head in (slice(0, 4), slice(4, 8)):
                for i in range(4):
                    weights = [float(query[i, head] @ key[j, head]) / 2 for j in range(4)]
                    total = sum(math.exp(w) for w in weights)
                    for j in range(4):
                        mixed[i, head] += math.exp(weights[j]) / total * value[j, head]
            x = x + layer.self_attn.out_proj(mixed)
            x = x + layer.linear2(layer.linear1(layer.norm2(x)).relu())
        wanted = context.encoder.norm(x)
        batch.boxes, batch.image_sizes = batch.boxes.double(), batch.image_sizes.double()
        torch.testing.assert_close(context(batch), wanted, rtol=1e-6, atol=1e-7)


def test_lstm_context_one_image_equals_bidirectional_lstm_from_left_to_right():
    context, batch = context_of("LSTMContext"), batch_of(5)
    reference = torch.nn.LSTM(HIDDEN, HIDDEN // 2, num_layers=2, bidirectional=True)
    for layer in range(2):
        for suffix, lstms in (("", context.to_right), ("_reverse", context.to_left)):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                own = getattr(lstms[layer], f"{kind}_l0")
                getattr(reference, f"{kind}_l{layer}{suffix}").data.copy_(own)
    centers = (batch.boxes[:, 0] + batch.boxes[:, 2]) / 2
    order = sorted(range(5), key=lambda i: float(centers[i]))
    assert order != list(range(5))
    with torch.no_grad():
        wanted = reference(context.embed(batch)[order])[0]
        torch.testing.assert_close(context(batch)[order], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_context_without_vectors_reads_classes_and_boxes(name):
    context, batch = context_of(name, vector_size=0), batch_of(3, vectors=False)
    assert context.vectors is None
    with torch.no_grad():
        before = context(batch)
        batch.boxes = batch.boxes + torch.tensor([0.0, 5, 0, 5])
        moved = context(batch)
    assert before.shape == (3, HIDDEN) and not torch.allclose(before, moved)


def keys(*options):
    return tuple(x if i % 2 else f"{HEAD}.CONTEXT.{x}" for i, x in enumerate(options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("HIDDEN_DIM", 0), "HIDDEN_DIM is 0; expected 1 or more"),
        (("LAYERS", 0), "LAYERS is 0; expected 1 or more"),
        (("DROPOUT", 1.0), "DROPOUT is 1.0; expected 0 to below 1"),
        (("HEADS", 3), "HEADS is 3; expected a divisor of CONTEXT.HIDDEN_DIM, which is 256"),
        (("NAME", "LSTMContext", "HIDDEN_DIM", 7), "HIDDEN_DIM is 7; expected an even number"),
    ],
)
def test_context_invalid_option_raises(options, message):
    with pytest.raises(ValueError, match=rf"RELATION_HEAD\.CONTEXT\.{message}"):
        small_model(*keys("NAME", "TransformerContext"), *keys(*options))


@pytest.mark.parametrize("name", NAMES)
def test_context_keys_reach_the_module(name):
    head = small_model(*keys("NAME", name, "HIDDEN_DIM", 12, "LAYERS", 3, "DROPOUT", 0.25))
    context = head.relation_head.context
    assert context.class_embedding.weight.shape == (len(CLASSES), 12)
    dropouts = {x.p for x in context.modules() if isinstance(x, torch.nn.Dropout)}
    assert dropouts == {0.25}
    layers = context.encoder.layers if name == "TransformerContext" else context.to_left
    assert len(layers) == 3


def test_context_none_has_no_parameters_and_is_the_default():
    names = set(small_model().state_dict())
    assert small_config().MODEL.ROI_RELATION_HEAD.CONTEXT.NAME == "none"
    assert not any("context" in name for name in names)
    added = set(small_model(*keys("NAME", "LSTMContext")).state_dict()) - names
    parts = {name.split(".")[1] for name in added}
    assert parts == {"context", "context_to_subject", "context_to_object"}


def test_context_nobody_reads_raises():
    with pytest.raises(ValueError, match="'LSTMContext', but no module .* JOINT.ENABLED or a part"):
        small_model(*keys("NAME", "LSTMContext"), *NO_VISUAL)


@pytest.mark.parametrize("options", [(), (f"{HEAD}.JOINT.ENABLED", True, *NO_VISUAL)])
@pytest.mark.parametrize("name", NAMES)
def test_model_with_context_trains_on_any_batch_and_predicts(name, options):
    model = small_model(*keys("NAME", name, "HIDDEN_DIM", 8), *options).train()
    for batch in ([busy_item(), empty_item(), one_box_item()], [empty_item()]):
        with EventStorage():
            losses = model(batch)
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(x) for x in losses.values())
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        if len(batch) > 1:
            assert model.relation_head.context.class_embedding.weight.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        results = model([busy_item(), empty_item()])
    assert len(results[0]["relations"]) > 0


@pytest.mark.parametrize("off", [("SPO", "OBJECT_SKIP"), ("SPO", "SUBJECT_SKIP"), ()])
@pytest.mark.parametrize("name", NAMES)
def test_model_with_context_autocast_and_parts_of_visual_off_trains_all_weights(name, off):
    switches = [x for part in off for x in (f"{HEAD}.VISUAL.{part}", False)]
    model = small_model(*keys("NAME", name, "HIDDEN_DIM", 8), *switches).train()
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        losses = model([busy_item(), empty_item()])
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == [] and all(torch.isfinite(x) for x in losses.values())


@pytest.mark.parametrize("name", NAMES)
def test_traced_context_equals_eager_for_other_numbers_of_entities(name):
    context = context_of(name).eval().requires_grad_(False)

    def forward(boxes, classes, subject_vectors, object_vectors):
        image, size = torch.zeros_like(classes), torch.tensor([[80.0, 90.0]])
        vectors = subject_vectors, object_vectors
        return context(EntityBatch(boxes, classes, image, size, [len(boxes)], *vectors))

    def inputs(count):
        x = batch_of(count, seed=count)
        return x.boxes, x.classes, x.subject_vectors, x.object_vectors

    with torch.no_grad():
        traced = torch.jit.trace(forward, inputs(4), check_trace=False)
        for count in (4, 1, 7):
            wanted = context(batch_of(count, seed=count))
            torch.testing.assert_close(traced(*inputs(count)), wanted, rtol=1e-5, atol=1e-6)
        assert traced(*inputs(0)).shape == (0, HIDDEN)


@pytest.mark.parametrize("name", NAMES)
def test_export_with_context_equals_model(name):
    options = keys("NAME", name, "HIDDEN_DIM", 8)
    torch.manual_seed(0)
    model = build_model(detector_config("faster_rcnn_FPN", "MODEL.WEIGHTS", "", *options)).eval()
    image = busy_item()["image"]
    with torch.no_grad():
        boxes, classes, _, pairs, predicates, scores, _ = RelDNExport(model)(image)
        (wanted,) = model([{"image": image}])
    torch.testing.assert_close(boxes, wanted["instances"].pred_boxes.tensor)
    torch.testing.assert_close(scores, wanted["relations"].scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(classes, wanted["instances"].pred_classes)
    assert torch.equal(pairs[:3], wanted["relations"].pairs[:3]) and len(predicates) == len(scores)


@pytest.mark.parametrize("name", NAMES)
def test_relation_weights_of_a_model_with_context_are_the_class_embeddings_and_tables(name):
    model = small_model(*keys("NAME", name), f"{HEAD}.JOINT.ENABLED", True)
    assert set(relation_weights(model.state_dict(), "thing_classes")) == {
        "relation_head.semantic.table.weight",
        "relation_head.context.class_embedding.weight",
        "relation_head.joint.subject_embedding.weight",
        "relation_head.joint.object_embedding.weight",
        "relation_head.joint.subject_relations",
        "relation_head.joint.object_relations",
    }
    last = ("spatial.4", "joint.layers.6", "visual.rest.3", "visual.subject_skip")
    logits = {f"relation_head.{x}.{y}" for x in last for y in ("weight", "bias")}
    logits |= {f"relation_head.visual.object_skip.{y}" for y in ("weight", "bias")}
    found = set(relation_weights(model.state_dict(), "predicate_classes"))
    counts = "relation_head.prior.predicate_counts"
    assert found == logits | {"relation_head.semantic.table.weight", counts}


def test_context_of_another_size_does_not_load(tmp_path):
    options = keys("NAME", "TransformerContext", "HIDDEN_DIM", 8)
    RelDNCheckpointer(small_model(*options), str(tmp_path)).save("model")
    path = str(tmp_path / "model.pth")
    RelDNCheckpointer(small_model(*options, seed=1)).load(path)
    with pytest.raises(ValueError, match=r"relation_head\.context"):
        RelDNCheckpointer(small_model(*options, *keys("HIDDEN_DIM", 12))).load(path)
