"""Scenes of the built-in data set: what stands where, and what relates to what.

What relates is decided by a small local cue, never by which boxes are near, by their sizes or by
how often classes occur together:

- :func:`reach_scene`: of several equal cups around a person, one is touched by the drawn hand; the
  other hand often stops just short of another one (entity instance confusion).
- :func:`player_scene`: neighbouring players whose arms go to instruments in a random assignment
  (proximal relationship ambiguity).
- :func:`furnish`: tables, chairs and boxes with things on, under, inside of, or merely in front.

Entities get their places first and are then chosen at random to relate, so that a related one has
the same distribution of places as an unrelated one.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .drawing import REACH_GAP, TOUCH_OVERLAP, Scene
from .furniture import add_hats, furnish
from .shapes import (
    HAND_RADIUS,
    IMAGE_SIZE,
    Entity,
    Person,
    Point,
    ball,
    cup,
    drum,
    guitar,
    person,
    stick,
)

_REACH = 47.0
_PLAYER_REACH = 74.0
_QUIET_SHARE = 0.02
_HOLDABLE: dict[str, Callable[..., Entity]] = {"cup": cup, "ball": ball}


def make_scene(rng: np.random.Generator) -> Scene:
    """Lay out one image."""
    scene = Scene(rng, quiet=bool(rng.random() < _QUIET_SHARE))
    kind = rng.choice(["reach", "players", "things"], p=[0.5, 0.42, 0.08])
    if kind == "reach":
        reach_scene(scene)
    elif kind == "players":
        player_scene(scene)
    else:
        bystander_scene(scene)
    furnish(scene, wanted=int(rng.integers(8, 12)))
    return scene


def reach_scene(scene: Scene) -> None:
    """One or two people among equal cups or balls; hands touch some and stop short of others."""
    rng = scene.rng
    count = int(rng.integers(1, 3))
    kinds = (["cup"], ["ball"], ["cup", "ball"])[rng.choice(3, p=[0.5, 0.25, 0.25])]
    kicks = "ball" in kinds and rng.random() < 0.6
    y = rng.uniform(46, 106)
    left = rng.uniform(44, 116) if count == 1 else rng.uniform(40, 50)
    people = []
    for number in range(count):
        x = left + number * rng.uniform(56, 66)
        top = float(np.clip(y + rng.uniform(-8, 8) - 20, 13, IMAGE_SIZE - 72))
        kicking = int(rng.integers(2)) if kicks and rng.random() < 0.75 else None
        one = person(rng, x, top, kicking)
        people.append((scene.add(one), one, kicking))
    for index, one, _ in people:
        add_hats(scene, index, one)
    for _, one, kicking in people:
        kind = str(rng.choice(kinds))
        _scatter(scene, one.chest, kinds if rng.random() < 0.3 else [kind], int(rng.integers(2, 6)))
        if kicking is not None:
            _scatter(scene, _below(one, kicking), ["ball"], 2, near=17, far=31)
    for index, one, kicking in people:
        if kicking is not None:
            _kick(scene, index, one, kicking)
        _reach_out(scene, index, one)


def _below(one: Person, side: int) -> Point:
    hip = one.hips[side]
    return hip[0], hip[1] + 8 * one.scale


def _scatter(
    scene: Scene,
    center: Point,
    kinds: Sequence[str],
    count: int,
    near: float = 24.0,
    far: float = 43.0,
) -> None:
    """Place things in a ring around a point, apart from each other and from people."""
    for _ in range(count):
        for _ in range(12):
            turn, radius = scene.rng.uniform(0, 2 * np.pi), scene.rng.uniform(near, far)
            x, y = center[0] + radius * np.cos(turn), center[1] + radius * np.sin(turn) + 6.5
            thing = _HOLDABLE[str(scene.rng.choice(kinds))](scene.rng, x, y)
            if scene.fits(thing, gap=3.5):
                scene.add(thing)
                break


def _within_reach(scene: Scene, start: Point, far: float, categories: Sequence[str]) -> list[int]:
    """Indices of free things of these categories whose centre is within reach, shuffled."""
    taken = {object_ for _, object_, _ in scene.relations}
    found = []
    for index, entity in enumerate(scene.entities):
        x, y = entity.center
        if entity.category in categories and index not in taken:
            if np.hypot(x - start[0], y - start[1]) <= far:
                found.append(index)
    return [int(index) for index in scene.rng.permutation(found)]


def _reach_out(scene: Scene, index: int, one: Person) -> None:
    """Draw both arms: each holds something, stops short of something, or hangs."""
    rng = scene.rng
    acts = ["hold", "reach", "hang"]
    first = acts[0] if scene.yes(0.86) else acts[rng.choice(3, p=[0, 0.8, 0.2])]
    second = acts[rng.choice(3, p=[0.2, 0.6, 0.2])] if first == "hold" else acts[rng.integers(1, 3)]
    if scene.quiet and second == "hold":
        second = "reach"
    candidates = _within_reach(scene, one.chest, _REACH, ["cup", "ball"])
    used: list[int] = []
    free_side = None
    for act in (first, second):
        side = free_side
        for target in candidates if act != "hang" else []:
            if target in used:
                continue
            right = int(scene.entities[target].center[0] > one.chest[0])
            wanted = (right if rng.random() < 0.8 else 1 - right) if side is None else side
            hand = _stretch(scene, target, one.shoulders[wanted], act)
            if hand is None:
                continue
            scene.add_arm(one, wanted, hand)
            used.append(target)
            free_side = 1 - wanted
            if act == "hold":
                scene.relate(index, target, "holds")
            break
        else:
            wanted = int(rng.integers(2)) if side is None else side
            hang(scene, one, wanted)
            free_side = 1 - wanted


def _stretch(scene: Scene, target: int, start: Point, act: str, part: int = 0) -> Point | None:
    """Find a place for a hand that holds or nearly holds the target."""
    for _ in range(5):
        gap = -scene.rng.uniform(*TOUCH_OVERLAP) if act == "hold" else scene.rng.uniform(*REACH_GAP)
        hand = scene.hand_at(target, start, gap, part)
        if hand is not None:
            return hand
    return None


def hang(scene: Scene, one: Person, side: int) -> None:
    """Let an arm hang down, away from all things."""
    sign = 2 * side - 1
    x, y = one.shoulders[side]
    for attempt in range(10):
        spread = scene.rng.uniform(1, 9) if attempt < 9 else -4.0
        hand = (x + sign * spread, y + scene.rng.uniform(19, 25) * one.scale)
        if scene.hand_is_clear(hand):
            scene.add_arm(one, side, hand, bend=0.08)
            return


def _kick(scene: Scene, index: int, one: Person, side: int) -> None:
    """Draw the free leg: its foot touches a ball, or stops short of it, or stands."""
    start = one.hips[side]
    act = "hold" if scene.yes(0.65) else "reach"
    for target in _within_reach(scene, _below(one, side), 35.0, ["ball"]):
        if scene.entities[target].center[1] < start[1] + 2:
            continue
        foot = _stretch(scene, target, start, act)
        if foot is None:
            continue
        scene.add_leg(one, side, foot)
        if act == "hold":
            scene.relate(index, target, "plays")
        return
    foot = (start[0] + (2 * side - 1) * 1.5, one.box[3] - HAND_RADIUS)
    scene.add_leg(one, side, foot)


def player_scene(scene: Scene) -> None:
    """Two or three players and at least three instruments, matched at random."""
    rng = scene.rng
    count = int(rng.choice([2, 3], p=[0.4, 0.6]))
    top = rng.uniform(13, 52)
    middle = rng.uniform(68, 92)
    step = rng.uniform(42, 50)
    people = []
    for number in range(count):
        x = middle + (number - (count - 1) / 2) * step + rng.uniform(-3, 3)
        one = person(rng, x, top + rng.uniform(-4, 4))
        people.append((scene.add(one), one))
    for index, one in people:
        add_hats(scene, index, one)
    _line_up_instruments(scene, middle, top + rng.uniform(58, 68))
    for number in rng.permutation(count):
        index, one = people[number]
        _play(scene, index, one)


def _line_up_instruments(scene: Scene, middle: float, y: float) -> None:
    rng = scene.rng
    kind = rng.choice(["guitar", "drum", "both"], p=[0.4, 0.25, 0.35])
    count = int(rng.choice([3, 4], p=[0.6, 0.4]))
    step = rng.uniform(38, 42) if count == 4 else rng.uniform(38, 46)
    people = [index for index, e in enumerate(scene.entities) if e.category == "person"]
    left = float(np.clip(middle - step * (count - 1) / 2, 20, 140 - step * (count - 1)))
    for number in range(count):
        for _ in range(8):
            x, height = left + number * step + rng.uniform(-3, 3), y + rng.uniform(-7, 7)
            guitars = kind == "guitar" or (kind == "both" and rng.random() < 0.5)
            thing = guitar(rng, x, height) if guitars else drum(rng, x, height + 5)
            if scene.fits(thing, gap=3.0, touching=people):
                scene.add(thing)
                break


def _play(scene: Scene, index: int, one: Person) -> None:
    """Match a player with a free instrument: play it, hold it, or stop short of it."""
    rng = scene.rng
    predicate = str(rng.choice(["plays", "holds", ""], p=[0.58, 0.3, 0.12]))
    predicate = "" if scene.quiet else predicate
    for target in _instruments(scene, one):
        is_drum = scene.entities[target].category == "drum"
        if predicate == "plays":
            done = (_drumsticks if is_drum else _two_hands)(scene, one, target)
        elif predicate == "holds":
            done = _one_hand(scene, one, target, "hold")
        elif is_drum and rng.random() < 0.6:
            done = _drumsticks(scene, one, target, touch=False)
        else:
            done = _one_hand(scene, one, target, "reach")
        if done:
            if predicate:
                scene.relate(index, target, predicate)
            return
    for side in (0, 1):
        hang(scene, one, side)


def _instruments(scene: Scene, one: Person) -> list[int]:
    """Free instruments in the order in which they are tried.

    Far ones are out of reach, so an even draw would favour near ones. The nearest one therefore
    mostly moves to the end.
    """
    targets = _within_reach(scene, one.chest, _PLAYER_REACH, ["guitar", "drum"])
    if targets and scene.rng.random() < 0.65:
        x = one.chest[0]
        nearest = min(targets, key=lambda index: abs(scene.entities[index].center[0] - x))
        targets.remove(nearest)
        targets.append(nearest)
    return targets


def _guitar_part(scene: Scene, target: int) -> int:
    """The body's lower bout or the neck; other instruments have one part."""
    return int(scene.rng.choice([0, 2])) if scene.entities[target].category == "guitar" else 0


