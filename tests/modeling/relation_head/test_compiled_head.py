"""torch.compile traces the relation head's predicate classifier into one graph."""

import torch
from model_utils import busy_item, small_model, unrelated_item
from torch._dynamo.testing import CompileCounterWithBackend

from reldn_d2.modeling.relation_head import EntityBatch, PairBatch


def test_predicate_classifier_compiled_equals_eager():
    """Dynamic shapes: another number of entities and pairs needs no other graph."""
    predictor = small_model().relation_head.predictor
    size = predictor.visual.vector_size

    def score(entities, subjects, objects, unions):
        return predictor(entities, PairBatch(subjects, objects, lambda: (unions, None)))

    torch._dynamo.reset()
    counter, num_graphs = CompileCounterWithBackend("eager"), set()
    compiled = torch.compile(score, backend=counter, fullgraph=True, dynamic=True)
    for batch in ([busy_item(0), busy_item(1)], [busy_item(0), unrelated_item()]):
        targets = [x["instances"] for x in batch]
        vectors = torch.randn(2, sum(map(len, targets)), size)
        entities = EntityBatch.stack(
            [x.gt_boxes for x in targets],
            [x.gt_classes for x in targets],
            [x.image_size for x in targets],
            *vectors,
        )
        same_image = entities.image[:, None] == entities.image
        subjects, objects = same_image.fill_diagonal_(False).nonzero().unbind(1)
        unions = torch.randn(len(subjects), size)
        logits = compiled(entities, subjects, objects, unions)
        expected = score(entities, subjects, objects, unions)
        torch.testing.assert_close(logits, expected)
        (gradient,) = torch.autograd.grad(logits.square().sum(), predictor.visual.first.weight)
        (wanted,) = torch.autograd.grad(expected.square().sum(), predictor.visual.first.weight)
        torch.testing.assert_close(gradient, wanted)
        num_graphs.add(counter.frame_count)
    assert len(num_graphs) == 1
