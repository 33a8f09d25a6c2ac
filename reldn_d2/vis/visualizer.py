"""Pictures of relations: predictions or ground truth, on the image or as a graph.

All boxes are in the frame of the image given to the visualizer. The figures live outside pyplot's
global state, so thousands of pictures can be drawn in one process.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from detectron2.utils.visualizer import VisImage, Visualizer

from ..structures.name_matching import NAME_FIELDS
from ..structures.names import class_name, name_entities, one_line, with_attributes
from ..structures.scene_graph import RelationRow, SceneGraph
from .canvas import FAINT, INK, WHITE, RelationImage, Row, label_size, plan_sheet, shorten
from .graph import GraphPlan, plan_graph
from .layout import (
    Color,
    Label,
    LabelPlacer,
    arc,
    arc_bulges,
    choose_anchors,
    entity_color,
    fit_size,
    predicate_color,
)

__all__ = ["RelationVisualizer", "check_size", "heading_of", "score_text"]

MIN_SIDE, MAX_SIDE = 1152, 1600
GRAPH_TEXT, GRAPH_MIN_SIZE = 15.0, (360, 240)  # font size of a graph, its min width and height
MAX_LINES = 4  # predicates written on one arrow; the panel lists all
_DIGIT_SPACE = "\u2007"  # as wide as a digit
HIT, MISS = (0.06, 0.48, 0.20), (0.78, 0.12, 0.12)


class _Look(NamedTuple):
    """How the relations and entities of a picture are drawn."""

    line_colors: list[Color]  # by relation
    dashed: list[bool]  # by relation
    names: Mapping[int, str]  # by entity
    colors: Mapping[int, Color]  # by entity


class RelationVisualizer(Visualizer):
    """Draws the entities and relations of one image.

    Each entity that takes part in a relation gets a box and a name, each pair an arrow from subject
    to object with its predicates, and a panel lists the relations in the given order. A predicate
    has the same color in all pictures. Each ``draw_*`` method of this class starts a new picture
    and returns it: ``get_image()`` gives an array, ``save(path)`` writes a file.
    """

    def __init__(self, img_rgb: np.ndarray, metadata: Any = None, scale: float | None = None):
        """
        Args:
            img_rgb: (H, W, 3) in [0, 255].
            metadata: with ``thing_classes``, ``predicate_classes`` and, if there are attributes,
                ``attribute_classes``; without them ids are shown.
            scale: pixels of the picture per pixel of the image. None enlarges a small image to a
                longest side of 1152 and reduces a large one to 1600.

        Raises:
            ValueError: the image has another shape.
        """
        img_rgb = np.asarray(img_rgb)
        if img_rgb.ndim != 3 or img_rgb.shape[2] != 3 or 0 in img_rgb.shape:
            raise ValueError(
                f"The image has shape {img_rgb.shape}; expected (height, width, 3) in RGB order. "
                "Convert it first, for instance with PIL's Image.convert('RGB')."
            )
        if scale is None:
            scale = fit_size(img_rgb.shape[1], img_rgb.shape[0], MIN_SIDE, MAX_SIDE)
        self.scale = scale
        super().__init__(img_rgb, metadata, scale=scale)
        self._things, self._predicates, self._attributes = (
            [one_line(name) for name in self.metadata.get(key, None) or []] for key in NAME_FIELDS
        )

    def draw_predictions(
        self, predicted: SceneGraph, topk: int | None = 20, min_score: float = 0.0, **style: Any
    ) -> VisImage:
        """Draw the best relations of a prediction.

        Args:
            predicted: what the predictor returns, or ``SceneGraph.from_output(None, output)`` for
                the output of a model.
            topk: max relations drawn; None draws all.
            min_score: relations with a lower score are left out.
            style: as for :meth:`draw_scene`.
        """
        best = predicted.best(topk, min_score)
        style.setdefault("heading", heading_of(best, len(predicted.scores), min_score))
        return self.draw_scene(best, **style)

    def draw_ground_truth(self, dataset_dict: dict[str, Any], **style: Any) -> VisImage:
        """Draw the ``relations`` of a dataset dict; ``style`` as for :meth:`draw_scene`.

        Raises:
            ValueError: the image is not as large as the dict says.
        """
        check_size(self.img, dataset_dict)
        return self.draw_scene(SceneGraph.from_dataset_dict(dataset_dict), **style)

    def draw_triplets(
        self, boxes: Any, classes: Sequence[int], triplets: Sequence[RelationRow], **style: Any
    ) -> VisImage:
        """Draw relations that are in no scene graph yet; ``style`` as for :meth:`draw_scene`.

        Args:
            boxes: (R, 4) x0, y0, x1, y1.
            classes: (R,) class ids.
            triplets: K tuples (subject index, object index, predicate id, score or None).
        """
        return self.draw_scene(SceneGraph.from_triplets(boxes, classes, triplets), **style)

    def draw_graph(self, scene: SceneGraph, **style: Any) -> VisImage:
        """Draw all relations of a scene as a graph without the image; needs networkx.

        Entities are nodes, close to where they are in the image. Arguments as for
        :meth:`draw_scene`.
        """
        drawn, groups = scene.related_entities, scene.rows_by_pair()
        names = style.setdefault("names", self.name(scene, drawn))
        size = GRAPH_TEXT
        plates = [label_size(_node_text(names[entity], size), size) for entity in drawn]
        nodes = {entity: node for node, entity in enumerate(drawn)}
        labels = [
            label_size([_node_text(x, size) for x, _ in self._arrow_lines(scene, rows)], size)
            for rows in groups.values()
        ]
        plan = plan_graph(
            (scene.boxes[drawn, :2] + scene.boxes[drawn, 2:]) / 2,
            np.array(plates).reshape(-1, 2),
            [(nodes[s], nodes[o]) for s, o in groups],
            np.array(labels).reshape(-1, 2),
            gap=2.5 * size,
            min_size=GRAPH_MIN_SIZE,
        )
        blank = np.full((plan.size[1], plan.size[0], 3), 255, np.uint8)
        return RelationVisualizer(blank, self.metadata, 1.0).draw_scene(scene, plan=plan, **style)

    def draw_scene(
        self,
        scene: SceneGraph,
        marks: Sequence[bool | None] | None = None,
        names: Mapping[int, str] | None = None,
        colors: Mapping[int, Color] | None = None,
        title: str | None = None,
        heading: str | None = None,
        panel: str = "right",
        plain: bool = False,
        plan: GraphPlan | None = None,
    ) -> VisImage:
        """Draw all relations of a scene.

        Args:
            scene: predicted or true, in the image's frame.
            marks: per relation True for a hit (green), False for a miss (red and dashed) or None.
            names: name by entity; by default ``cup 2`` where there are several cups.
            colors: color by entity.
            title: text above the image.
            heading: text above the list.
            panel: where the list goes, "right", "below" or "none".
            plain: dark arrows instead of one color per predicate.
            plan: positions of all drawn entities and pairs; draws them as a graph.
        """
        drawn, relations = scene.related_entities, scene.rows()
        if marks is None:
            marks = [None] * len(relations)
        if colors is None:
            colors = {entity: entity_color(index) for index, entity in enumerate(drawn)}
        look = _Look(
            [INK if plain else _line_color(x[2], mark) for x, mark in zip(relations, marks)],
            [mark is False for mark in marks],
            (
                self.name(scene, drawn)
                if names is None
                else {entity: one_line(name) for entity, name in names.items()}
            ),
            colors,
        )
        if heading is None:
            count = len(relations)
            heading = f"{count} relation{'s' * (count > 1)}" if count else "no relations"
        rows = [Row([(heading, FAINT, False)])]
        rows += [
            self._panel_row(index, relation, mark, look)
            for index, (relation, mark) in enumerate(zip(relations, marks))
        ]
        height, width = self.img.shape[:2]
        text_size = None if plan is None else GRAPH_TEXT
        sheet = plan_sheet(width, height, self.scale, rows, panel, title is not None, text_size)
        self.output = RelationImage(self.img, self.scale, sheet)
        if title is not None:
            text = shorten(one_line(title), 1.1 * sheet.text, sheet.area[2] - 12, bold=True)
            self.output.write(6, sheet.area[1] / 2, text, 1.1 * sheet.text, INK, bold=True)
        if drawn and plan is None:
            self._draw_on_image(scene, look)
        elif drawn:
            self._draw_plan(scene, plan, look)
        if panel != "none":
            self.output.list_rows(rows)
        return self.output

    def name(self, scene: SceneGraph, entities: Sequence[int]) -> dict[int, str]:
        """Return names of some entities of a scene, such as ``cup 2`` if there are several cups.

        Attributes, if there are any, are added: ``cup 2 (red, wooden)``.
        """
        names = name_entities(scene.boxes, scene.classes, entities, self._things)
        words = replace(scene, attribute_classes=self._attributes).attribute_words()
        return {entity: with_attributes(name, words[entity]) for entity, name in names.items()}

    def _predicate_name(self, predicate: int) -> str:
        return class_name(predicate, self._predicates, "predicate")

    def _panel_row(self, index: int, relation: RelationRow, mark: bool | None, look: _Look) -> Row:
        """Return the line of the panel for one relation."""
        subject, object_, predicate, score = relation
        color = look.line_colors[index]
        pieces = [(str(index + 1).rjust(2, _DIGIT_SPACE) + "  ", FAINT, False)]
        if mark is not None:
            pieces = [("\u2713  " if mark else "\u2717  ", color, True)]
        pieces += [
            (look.names[subject], look.colors[subject], False),
            (" \u2013 ", FAINT, False),
            (self._predicate_name(predicate), color, True),
            (" \u2013 ", FAINT, False),
            (look.names[object_], look.colors[object_], False),
        ]
        return Row(pieces, "" if score is None else score_text(score))

    def _draw_on_image(self, scene: SceneGraph, look: _Look) -> None:
        """Draw boxes, arrows and labels, from the bottom to the top."""
        output: RelationImage = self.output
        sheet, drawn = output.sheet, scene.related_entities
        size, stroke, radius = sheet.text, sheet.text / 7, sheet.text / 3.2
        x0, y0, x1, y1 = sheet.image
        boxes = scene.boxes[drawn] * ((x1 - x0) / self.img.shape[1]) + [x0, y0, x0, y0]
        boxes = np.clip(boxes, [x0 + 1, y0 + 1] * 2, [x1 - 1, y1 - 1] * 2)
        for entity, (left, top, right, bottom) in zip(drawn, boxes):
            corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
            output.line(np.array(corners), look.colors[entity], stroke)

        anchors = dict(zip(drawn, choose_anchors(boxes, spacing=5 * size)))
        groups = scene.rows_by_pair()
        bulges = arc_bulges(list(groups), anchors, step=1.7 * size)
        arcs = [
            arc(anchors[s], anchors[o], bulge, sheet.area, trim=radius + 1.5)
            for (s, o), bulge in zip(groups, bulges)
        ]
        self._draw_arrows(arcs, groups.values(), look)
        for entity in drawn:
            output.dot(anchors[entity], radius, look.colors[entity])

        dots = np.stack([np.tile(anchors[e], 2) for e in drawn]) + radius * np.array([-1, -1, 1, 1])
        placer = LabelPlacer(sheet.area, taken=dots, details=boxes)
        max_width = 0.5 * (sheet.area[2] - sheet.area[0])
        for entity, box in zip(drawn, boxes):
            text = shorten(look.names[entity], size, max_width)
            label = placer.place_at_box(label_size(text, size), box, arcs)
            output.plate(label, [(text, WHITE)], look.colors[entity], WHITE)
        for index, (points, rows) in enumerate(zip(arcs, groups.values())):
            lines = self._arrow_lines(scene, rows, look.line_colors)
            lines = [(shorten(text, size, max_width), color) for text, color in lines]
            other_arcs = [*arcs[:index], *arcs[index + 1 :]]
            wanted = label_size([text for text, _ in lines], size)
            label = placer.place_on_line(wanted, points, other_arcs)
            output.plate(label, lines, WHITE, lines[0][1])

    def _draw_plan(self, scene: SceneGraph, plan: GraphPlan, look: _Look) -> None:
        """Draw entities as plates with their names, and arrows between them."""
        output: RelationImage = self.output
        size, groups = output.sheet.text, scene.rows_by_pair().values()
        plan = plan.moved(*output.sheet.image[:2])
        self._draw_arrows(plan.arcs, groups, look)
        for entity, rect in zip(scene.related_entities, plan.nodes):
            label = Label(tuple(float(x) for x in rect), None)
            text = _node_text(look.names[entity], size)
            output.plate(label, [(text, WHITE)], look.colors[entity], WHITE)
        for label, rows in zip(plan.labels, groups):
            lines = self._arrow_lines(scene, rows, look.line_colors)
            lines = [(_node_text(text, size), color) for text, color in lines]
            output.plate(label, lines, WHITE, lines[0][1])

    def _draw_arrows(
        self, arcs: Sequence[np.ndarray], groups: Iterable[Sequence[int]], look: _Look
    ) -> None:
        """Draw one arrow per pair in the color of its best relation that is not a miss, if any."""
        width = 1.1 * self.output.sheet.text / 7
        for points, rows in zip(arcs, groups):
            solid = [row for row in rows if not look.dashed[row]]
            self.output.arrow(points, look.line_colors[(solid or rows)[0]], width, not solid)

    def _arrow_lines(
        self, scene: SceneGraph, rows: Sequence[int], line_colors: Sequence[Color] | None = None
    ) -> list[tuple[str, Color | None]]:
        """Return the texts on the arrow of a pair and their colors (None without colors).

        Args:
            scene: the scene.
            rows: the relations of the pair.
            line_colors: color by relation.
        """
        # Annotations may list a relation twice.
        predicates = scene.predicates.tolist()
        first_row = {predicates[row]: row for row in reversed(rows)}
        rows = sorted(first_row.values())
        shown = rows if len(rows) <= MAX_LINES else rows[: MAX_LINES - 1]
        lines = [
            (self._predicate_name(predicates[row]), line_colors and line_colors[row])
            for row in shown
        ]
        if len(shown) < len(rows):
            lines.append((f"and {len(rows) - len(shown)} more", FAINT))
        return lines


def _node_text(name: str, size: float) -> str:
    """Return the text of a node or an arrow of a graph."""
    return shorten(name, size, 20 * size)


def heading_of(best: SceneGraph, total: int, min_score: float = 0.0) -> str:
    """Return the heading of a list of the best of ``total`` predicted relations."""
    count = len(best.scores)
    if not total:
        return "no relations"
    if not count:
        return f"none of {total} relations scores {min_score:g}"
    return f"{count} best of {total} relation{'s' * (total > 1)}"


def _line_color(predicate: int, mark: bool | None) -> Color:
    if mark is None:
        return predicate_color(predicate)
    return HIT if mark else MISS


def score_text(score: float) -> str:
    """Return two decimals of a score, or three if it is small."""
    if score >= 0.0995:
        return f"{score:.2f}"
    return f"{score:.3f}" if score >= 0.0005 else "<0.001"


def check_size(img: np.ndarray, dataset_dict: dict[str, Any]) -> None:
    """Raise ValueError if an image does not have the size that its dataset dict says."""
    height, width = img.shape[:2]
    expected = (dataset_dict.get("height", height), dataset_dict.get("width", width))
    if expected != (height, width):
        raise ValueError(
            f"{dataset_dict.get('file_name', 'dataset dict')}: the image is {width} x {height} "
            f"pixels, but its record says {expected[1]} x {expected[0]}. Give the image that the "
            "boxes belong to, read with its EXIF orientation "
            "(reldn_d2.utils.image_io.read_rgb does so)."
        )
