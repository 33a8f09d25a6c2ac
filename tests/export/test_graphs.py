"""The exported functions against the model, and what cannot be exported."""

import pytest
import torch
from export_cases import entities, image
from model_utils import model_of, small_model
from usage_utils import write_boxes_checkpoint

from reldn_d2.export import GivenBoxesExport, RelDNExport
from reldn_d2.export.graphs import rank_triplets
from reldn_d2.modeling.meta_arch import RelDN
from reldn_d2.modeling.relation_head import RelDNHead
from reldn_d2.modeling.relation_head.topk import TopTriplets
from reldn_d2.predictor import RelationPredictor


def assert_equals_model(graph, inputs):
    with torch.no_grad():
        outputs = dict(zip(graph.output_names, graph(*inputs)))
    expected = dict(zip(graph.output_names, graph.model_outputs(*inputs)))
    for name in ("pairs", "predicates"):
        assert torch.equal(outputs[name], expected[name])
    for name in set(graph.output_names) - {"pairs", "predicates"}:
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ks", [[1], [None], [1, 3]])
@pytest.mark.parametrize("overlap", [True, False])
def test_reldn_export_equals_the_model(checkpoint, ks, overlap):
    options = ["TEST.RELATIONS.PREDICATES_PER_PAIR", ks, "TEST.RELATIONS.TOPK", 11]
    options += ["MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER", overlap]
    options += ["TEST.RELATIONS.ENTITY_SCORE_EXPONENT", 2.0 if overlap else 1.0]
    model = RelationPredictor.from_checkpoint(checkpoint, "cpu", opts=options).model
    graph = RelDNExport(model)
    assert_equals_model(graph, [image()])
    assert not graph.training and model.task == "sgdet"


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_given_boxes_export_equals_the_model(checkpoint, count):
    model = RelationPredictor.from_checkpoint(checkpoint, "cpu").model
    graph = GivenBoxesExport(model)
    assert graph.input_names == ("image", "boxes", "classes", "box_scores")
    assert_equals_model(graph, [image(), *entities(count, beyond=9.0)])


def test_given_boxes_export_without_pixels_equals_the_model(tmp_path):
    model = RelationPredictor.from_checkpoint(write_boxes_checkpoint(tmp_path), "cpu").model
    graph = GivenBoxesExport(model)
    assert graph.input_names == ("boxes", "classes", "box_scores", "image_size")
    assert_equals_model(graph, [*entities(9), torch.tensor([64, 96])])


@pytest.mark.parametrize("ks", [[1], [2], [None], [1, 2, None]])
def test_rank_triplets_equal_scores_equals_top_triplets(ks):
    generator = torch.Generator().manual_seed(0)
    # Few different values, so that most scores occur several times.
    probabilities = torch.randint(0, 3, (20, 4), generator=generator) / 4
    pair_scores = torch.randint(1, 3, (20,), generator=generator) / 2
    pairs, predicates, scores = rank_triplets(probabilities, pair_scores, ks, 13)
    best = TopTriplets(ks, 13, 4)
    best.update(probabilities, pair_scores, torch.arange(20))
    expected = best.relations(20, (1, 1))  # pair i is (0, i)
    assert torch.equal(pairs, expected.pairs[:, 1])
    assert torch.equal(predicates, expected.predicates)
    assert torch.equal(scores, expected.scores)


def test_export_of_what_cannot_be_exported_raises():
    with pytest.raises(TypeError, match="detections come from files cannot be exported as a det"):
        RelDNExport(model_of("precomputed"))
    model = small_model()
    model.detector.model.proposal_generator = None
    with pytest.raises(
        TypeError, match="proposals come from files cannot be exported: use --given"
    ):
        RelDNExport(model)
    GivenBoxesExport(model)

    class DeformConv(torch.nn.Module):
        pass

    model = small_model()
    model.detector.model.roi_heads.extra = DeformConv()
    GivenBoxesExport(model)  # does not run the ROI heads
    with pytest.raises(
        TypeError, match="roi_heads.extra is a DeformConv, which cannot be exported"
    ):
        RelDNExport(model)
    model.predicate_backbone.extra = DeformConv()
    with pytest.raises(TypeError, match="predicate_backbone.extra is a DeformConv"):
        GivenBoxesExport(model)
    model.detector_precision = "bf16"
    with pytest.raises(ValueError, match="PRECISION is 'bf16'.*--opts MODEL.*PRECISION float32$"):
        GivenBoxesExport(model)
    model.relation_head = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="only RelDNHead and its subclasses.*not Linear"):
        GivenBoxesExport(model)


@pytest.mark.parametrize(
    ("base", "step"),
    [
        *((RelDN, "inference"), (RelDN, "_entities")),
        *((RelDNHead, "forward"), (RelDNHead, "_predict"), (RelDNHead, "encode_entities")),
    ],
)
def test_export_of_overridden_steps_raises(base, step):
    model = small_model()
    module = model if base is RelDN else model.relation_head
    module.__class__ = type("Mine", (base,), {step: lambda *args: None})
    with pytest.raises(TypeError, match=f"Mine overrides {step}, but.* step of {base.__name__}"):
        RelDNExport(model)


def test_export_of_overridden_scores_equals_the_model():
    class Doubling(RelDNHead):
        def score_pairs(self, *args):
            return 2 * super().score_pairs(*args)

    model = small_model()
    model.relation_head.__class__ = Doubling
    assert_equals_model(GivenBoxesExport(model), [image(), *entities(5)])
