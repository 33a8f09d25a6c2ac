"""Where the nodes and edges of a scene graph go in a drawing without the image.

Shapes: E nodes, P edges. Rectangles are ``(x0, y0, x1, y1)`` in pixels, y downwards.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .layout import Label, LabelPlacer, arc

__all__ = ["GraphPlan", "place_nodes", "plan_graph", "route_edges"]

MOST_TRIES = 12  # of larger and larger drawings, until no label covers anything


class GraphPlan(NamedTuple):
    """Where the parts of a graph lie in a drawing that begins at (0, 0)."""

    size: tuple[int, int]  # width, height
    nodes: np.ndarray  # (E, 4) rectangles
    arcs: list[np.ndarray]  # (L, 2) points of each edge
    labels: list[Label]  # of each edge

    def moved(self, x: float, y: float) -> "GraphPlan":
        """The same further to the right and below."""
        by = np.array([x, y])
        labels = []
        for (x0, y0, x1, y1), target in self.labels:
            target = None if target is None else (target[0] + x, target[1] + y)
            labels.append(Label((x0 + x, y0 + y, x1 + x, y1 + y), target))
        arcs = [points + by for points in self.arcs]
        return GraphPlan(self.size, self.nodes + np.tile(by, 2), arcs, labels)


def plan_graph(
    centres: np.ndarray,
    sizes: np.ndarray,
    edges: Sequence[tuple[int, int]],
    labels: np.ndarray,
    gap: float,
    least: tuple[int, int],
) -> GraphPlan:
    """Place nodes, edges and labels, in a drawing so large that no label covers anything.

    Args:
        centres: (E, 2) of the entities in the image, both in one unit.
        sizes: (E, 2) width and height of each node.
        edges: P pairs of nodes.
        labels: (P, 2) width and height of what stands on each edge.
        gap: pixels that stay free around a node.
        least: width and height that the drawing has at least.
    """
    spread = 1.0
    for _ in range(MOST_TRIES):
        places, needed = place_nodes(centres, sizes, edges, labels, gap, spread)
        whole = np.maximum(np.ceil(needed), least).astype(int)
        places = places + (whole - needed) / 2
        frame = (0, 0, int(whole[0]), int(whole[1]))
        arcs = route_edges(edges, dict(enumerate(places)), dict(enumerate(sizes)), frame)
        rects = np.concatenate([places - sizes / 2, places + sizes / 2], axis=1)
        placer = LabelPlacer(frame, taken=rects, details=rects)
        placed = [
            placer.place_on_line(tuple(size), points, [*arcs[:number], *arcs[number + 1 :]])
            for number, (size, points) in enumerate(zip(labels, arcs))
        ]
        if not placer.crowded:
            break
        spread *= 1.2
    return GraphPlan(frame[2:], rects, arcs, placed)


def place_nodes(
    centres: np.ndarray,
    sizes: np.ndarray,
    edges: Sequence[tuple[int, int]],
    labels: np.ndarray,
    gap: float,
    spread: float = 1.0,
) -> tuple[np.ndarray, tuple[float, float]]:
    """Place nodes so that related ones are near each other and none covers another.

    Each connected part is laid out by networkx's spring layout, started where the entities are in
    the image and then turned so that left and right, above and below are kept where they can be;
    the parts stand side by side, in the order in which they are in the image.

    Args:
        centres: (E, 2) of the entities in the image, both in one unit.
        sizes: (E, 2) width and height of each node.
        edges: pairs of nodes.
        labels: (P, 2) width and height of what stands on each edge.
        gap: pixels that stay free around a node.
        spread: makes all edges longer by this factor.

    Returns:
        (E, 2) centres in a drawing that begins at (0, 0), and its width and height.

    Raises:
        ImportError: networkx is not installed.
    """
    try:
        import networkx
    except ImportError as error:
        raise ImportError("Drawing scene graphs needs networkx: pip install networkx") from error

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(centres)))
    for edge, label in zip(edges, labels):
        both_ways = graph.has_edge(*edge)
        graph.add_edge(*edge, label=label, arrows=2 if both_ways else 1)
    parts = [sorted(part) for part in networkx.connected_components(graph)]
    parts.sort(key=lambda part: tuple(centres[part].mean(axis=0)))
    places, boxes = np.zeros((len(centres), 2)), []
    for part in parts:
        laid_out = _place_part(graph.subgraph(part), centres, sizes, gap, spread)
        low = (laid_out - sizes[part] / 2 - gap / 2).min(axis=0)
        high = (laid_out + sizes[part] / 2 + gap / 2).max(axis=0)
        places[part] = laid_out - low
        boxes.append(high - low)
    corners, whole = _pack(boxes)
    for part, corner in zip(parts, corners):
        places[part] += corner
    return places, whole


def _place_part(
    graph: Any, centres: np.ndarray, sizes: np.ndarray, gap: float, spread: float
) -> np.ndarray:
    """Centres of the nodes, in order, of one connected part.

    Its edges have a ``label``, the size of what stands on them, and a number of ``arrows``.
    """
    import networkx

    nodes = sorted(graph)
    if len(nodes) == 1:
        return np.zeros((1, 2))
    start = centres[nodes] - centres[nodes].mean(axis=0)
    # Two nodes at one place would push each other in no direction.
    reach = np.abs(start).max() or 1.0
    start = start / reach + 0.03 * np.random.default_rng(0).standard_normal(start.shape)
    found = networkx.spring_layout(
        graph, pos=dict(zip(nodes, start)), k=1.0, iterations=200, seed=0, weight=None
    )
    places = np.array([found[node] for node in nodes])
    places -= places.mean(axis=0)
    left, _, right = np.linalg.svd(places.T @ start)
    places = places @ (left @ right)  # the rotation or reflection nearest to the image
    index = {node: i for i, node in enumerate(nodes)}
    ratios = []
    for i, j, label in graph.edges(data="label"):
        offset = np.abs(places[index[i]] - places[index[j]])
        length = max(np.hypot(*offset), 1e-6)
        # Half of both nodes and the label, along the edge, and some line to be seen of it.
        needed = float(((sizes[i] + sizes[j]) / 2 + label) @ offset) / length + 1.5 * gap
        ratios.append(needed / length)
    # Many edges for the nodes cross each other and need room for their labels.
    density = graph.size(weight="arrows") / (1.5 * len(nodes))
    scale = np.quantile(ratios, 0.75) * max(1.0, density**0.5) * spread
    return _push_apart(places * scale, sizes[nodes] + gap)


def _pack(boxes: Sequence[np.ndarray]) -> tuple[list[np.ndarray], tuple[float, float]]:
    """Corners of boxes that are put side by side, in rows, and the width and height of all."""
    widest = max((box[0] for box in boxes), default=0.0)
    width = max(widest, (1.8 * sum(box.prod() for box in boxes)) ** 0.5)
    rows: list[list[int]] = []
    used = np.inf
    for number, box in enumerate(boxes):
        if used + box[0] > 1.15 * width:
            rows.append([])
            used = 0.0
        rows[-1].append(number)
        used += box[0]
    corners = [np.zeros(2) for _ in boxes]
    top = right = 0.0
    for row in rows:
        height, left = max(boxes[i][1] for i in row), 0.0
        for i in row:
            corners[i] = np.array([left, top + (height - boxes[i][1]) / 2])
            left += boxes[i][0]
        top, right = top + height, max(right, left)
    return corners, (float(right), float(top))


def _push_apart(places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Move overlapping rectangles away from each other, along the axis where less is in common."""
    places = places.copy()
    for _ in range(1000):
        offset = places[:, None] - places[None]
        common = (sizes[:, None] + sizes[None]) / 2 - np.abs(offset)
        both = (common > 1e-6).all(axis=2)
        np.fill_diagonal(both, False)
        if not both.any():
            break
        axis = common.argmin(axis=2)
        along = np.take_along_axis(offset, axis[..., None], axis=2)[..., 0]
        index = np.arange(len(places))
        sign = np.where(along != 0, np.sign(along), np.sign(index[:, None] - index[None]))
        # A little more than half of what is in common, or many nodes would never settle.
        step = 0.7 * np.take_along_axis(common, axis[..., None], axis=2)[..., 0] * sign * both
        for i in (0, 1):
            places[:, i] += (step * (axis == i)).sum(axis=1)
    return places


