"""Matching lists of names, and renumbering by the result."""

import numpy as np
import pytest
import torch
from model_utils import busy_item

from reldn_d2.structures.name_matching import (
    NameMismatchError,
    Renumbering,
    match_names,
    require_unique_names,
)
from reldn_d2.structures.scene_graph import SceneGraph

from detectron2.structures import Instances

OWNERS = ("thing_classes", "dataset 'a'", "dataset 'b'")


def test_match_names_equal_returns_none():
    assert match_names(["cup", " hat"], ["cup ", "hat"], *OWNERS) is None


def test_match_names_other_order_returns_ids_of_the_target():
    assert match_names(["cup", "hat", "box"], ["box", "cup", "hat "], *OWNERS) == [1, 2, 0]


def test_match_names_more_names_in_the_target_needs_permission():
    names = (["hat", "cup"], ["cup", "box", "hat"])
    assert match_names(*names, *OWNERS, allow_more=True) == [2, 0]
    with pytest.raises(NameMismatchError, match=r"Only in dataset 'b': 'box' \(1 of 3\)"):
        match_names(*names, *OWNERS)


def test_match_names_different_lists_both_sides():
    source, target = [f"s{i}" for i in range(7)] + ["x"], ["x", "Y"]
    with pytest.raises(NameMismatchError) as error:
        match_names(source, target, *OWNERS, hint="Do this.")
    assert str(error.value) == (
        "thing_classes of dataset 'a' and of dataset 'b' differ. Only in dataset 'a': 's0', "
        "'s1', 's2', 's3', 's4', ... (7 of 8); Only in dataset 'b': 'Y' (1 of 2). Names are "
        "compared exactly, except for whitespace around them. Do this."
    )


def test_match_names_case_matters():
    with pytest.raises(NameMismatchError):
        match_names(["Cup"], ["cup"], *OWNERS)


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ("thing_classes", "classes"),
        ("predicate_classes", "predicates"),
        ("attribute_classes", "attributes"),
    ],
)
def test_require_unique_names_duplicate_raises(field, kind):
    require_unique_names(["a", "A", "b"], field, "it")
    with pytest.raises(ValueError, match=f'{field} of it: {kind} 1 and 3 are both "person"'):
        require_unique_names(["x", "person ", "y", "person"], field, "it")


def test_renumbering_between_skips_unknown_names_and_logs(caplog):
    ours = {"thing_classes": ["a", "b"], "predicate_classes": ["p", "q"]}
    theirs = {"thing_classes": ["b", "a"]}
    with caplog.at_level("INFO", logger="reldn_d2"):
        ids = Renumbering.between(ours, theirs, "dataset 'x'", "the model")
    assert ids == Renumbering([1, 0], None) and ids
    assert not Renumbering.between(ours, ours, "one", "other")
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == (
        "thing_classes: dataset 'x' lists the 2 names of the model in another order; ids are "
        "mapped by name."
    )


def test_renumbering_inverse_undoes_it():
    ids = Renumbering([2, 0, 1], [1, 0])
    assert ids.inverse() == Renumbering([1, 2, 0], [1, 0])
    assert not Renumbering().inverse()


def test_renumbering_dataset_dict_copies():
    record = {
        "annotations": [{"category_id": 0, "bbox": [1]}, {"category_id": 2, "bbox": [2]}],
        "relations": [(0, 1, 1)],
        "detections": {"classes": np.array([2, 0]), "scores": np.ones(2)},
        "verified_labels": {0: True, 1: False},
    }
    found = Renumbering([2, 0, 1], [1, 0]).dataset_dict(record)
    assert [x["category_id"] for x in found["annotations"]] == [2, 1]
    assert found["relations"] == [(0, 1, 0)]
    assert found["detections"]["classes"].tolist() == [1, 2]
    assert found["verified_labels"] == {2: True, 0: False}
    assert record["annotations"][1]["category_id"] == 2 and record["relations"] == [(0, 1, 1)]
    assert Renumbering().dataset_dict(record) == record


def test_renumbering_maps_attributes_everywhere():
    ours = {"attribute_classes": ["red", "old", "wet"]}
    theirs = {"attribute_classes": ["wet", "red", "old"]}
    ids = Renumbering.between(ours, theirs, "dataset 'x'", "the model")
    assert ids == Renumbering(attributes=[1, 2, 0]) and ids
    assert not Renumbering.between(ours, {"attribute_classes": []}, "one", "another without")
    record = {"annotations": [{"attributes": [0, 2]}, {"attributes": []}, {"iscrowd": 1}]}
    found = ids.dataset_dict(record)
    assert found["annotations"] == [{"attributes": [1, 0]}, {"attributes": []}, {"iscrowd": 1}]
    assert record["annotations"][0] == {"attributes": [0, 2]}
    instances = Instances((4, 4))
    instances.pred_attributes = torch.tensor([[0.1, 0.2, 0.3]])  # red, old, wet
    mapped = ids.fields({"instances": instances})["instances"].pred_attributes
    assert torch.equal(mapped, torch.tensor([[0.3, 0.1, 0.2]])), "wet, red, old"
    again = ids.inverse().fields({"instances": instances})["instances"].pred_attributes
    assert torch.equal(again, torch.tensor([[0.2, 0.3, 0.1]])), "red, old, wet of wet, red, old"
    graph = SceneGraph.from_dataset_dict(
        {
            "annotations": [
                {"bbox": [0, 0, 1, 1], "bbox_mode": 0, "category_id": 0, **x}
                for x in record["annotations"]
            ]
        }
    )
    assert ids.scene_graph(graph).attributes.ids.tolist() == [1, 0]


def test_renumbering_fields_maps_instances_and_relations():
    item = busy_item()
    ids = Renumbering([8, 7, 6, 5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0])
    found = ids.fields(item)
    assert torch.equal(found["instances"].gt_classes, 8 - item["instances"].gt_classes)
    assert torch.equal(found["relations"].gt_predicates, 5 - item["relations"].gt_predicates)
    assert torch.equal(found["relations"].gt_pairs, item["relations"].gt_pairs)
    assert found["image"] is item["image"]
    again = ids.inverse().fields(found)
    assert torch.equal(again["instances"].gt_classes, item["instances"].gt_classes)


def test_renumbering_scene_graph_maps_classes_and_predicates():
    graph = SceneGraph(
        "image",
        boxes=np.zeros((2, 4)),
        classes=np.array([0, 2]),
        pairs=np.array([[0, 1]]),
        predicates=np.array([1]),
        verified=np.array([[1, 1], [2, 0]]),
    )
    found = Renumbering([2, 0, 1], [1, 0]).scene_graph(graph)
    assert found.classes.tolist() == [2, 1] and found.predicates.tolist() == [0]
    assert found.verified.tolist() == [[0, 1], [1, 0]] and found.pairs.tolist() == [[0, 1]]
    same = Renumbering().scene_graph(graph)
    assert same.classes is graph.classes and same.predicates is graph.predicates
    empty = Renumbering([1, 0], [0]).scene_graph(SceneGraph.empty("image"))
    assert len(empty.classes) == len(empty.predicates) == 0
