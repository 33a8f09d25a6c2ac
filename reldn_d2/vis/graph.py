"""Layout of a scene graph in a drawing without the image.

Shapes: E nodes, P edges. Rectangles are ``(x0, y0, x1, y1)`` in pixels, y downwards.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .layout import Label, LabelPlacer, arc

__all__ = ["GraphPlan", "place_nodes", "plan_graph", "route_edges"]

MAX_ATTEMPTS = 12  # each is larger than the last, until no label covers anything


class GraphPlan(NamedTuple):
    """Positions of the parts of a graph in a drawing that starts at (0, 0)."""

    size: tuple[int, int]  # width, height
    nodes: np.ndarray  # (E, 4) rectangles
    arcs: list[np.ndarray]  # (L, 2) points of each edge
    labels: list[Label]  # of each edge

    def moved(self, x: float, y: float) -> "GraphPlan":
        """Return the plan moved to the right and down."""
        labels = []
        for (x0, y0, x1, y1), target in self.labels:
            target = None if target is None else (target[0] + x, target[1] + y)
            labels.append(Label((x0 + x, y0 + y, x1 + x, y1 + y), target))
        arcs = [points + (x, y) for points in self.arcs]
        return GraphPlan(self.size, self.nodes + (x, y, x, y), arcs, labels)


def plan_graph(
    centers: np.ndarray,
    sizes: np.ndarray,
    edges: Sequence[tuple[int, int]],
    labels: np.ndarray,
    gap: float,
    min_size: tuple[int, int],
) -> GraphPlan:
    """Place nodes, edges and labels in a drawing large enough that no label covers anything.

    Args:
        centers: (E, 2) positions of the entities in the image, x and y in one unit.
        sizes: (E, 2) width and height of each node.
        edges: P pairs of nodes.
        labels: (P, 2) width and height of the label on each edge.
        gap: pixels that stay free around a node.
        min_size: min width and height of the drawing.
    """
    spread = 1.0
    for _ in range(MAX_ATTEMPTS):
        places, needed = place_nodes(centers, sizes, edges, labels, gap, spread)
        whole = np.maximum(np.ceil(needed), min_size).astype(int)
        places = places + (whole - needed) / 2
        frame = (0, 0, int(whole[0]), int(whole[1]))
        arcs = route_edges(edges, places, sizes, frame)
        rects = np.concatenate([places - sizes / 2, places + sizes / 2], axis=1)
        placer = LabelPlacer(frame, taken=rects, details=rects)
        placed = [
            placer.place_on_line(tuple(size), points, [*arcs[:index], *arcs[index + 1 :]])
            for index, (size, points) in enumerate(zip(labels, arcs))
        ]
        if not placer.crowded:
            break
        spread *= 1.2
    return GraphPlan(frame[2:], rects, arcs, placed)


def place_nodes(
    centers: np.ndarray,
    sizes: np.ndarray,
    edges: Sequence[tuple[int, int]],
    labels: np.ndarray,
    gap: float,
    spread: float = 1.0,
) -> tuple[np.ndarray, tuple[float, float]]:
    """Place nodes so that related ones are near each other and none covers another.

    Each connected part is laid out by networkx's spring layout, which starts from the positions in
    the image. The result is rotated or mirrored to keep left and right, above and below as far as
    possible. The parts are put side by side, in their order in the image.

    Args:
        centers, sizes, edges, labels, gap: as in :func:`plan_graph`.
        spread: factor on the length of all edges.

    Returns:
        (E, 2) centers in a drawing that starts at (0, 0), and its width and height.

    Raises:
        ImportError: networkx is not installed.
    """
    try:
        import networkx
    except ImportError as error:
        raise ImportError("Drawing scene graphs needs networkx: pip install networkx") from error

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(centers)))
    for edge, label in zip(edges, labels):
        graph.add_edge(*edge, label=label, arrows=2 if graph.has_edge(*edge) else 1)
    parts = [sorted(part) for part in networkx.connected_components(graph)]
    parts.sort(key=lambda part: tuple(centers[part].mean(axis=0)))
    places, boxes = np.zeros((len(centers), 2)), []
    for part in parts:
        laid_out = _place_part(graph.subgraph(part), centers, sizes, gap, spread)
        low = (laid_out - sizes[part] / 2 - gap / 2).min(axis=0)
        high = (laid_out + sizes[part] / 2 + gap / 2).max(axis=0)
        places[part] = laid_out - low
        boxes.append(high - low)
    corners, whole = _pack(boxes)
    for part, corner in zip(parts, corners):
        places[part] += corner
    return places, whole


def _place_part(
    graph: Any, centers: np.ndarray, sizes: np.ndarray, gap: float, spread: float
) -> np.ndarray:
    """Return the centers of the nodes of one connected part, in order.

    Its edges have the size of their ``label`` and the number of their ``arrows``.
    """
    import networkx

    nodes = sorted(graph)
    if len(nodes) == 1:
        return np.zeros((1, 2))
    start = centers[nodes] - centers[nodes].mean(axis=0)
    # Noise, because two nodes in the same place would not push each other apart.
    reach = np.abs(start).max() or 1.0
    start = start / reach + 0.03 * np.random.default_rng(0).standard_normal(start.shape)
    layout = networkx.spring_layout(
        graph, pos=dict(zip(nodes, start)), k=1.0, iterations=200, seed=0, weight=None
    )
    places = np.array([layout[node] for node in nodes])
    places -= places.mean(axis=0)
    left, _, right = np.linalg.svd(places.T @ start)
    places = places @ (left @ right)  # orthogonal Procrustes: the best rotation or reflection
    index = {node: i for i, node in enumerate(nodes)}
    ratios = []
    for i, j, label in graph.edges(data="label"):
        offset = np.abs(places[index[i]] - places[index[j]])
        length = max(np.hypot(*offset), 1e-6)
        # Along the edge: half of both nodes, the label, and some visible line.
        needed = float(((sizes[i] + sizes[j]) / 2 + label) @ offset) / length + 1.5 * gap
        ratios.append(needed / length)
    # In a dense graph edges cross, and their labels need more room.
    density = graph.size(weight="arrows") / (1.5 * len(nodes))
    scale = np.quantile(ratios, 0.75) * max(1.0, density**0.5) * spread
    return _push_apart(places * scale, sizes[nodes] + gap)


def _pack(boxes: Sequence[np.ndarray]) -> tuple[list[np.ndarray], tuple[float, float]]:
    """Put boxes side by side in rows; return their corners and the total width and height."""
    widest = max((box[0] for box in boxes), default=0.0)
    width = max(widest, (1.8 * sum(box.prod() for box in boxes)) ** 0.5)
    rows: list[list[int]] = []
    used = np.inf
    for index, box in enumerate(boxes):
        if used + box[0] > 1.15 * width:
            rows.append([])
            used = 0.0
        rows[-1].append(index)
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
    """Move overlapping rectangles apart along the axis on which they overlap less."""
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
        # More than half of the overlap, or many nodes would never settle.
        step = 0.7 * np.take_along_axis(common, axis[..., None], axis=2)[..., 0] * sign * both
        for i in (0, 1):
            places[:, i] += (step * (axis == i)).sum(axis=1)
    return places


def route_edges(
    edges: Sequence[tuple[int, int]],
    centers: np.ndarray,
    sizes: np.ndarray,
    frame: Sequence[float],
) -> list[np.ndarray]:
    """Return arcs from node to node that start and end at the nodes' borders.

    Of four arcs per edge, the one with the fewest points behind other nodes is taken.

    Args:
        edges: P pairs of nodes.
        centers: (E, 2).
        sizes: (E, 2) width and height.
        frame: rectangle that no arc leaves.

    Returns:
        per edge (L, 2) points in order, L >= 2.
    """
    routes = []
    halves = sizes / 2 + 2
    both_ways = set(edges)
    for first, second in edges:
        length = float(np.hypot(*(centers[second] - centers[first])))
        least = (0.14 if (second, first) in both_ways else 0.05) * length
        best, hidden = None, float("inf")
        for bulge in (least, least + 0.15 * length, -least, least + 0.3 * length):
            points = arc(centers[first], centers[second], bulge, frame)
            where = np.linspace(0, len(points) - 1, 401)
            fine = [np.interp(where, np.arange(len(points)), x) for x in points.T]
            points = np.stack(fine, axis=1)
            low, high = points.min(axis=0), points.max(axis=0)
            near = ((centers + halves >= low) & (centers - halves <= high)).all(axis=1)
            near[[first, second]] = False
            outside = ~_within(points, centers, halves, [first, second]).any(axis=0)
            behind = int(_within(points[outside], centers, halves, np.flatnonzero(near)).sum())
            if behind < hidden:
                best, hidden = points[outside][::4] if outside.sum() > 8 else points, behind
        routes.append(best)
    return routes


def _within(
    points: np.ndarray, centers: np.ndarray, halves: np.ndarray, nodes: Sequence[int]
) -> np.ndarray:
    """Return (N, L) bool: whether each of (L, 2) points is inside each of N nodes."""
    return (np.abs(points - centers[nodes][:, None]) <= halves[nodes][:, None]).all(axis=2)
