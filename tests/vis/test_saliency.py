"""Saliency maps, their pictures, and models without feature maps.

Expectations follow docs/usage.md in numpy and OpenCV, given the model's own features.
"""

import cv2
import draw_saliency
import numpy as np
import pytest
import torch
from model_utils import PREDICATES, small_config
from PIL import Image
from usage_utils import OPTIONS, picture, write_checkpoint

from reldn_d2.predictor import RelationPredictor
from reldn_d2.utils.image_io import ImageError
from reldn_d2.vis.saliency import (
    draw_feature_maps,
    draw_triplet_saliency,
    feature_saliency,
    triplet_saliency,
)

from detectron2.modeling import build_model

LEVELS = ("p2", "p3", "p4")
HEIGHT, WIDTH = 64, 96  # scaled to 85 x 128, padded to 96 x 128
HEAD = "MODEL.ROI_RELATION_HEAD"
NOT_VISUAL = [
    x for key in ("SPO", "SUBJECT_SKIP", "OBJECT_SKIP") for x in (f"{HEAD}.VISUAL.{key}", False)
]


def run(predictor, rgb):
    """Return the padded input of the network and the feature maps of both CNNs."""
    model = predictor.model
    images = model.detector.preprocess([predictor.prepare(rgb)])
    assert images.image_sizes == [(85, 128)] and images.tensor.shape[-2:] == (96, 128)
    with torch.no_grad():
        return images, (
            model.detector.model.backbone(images.tensor),
            model.predicate_backbone(images.tensor),
        )


