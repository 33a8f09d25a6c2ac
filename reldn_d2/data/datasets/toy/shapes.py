"""Shapes and entities of the toy dataset: the look of a cup, a person or a drum.

All coordinates are continuous pixels of the final image (x to the right, y down). An entity is a
list of polygons and lines; its box is computed from them, so it is tight by construction. Limbs
(arms, kicking legs) are shapes without an entity: they belong to no box.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

IMAGE_SIZE = 160
HAND_RADIUS = 3.6

Color = tuple[float, float, float]
Point = tuple[float, float]
Box = tuple[float, float, float, float]

_OVERSAMPLING = 2
_SHIFT = 4
_DARK: Color = (40.0, 36.0, 34.0)
_SKINS: Sequence[Color] = ((172, 204, 240), (142, 182, 226), (110, 150, 200), (80, 116, 168))
_TURN = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)


class Layer:
    """Drawing order: shapes of a higher layer cover those of a lower one."""

    BEHIND = 0.0
    FURNITURE = 1.0
    PERSON = 2.0
    LIMB_BEHIND = 3.0
    THING = 4.0
    FRONT = 5.0
    LIMB = 6.0
    HAND = 7.0


class Shape(NamedTuple):
    """A filled polygon (``width`` 0) or a line; ``edge`` draws a dark contour around a polygon."""

    points: np.ndarray
    color: Color
    layer: float
    width: float = 0.0
    edge: bool = True

    def extent(self) -> Box:
        """Return the bounding box of the drawn shape."""
        margin = self.width / 2 + 0.25 if self.width else (0.75 if self.edge else 0.0)
        x0, y0 = self.points.min(axis=0) - margin
        x1, y1 = self.points.max(axis=0) + margin
        return float(x0), float(y0), float(x1), float(y1)


@dataclass(eq=False)
class DrawnEntity:
    """One annotated thing.

    Attributes:
        category: one of the dataset's ``thing_classes``.
        shapes: shapes to draw.
        outlines: convex polygons whose union is the surface that a hand can touch.
        box: tight around ``shapes``.
    """

    category: str
    shapes: list[Shape]
    outlines: list[np.ndarray]
    box: Box = field(init=False)

    def __post_init__(self) -> None:
        extents = np.array([shape.extent() for shape in self.shapes])
        low, high = extents[:, :2].min(axis=0), extents[:, 2:].max(axis=0)
        self.box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        self.outlines = [np.asarray(outline, np.float32) for outline in self.outlines]

    @property
    def center(self) -> Point:
        """The center of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def distance(self, point: Point) -> float:
        """Return the distance from ``point`` to the surface; negative inside."""
        return min(
            -cv2.pointPolygonTest(outline, (float(point[0]), float(point[1])), True)
            for outline in self.outlines
        )


@dataclass(eq=False)
class Person(DrawnEntity):
    """A person: head, torso and standing legs. Arms and a kicking leg are drawn by the scene."""

    head: Point
    head_radius: float
    chest: Point
    shoulders: tuple[Point, Point]
    hips: tuple[Point, Point]
    skin: Color
    shirt: Color
    trousers: Color
    scale: float


def render(shapes: Sequence[Shape], background: np.ndarray) -> np.ndarray:
    """Draw ``shapes`` over a BGR ``background`` with anti-aliased edges."""
    size = (background.shape[1] * _OVERSAMPLING, background.shape[0] * _OVERSAMPLING)
    canvas = cv2.resize(background, size, interpolation=cv2.INTER_NEAREST)
    for shape in sorted(shapes, key=lambda shape: shape.layer):
        points = (shape.points * _OVERSAMPLING - 0.5) * (1 << _SHIFT)
        polygon = [np.rint(points).astype(np.int32)]
        if shape.width:
            width = max(1, round(shape.width * _OVERSAMPLING))
            cv2.polylines(canvas, polygon, False, shape.color, width, cv2.LINE_AA, _SHIFT)
            continue
        cv2.fillPoly(canvas, polygon, shape.color, cv2.LINE_AA, _SHIFT)
        if shape.edge:
            dark = tuple(0.45 * value for value in shape.color)
            cv2.polylines(canvas, polygon, True, dark, _OVERSAMPLING, cv2.LINE_AA, _SHIFT)
    return cv2.resize(canvas, background.shape[1::-1], interpolation=cv2.INTER_AREA)


