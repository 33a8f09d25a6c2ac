"""Conversion of scene graphs to networkx, GraphML and Graphviz's DOT."""

from typing import Any

from .names import name_entities

__all__ = ["graph_to_dot", "graph_to_graphml", "to_networkx"]


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
