"""A checkpoint of version 0.1, written before the package was split into folders, still works."""

import json
from pathlib import Path

import pytest
from usage_utils import picture

from reldn_d2.predictor import RelationPredictor

DATA = Path(__file__).parent / "data"


def test_from_checkpoint_version_0_1_gives_the_same_predictions():
    expected = json.loads((DATA / "tiny_reldn_0.1_prediction.json").read_text())
    predictor = RelationPredictor.from_checkpoint(DATA / "tiny_reldn_0.1.pth", device="cpu")
    found = predictor(picture()).to_dict()
    for part, exact, close in (
        ("instances", ("classes", "class_names"), ("boxes", "scores")),
        ("relations", ("pairs", "predicates", "predicate_names"), ("scores", "predicate_scores")),
    ):
        for key in exact:
            assert found[part][key] == expected[part][key], key
        for key in close:
            for value, wanted in zip(found[part][key], expected[part][key], strict=True):
                assert value == pytest.approx(wanted, rel=1e-4, abs=1e-6), key
