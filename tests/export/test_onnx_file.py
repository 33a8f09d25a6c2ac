"""ONNX files: each kind of model in onnxruntime against the model."""

import json

import pytest
import torch
from export_cases import entities, fcos_model, image, square_model
from export_model import run_in_new_process
from model_utils import model_of, small_model
from usage_utils import write_boxes_checkpoint

from reldn_d2.export import GivenBoxesExport, RelDNExport, onnx_file, save_onnx
from reldn_d2.export.comparison import compare_outputs
from reldn_d2.predictor import RelationPredictor

REASON = 'needs onnx and onnxruntime: pip install "reldn_d2[export]"'
pytest.importorskip("onnx", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)

DETECTORS = (
    *("faster_rcnn_FPN", "mask_rcnn_FPN", "cascade_rcnn_FPN", "retinanet_FPN"),
    *("faster_rcnn_C4", "faster_rcnn_VGG16", "fcos"),
)
SIZES = ((64, 96), (96, 64), (75, 131))


def write_session(graph, path, *example, **names):
    save_onnx(graph, example, path, **names)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def compare(session, graph, inputs):
    """Compare the outputs of a file with the model's."""
    given = {name: x.numpy() for name, x in zip(graph.input_names, inputs)}
    found = dict(zip(graph.output_names, session.run(list(graph.output_names), given)))
    return compare_with_model(graph, inputs, found), found


def compare_with_model(graph, inputs, found):
    expected = dict(zip(graph.output_names, [x.numpy() for x in graph.model_outputs(*inputs)]))
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
    return compare_outputs(expected, found)


@pytest.mark.parametrize("kind", DETECTORS)
def test_save_onnx_each_detector_in_a_new_process_equals_the_model(kind, tmp_path):
    graph = RelDNExport(fcos_model(tmp_path) if kind == "fcos" else model_of(kind))
    save_onnx(graph, [image(64, 96)], tmp_path / "x.onnx")
    images = [image(*size, seed) for seed, size in enumerate(SIZES)]
    cases = [{"image": x.numpy()} for x in images]
    for x, found in zip(images, run_in_new_process(tmp_path / "x.onnx", "onnx", cases)[0]):
        assert compare_with_model(graph, [x], found).problem is None and len(found["pairs"]) > 0


@pytest.mark.parametrize("kind", ["faster_rcnn_FPN", "faster_rcnn_C4", "precomputed"])
def test_save_onnx_given_boxes_equals_the_model(kind, tmp_path):
    graph = GivenBoxesExport(model_of(kind))
    session = write_session(graph, tmp_path / "x.onnx", image(), *entities(6))
    assert session.get_inputs()[0].shape == [3, "height", "width"]
    for count, size in zip((12, 2, 1, 0), (*SIZES, (64, 96))):
        inputs = image(*size, seed=count), *entities(count, *size)
        result, found = compare(session, graph, inputs)
        assert result.problem is None and (len(found["pairs"]) > 0) == (count > 1)


def test_save_onnx_without_pixels_equals_the_model(tmp_path):
    predictor = RelationPredictor.from_checkpoint(write_boxes_checkpoint(tmp_path), "cpu")
    graph = GivenBoxesExport(predictor.model)
    size = torch.tensor([64, 96])
    session = write_session(
        *(graph, tmp_path / "x.onnx", *entities(6), size),
        thing_classes=predictor.thing_classes,
        predicate_classes=predictor.predicate_classes,
    )
    for count in (0, 1, 2, 30):
        inputs = *entities(count, 90, 70, num_classes=100), torch.tensor([90, 70])
        assert compare(session, graph, inputs)[0].problem is None
    about = {k: json.loads(x) for k, x in session.get_modelmeta().custom_metadata_map.items()}
    assert about["thing_classes"] == predictor.thing_classes
    assert about["predicate_classes"] == predictor.predicate_classes
    assert about["inputs"] == ["boxes", "classes", "box_scores", "image_size"]
    assert "input_format" not in about


@pytest.mark.parametrize("context", ["TransformerContext", "LSTMContext"])
def test_save_onnx_with_options_of_the_head_equals_the_model(context, tmp_path):
    options = ["MODEL.ROI_RELATION_HEAD.CONTEXT.NAME", context]
    options += ["MODEL.ROI_RELATION_HEAD.CONTEXT.HIDDEN_DIM", 8]
    options += ["MODEL.ROI_RELATION_HEAD.JOINT.ENABLED", True]
    options += ["TEST.RELATIONS.PREDICATES_PER_PAIR", [1, 3, None], "TEST.RELATIONS.TOPK", 9]
    options += ["TEST.RELATIONS.LOGIT_ADJUSTMENT", 0.5]
    options += ["TEST.RELATIONS.ENTITY_SCORE_EXPONENT", 2.0]
    model = small_model(*options)
    model.relation_head.set_predicate_counts(torch.arange(model.relation_head.num_predicates) + 1)
    graph = GivenBoxesExport(model)
    session = write_session(graph, tmp_path / "x.onnx", image(), *entities(6))
    for count in (9, 0, 1):
        inputs = image(seed=count), *entities(count)
        assert compare(session, graph, inputs)[0].problem is None