def _two_hands(scene: Scene, one: Person, target: int) -> bool:
    """Both hands touch a guitar, one its body and one its neck."""
    neck_x, body_x = (scene.entities[target].outlines[part][:, 0].mean() for part in (2, 0))
    sides = (0, 1) if body_x < neck_x else (1, 0)
    body = _stretch(scene, target, one.shoulders[sides[0]], "hold", part=0)
    neck = _stretch(scene, target, one.shoulders[sides[1]], "hold", part=2)
    if body is None or neck is None or np.hypot(body[0] - neck[0], body[1] - neck[1]) < 9:
        return False
    scene.add_arm(one, sides[0], body)
    scene.add_arm(one, sides[1], neck)
    return True


def _one_hand(scene: Scene, one: Person, target: int, act: str) -> bool:
    """One hand touches an instrument or nearly does; the other one hangs or stops short."""
    rng = scene.rng
    side = int(rng.integers(2))
    hand = _stretch(scene, target, one.shoulders[side], act, _guitar_part(scene, target))
    if hand is None:
        return False
    scene.add_arm(one, side, hand)
    others = _within_reach(scene, one.chest, _PLAYER_REACH, ["guitar", "drum"])
    other = target if rng.random() < 0.5 or not others else others[0]
    if rng.random() < 0.7:
        start = one.shoulders[1 - side]
        second = _stretch(scene, other, start, "reach", _guitar_part(scene, other))
        if second is not None:
            scene.add_arm(one, 1 - side, second)
            return True
    hang(scene, one, 1 - side)
    return True


