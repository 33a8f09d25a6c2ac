"""Conversion of scene graphs to a model's output, plain types, networkx, GraphML and DOT."""

from typing import Any

import numpy as np
import torch

from detectron2.structures import Boxes, Instances

from .names import name_entities
from .relations import predicted_relations

__all__ = ["graph_to_dot", "graph_to_graphml", "to_networkx", "to_output", "to_record"]


def to_output(scene: Any) -> dict[str, Instances]:
    """Return a prediction as a model's output: ``instances`` and ``relations``.

    Unknown ``predicate_scores`` are the triplets' scores divided by those of their boxes. (This is
    their probability if ``TEST.RELATIONS.ENTITY_SCORE_EXPONENT`` was 1.)

    Args:
        scene: a predicted :class:`.scene_graph.SceneGraph`.
    """
    size = scene.image_size or (0, 0)
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.from_numpy(scene.boxes).float())
    instances.pred_classes = torch.from_numpy(scene.classes).long()
    instances.scores = torch.from_numpy(scene.box_scores).float()
    if scene.attributes is not None:
        known = max(scene.attributes.ids.max(initial=-1) + 1, len(scene.attribute_classes))
        table = scene.attributes.table(len(scene.boxes), known)
        instances.pred_attributes = torch.from_numpy(table).float()
    predicate_scores = scene.predicate_scores
    if predicate_scores is None:
        of_boxes = scene.box_scores[scene.pairs].prod(axis=1)
        predicate_scores = np.divide(
            scene.scores, of_boxes, out=np.zeros_like(scene.scores), where=of_boxes > 0
        )
    relations = predicted_relations(
        size,
        torch.from_numpy(scene.pairs).long(),
        torch.from_numpy(scene.predicates).long(),
        torch.from_numpy(scene.scores).float(),
        torch.from_numpy(predicate_scores).float(),
    )
    return {"instances": instances, "relations": relations}


def to_record(scene: Any) -> dict[str, Any]:
    """Return plain types: the record of the image in a predictions file.

    Unknown values are left out; names are there where the graph has them.

    Args:
        scene: a :class:`.scene_graph.SceneGraph`.
    """
    instances = {"boxes": scene.boxes.tolist(), "classes": scene.classes.tolist()}
    relations = {"pairs": scene.pairs.tolist(), "predicates": scene.predicates.tolist()}
    if scene.thing_classes:
        instances["class_names"] = [scene.class_name(x) for x in instances["classes"]]
    if scene.predicate_classes:
        names = [scene.predicate_name(x) for x in relations["predicates"]]
        relations["predicate_names"] = names
    if scene.attributes is not None:
        instances.update(_attribute_lists(scene))
    for part, key, values in (
        (instances, "scores", scene.box_scores),
        (relations, "scores", scene.scores),
        (relations, "predicate_scores", scene.predicate_scores),
    ):
        if values is not None:
            part[key] = values.tolist()
    image_id = scene.image_id.item() if isinstance(scene.image_id, np.generic) else scene.image_id
    height, width = scene.image_size or (None, None)
    record = {
        "image_id": image_id,
        "file_name": scene.file_name,
        "height": height,
        "width": width,
        "instances": instances,
        "relations": relations,
        "left_out": {str(index): name for index, name in scene.left_out.items()} or None,
    }
    return {key: value for key, value in record.items() if value is not None}


def _attribute_lists(scene: Any) -> dict[str, Any]:
    """Return the attributes of the record, one list per entity."""
    found, count = scene.attributes, len(scene.boxes)
    lists = {"attributes": found.lists(found.ids, count)}
    if scene.attribute_classes:
        ids = lists["attributes"]
        lists["attribute_names"] = [[scene.attribute_name(x) for x in part] for part in ids]
    if found.scores is not None:
        lists["attribute_scores"] = found.lists(found.scores, count)
    return lists


def to_networkx(scene: Any, related_only: bool = False):
    """Return a predicted scene graph as a :class:`networkx.MultiDiGraph`.

    Nodes are the entities by index, with ``name`` of the class, ``label`` (as in pictures, with an
    ordinal if a class occurs repeatedly), ``class_id``, ``score`` and the box as ``x0``, ``y0``,
    ``x1`` and ``y1``; and, if entities have attributes, ``attributes``, such as ``red, wooden``:
    those with a score of at least 0.5, best first. Edges go from subject to object, with ``name``,
    ``predicate_id``, ``score`` and ``predicate_score``; their key is the predicate's id. All values
    are plain scalars, so that networkx can write the graph in any of its formats.

    Args:
        scene: a predicted :class:`.scene_graph.SceneGraph`.
        related_only: leave out entities without relations.

    Raises:
        ImportError: networkx is not installed.
    """
    try:
        import networkx
    except ImportError as error:
        raise ImportError("Scene graphs need networkx: pip install networkx") from error

    height, width = scene.image_size or (0, 0)
    graph = networkx.MultiDiGraph(height=height, width=width, file_name=scene.file_name or "")
    boxes, classes = scene.boxes.tolist(), scene.classes.tolist()
    nodes = scene.related_entities if related_only else range(len(boxes))
    labels = name_entities(boxes, classes, nodes, scene.thing_classes)
    scores = scene.box_scores.tolist()
    words = scene.attribute_words()
    for i in nodes:
        more = {} if scene.attributes is None else {"attributes": ", ".join(words[i])}
        graph.add_node(
            i,
            name=scene.class_name(classes[i]),
            label=labels[i],
            class_id=classes[i],
            score=scores[i],
            **dict(zip(("x0", "y0", "x1", "y1"), boxes[i])),
            **more,
        )
    predicate_scores = scene["relations"].predicate_scores.tolist()
    for (subject, object_, predicate, score), probability in zip(scene.rows(), predicate_scores):
        graph.add_edge(
            subject,
            object_,
            key=predicate,
            name=scene.predicate_name(predicate),
            predicate_id=predicate,
            score=score,
            predicate_score=probability,
        )
    return graph


def graph_to_graphml(graph) -> str:
    """Return a scene graph as GraphML."""
    import networkx

    # A key becomes the id of the edge, which must be unique in the file.
    numbered = networkx.MultiDiGraph(**graph.graph)
    numbered.add_nodes_from(graph.nodes(data=True))
    for edge_id, (subject, object_, data) in enumerate(graph.edges(data=True)):
        numbered.add_edge(subject, object_, key=edge_id, **data)
    return "\n".join(networkx.generate_graphml(numbered))


def graph_to_dot(graph) -> str:
    """Return a scene graph in Graphviz's DOT language."""
    lines = ["digraph scene {", "  node [shape=box, style=rounded];"]
    for node, data in graph.nodes(data=True):
        label = data.get("label", data["name"])
        if data.get("attributes"):
            label += f"\n{data['attributes']}"
        lines.append(f"  {node} [label={_quote(label)}];")
    for subject, object_, data in graph.edges(data=True):
        label = _quote(f"{data['name']} {data['score']:.2f}")
        lines.append(f"  {subject} -> {object_} [label={label}];")
    return "\n".join([*lines, "}"]) + "\n"


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