def test_save_onnx_boxes_between_two_levels_equals_the_model(tmp_path):
    # The side decides about the map that a box is pooled from; rounding must not.
    graph = GivenBoxesExport(small_model())
    session = write_session(graph, tmp_path / "x.onnx", image(), *entities(6))
    sides = torch.tensor([14.0, 28.0, 56.0, 112.0, 224.0, 448.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    inputs = image(448, 448), boxes, torch.arange(6), torch.linspace(0.5, 1, 6)
    result, _ = compare(session, graph, inputs)
    assert result.problem is None and result.difference < 1e-5


@pytest.mark.parametrize("kind", ["faster_rcnn_FPN", "retinanet_FPN"])
def test_save_onnx_image_without_entities_gives_none(kind, tmp_path):
    graph = RelDNExport(model_of(kind))
    detector = graph.model.detector.model
    with torch.no_grad():  # scores that differ from image to image
        (
            detector.roi_heads.box_predictor if "rcnn" in kind else detector.head
        ).cls_score.weight.mul_(60)
    images = [image(seed=i) for i in range(4)]
    scores = [graph.model_outputs(x)[2] for x in images]
    low, high = min(range(4), key=lambda i: scores[i][0]), max(range(4), key=lambda i: scores[i][1])
    threshold = float(scores[low][0] + scores[high][1]) / 2
    assert scores[low][0] < threshold < scores[high][1]
    (detector.roi_heads.box_predictor if "rcnn" in kind else detector).test_score_thresh = threshold
    session = write_session(graph, tmp_path / "x.onnx", images[high])
    assert compare(session, graph, [images[high]])[0].problem is None
    result, found = compare(session, graph, [images[low]])
    assert result.problem is None and len(found["boxes"]) == len(found["pairs"]) == 0


def test_save_onnx_fixed_size_rejects_others(tmp_path):
    graph = GivenBoxesExport(small_model(), (64, 96))
    session = write_session(graph, tmp_path / "x.onnx", image(), *entities(6))
    assert session.get_inputs()[0].shape == [3, 64, 96]
    assert compare(session, graph, [image(), *entities(4)])[0].problem is None
    with pytest.raises(Exception, match="invalid dimensions for input: image"):
        compare(session, graph, [image(96, 64), *entities(4)])


def test_save_onnx_image_larger_than_the_square_pad_raises(tmp_path):
    graph = GivenBoxesExport(square_model(tmp_path))
    session = write_session(graph, tmp_path / "x.onnx", image(64, 64), *entities(6))
    assert compare(session, graph, [image(48, 80), *entities(4)])[0].problem is None
    for size in ((64, 96), (96, 64)):
        values = [x.numpy() for x in (image(*size), *entities(4))]
        with pytest.raises(Exception, match="ConstantOfShape"):
            session.run(None, dict(zip(graph.input_names, values)))


def test_save_onnx_unknown_operator_raises_one_line(tmp_path):
    model = small_model()
    model.relation_head.predictor.fuse = lambda x: torch.special.i0(sum(x.values()))
    with pytest.raises(ValueError, match="cannot write this model as ONNX: [^\n]*$"):
        save_onnx(GivenBoxesExport(model), [image(), *entities(6)], tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_save_onnx_too_many_weights_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="GB of weights, and an ONNX file holds at most 2 GB"):
        save_onnx(GivenBoxesExport(small_model()), [image(), *entities(6)], tmp_path / "x.onnx")


def test_attend_equals_pytorch():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    values, mask = torch.rand(3, 5, 8), torch.rand(5, 5)
    padding = torch.zeros(3, 5).index_fill(1, torch.tensor(4), float("-inf"))
    for arguments in ((None, None), (mask, None), (None, padding), (mask, padding)):
        with torch.no_grad():
            expected = layer._sa_block(values, *arguments)
            torch.testing.assert_close(onnx_file._attend(layer, values, *arguments), expected)


def test_missing_operators_after_an_error_pytorch_is_unchanged():
    before = torch.nn.TransformerEncoderLayer._sa_block, torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), onnx_file._missing_operators():
        assert torch.nn.TransformerEncoderLayer._sa_block is onnx_file._attend
        raise KeyError
    after = torch.nn.TransformerEncoderLayer._sa_block, torch.backends.mha.get_fastpath_enabled()
    assert after == before