def route_edges(
    edges: Sequence[tuple[int, int]],
    centres: dict[int, np.ndarray],
    sizes: dict[int, np.ndarray],
    frame: Sequence[float],
) -> list[np.ndarray]:
    """Bows from node to node that begin and end at the nodes' rims.

    Args:
        edges: P pairs of nodes.
        centres: (2,) of each node.
        sizes: (2,) width and height of each node.
        frame: rectangle that no bow leaves.

    Returns:
        for each edge (L, 2) points in order, L >= 2.
    """
    routes = []
    number = {node: i for i, node in enumerate(centres)}
    middles = np.array([centres[node] for node in number]).reshape(-1, 2)
    halves = np.array([sizes[node] for node in number]).reshape(-1, 2) / 2 + 2
    both_ways = set(edges)
    for first, second in edges:
        length = float(np.hypot(*(centres[second] - centres[first])))
        least = (0.14 if (second, first) in both_ways else 0.05) * length
        best, hidden = None, float("inf")
        for bulge in (least, least + 0.15 * length, -least, least + 0.3 * length):
            points = arc(centres[first], centres[second], bulge, frame)
            where = np.linspace(0, len(points) - 1, 401)
            fine = [np.interp(where, np.arange(len(points)), x) for x in points.T]
            points = np.stack(fine, axis=1)
            low, high = points.min(axis=0), points.max(axis=0)
            near = ((middles + halves >= low) & (middles - halves <= high)).all(axis=1)
            near[[number[first], number[second]]] = False
            outside = ~_within(points, middles, halves, [number[first], number[second]]).any(0)
            behind = int(_within(points[outside], middles, halves, np.flatnonzero(near)).sum())
            if behind < hidden:
                best, hidden = points[outside][::4] if outside.sum() > 8 else points, behind
        routes.append(best)
    return routes


def _within(
    points: np.ndarray, middles: np.ndarray, halves: np.ndarray, which: Sequence[int]
) -> np.ndarray:
    """(L, 2) points and N of the rectangles to (N, L) bool."""
    return (np.abs(points - middles[which][:, None]) <= halves[which][:, None]).all(axis=2)
