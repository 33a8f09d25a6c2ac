"""Predictions files that list the names of their ids meet datasets in another order."""

import json

import pytest
from evaluation_data import CLASSES, NAME, PREDICATES, dataset_dicts, registered, run

from reldn_d2.evaluation import RelationEvaluator, evaluate_predictions
from reldn_d2.evaluation.predictions_io import settings_file
from reldn_d2.structures.name_matching import NameMismatchError


@pytest.fixture
def predictions(tmp_path):
    """A predictions file of the test set, with its settings."""
    with registered():
        run(RelationEvaluator(NAME, str(tmp_path)))
    return str(tmp_path / "relation_predictions.json")


def reversed_ids():
    """The same images as in ``dataset_dicts``, their classes and predicates listed backwards."""
    records = dataset_dicts()
    for record in records:
        record["annotations"] = [  # the images share annotations, so they are copied
            {**x, "category_id": len(CLASSES) - 1 - x["category_id"]} for x in record["annotations"]
        ]
        record["relations"] = [
            (s, o, len(PREDICATES) - 1 - predicate) for s, o, predicate in record["relations"]
        ]
    return records


def test_evaluate_predictions_other_order_of_names_gives_equal_results(predictions):
    with registered():
        expected = evaluate_predictions(NAME, predictions)
    names = dict(thing_classes=CLASSES[::-1], predicate_classes=PREDICATES[::-1])
    with registered(reversed_ids, **names):
        results = evaluate_predictions(NAME, predictions)
    assert results["relations_sgdet"] == pytest.approx(expected["relations_sgdet"], nan_ok=True)
    assert results["relations_sgdet"]["R@20"] == 100


def test_evaluate_predictions_other_names_raises(predictions):
    names = dict(predicate_classes=["holds", "near", "wears"])
    with registered(**names), pytest.raises(NameMismatchError, match="'next to'.*'near'"):
        evaluate_predictions(NAME, predictions)


def test_evaluate_predictions_settings_without_names_are_read(predictions):
    path = settings_file(predictions)
    with open(path, encoding="utf-8") as stream:
        settings = json.load(stream)
    assert settings.pop("thing_classes") == CLASSES
    assert settings.pop("predicate_classes") == PREDICATES
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(settings, stream)
    with registered():
        assert evaluate_predictions(NAME, predictions)["relations_sgdet"]["R@20"] == 100