def background(rng: np.random.Generator) -> np.ndarray:
    """Return a pale color with a gradient and light noise, as a BGR image."""
    tone = random_color(rng, saturation=(0.03, 0.25), value=(0.62, 0.95))
    slope = rng.uniform(-22, 22, size=2)
    ramp = np.linspace(-0.5, 0.5, IMAGE_SIZE)
    shade = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    shade = shade + 1.2 * rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    shade = np.rint(shade).astype(np.int16)
    image = np.array(tone, np.int16)[None, None, :] + shade[:, :, None]
    return np.clip(image, 0, 255).astype(np.uint8)


def random_color(
    rng: np.random.Generator,
    hue: tuple[float, float] = (0.0, 1.0),
    saturation: tuple[float, float] = (0.55, 0.95),
    value: tuple[float, float] = (0.45, 0.95),
) -> Color:
    """Return a random BGR color from ranges of hue, saturation and value."""
    rgb = colorsys.hsv_to_rgb(rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value))
    return rgb[2] * 255.0, rgb[1] * 255.0, rgb[0] * 255.0


def _wood(rng: np.random.Generator) -> Color:
    return random_color(rng, hue=(0.05, 0.12), saturation=(0.45, 0.75), value=(0.45, 0.8))


def _mix(color: Color, other: Color, share: float) -> Color:
    return tuple((1 - share) * a + share * b for a, b in zip(color, other))  # type: ignore


def ellipse(x: float, y: float, rx: float, ry: float | None = None) -> np.ndarray:
    """Return an ellipse as a polygon; a circle when ``ry`` is None."""
    return _CIRCLE * (rx, rx if ry is None else ry) + (x, y)


def _quad(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=float)


def shadow(x: float, y: float, width: float) -> Shape:
    """Create the contact shadow of a thing that stands at (x, y)."""
    return Shape(ellipse(x, y, width / 2 + 1.5, 1.6), _DARK, Layer.FURNITURE + 0.5, edge=False)


def person(rng: np.random.Generator, x: float, top: float, kicking: int | None = None) -> Person:
    """Create a standing person with the top of the head at ``top``, without leg ``kicking``."""
    s = rng.uniform(0.92, 1.08)
    skin = _SKINS[rng.integers(len(_SKINS))]
    shirt, trousers = random_color(rng), random_color(rng, value=(0.25, 0.5))
    head, radius = (x, top + 6.5 * s), 6.5 * s
    y_shoulder, y_hip, y_foot = top + 15 * s, top + 38 * s, top + 63 * s
    torso = np.array([(-7, 13), (7, 13), (9.5, 17), (8, 39), (-8, 39), (-9.5, 17)]) * s + (x, top)
    layer = Layer.PERSON
    shapes = []
    for side, sign in enumerate((-1, 1)):
        if side == kicking:
            continue
        leg = np.array([(x + 4.5 * s * sign, y_hip), (x + 4.8 * s * sign, y_foot - 2)])
        shapes.append(Shape(leg, trousers, layer, width=6.0))
        shapes.append(Shape(ellipse(x + 5.4 * s * sign, y_foot, 3.9, 2.4), _DARK, layer))
    shapes += [
        Shape(torso, shirt, layer + 0.1),
        Shape(ellipse(*head, radius), skin, layer + 0.2),
        Shape(ellipse(x - 2.3, head[1] - 0.5, 0.8), _DARK, layer + 0.3, edge=False),
        Shape(ellipse(x + 2.3, head[1] - 0.5, 0.8), _DARK, layer + 0.3, edge=False),
    ]
    return Person(
        category="person",
        shapes=shapes,
        outlines=[torso, ellipse(*head, radius)],
        head=head,
        head_radius=radius,
        chest=(x, top + 20 * s),
        shoulders=((x - 8.2 * s, y_shoulder + 2), (x + 8.2 * s, y_shoulder + 2)),
        hips=((x - 4.5 * s, y_hip), (x + 4.5 * s, y_hip)),
        skin=skin,
        shirt=shirt,
        trousers=trousers,
        scale=s,
    )


