"""What a model found in one image, and the forms in which it can be taken along.

Boxes are XYXY in pixels of the image as it was read.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from detectron2.structures import Instances

__all__ = ["RelationPrediction", "Triplet", "graph_to_dot", "graph_to_graphml", "name_entities"]


class Triplet(NamedTuple):
    """One relation, in words."""

    subject: str
    predicate: str
    object: str
    score: float
    subject_index: int  # into the instances
    object_index: int


class RelationPrediction(dict):
    """The output contract of one image, a dict with ``instances`` and ``relations``, and views.

    Attributes:
        thing_classes, predicate_classes: names by id; ids beyond them are called ``class 7``.
        file_name: of the image, if it came from a file.
    """

    def __init__(
        self,
        instances: Instances,
        relations: Instances,
        thing_classes: Sequence[str] = (),
        predicate_classes: Sequence[str] = (),
        file_name: str | None = None,
    ):
        """
        Args:
            instances, relations: as the model gives them, see :mod:`.structures.relations`.
            thing_classes, predicate_classes: names.
            file_name: of the image.
        """
        super().__init__(instances=instances.to("cpu"), relations=relations.to("cpu"))
        self.thing_classes = list(thing_classes)
        self.predicate_classes = list(predicate_classes)
        self.file_name = file_name

    @property
    def image_size(self):
        """(height, width)."""
        return self["instances"].image_size

    def class_name(self, number: int) -> str:
        """Name of an entity class."""
        known = number < len(self.thing_classes)
        return self.thing_classes[number] if known else f"class {number}"

    def predicate_name(self, number: int) -> str:
        """Name of a predicate."""
        known = number < len(self.predicate_classes)
        return self.predicate_classes[number] if known else f"predicate {number}"

    def best(self, topk: int | None = None, min_score: float = 0.0) -> "RelationPrediction":
        """The same entities with only the best relations.

        Args:
            topk: at most so many; None keeps all.
            min_score: relations below it are left out.
        """
        relations = self["relations"]
        relations = relations[relations.scores >= min_score]
        if topk is not None:
            relations = relations[:topk]
        return RelationPrediction(
            self["instances"], relations, self.thing_classes, self.predicate_classes, self.file_name
        )

    def triplets(self) -> list[Triplet]:
        """All relations in words, the best first."""
        classes, relations = self["instances"].pred_classes.tolist(), self["relations"]
        rows = zip(
            relations.pairs.tolist(), relations.predicates.tolist(), relations.scores.tolist()
        )
        return [
            Triplet(
                self.class_name(classes[s]),
                self.predicate_name(predicate),
                self.class_name(classes[o]),
                score,
                s,
                o,
            )
            for (s, o), predicate, score in rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types: numbers as in the predictions file of an evaluation, and the names."""
        instances, relations = self["instances"], self["relations"]
        height, width = self.image_size
        classes, predicates = instances.pred_classes.tolist(), relations.predicates.tolist()
        return {
            "file_name": self.file_name,
            "height": height,
            "width": width,
            "instances": {
                "boxes": instances.pred_boxes.tensor.tolist(),
                "classes": classes,
                "class_names": [self.class_name(x) for x in classes],
                "scores": instances.scores.tolist(),
            },
            "relations": {
                "pairs": relations.pairs.tolist(),
                "predicates": predicates,
                "predicate_names": [self.predicate_name(x) for x in predicates],
                "scores": relations.scores.tolist(),
                "predicate_scores": relations.predicate_scores.tolist(),
            },
        }

    def to_json(self, indent: int | None = None) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def graph(self, related_only: bool = False):
        """The scene graph as a :class:`networkx.MultiDiGraph`.

        Nodes are the entities by index, with ``name`` of the class, ``label`` (numbered where there
        are several of a class, as in pictures), ``class_id``, ``score`` and ``box``
        [x0, y0, x1, y1]; edges lead from subject to object, with ``name``, ``predicate_id``,
        ``score`` and ``predicate_score``, their key being the predicate's id.

        Args:
            related_only: leave out entities without any relation.

        Raises:
            ImportError: networkx is not installed.
        """
        try:
            import networkx
        except ImportError as error:
            raise ImportError("Scene graphs need networkx: pip install networkx") from error

        instances, relations = self["instances"], self["relations"]
        height, width = self.image_size
        graph = networkx.MultiDiGraph(height=height, width=width, file_name=self.file_name or "")
        boxes, classes = instances.pred_boxes.tensor.tolist(), instances.pred_classes.tolist()
        nodes = range(len(boxes))
        if related_only:
            nodes = sorted(set(relations.pairs.flatten().tolist()))
        labels = name_entities(boxes, classes, nodes, self.thing_classes)
        scores = instances.scores.tolist()
        for i in nodes:
            graph.add_node(
                i,
                name=self.class_name(classes[i]),
                label=labels[i],
                class_id=classes[i],
                score=scores[i],
                box=boxes[i],
            )
        rows = zip(
            relations.pairs.tolist(),
            relations.predicates.tolist(),
            relations.scores.tolist(),
            relations.predicate_scores.tolist(),
        )
        for (subject, object_), number, score, probability in rows:
            graph.add_edge(
                subject,
                object_,
                key=number,
                name=self.predicate_name(number),
                predicate_id=number,
                score=score,
                predicate_score=probability,
            )
        return graph


def name_entities(
    boxes: np.ndarray, classes: Sequence[int], drawn: Sequence[int], class_names: Sequence[str]
) -> dict[int, str]:
    """Name entities by class, numbered from left to right where a class occurs several times.

    Args:
        boxes: (E, 4).
        classes: (E,) class ids.
        drawn: indices of the entities that get a name.
        class_names: by class id; ids beyond it are called ``class N``.

    Returns:
        From each index in ``drawn`` to its name, such as ``cup 2``.
    """
    members: dict[int, list[int]] = {}
    for entity in drawn:
        members.setdefault(int(classes[entity]), []).append(entity)
    names = {}
    for class_id, entities in members.items():
        known = class_id < len(class_names)
        name = class_names[class_id] if known else f"class {class_id}"
        entities = sorted(
            entities, key=lambda e: (boxes[e][0] + boxes[e][2], boxes[e][1] + boxes[e][3], e)
        )
        for number, entity in enumerate(entities, start=1):
            names[entity] = f"{name} {'' if known else '#'}{number}" if len(entities) > 1 else name
    return names


def graph_to_graphml(graph) -> str:
    """A scene graph as GraphML, whose attributes are plain: a box is ``x0`` to ``y1``."""
    import networkx

    flat = networkx.MultiDiGraph(**graph.graph)
    for node, data in graph.nodes(data=True):
        values = dict(data)
        values.update(zip(("x0", "y0", "x1", "y1"), values.pop("box")))
        flat.add_node(node, **values)
    # A key becomes the edge's id, of which there must be one in a file.
    for number, (subject, object_, data) in enumerate(graph.edges(data=True)):
        flat.add_edge(subject, object_, key=number, **data)
    return "\n".join(networkx.generate_graphml(flat))


def graph_to_dot(graph) -> str:
    """A scene graph in Graphviz's DOT language."""
    lines = ["digraph scene {", "  node [shape=box, style=rounded];"]
    for node, data in graph.nodes(data=True):
        lines.append(f"  {node} [label={_quote(data.get('label', data['name']))}];")
    for subject, object_, data in graph.edges(data=True):
        label = _quote(f"{data['name']} {data['score']:.2f}")
        lines.append(f"  {subject} -> {object_} [label={label}];")
    return "\n".join([*lines, "}"]) + "\n"


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
