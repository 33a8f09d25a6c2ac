"""The attributes of an image's entities, as tensors, as a list and in files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from reldn_d2.structures.attributes import EntityAttributes, ground_truth_attributes
from reldn_d2.structures.graph_formats import graph_to_dot, graph_to_graphml
from reldn_d2.structures.scene_graph import SceneGraph

from detectron2.structures import Boxes, Instances

ANNOTATIONS = [{"attributes": [2, 0]}, {}, {"attributes": []}, {"attributes": [1, 1]}]


def predicted(scores):
    """Return a model's instances with these scores of attributes."""
    instances = Instances((40, 60))
    count = len(scores)
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 9.0, 9.0]]).expand(count, 4))
    instances.pred_classes = torch.zeros(count, dtype=torch.int64)
    instances.scores = torch.full((count,), 0.5)
    instances.pred_attributes = torch.tensor(scores)
    return instances


def no_relations():
    relations = Instances((40, 60))
    relations.pairs = torch.zeros((0, 2), dtype=torch.int64)
    relations.predicates = torch.zeros(0, dtype=torch.int64)
    relations.scores = relations.predicate_scores = torch.zeros(0)
    return relations


def graph_of(scores, **fields):
    output = {"instances": predicted(scores), "relations": no_relations()}
    return SceneGraph.from_output("a", output, **fields)


def test_ground_truth_attributes_unknown_entities_are_marked():
    table, known = ground_truth_attributes(ANNOTATIONS, 3)
    assert table.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert known.tolist() == [True, False, True, True]
    table, known = ground_truth_attributes([], 3)
    assert table.shape == (0, 3) and known.shape == (0,)


def test_entity_attributes_from_annotations():
    found = EntityAttributes.from_annotations(ANNOTATIONS)
    assert found.rows() == [(0, 2, None), (0, 0, None), (3, 1, None)], "a repetition counts once"
    assert found.known.tolist() == [True, False, True, True]
    assert found.table(4, 3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert EntityAttributes.from_annotations([{}, {}]) is None
    assert EntityAttributes.from_annotations([]) is None


def test_entity_attributes_from_instances_keeps_the_best():
    scores = np.linspace(0.02, 0.9, 12)[None].repeat(2, axis=0)
    scores[1] = 0.005
    scores[1, 7] = 1.0
    found = EntityAttributes.from_instances(predicted(scores.tolist()))
    assert found.entities.tolist() == [0] * 10 + [1]
    assert found.ids.tolist() == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 7]
    np.testing.assert_allclose(found.scores[:2], scores[0, [11, 10]], rtol=1e-6)
    with pytest.raises(ValueError, match="NaN or infinite pred_attributes"):
        EntityAttributes.from_instances(predicted([[0.5, float("nan")]]))
    without = predicted([[0.5]])
    without.remove("pred_attributes")
    assert EntityAttributes.from_instances(without) is None
    assert EntityAttributes.from_instances(predicted([[0.5]])[:0]).rows() == []


def test_scene_graph_attributes_to_json_and_back():
    names = dict(attribute_classes=["red", "old", "wet"], thing_classes=["cup"])
    graph = graph_of([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]], **names)
    record = json.loads(graph.to_json())["instances"]
    assert record["attributes"] == [[1, 0], []]
    assert record["attribute_scores"] == [[0.75, 0.25], []]
    assert record["attribute_names"] == [["old", "red"], []]
    again = EntityAttributes.from_lists(record["attributes"], record["attribute_scores"], 2, "it")
    assert again.rows() == graph.attributes.rows() == [(0, 1, 0.75), (0, 0, 0.25)]
    assert graph.attribute_words() == [["old"], []]
    assert graph.attribute_words(0.2) == [["old", "red"], []]
    tensor = graph.to_output()["instances"].pred_attributes
    assert torch.equal(tensor, torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]))


def test_scene_graph_without_attributes_has_no_entry():
    graph = SceneGraph.empty("a")
    assert graph.attributes is None and "attributes" not in graph.to_dict()["instances"]
    assert graph.attribute_words() == [] and not graph.to_output()["instances"].has(
        "pred_attributes"
    )


def test_scene_graph_from_dataset_dict_names_attributes():
    box = {"bbox": [0, 0, 9, 9], "bbox_mode": 0, "category_id": 0}
    record = {"annotations": [{**box, **x} for x in ANNOTATIONS]}
    graph = SceneGraph.from_dataset_dict(record)
    assert graph.attribute_words() == [["attribute 2", "attribute 0"], [], [], ["attribute 1"]]


@pytest.mark.parametrize(
    ("ids", "scores", "message"),
    [
        ([[0]], [[0.5]], "attributes are .*; expected one list for each of the 2 boxes"),
        ([0, 1], [[0.5], [0.5]], "attributes are .*; expected one list for each of the 2 boxes"),
        ([[0], [1]], 0.5, "attribute scores are 0.5; expected one list"),
        ([[0], [1]], [[0.5], []], "attributes and attribute scores differ in length"),
        ([[0.5], []], [[0.5], []], "attributes are .*expected integers"),
        ([[0], []], [["high"], []], "attribute scores are .*expected numbers"),
        ([[], [-1]], [[], [0.5]], "attribute -1 is negative"),
        ([[], [1]], [[], [1.5]], "an attribute of box 1 has the score 1.5; expected a probability"),
        ([[], [1]], [[], [float("nan")]], "NaN or infinite attribute scores"),
        (
            [[], [1, 1]],
            [[], [0.5, 0.4]],
            r"the attributes \[1, 1\] of box 1 list one of them twice",
        ),
    ],
)
def test_entity_attributes_from_wrong_lists_raises(ids, scores, message):
    with pytest.raises(ValueError, match=f"file, record 3: {message}"):
        EntityAttributes.from_lists(ids, scores, 2, "file, record 3")


def test_scene_graph_attributes_in_networkx_and_dot():
    names = dict(attribute_classes=["red", 'ol"d', "wet"], thing_classes=["cup"])
    graph = graph_of([[0.6, 0.75, 0.0], [0.0, 0.4, 0.0]], **names).graph()
    assert [data["attributes"] for _, data in graph.nodes(data=True)] == ['ol"d, red', ""]
    dot = graph_to_dot(graph)
    assert '0 [label="cup 1\\nol\\"d, red"]' in dot and '1 [label="cup 2"]' in dot
    assert "red" in graph_to_graphml(graph)
    plain = replace(graph_of([[0.6]]), attributes=None).graph()
    assert "attributes" not in plain.nodes[0]