def cup(rng: np.random.Generator, x: float, base: float, layer: float = Layer.THING) -> DrawnEntity:
    """Create a cup that stands at (x, base)."""
    w, h = rng.uniform(5.2, 6.6), rng.uniform(11.5, 14)
    color = random_color(rng, value=(0.6, 1.0))
    body = np.array([(-w, -h), (w, -h), (0.72 * w, 0), (-0.72 * w, 0)]) + (x, base)
    shapes = [
        Shape(body, color, layer),
        Shape(ellipse(x, base - h, w, 1.8), _mix(color, _DARK, 0.65), layer + 0.01),
    ]
    return DrawnEntity("cup", shapes, [body])


def ball(
    rng: np.random.Generator, x: float, base: float, layer: float = Layer.THING
) -> DrawnEntity:
    """Create a ball that lies at (x, base)."""
    r = rng.uniform(5.6, 7.2)
    color = random_color(rng, value=(0.7, 1.0))
    outline = ellipse(x, base - r, r)
    band = np.array(
        [(x - 0.85 * r, base - r + 1), (x, base - r - 1.2), (x + 0.85 * r, base - r + 1)]
    )
    shine = ellipse(x - 0.35 * r, base - 1.45 * r, 1.3)
    shapes = [
        Shape(outline, color, layer),
        Shape(band, (245, 245, 245), layer + 0.01, width=1.5),
        Shape(shine, (255, 255, 255), layer + 0.02, edge=False),
    ]
    return DrawnEntity("ball", shapes, [outline])


def hat(rng: np.random.Generator, x: float, base: float, layer: float = Layer.THING) -> DrawnEntity:
    """Create a hat with its brim at (x, base)."""
    w, h = rng.uniform(8.5, 10), rng.uniform(7, 9)
    color = random_color(rng, value=(0.25, 0.75))
    lean = np.array([[1.0, 0.0], [rng.uniform(-0.16, 0.16), 1.0]]).T
    crown = np.array([(-0.62, 0), (-0.5, -1), (0.5, -1), (0.62, 0)]) * (w, h)
    band = np.array([(-0.6 * w, -1.6), (0.6 * w, -1.6)])
    brim = ellipse(0, 0, w, 2.0)
    crown, band, brim = (part @ lean.T + (x, base - 2) for part in (crown, band, brim))
    shapes = [
        Shape(brim, color, layer),
        Shape(crown, color, layer + 0.01),
        Shape(band, _mix(color, (255, 255, 255), 0.7), layer + 0.02, width=1.5),
    ]
    return DrawnEntity("hat", shapes, [brim, crown])


def guitar(rng: np.random.Generator, x: float, y: float) -> DrawnEntity:
    """Create a guitar around (x, y), neck up; outlines: lower body, upper body, neck, head."""
    s = rng.uniform(0.92, 1.08)
    lean = rng.choice((-1, 1)) * rng.uniform(0.2, 0.75)
    turn = np.array([[np.cos(lean), -np.sin(lean)], [np.sin(lean), np.cos(lean)]])
    color, layer = _wood(rng), Layer.THING
    color = _mix(color, random_color(rng, hue=(0.0, 0.12)), 0.5)

    def place(part: np.ndarray) -> np.ndarray:
        return part * s @ turn.T + (x, y)

    lower, upper = place(ellipse(0, 9, 7.6, 7.0)), place(ellipse(0, 0, 5.8, 5.6))
    neck, head = place(_quad(-1.7, -19, 1.7, 1)), place(_quad(-2.8, -22, 2.8, -18))
    shapes = [
        Shape(lower, color, layer),
        Shape(upper, color, layer + 0.01),
        Shape(place(ellipse(0, 8, 6.2, 5.6)), color, layer + 0.02, edge=False),
        Shape(neck, (60, 84, 120), layer + 0.03),
        Shape(head, (40, 50, 70), layer + 0.04),
        Shape(place(ellipse(0, 4, 2.6)), (30, 34, 40), layer + 0.05, edge=False),
    ]
    return DrawnEntity("guitar", shapes, [lower, upper, neck, head])