def in_image(values):
    """Resize a map of the padded input to the image."""
    padded = cv2.resize(values, (128, 96), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(padded[:85], (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)


def unit(values):
    """Scale to [0, 1]; the top 0.1 % becomes 1, a constant map 0."""
    high = np.quantile(values, 0.999)
    if high == values.min():
        return np.zeros_like(values)
    return np.minimum((values - values.min()) / (high - values.min()), 1)


def assert_maps(actual, expected, fused):
    assert set(actual) == {*expected, "fused"}
    for level, values in {**expected, "fused": fused}.items():
        assert actual[level].shape == (HEIGHT, WIDTH) and actual[level].dtype == np.float32
        np.testing.assert_allclose(actual[level], unit(values), rtol=0, atol=2e-3, err_msg=level)


def test_feature_saliency_equals_mean_absolute_activation(predictor):
    rgb = picture(HEIGHT, WIDTH)
    _, branches = run(predictor, rgb)
    for actual, features in zip(feature_saliency(predictor, rgb), branches):
        expected = {
            level: in_image(np.mean(np.abs(features[level][0].numpy()), axis=0)) for level in LEVELS
        }
        fused = sum(unit(x) for x in expected.values()) / 3
        assert_maps(actual, expected, fused)


def test_triplet_saliency_equals_gradient_times_map(predictor):
    # The oracle: how log p changes when all channels of a place are multiplied by a factor.
    rgb, model = picture(HEIGHT, WIDTH), predictor.model
    images, branches = run(predictor, rgb)
    with torch.no_grad():
        inputs = [predictor.prepare(rgb)]
        entities = model.detector.detect(inputs, images, branches[0])
    grown, factors = [], []
    for features in branches:
        shares = {level: torch.ones_like(features[level][:, :1]) for level in LEVELS}
        factors.append({level: x.requires_grad_(True) for level, x in shares.items()})
        grown.append({level: features[level] * factors[-1][level] for level in LEVELS})
    relations = model.relation_head(*grown, entities)[0].relations
    for rank in (0, 3):
        score = relations.predicate_scores[rank].log()
        for actual, shares in zip(triplet_saliency(predictor, rgb, rank)[0], factors):
            moves = torch.autograd.grad(score, list(shares.values()), retain_graph=True)
            assert any(x.any() for x in moves)
            expected = {n: in_image(x[0, 0].abs().numpy()) for n, x in zip(LEVELS, moves)}
            assert_maps(actual, expected, sum(expected.values()) / 3)


def test_triplet_saliency_is_zero_far_from_the_boxes(predictor):
    # Three boxes are pooled, so the gradient is 0 elsewhere.
    rgb = picture(96, 128)
    triplets = predictor(rgb).triplets()
    for rank in (0, 3):
        maps, prediction = triplet_saliency(predictor, rgb, rank)
        assert prediction.triplets()[0][:3] == triplets[rank][:3]
        assert prediction.triplets()[0].score == pytest.approx(triplets[rank].score, abs=1e-5)
        boxes = prediction["instances"].pred_boxes.tensor[list(triplets[rank][4:])]
        low, high = boxes[:, :2].min(0).values, boxes[:, 2:].max(0).values
        far = np.ones((96, 128), dtype=bool)
        margin = 24  # reach of bilinear sampling on the coarsest map
        y0, x0 = (max(int(x) - margin, 0) for x in low.tolist()[::-1])
        y1, x1 = (int(x) + margin for x in high.tolist()[::-1])
        far[y0:y1, x0:x1] = False
        for branch in (maps.detector, maps.predicate):
            assert branch["fused"].max() == 1.0
            assert not far.any() or branch["fused"][far].max() < 0.05
    with pytest.raises(ImageError, match="no triplet 5000; there are"):
        triplet_saliency(predictor, rgb, 5000)


def test_draw_saliency_pictures_and_unknown_levels(predictor):
    drawn = draw_feature_maps(predictor, picture(), ["p2", "fused"])
    assert drawn.dtype == np.uint8 and drawn.shape[1] > 3 * 500
    with pytest.raises(ImageError, match="no feature map 'p9'; it has p2, p3, p4, fused"):
        draw_feature_maps(predictor, picture(), ["p9"])
    drawn, triplet = draw_triplet_saliency(predictor, picture(), 1)
    assert triplet.predicate in PREDICATES and drawn.shape[1] > 3 * 500
    for rank, level, message in ((-1, "fused", "no triplet -1"), (0, "p9", "no feature map 'p9'")):
        with pytest.raises(ImageError, match=message):
            draw_triplet_saliency(predictor, picture(), rank, level)


@pytest.mark.parametrize("height, width", [(40, 1200), (1200, 40), (1, 700)])
def test_draw_feature_maps_long_image_keeps_its_aspect_ratio(predictor, height, width):
    red = np.full((height, width, 3), (255, 0, 0), np.uint8)
    drawn = draw_feature_maps(predictor, red).astype(int)
    places = np.argwhere((drawn[..., 0] > 200) & (drawn[..., 1:] < 60).all(axis=2))
    places = places[places[:, 1] < max(240, 570 * width // max(height, width))]  # the image's cell
    shown = places.max(axis=0) - places.min(axis=0) + 1
    scale = 560 / max(height, width)
    assert np.abs(shown - [max(1, height * scale), max(1, width * scale)]).max() <= 2
    assert drawn.shape[0] > 240 and drawn.shape[1] > 3 * 240  # there is room for titles


def test_feature_saliency_precomputed_detector_needs_no_detections():
    cfg = small_config(*OPTIONS, "MODEL.RELDN.DETECTOR", "PrecomputedDetector")
    predictor = RelationPredictor(build_model(cfg), cfg)  # its detections come from files
    maps = feature_saliency(predictor, picture())
    assert set(maps.detector) == {*LEVELS, "fused"} == set(maps.predicate)


@pytest.mark.parametrize("frozen", [True, False])
def test_triplet_saliency_without_visual_module_raises(frozen, tmp_path):
    options = [*NOT_VISUAL, f"{HEAD}.SPATIAL.ENABLED", False, f"{HEAD}.SEMANTIC.FREEZE", frozen]
    path = write_checkpoint(tmp_path, *options)
    predictor = RelationPredictor.from_checkpoint(path, device="cpu")
    Image.fromarray(picture()).save(tmp_path / "a.png")
    assert len(predictor(picture())["relations"]) > 0
    with pytest.raises(ImageError, match=r"^\S*a.png: .*do not depend on feature maps$"):
        triplet_saliency(predictor, tmp_path / "a.png")
    with pytest.raises(ImageError, match="^image: .*do not depend on feature maps$"):
        draw_triplet_saliency(predictor, picture())
    maps = feature_saliency(predictor, picture())
    assert len(maps.detector) == 4 and maps.predicate == {}
    assert draw_feature_maps(predictor, picture()).shape[1] > 2 * 500


def test_draw_saliency_tool_missing_triplet_is_reported_once(checkpoint, tmp_path, capsys):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "text.jpg").write_text("hello")
    files = [str(tmp_path / x) for x in ("a.png", "text.jpg")]
    common = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    levels = ["--levels", "p2", "fused"]
    arguments = [*common, "--input", *files, *levels, "--triplets", "0", "5000", "1"]
    assert draw_saliency.main(arguments) == 1
    names = {f"a_triplet_{rank}_{level}.png" for rank in (0, 1) for level in ("p2", "fused")}
    assert {x.name for x in (tmp_path / "out").iterdir()} == names
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 4
    missing, unread = printed.err.splitlines()[-2:]  # once each, whatever the levels
    assert "a.png: no triplet 5000; there are " in missing
    assert "text.jpg: " in unread and printed.err.count("draw_saliency.py: ") == 2
    assert draw_saliency.main([*common, "--input", files[0], "--triplets", "0", "1"]) == 0
    assert draw_saliency.main([*common, "--input", files[0]]) == 0
    assert (tmp_path / "out" / "a_features.png").is_file()
