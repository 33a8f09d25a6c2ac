"""A toy scene under construction: entities, relations, limbs and free space.

Everything is added to a scene through :class:`ToyScene`, which rejects what would make an image
ambiguous: a hand too close to a thing that it does not touch, two things at the same place, a thing
that extends beyond the image.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from .shapes import (
    HAND_RADIUS,
    IMAGE_SIZE,
    Box,
    Color,
    DrawnEntity,
    Layer,
    Person,
    Point,
    Shape,
    background,
    limb,
    render,
)

# Gaps in pixels between the edge of a hand (or foot) and the surface of a thing.
TOUCH_OVERLAP = (1.2, 2.4)
REACH_GAP = (3.0, 5.0)
CLEAR_GAP = 2.8


def box_gap(a: Box, b: Box) -> float:
    """Return the gap of two boxes along the axis that separates them more; negative: overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


class ToyScene:
    """Entities and relations of one image, and other shapes that are drawn.

    Args:
        rng: source of every random choice.
        quiet: a scene without relations; :meth:`yes` then always returns False.

    Attributes:
        entities: entities in the order of the annotations.
        relations: (subject index, object index, predicate name).
        hands: centers of all hands, and of all feet of kicking legs.
    """

    def __init__(self, rng: np.random.Generator, quiet: bool = False) -> None:
        self.rng = rng
        self.quiet = quiet
        self.entities: list[DrawnEntity] = []
        self.relations: list[tuple[int, int, str]] = []
        self.hands: list[Point] = []
        self._extras: list[Shape] = []
        self._taken = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)

    def yes(self, probability: float) -> bool:
        """Decide at random whether two entities are related."""
        return bool(self.rng.random() < probability) and not self.quiet

    def add(self, entity: DrawnEntity) -> int:
        """Add an entity and return its index."""
        self.entities.append(entity)
        self._occupy(entity.box)
        return len(self.entities) - 1

    def relate(self, subject: int, object_: int, predicate: str) -> None:
        """Add a relation."""
        self.relations.append((subject, object_, predicate))

    def draw(self, shapes: Sequence[Shape]) -> None:
        """Draw shapes that belong to no entity."""
        self._extras.extend(shapes)

    def render(self) -> np.ndarray:
        """Return the image, (160, 160, 3) uint8 BGR."""
        shapes = [shape for entity in self.entities for shape in entity.shapes]
        return render(shapes + self._extras, background(self.rng))

    def fits(self, entity: DrawnEntity, gap: float, touching: Sequence[int] = ()) -> bool:
        """Return whether an entity is inside the image and keeps ``gap`` from boxes and hands.

        Args:
            entity: entity that is not part of the scene yet.
            gap: min distance to the boxes of the scene's entities (people: at least CLEAR_GAP).
            touching: indices of entities that it may overlap.
        """
        box = entity.box
        if min(box[:2]) < 1 or max(box[2:]) > IMAGE_SIZE - 1:
            return False
        others = (e for index, e in enumerate(self.entities) if index not in touching)
        return all(
            box_gap(box, other.box) >= (max(gap, CLEAR_GAP) if isinstance(other, Person) else gap)
            for other in others
        ) and all(entity.distance(hand) - HAND_RADIUS >= CLEAR_GAP for hand in self.hands)

    def free_spot(self, width: float, height: float) -> Point | None:
        """Return the top left corner of a random free area of this size, None if there is none."""
        w, h = int(np.ceil(width)) + 4, int(np.ceil(height)) + 4
        if max(w, h) >= IMAGE_SIZE - 2:
            return None
        sums = cv2.integral(self._taken)
        used = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
        rows, columns = np.nonzero(used[1:-1, 1:-1] == 0)
        if not len(rows):
            return None
        pick = self.rng.integers(len(rows))
        return float(columns[pick]) + 3.0, float(rows[pick]) + 3.0

    def hand_is_clear(self, hand: Point, target: int | None = None) -> bool:
        """Return whether a hand is inside the image and away from all but people and ``target``."""
        low, high = HAND_RADIUS + 1, IMAGE_SIZE - HAND_RADIUS - 1
        if not (low <= hand[0] <= high and low <= hand[1] <= high):
            return False
        if any(np.hypot(hand[0] - x, hand[1] - y) < 2 * HAND_RADIUS + 1.5 for x, y in self.hands):
            return False
        things = (
            entity
            for index, entity in enumerate(self.entities)
            if index != target and not isinstance(entity, Person)
        )
        return all(thing.distance(hand) - HAND_RADIUS >= CLEAR_GAP for thing in things)

    def hand_at(self, target: int, start: Point, gap: float, part: int = 0) -> Point | None:
        """Return where a hand that comes from ``start`` stops at a given distance from a thing.

        Args:
            target: index of the thing.
            start: shoulder or hip where the limb starts.
            gap: distance between the edge of the hand and the thing; negative: overlap.
            part: index of the outline that the hand approaches.

        Returns:
            The center of the hand, or None if it would be too close to something else.
        """
        entity = self.entities[target]
        outline = entity.outlines[part]
        low, high = outline.min(axis=0), outline.max(axis=0)
        center = (low + high) / 2.0
        turn = np.arctan2(start[1] - center[1], start[0] - center[0]) + self.rng.uniform(-0.6, 0.6)
        direction = np.array([np.cos(turn), np.sin(turn)])
        # Bisect along the ray: at `near` the hand is too close, at `far` it is not.
        near, far = 0.0, float(np.hypot(*(high - low))) + HAND_RADIUS + 8.0
        for _ in range(14):
            middle = (near + far) / 2
            if entity.distance(center + middle * direction) - HAND_RADIUS < gap:
                near = middle
            else:
                far = middle
        hand = (float(center[0] + far * direction[0]), float(center[1] + far * direction[1]))
        # Another part of the thing may be in the way, e.g. the neck of a guitar.
        if abs(entity.distance(hand) - HAND_RADIUS - gap) > 0.1:
            return None
        return hand if self.hand_is_clear(hand, target) else None

    def add_arm(self, person: Person, side: int, hand: Point, bend: float = 0.16) -> None:
        """Draw an arm from the left (0) or right (1) shoulder to a hand."""
        layer = Layer.LIMB if self.rng.random() < 0.4 else Layer.LIMB_BEHIND
        self._add_limb(person.shoulders[side], hand, person.shirt, person.skin, layer, bend)

    def add_leg(self, person: Person, side: int, foot: Point) -> None:
        """Draw a leg from the left (0) or right (1) hip to a foot."""
        shoe = (45.0, 40.0, 38.0)
        layer = Layer.LIMB_BEHIND
        self._add_limb(person.hips[side], foot, person.trousers, shoe, layer, bend=0.1)

    def _add_limb(
        self, start: Point, end: Point, color: Color, tip: Color, layer: float, bend: float
    ) -> None:
        across = np.array([start[1] - end[1], end[0] - start[0]]) * self.rng.uniform(-bend, bend)
        joint = (np.array(start) + np.array(end)) / 2 + across
        self.draw(limb(start, (float(joint[0]), float(joint[1])), end, color, tip, layer))
        self.hands.append(end)
        for a, b in ((start, joint), (joint, end)):
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                x, y = np.array(a) * (1 - share) + np.array(b) * share
                self._occupy((x - 5, y - 5, x + 5, y + 5))

    def _occupy(self, box: Box) -> None:
        x0, y0 = max(0, int(box[0])), max(0, int(box[1]))
        self._taken[y0 : int(box[3]) + 1, x0 : int(box[2]) + 1] = 1
