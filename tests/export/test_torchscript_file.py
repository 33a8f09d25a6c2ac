"""TorchScript files, loaded in the same process, against the model."""

import pytest
import torch
from export_cases import entities, fcos_model, image, square_model
from model_utils import small_model

from reldn_d2.export import GivenBoxesExport, RelDNExport, save_torchscript
from reldn_d2.export.comparison import compare_outputs
from reldn_d2.predictor import RelationPredictor

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


def compare(exported, graph, inputs):
    with torch.no_grad():
        outputs = exported(*inputs), graph.model_outputs(*inputs)
    found, expected = (
        dict(zip(graph.output_names, [x.numpy() for x in tensors])) for tensors in outputs
    )
    return compare_outputs(expected, found), found


@pytest.mark.parametrize("kind", ["faster_rcnn", "fcos"])
def test_save_torchscript_any_size_equals_the_model(kind, checkpoint, tmp_path):
    if kind == "fcos":
        model = fcos_model(tmp_path)
    else:
        model = RelationPredictor.from_checkpoint(checkpoint, "cpu").model
    graph = RelDNExport(model)
    save_torchscript(graph, [image(64, 96)], tmp_path / "x.ts")
    exported = torch.jit.load(tmp_path / "x.ts")
    for size in ((96, 64), (75, 131)):
        result, found = compare(exported, graph, [image(*size)])
        assert result.problem is None and result.difference < 1e-6 and len(found["pairs"]) > 0


def test_save_torchscript_image_larger_than_the_square_pad_raises(tmp_path):
    graph = GivenBoxesExport(square_model(tmp_path))
    save_torchscript(graph, [image(64, 64), *entities(6)], tmp_path / "x.ts")
    exported = torch.jit.load(tmp_path / "x.ts")
    result, _ = compare(exported, graph, [image(48, 80), *entities(4)])
    assert result.problem is None
    for size in ((64, 96), (96, 64)):
        with pytest.raises(RuntimeError, match="negative dimension -16"):
            exported(image(*size), *entities(4))


def test_save_torchscript_unknown_function_is_one_line(tmp_path):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + 1

    model = small_model()
    model.relation_head.predictor.fuse = lambda x: Function.apply(sum(x.values()))
    with pytest.raises(ValueError, match="cannot write this model as TorchScript: [^\n]+$"):
        save_torchscript(GivenBoxesExport(model), [image(), *entities(6)], tmp_path / "x.ts")
    assert not (tmp_path / "x.ts").exists()