def _drumsticks(scene: Scene, one: Person, target: int, touch: bool = True) -> bool:
    """Both hands hold sticks whose tips are on the drum, or a little above it."""
    rng = scene.rng
    x, top = scene.entities[target].outlines[1].mean(axis=0)
    ends = []
    for sign in (-1, 1):
        tip_y = top + rng.uniform(-1, 1) if touch else top - 3.6 - rng.uniform(3.5, 5)
        tip = (float(x + sign * rng.uniform(3, 5)), float(tip_y))
        hand = (tip[0] + sign * rng.uniform(4, 6), tip[1] - rng.uniform(11, 13))
        if not scene.hand_is_clear(hand):
            return False
        ends.append((hand, tip))
    for side, (hand, tip) in enumerate(ends):
        scene.add_arm(one, side, hand)
        scene.draw(stick(hand, tip))
    return True


def bystander_scene(scene: Scene) -> None:
    """People who do nothing, with or without hats; the furniture is what matters."""
    rng = scene.rng
    for _ in range(int(rng.integers(1, 3))):
        spot = scene.free_spot(34, 86)
        if spot is None:
            return
        one = person(rng, spot[0] + 17, spot[1] + 13)
        index = scene.add(one)
        add_hats(scene, index, one)
        for side in (0, 1):
            hang(scene, one, side)
