"""Export as TorchScript: the exported function, and tools/export_model.py."""

import json

import export_model
import numpy as np
import pytest
import torch
from model_utils import PREDICATES
from PIL import Image
from usage_utils import picture

from reldn_d2.export import OUTPUT_NAMES, RelDNExport
from reldn_d2.predictor import RelationPredictor


@pytest.fixture
def image_file(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.mark.filterwarnings("ignore:.*torch.jit.load. is deprecated")
def test_export_model_in_new_process_gives_equal_triplets(
    checkpoint, image_file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "reldn.ts"
    monkeypatch.chdir(tmp_path)  # the path is relative, as documented
    arguments = ["--checkpoint", str(checkpoint), "--output", "reldn.ts", "--height", "64"]
    arguments += ["--width"]
    arguments += ["96", "--image", image_file, "--opts", "TEST.RELATIONS.TOPK", "9"]
    assert export_model.main(arguments) == 0
    assert "the same triplets as the eager model" in capsys.readouterr().out
    extra = {"reldn.json": ""}
    exported = torch.jit.load(str(out), _extra_files=extra)
    description = json.loads(extra["reldn.json"])
    assert description["input"] == [3, 64, 96] and description["outputs"] == list(OUTPUT_NAMES)
    assert description["predicate_classes"] == PREDICATES
    with torch.no_grad(), pytest.raises(RuntimeError, match="must match the existing size"):
        exported(torch.zeros(3, 96, 64))
    # On images that were not traced, against the eager model's search.
    predictor = RelationPredictor.from_checkpoint(
        checkpoint, "cpu", opts=["TEST.RELATIONS.TOPK", 9]
    )
    for seed in (3, 4):
        rgb = picture(64, 96, seed)
        image = torch.as_tensor(np.ascontiguousarray(rgb[:, :, ::-1].transpose(2, 0, 1))).float()
        with torch.no_grad():
            outputs = exported(image)
            expected = predictor.model.inference([{"image": image}], do_postprocess=False)[0]
        relations = expected["relations"]
        assert torch.equal(outputs[3], relations.pairs)
        assert torch.equal(outputs[4], relations.predicates)
        torch.testing.assert_close(outputs[5], relations.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(outputs[6], relations.predicate_scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(outputs[0], expected["instances"].pred_boxes.tensor)


@pytest.mark.parametrize("ks", [[1], [None], [1, 3]])
@pytest.mark.parametrize("overlap", [True, False])
def test_reldn_export_equals_the_model(checkpoint, ks, overlap):
    options = ["TEST.RELATIONS.PREDICATES_PER_PAIR", ks, "TEST.RELATIONS.TOPK", 11]
    options += ["MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER", overlap]
    options += ["TEST.RELATIONS.ENTITY_SCORE_EXPONENT", 2.0 if overlap else 1.0]
    model = RelationPredictor.from_checkpoint(checkpoint, "cpu", opts=options).model
    image = torch.as_tensor(picture(64, 96).transpose(2, 0, 1).copy()).float()
    with torch.no_grad():
        outputs = RelDNExport(model)(image)
        expected = model.inference([{"image": image}], do_postprocess=False)[0]["relations"]
    assert torch.equal(outputs[3], expected.pairs) and torch.equal(outputs[4], expected.predicates)
    torch.testing.assert_close(outputs[5], expected.scores, rtol=0, atol=1e-6)


def test_export_model_bad_arguments_exit_1(checkpoint, image_file, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("hello")
    common = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.ts")]
    assert export_model.main([*common, "--image", str(tmp_path / "text.jpg")]) == 1
    assert "text.jpg: cannot be read" in capsys.readouterr().err
    few = ["--opts", "TEST.DETECTIONS_PER_IMAGE", "1"]
    assert export_model.main([*common, "--image", image_file, *few]) == 1
    assert "1 entities are found in the example" in capsys.readouterr().err
    (tmp_path / "taken.ts").mkdir()
    common[-1] = str(tmp_path / "taken.ts")
    assert export_model.main([*common, "--image", image_file]) == 1
    assert "taken.ts" in capsys.readouterr().err
