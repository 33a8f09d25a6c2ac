"""Pictures of relations: predictions or ground truth, on the image or as a graph.

All boxes are in the frame of the image given to the visualiser. The figures live outside of
pyplot's global state, so thousands of pictures can be drawn in one process.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detectron2.structures import Instances
from detectron2.utils.visualizer import VisImage, Visualizer

from ..structures.names import class_name, name_entities
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

__all__ = ["RelationVisualizer"]

MIN_SIDE, MAX_SIDE = 1152, 1600
GRAPH_TEXT, GRAPH_SIDES = 15.0, (360, 240)  # font size of a graph, its least width and height
MOST_LINES = 4  # predicates written on one arrow; the panel has all
_DIGIT_SPACE = "\u2007"  # as wide as a digit
HIT, MISS = (0.06, 0.48, 0.20), (0.78, 0.12, 0.12)


class RelationVisualizer(Visualizer):
    """Draws the entities and relations of one image.

    Each entity that takes part gets its box and name, each pair an arrow from subject to object
    with its predicates, and a panel lists the relations in the order given. The colour of a
    predicate is the same in all pictures. Each ``draw_*`` of this class starts a new picture.
    """

    def __init__(self, img_rgb: np.ndarray, metadata: Any = None, scale: float | None = None):
        """
        Args:
            img_rgb: (H, W, 3) in [0, 255].
            metadata: with ``thing_classes`` and ``predicate_classes``; ids where it has none.
            scale: pixels of the picture per pixel of the image. None enlarges a small image to a
                longest side of 1152 and reduces a large one to 1600.
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
        self._things: Sequence[str] = self.metadata.get("thing_classes", None) or []
        self._predicates: Sequence[str] = self.metadata.get("predicate_classes", None) or []

    def draw_predictions(
        self, instances: Instances, relations: Instances, topk: int = 20, min_score: float = 0.0
    ) -> VisImage:
        """Draw the best relations of a model's output.

        Args:
            instances: ``pred_boxes`` and ``pred_classes`` of E entities, in the image's frame.
            relations: ``pairs`` (K, 2), ``predicates`` (K,) and descending ``scores`` (K,).
            topk: at most so many are drawn.
            min_score: relations below it are left out.
        """
        predicted = SceneGraph.from_output(None, {"instances": instances, "relations": relations})
        return self.draw_scene(predicted, topk, min_score)

    def draw_scene(
        self, predicted: SceneGraph, topk: int | None = 20, min_score: float = 0.0, **style: Any
    ) -> VisImage:
        """Draw the best relations of a prediction.

        Args:
            predicted: in the image's frame.
            topk: most relations drawn; None draws all.
            min_score: relations with a lower score are left out.
            style: as for :meth:`draw_triplets`.
        """
        best = predicted.best(topk, min_score)
        style.setdefault("heading", heading_of(best, len(predicted.scores), min_score))
        return self._draw(best, **style)

    def draw_ground_truth(self, dataset_dict: dict[str, Any]) -> VisImage:
        """Draw the ``relations`` of a dataset dict whose boxes are in the image's frame."""
        check_size(self.img, dataset_dict)
        return self._draw(SceneGraph.from_dataset_dict(dataset_dict))

    def draw_triplets(
        self, boxes: Any, classes: Sequence[int], triplets: Sequence[RelationRow], **style: Any
    ) -> VisImage:
        """Draw any relations.

        Args:
            boxes: (E, 4) x0, y0, x1, y1.
            classes: (E,) class ids.
            triplets: K tuples (subject index, object index, predicate id, score or None).
            style: ``marks``, K times True for a hit (green), False for a miss (red and dashed) or
                None; ``plain``, True for dark arrows instead of one colour per predicate; ``names``
                and ``colors``, from entity index; ``title`` above the image; ``heading`` above the
                list; ``panel``, where the list stands: "right", "below" or "none".

        Returns:
            the picture; ``get_image()`` gives an array, ``save(path)`` writes a file.
        """
        return self._draw(SceneGraph.from_triplets(boxes, classes, triplets), **style)

    def draw_graph(
        self, boxes: Any, classes: Sequence[int], triplets: Sequence[RelationRow], **style: Any
    ) -> VisImage:
        """Draw relations as a graph without the image: entities are nodes, near where they are.

        Arguments and result as for :meth:`draw_triplets`; needs networkx.
        """
        return self.draw_scene_graph(SceneGraph.from_triplets(boxes, classes, triplets), **style)

    def draw_scene_graph(self, scene: SceneGraph, **style: Any) -> VisImage:
        """Draw all relations of a scene as a graph without the image; as :meth:`draw_graph`."""
        drawn, groups = scene.related_entities, scene.rows_by_pair()
        names = style.setdefault("names", self.name(scene, drawn))
        size = GRAPH_TEXT
        plates = [label_size(_node_text(names[e], size), size) for e in drawn]
        nodes = {entity: i for i, entity in enumerate(drawn)}
        labels = [
            label_size([_node_text(text, size) for text, _ in self._arrow_lines(scene, m)], size)
            for m in groups.values()
        ]
        plan = plan_graph(
            (scene.boxes[drawn, :2] + scene.boxes[drawn, 2:]) / 2,
            np.array(plates).reshape(-1, 2),
            [(nodes[s], nodes[o]) for s, o in groups],
            np.array(labels).reshape(-1, 2),
            gap=2.5 * size,
            least=GRAPH_SIDES,
        )
        blank = np.full((plan.size[1], plan.size[0], 3), 255, np.uint8)
        return RelationVisualizer(blank, self.metadata, 1.0)._draw(scene, plan=plan, **style)

    def name(self, scene: SceneGraph, entities: Sequence[int]) -> dict[int, str]:
        """Names of some entities of a scene, such as ``cup 2`` where there are several cups."""
        return name_entities(scene.boxes, scene.classes, entities, self._things)

    def _draw(
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
        """The common core; arguments as in :meth:`draw_triplets`.

        With ``plan``, the places of all drawn entities and pairs, it is a graph that is drawn.
        """
        drawn, relations = scene.related_entities, scene.rows()
        if marks is None:
            marks = [None] * len(relations)
        line_colors = [
            INK if plain else _line_color(triplet[2], mark)
            for triplet, mark in zip(relations, marks)
        ]
        if names is None:
            names = self.name(scene, drawn)
        if colors is None:
            colors = {entity: entity_color(number) for number, entity in enumerate(drawn)}
        if heading is None:
            count = len(relations)
            heading = f"{count} relation{'s' * (count > 1)}" if count else "no relations"
        rows = [Row([(heading, FAINT, False)])]
        for number, (triplet, mark, color) in enumerate(
            zip(relations, marks, line_colors), start=1
        ):
            rows.append(self._row(number, triplet, mark, color, names, colors))
        height, width = self.img.shape[:2]
        text = None if plan is None else GRAPH_TEXT
        sheet = plan_sheet(width, height, self.scale, rows, panel, title is not None, text)
        self.output = RelationImage(self.img, self.scale, sheet)
        if title is not None:
            text = shorten(title, 1.1 * sheet.text, sheet.area[2] - 12, bold=True)
            self.output.write(6, sheet.area[1] / 2, text, 1.1 * sheet.text, INK, bold=True)
        if drawn:
            dashed = [mark is False for mark in marks]
            if plan is None:
                self._draw_scene(scene, drawn, line_colors, dashed, names, colors)
            else:
                self._draw_plan(scene, plan, line_colors, dashed, names, colors)
        if panel != "none":
            self.output.list_rows(rows)
        return self.output

    def _row(
        self,
        number: int,
        triplet: RelationRow,
        mark: bool | None,
        color: Color,
        names: Mapping[int, str],
        colors: Mapping[int, Color],
    ) -> Row:
        """The line of the panel for one relation."""
        subject, object_, predicate, score = triplet
        pieces = [(str(number).rjust(2, _DIGIT_SPACE) + "  ", FAINT, False)]
        if mark is not None:
            pieces = [("\u2713  " if mark else "\u2717  ", color, True)]
        pieces += [
            (names[subject], colors[subject], False),
            (" \u2013 ", FAINT, False),
            (self._predicate_name(predicate), color, True),
            (" \u2013 ", FAINT, False),
            (names[object_], colors[object_], False),
        ]
        return Row(pieces, "" if score is None else score_text(score))

    def _predicate_name(self, predicate: int) -> str:
        return class_name(predicate, self._predicates, "predicate")

    def _draw_scene(
        self,
        scene: SceneGraph,
        drawn: Sequence[int],
        line_colors: Sequence[Color],
        dashed: Sequence[bool],
        names: Mapping[int, str],
        colors: Mapping[int, Color],
    ) -> None:
        """Draw boxes, arrows and labels; what is drawn later lies above."""
        output: RelationImage = self.output
        sheet = output.sheet
        size, stroke, radius = sheet.text, sheet.text / 7, sheet.text / 3.2
        x0, y0, x1, y1 = sheet.image
        boxes = scene.boxes[list(drawn)] * np.array([(x1 - x0) / self.img.shape[1]] * 4)
        boxes = boxes + np.array([x0, y0, x0, y0])
        boxes = np.clip(boxes, [x0 + 1, y0 + 1] * 2, [x1 - 1, y1 - 1] * 2)
        for entity, (left, top, right, bottom) in zip(drawn, boxes):
            corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
            output.line(np.array(corners), colors[entity], stroke)

        anchors = dict(zip(drawn, choose_anchors(boxes, spacing=5 * size)))
        groups = scene.rows_by_pair()
        bulges = arc_bulges(list(groups), anchors, step=1.7 * size)
        arcs = [
            arc(anchors[s], anchors[o], bulge, sheet.area, trim=radius + 1.5)
            for (s, o), bulge in zip(groups, bulges)
        ]
        self._draw_arrows(arcs, list(groups.values()), line_colors, dashed)
        for entity in drawn:
            output.dot(anchors[entity], radius, colors[entity])

        dots = np.stack([np.tile(anchors[e], 2) for e in drawn]) + radius * np.array([-1, -1, 1, 1])
        placer = LabelPlacer(sheet.area, taken=dots, details=boxes)
        room = 0.5 * (sheet.area[2] - sheet.area[0])
        for entity, box in zip(drawn, boxes):
            text = shorten(names[entity], size, room)
            label = placer.place_at_box(label_size(text, size), box, arcs)
            output.plate(label, [(text, WHITE)], colors[entity], WHITE)
        self._label_arrows(placer, arcs, scene, list(groups.values()), line_colors)

    def _draw_plan(
        self,
        scene: SceneGraph,
        plan: GraphPlan,
        line_colors: Sequence[Color],
        dashed: Sequence[bool],
        names: Mapping[int, str],
        colors: Mapping[int, Color],
    ) -> None:
        """Draw entities as plates with their names, and arrows between them."""
        output: RelationImage = self.output
        sheet, groups = output.sheet, list(scene.rows_by_pair().values())
        plan = plan.moved(*sheet.image[:2])
        self._draw_arrows(plan.arcs, groups, line_colors, dashed)
        for entity, rect in zip(scene.related_entities, plan.nodes):
            label = Label(tuple(float(x) for x in rect), None)
            text = _node_text(names[entity], sheet.text)
            output.plate(label, [(text, WHITE)], colors[entity], WHITE)
        for label, members in zip(plan.labels, groups):
            lines = [
                (_node_text(text, sheet.text), FAINT if i is None else line_colors[i])
                for text, i in self._arrow_lines(scene, members)
            ]
            output.plate(label, lines, WHITE, lines[0][1])

    def _draw_arrows(
        self,
        arcs: Sequence[np.ndarray],
        groups: Sequence[Sequence[int]],
        line_colors: Sequence[Color],
        dashed: Sequence[bool],
    ) -> None:
        """Draw an arrow a pair, in the colour of its best relation; dashed if all of them are."""
        width = 1.1 * self.output.sheet.text / 7
        for points, members in zip(arcs, groups):
            whole = [number for number in members if not dashed[number]]
            self.output.arrow(points, line_colors[(whole or members)[0]], width, not whole)

    def _label_arrows(
        self,
        placer: LabelPlacer,
        arcs: Sequence[np.ndarray],
        scene: SceneGraph,
        groups: Sequence[Sequence[int]],
        line_colors: Sequence[Color],
    ) -> None:
        """Write on each arrow the predicates of its pair, each in its colour."""
        output: RelationImage = self.output
        size, room = output.sheet.text, 0.5 * (output.sheet.area[2] - output.sheet.area[0])
        for number, (points, members) in enumerate(zip(arcs, groups)):
            lines = [
                (shorten(text, size, room), FAINT if i is None else line_colors[i])
                for text, i in self._arrow_lines(scene, members)
            ]
            others = [*arcs[:number], *arcs[number + 1 :]]
            wanted = label_size([text for text, _ in lines], size)
            label = placer.place_on_line(wanted, points, others)
            output.plate(label, lines, WHITE, lines[0][1])

    def _arrow_lines(
        self, scene: SceneGraph, members: Sequence[int]
    ) -> list[tuple[str, int | None]]:
        """What is written on the arrow of a pair: texts, and the relation that each one names."""
        # Annotations may say the same thing of a pair twice.
        predicates = scene.predicates.tolist()
        first = {predicates[i]: i for i in reversed(members)}
        members = sorted(first.values())
        shown = members if len(members) <= MOST_LINES else members[: MOST_LINES - 1]
        lines = [(self._predicate_name(predicates[i]), i) for i in shown]
        if len(shown) < len(members):
            lines.append((f"and {len(members) - len(shown)} more", None))
        return lines


def _node_text(name: str, size: float) -> str:
    """The text of a node or an arrow of a graph."""
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
    """Two digits behind the point; three of small scores."""
    if score >= 0.0995:
        return f"{score:.2f}"
    return f"{score:.3f}" if score >= 0.0005 else "<0.001"


def check_size(img: np.ndarray, dataset_dict: dict[str, Any]) -> None:
    height, width = img.shape[:2]
    expected = (dataset_dict.get("height", height), dataset_dict.get("width", width))
    if expected != (height, width):
        raise ValueError(
            f"{dataset_dict.get('file_name', 'dataset dict')}: the image is {width} x {height} "
            f"pixels, but its record says {expected[1]} x {expected[0]}. Give the image that the "
            "boxes belong to, read with its EXIF orientation "
            "(detectron2.data.detection_utils.read_image does so)."
        )
