"""Layout of a picture of relations: plain geometry on arrays, without any drawing.

Shapes: E entities (boxes), C candidate positions, O obstacles. Boxes and label rectangles are
``(x0, y0, x1, y1)`` in pixels of the picture, y downwards.
"""

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "Label",
    "LabelPlacer",
    "arc",
    "arc_bulges",
    "choose_anchors",
    "entity_color",
    "fit_size",
    "predicate_color",
]

Color = tuple[float, float, float]

# Dark enough for white text on them and for colored text on white (contrast of at least 4.5).
_PREDICATE_PALETTE = (
    "#C62828 #1565C0 #2E7D32 #6A1B9A #A84300 #00707A #AD1457 #5D4037 #283593 #6B6410 "
    "#00695C #4527A0 #455A64 #3F6B1F #806000 #8E0000"
).split()
# No red and green, which mark misses and hits.
_ENTITY_PALETTE = (
    "#1565C0 #A84300 #6A1B9A #00707A #A0267E #5D4037 #283593 #6B6410 #455A64 #4527A0"
).split()
_GOLDEN_RATIO = 0.618033988749895


def _from_palette(palette: Sequence[str], index: int) -> Color:
    if index < len(palette):
        return tuple(int(palette[index][i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue = (0.31 + index * _GOLDEN_RATIO) % 1.0
    lightness = (0.42, 0.34, 0.26)[index % 3]
    color = colorsys.hls_to_rgb(hue, lightness, 0.75)
    while _contrast_with_white(color) < 4.6:
        lightness *= 0.95
        color = colorsys.hls_to_rgb(hue, lightness, 0.75)
    return color


def _contrast_with_white(color: Color) -> float:
    """Return the contrast ratio of the Web Content Accessibility Guidelines, 1 to 21."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def predicate_color(predicate: int) -> Color:
    """Return the color of a predicate id, the same in every picture and every run."""
    return _from_palette(_PREDICATE_PALETTE, predicate)


def entity_color(index: int) -> Color:
    """Return the color of an entity by its index among the drawn ones."""
    return _from_palette(_ENTITY_PALETTE, index)


def fit_size(width: int, height: int, low: float, high: float) -> float:
    """Return the factor that brings an image's longest side into ``[low, high]``; 1 if it is there.

    A panorama may become up to three times as long as ``high``, to keep its short side at a quarter
    of ``high`` if possible.
    """
    longest, shortest = max(width, height), min(width, height)
    if longest < low:
        return low / longest
    return min(1.0, max(high / longest, min(high / (4 * shortest), 3 * high / longest)))


def choose_anchors(boxes: np.ndarray, spacing: float) -> np.ndarray:
    """Choose a point inside each box where its arrows start and end.

    The point is close to the center, but away from other points and outside smaller boxes, so that
    a person's point differs from that of the shirt that the person wears.

    Args:
        boxes: (E, 4).
        spacing: desired distance between two points.

    Returns:
        (E, 2) x and y.
    """
    across, down = [0.5, 0.38, 0.62, 0.26, 0.74], [0.5, 0.62, 0.38, 0.74, 0.26, 0.84, 0.16]
    grid = np.stack(np.meshgrid(across, down), axis=-1).reshape(-1, 2)
    size = (boxes[:, 2:] - boxes[:, :2]).clip(min=0)
    area = size.prod(axis=1)
    anchors = np.zeros((len(boxes), 2))
    placed: list[int] = []
    for entity in np.argsort(area, kind="stable"):
        points = boxes[entity, :2] + grid * size[entity]
        cost = np.linalg.norm(grid - 0.5, axis=1) + 0.15 * (
            grid[:, 1] < 0.3
        )  # faces are at the top
        covering = np.zeros(len(grid))  # smaller boxes at each point
        for other in placed:
            distance = np.linalg.norm(points - anchors[other], axis=1)
            cost += 1.5 * (1 - distance / spacing).clip(min=0)
            if area[other] < 0.8 * area[entity]:
                inside = (points >= boxes[other, :2]) & (points <= boxes[other, 2:])
                covering += inside.all(axis=1)
        anchors[entity] = points[np.argmin(cost + 0.25 * covering)]
        placed.append(entity)
    return anchors


def arc(
    start: np.ndarray, end: np.ndarray, bulge: float, frame: Sequence[float], trim: float = 0.0
) -> np.ndarray:
    """Return the points of an arc from ``start`` to ``end``.

    Args:
        start, end: (2,) x and y.
        bulge: distance of the arc's middle from the straight line, to the left of its direction.
        frame: rectangle that the arc must not leave.
        trim: length cut off at both ends, at most a quarter of the arc.

    Returns:
        (41, 2) points, in order.
    """
    direction = end - start
    length = float(np.hypot(*direction))
    normal = np.array([direction[1], -direction[0]]) / length if length > 1 else np.array([0, -1.0])
    control = (start + end) / 2 + 2 * bulge * normal
    control = np.clip(control, frame[:2], frame[2:])
    t = np.linspace(0, 1, 41)[:, None]
    points = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
    along = np.concatenate([[0], np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum()])
    trim = min(trim, along[-1] / 4)
    where = np.linspace(trim, along[-1] - trim, 41)
    return np.stack([np.interp(where, along, points[:, i]) for i in range(2)], axis=1)


def arc_bulges(
    pairs: Sequence[tuple[int, int]], anchors: dict[int, np.ndarray], step: float
) -> list[float]:
    """Return the bulge of the arc of each pair, for :func:`arc`.

    A short arc bends enough to be seen, and the two directions of a pair bend to different sides.

    Args:
        pairs: subject and object.
        anchors: (2,) point by entity.
        step: bulge of a short arc, and the largest one.
    """
    lengths = [float(np.hypot(*(anchors[o] - anchors[s]))) for s, o in pairs]
    return [min(0.1 * length, step) if length > step else step for length in lengths]


class Label(NamedTuple):
    """A placed label: its rectangle, and the end of its leader line if it has one."""

    rect: tuple[float, float, float, float]
    target: tuple[float, float] | None


def _overlap(rects: np.ndarray, obstacles: np.ndarray) -> np.ndarray:
    """Return the (C, O) common areas of (C, 4) and (O, 4) rectangles."""
    low = np.maximum(rects[:, None, :2], obstacles[None, :, :2])
    high = np.minimum(rects[:, None, 2:], obstacles[None, :, 2:])
    return (high - low).clip(min=0).prod(axis=2)


class LabelPlacer:
    """Places labels one after the other so that they cover no earlier label and little else."""

    def __init__(self, frame: Sequence[float], taken: np.ndarray, details: np.ndarray):
        """
        Args:
            frame: rectangle that contains all labels.
            taken: (O, 4) areas that no label may cover, such as the ends of arrows.
            details: (O, 4) areas to keep free if possible, such as small objects.
        """
        self.frame = np.asarray(frame, dtype=float)
        self.details = np.asarray(details, dtype=float).reshape(-1, 4)
        self.taken = np.asarray(taken, dtype=float).reshape(-1, 4)
        self.crowded = False  # whether a label had to cover something

    def place_at_box(
        self, size: tuple[float, float], box: np.ndarray, lines: Sequence[np.ndarray]
    ) -> Label:
        """Place an entity's label: at a corner outside its box, else inside, else close to it.

        Args:
            size: width and height of the label.
            box: (4,) of the entity.
            lines: (L, 2) points of each line to keep free if possible.
        """
        width, height = size
        x0, y0, x1, y1 = box
        left, right, middle = x0 + width / 2, x1 - width / 2, (x0 + x1) / 2
        above, below = y0 - height / 2 - 1, y1 + height / 2 + 1
        top, bottom = y0 + height / 2 + 1, y1 - height / 2 - 1
        outside = [(x, y) for y in (above, below) for x in (left, right, middle)]
        next_to = [(x, y) for x in (x0 - width / 2, x1 + width / 2) for y in (top, bottom)]
        inside = [(x, y) for y in (top, bottom) for x in (left, right, middle)]
        centers = np.array(outside + next_to + inside)
        cost = np.array([0, 1, 2, 3, 4, 5, 7, 7, 7, 7, 4, 5, 6, 6, 7, 8]) * 0.08
        return self._place(
            size, centers, cost, np.asarray(box, dtype=float)[None], lines, slack=3.0
        )

    def place_on_line(
        self, size: tuple[float, float], points: np.ndarray, lines: Sequence[np.ndarray]
    ) -> Label:
        """Place a relation's label: on the middle of its line, else along it, else close to it.

        Args:
            size: width and height of the label.
            points: (L, 2) of the relation's own line.
            lines: (L, 2) points of each other line to keep free if possible.
        """
        last = len(points) - 1
        fractions = np.array([0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3, 0.7, 0.25, 0.75])
        along = points[np.round(fractions * last).astype(int)]
        shifts = np.array(
            [[0, 0], [0, -1.1], [0, 1.1], [-0.6, -1.1], [0.6, 1.1], [0.6, -1.1], [-0.6, 1.1]]
        )
        shifts = shifts * np.asarray(size)
        centers = (shifts[:, None] + along[None]).reshape(-1, 2)
        apart = np.arange(len(shifts)).clip(max=2) * 0.3
        cost = (apart[:, None] + np.arange(len(along)) * 0.05).reshape(-1)
        # Half of a short line must stay visible, and the arrow's head.
        hidden = self._inside(points, self._rects(size, centers)).mean(axis=1)
        cost += 5.0 * (hidden - 0.5).clip(min=0)
        head = points[int(0.85 * last) :]
        cost += 1.0 * self._inside(head, self._rects(size, centers)).any(axis=1)
        return self._place(size, centers, cost, np.tile(points, 2), lines, slack=1.0)

    def _place(
        self,
        size: tuple[float, float],
        centers: np.ndarray,
        cost: np.ndarray,
        targets: np.ndarray,
        lines: Sequence[np.ndarray],
        slack: float,
    ) -> Label:
        """Take the best free candidate, else the nearest free position of the frame.

        Args:
            size: width and height of the label.
            centers: (C, 2) candidates.
            cost: (C,) of each candidate by itself.
            targets: (T, 4) rectangles (or points) that the label belongs to.
            lines: (L, 2) points of each line to keep free if possible.
            slack: distance from the targets beyond which the label needs a leader line.
        """
        rects = self._rects(size, centers)
        # A candidate that was moved into the frame may be far from its target.
        moved = np.abs((rects[:, :2] + rects[:, 2:]) / 2 - centers).sum(axis=1) / size[1]
        free = self._taken_area(rects) == 0
        if free.any():
            cost = np.where(free, cost + 0.3 * moved + self._covered(rects, lines), np.inf)
            best = rects[np.argmin(cost)]
        else:
            best = self._nearest_free(size, centers[0])
        self.taken = np.concatenate([self.taken, best[None]])
        return Label(tuple(float(v) for v in best), self._leader(best, targets, slack))

    def _rects(self, size: tuple[float, float], centers: np.ndarray) -> np.ndarray:
        half = np.asarray(size) / 2
        low = np.minimum(centers - half, self.frame[2:] - 2 * half)
        low = np.maximum(low, self.frame[:2])
        return np.concatenate([low, low + 2 * half], axis=1)

    def _covered(self, rects: np.ndarray, lines: Sequence[np.ndarray]) -> np.ndarray:
        """Return (C,) the cost of what each rectangle hides: details and points of lines."""
        area = (self.details[:, 2:] - self.details[:, :2]).prod(axis=1).clip(min=1.0)
        shares = (_overlap(rects, self.details) / area).sum(axis=1)
        points = np.concatenate([np.zeros((0, 2)), *lines])
        near = (points >= rects[:, :2].min(axis=0)) & (points <= rects[:, 2:].max(axis=0))
        points = points[near.all(axis=1)]
        return 1.5 * shares + 0.05 * self._inside(points, rects).sum(axis=1)

    @staticmethod
    def _inside(points: np.ndarray, rects: np.ndarray) -> np.ndarray:
        """Return (C, L) bool: whether each of (L, 2) points is inside each of (C, 4) rectangles."""
        return ((points >= rects[:, None, :2]) & (points <= rects[:, None, 2:])).all(axis=2)

    def _nearest_free(self, size: tuple[float, float], center: np.ndarray) -> np.ndarray:
        """Return the free position nearest to ``center``, else the one that covers least."""
        step = size[1] / 2
        x = np.arange(self.frame[0], max(self.frame[2] - size[0], self.frame[0]) + step, step)
        y = np.arange(self.frame[1], max(self.frame[3] - size[1], self.frame[1]) + step, step)
        centers = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2) + np.asarray(size) / 2
        rects = self._rects(size, centers)
        distance = np.linalg.norm((rects[:, :2] + rects[:, 2:]) / 2 - center, axis=1)
        reach, furthest = 8 * size[1], distance.max()
        while True:  # close ones first: most positions of a large frame need not be checked
            near = distance <= reach
            covered = self._taken_area(rects[near])
            if reach >= furthest or (covered == 0).any():
                break
            reach *= 2
        best = np.lexsort((distance[near], covered))[0]
        self.crowded |= bool(covered[best] > 0)
        return rects[near][best]

    def _taken_area(self, rects: np.ndarray) -> np.ndarray:
        """Return (C,) how much of each of (C, 4) rectangles is taken."""
        taken = self.taken + np.array([-1.0, -1.0, 1.0, 1.0])
        if not len(rects):
            return np.zeros(0)
        bounds = np.concatenate([rects[:, :2].min(axis=0), rects[:, 2:].max(axis=0)])
        return _overlap(rects, taken[_overlap(taken, bounds[None])[:, 0] > 0]).sum(axis=1)

    @staticmethod
    def _leader(rect: np.ndarray, targets: np.ndarray, slack: float) -> tuple[float, float] | None:
        """Return the targets' nearest point if it is further than ``slack`` from the label."""
        center = (rect[:2] + rect[2:]) / 2
        nearest = np.clip(center, targets[:, :2], targets[:, 2:])
        gap = np.maximum(rect[:2] - nearest, nearest - rect[2:]).clip(min=0)
        distance = np.linalg.norm(gap, axis=1)
        best = int(np.argmin(distance))
        if distance[best] <= slack:
            return None
        return float(nearest[best, 0]), float(nearest[best, 1])
