"""A checkpoint of version 0.1, written before the package was split into folders, still works."""

import json
from pathlib import Path

import pytest
from usage_utils import picture

from reldn_d2 import config
from reldn_d2.predictor import RelationPredictor, read_description

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


@pytest.mark.parametrize("opts", [[], ["TEST.RELATIONS.PREDICATES_PER_PAIR", []]])
def test_from_checkpoint_version_0_1_reads_zero_as_no_limit(caplog, opts):
    """Version 0.1 wrote 0 for "no limit", in the config and, as a fallback, in the description."""
    path = str(DATA / "tiny_reldn_0.1.pth")
    description = read_description(path)
    assert description["predicates_per_pair"] == [0]
    assert "PREDICATES_PER_PAIR:\n    - 0\n" in description["config"]
    config._warn_about_zero.cache_clear()
    predictor = RelationPredictor.from_checkpoint(path, device="cpu", opts=opts)
    assert predictor.cfg.TEST.RELATIONS.PREDICATES_PER_PAIR == [None]
    assert caplog.text.count("has the value 0, which is read as None") == 1