def drum(rng: np.random.Generator, x: float, y: float) -> DrawnEntity:
    """Create a drum around (x, y); its skin is an ellipse at the top."""
    w, h = rng.uniform(11.5, 13.5), rng.uniform(15, 19)
    color, layer = random_color(rng), Layer.THING
    top, base = y - h / 2, y + h / 2
    angles = np.linspace(0, np.pi, 9)
    bottom = np.stack([x + w * np.cos(angles), base - 3 + 3 * np.sin(angles)], axis=1)
    shell = np.concatenate([[(x - w, top), (x + w, top)], bottom])
    zigzag = np.array([(x + w * (k / 3 - 1), base - 3 if k % 2 else top + 6) for k in range(7)])
    shapes = [
        Shape(shell, color, layer),
        Shape(zigzag[1:-1], (235, 235, 235), layer + 0.01, width=1.0),
        Shape(ellipse(x, top, w, 3.6), (232, 238, 240), layer + 0.02),
    ]
    return DrawnEntity("drum", shapes, [shell, ellipse(x, top, w, 3.6)])


def table(rng: np.random.Generator, x: float, y: float, width: float, height: float) -> DrawnEntity:
    """Create a table in the box (x, y, x + width, y + height); its surface is 9 px deep."""
    color, layer = _wood(rng), Layer.FURNITURE
    surface = np.array([(x + 5, y), (x + width - 5, y), (x + width, y + 9), (x, y + 9)])
    shapes = [
        Shape(_quad(x + 1.5, y + 11, x + 5.5, y + height), _mix(color, _DARK, 0.3), layer),
        Shape(_quad(x + width - 5.5, y + 11, x + width - 1.5, y + height), color, layer),
        Shape(_quad(x, y + 9, x + width, y + 12.5), _mix(color, _DARK, 0.35), layer + 0.01),
        Shape(surface, _mix(color, (255, 255, 255), 0.25), layer + 0.02),
    ]
    return DrawnEntity("table", shapes, [_quad(x, y, x + width, y + height)])


def chair(rng: np.random.Generator, x: float, y: float, width: float, height: float) -> DrawnEntity:
    """Create a chair in the box (x, y, x + width, y + height); back on the left, seat halfway."""
    color, layer = _wood(rng), Layer.FURNITURE
    color = _mix(color, random_color(rng), 0.25)
    seat, right = y + 0.52 * height, x + width
    dark = _mix(color, _DARK, 0.35)
    shapes = [
        Shape(_quad(x, y, x + 4, y + height), color, layer),
        Shape(_quad(right - 4, seat, right, y + height), color, layer),
        Shape(
            np.array([(x, seat), (x + 4, seat - 6), (right, seat - 6), (right, seat)]), color, layer
        ),
        Shape(_quad(x, seat, right, seat + 3), dark, layer + 0.01),
    ]
    return DrawnEntity("chair", shapes, [_quad(x, y, right, y + height)])


def carton(
    rng: np.random.Generator, x: float, y: float, width: float, height: float
) -> DrawnEntity:
    """Create an open box in the box (x, y, x + width, y + height); its opening is 7 px deep."""
    color = random_color(rng, hue=(0.07, 0.13), saturation=(0.3, 0.55), value=(0.6, 0.85))
    opening = np.array([(x + 4, y), (x + width - 4, y), (x + width, y + 7), (x, y + 7)])
    front = _quad(x, y + 7, x + width, y + height)
    tape = _quad(x + width / 2 - 2, y + 7, x + width / 2 + 2, y + height)
    over = Layer.THING + 0.5
    shapes = [
        Shape(opening, _mix(color, _DARK, 0.7), Layer.FURNITURE),
        Shape(front, color, over),
        Shape(tape, _mix(color, (255, 255, 255), 0.35), over + 0.01, edge=False),
    ]
    return DrawnEntity("box", shapes, [_quad(x, y, x + width, y + height)])


def limb(
    start: Point, joint: Point, end: Point, color: Color, tip: Color, layer: float
) -> list[Shape]:
    """Create an arm or leg of two straight parts with a round hand or foot at the end."""
    line = np.array([start, joint, end], dtype=float)
    return [
        Shape(line, _mix(color, _DARK, 0.75), layer, width=4.0),
        Shape(line, color, layer + 0.01, width=2.5),
        Shape(ellipse(*end, HAND_RADIUS - 0.5), tip, Layer.HAND),
    ]


def stick(hand: Point, tip: Point) -> list[Shape]:
    """Create a drumstick from a hand to its tip."""
    line = np.array([hand, tip], dtype=float)
    return [
        Shape(line, _DARK, Layer.HAND - 0.3, width=2.5),
        Shape(line, (150, 200, 235), Layer.HAND - 0.2, width=1.5),
    ]
