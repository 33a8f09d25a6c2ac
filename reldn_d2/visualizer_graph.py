"""Where the nodes and edges of a scene graph go in a drawing without the image.

Shapes: E nodes, P edges. Rectangles are ``(x0, y0, x1, y1)`` in pixels, y downwards.
"""

from typing import Dict, List, Sequence, Tuple

import numpy as np

from .visualizer_layout import arc

__all__ = ["place_nodes", "route_edges"]


def place_nodes(
    centres: np.ndarray,
    sizes: np.ndarray,
    edges: Sequence[Tuple[int, int]],
    frame: Sequence[float],
    gap: float,
) -> np.ndarray:
    """Place nodes so that related ones are near each other and none covers another.

    The layout is networkx's spring layout, started where the entities are in the image, so that the
    drawing keeps left and right, above and below where it can.

    Args:
        centres: (E, 2) of the entities, as shares of the image's width and height.
        sizes: (E, 2) width and height of each node.
        edges: pairs of nodes.
        frame: rectangle in which all nodes lie.
        gap: pixels that stay free around a node.

    Returns:
        (E, 2) centres.

    Raises:
        ImportError: networkx is not installed.
    """
    try:
        import networkx
    except ImportError as error:
        raise ImportError("Drawing scene graphs needs networkx: pip install networkx") from error

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(centres)))
    graph.add_edges_from(edges)
    # Two nodes at one place would push each other in no direction.
    start = centres + 0.03 * np.random.default_rng(0).standard_normal(centres.shape)
    positions = networkx.spring_layout(
        graph,
        pos={i: tuple(place) for i, place in enumerate(start)},
        k=1.6 / max(len(centres), 1) ** 0.5,
        iterations=40,
        seed=0,
    )
    places = np.array([positions[i] for i in range(len(centres))]).reshape(-1, 2)
    low, high = np.asarray(frame[:2], dtype=float), np.asarray(frame[2:], dtype=float)
    spread = places.max(axis=0) - places.min(axis=0)
    relative = np.where(spread > 1e-6, (places - places.min(axis=0)) / spread.clip(1e-6), 0.5)
    margin = sizes / 2 + gap / 2
    places = low + margin + relative * ((high - low) - 2 * margin).clip(min=0)
    return _push_apart(places, sizes + gap, low, high)


def _push_apart(
    places: np.ndarray, sizes: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Move overlapping rectangles away from each other, along the axis where less is in common."""
    places = places.copy()
    for _ in range(200):
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
        step = 0.5 * np.take_along_axis(common, axis[..., None], axis=2)[..., 0] * sign * both
        for i in (0, 1):
            places[:, i] += (step * (axis == i)).sum(axis=1)
        places = np.clip(places, low + sizes / 2, np.maximum(high - sizes / 2, low + sizes / 2))
    return places


def route_edges(
    edges: Sequence[Tuple[int, int]],
    centres: Dict[int, np.ndarray],
    sizes: Dict[int, np.ndarray],
    frame: Sequence[float],
) -> List[np.ndarray]:
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
            inside = {
                node: (np.abs(points - centre) <= sizes[node] / 2 + 2).all(axis=1)
                for node, centre in centres.items()
            }
            outside = ~(inside[first] | inside[second])
            behind = sum(int((x & outside).sum()) for n, x in inside.items() if n != first)
            if behind < hidden:
                best, hidden = points[outside][::4] if outside.sum() > 8 else points, behind
        routes.append(best)
    return routes
