"""Scenes of the toy dataset: the layout of entities and the relations between them.

A small local cue decides which entities are related, never the distance or size of boxes or how
often classes occur together:

- :func:`reach_scene`: a hand touches one of several equal cups around a person; the other hand
  often stops just short of another cup (entity instance confusion).
- :func:`player_scene`: adjacent players whose arms reach randomly assigned instruments (proximal
  relationship ambiguity).
- :func:`furnish`: tables, chairs and boxes with things on, under, inside of or just in front.

Entities are placed first, and related ones are then chosen at random, so that related and unrelated
entities have the same distribution of positions.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .drawing import REACH_GAP, TOUCH_OVERLAP, ToyScene
from .furniture import add_hats, furnish
from .shapes import (
    HAND_RADIUS,
    IMAGE_SIZE,
    DrawnEntity,
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
_HOLDABLE: dict[str, Callable[..., DrawnEntity]] = {"cup": cup, "ball": ball}


def make_scene(rng: np.random.Generator) -> ToyScene:
    """Generate the scene of one image."""
    scene = ToyScene(rng, quiet=bool(rng.random() < _QUIET_SHARE))
    scene_type = rng.choice(["reach", "players", "things"], p=[0.5, 0.42, 0.08])
    if scene_type == "reach":
        reach_scene(scene)
    elif scene_type == "players":
        player_scene(scene)
    else:
        bystander_scene(scene)
    furnish(scene, num_entities=int(rng.integers(8, 12)))
    return scene


def reach_scene(scene: ToyScene) -> None:
    """Add one or two people among equal cups or balls; hands touch some and miss others."""
    rng = scene.rng
    count = int(rng.integers(1, 3))
    categories = (["cup"], ["ball"], ["cup", "ball"])[rng.choice(3, p=[0.5, 0.25, 0.25])]
    kicks = "ball" in categories and rng.random() < 0.6
    y = rng.uniform(46, 106)
    left = rng.uniform(44, 116) if count == 1 else rng.uniform(40, 50)
    people = []
    for index in range(count):
        x = left + index * rng.uniform(56, 66)
        top = float(np.clip(y + rng.uniform(-8, 8) - 20, 13, IMAGE_SIZE - 72))
        kicking = int(rng.integers(2)) if kicks and rng.random() < 0.75 else None
        human = person(rng, x, top, kicking)
        people.append((scene.add(human), human, kicking))
    for index, human, _ in people:
        add_hats(scene, index, human)
    for _, human, kicking in people:
        category = str(rng.choice(categories))
        _scatter(
            scene,
            human.chest,
            categories if rng.random() < 0.3 else [category],
            int(rng.integers(2, 6)),
        )
        if kicking is not None:
            _scatter(scene, _below(human, kicking), ["ball"], 2, near=17, far=31)
    for index, human, kicking in people:
        if kicking is not None:
            _kick(scene, index, human, kicking)
        _reach_out(scene, index, human)


def _below(human: Person, side: int) -> Point:
    hip = human.hips[side]
    return hip[0], hip[1] + 8 * human.scale


def _scatter(
    scene: ToyScene,
    center: Point,
    categories: Sequence[str],
    count: int,
    near: float = 24.0,
    far: float = 43.0,
) -> None:
    """Place things in a ring around a point, away from each other and from people."""
    for _ in range(count):
        for _ in range(12):
            turn, radius = scene.rng.uniform(0, 2 * np.pi), scene.rng.uniform(near, far)
            x, y = center[0] + radius * np.cos(turn), center[1] + radius * np.sin(turn) + 6.5
            thing = _HOLDABLE[str(scene.rng.choice(categories))](scene.rng, x, y)
            if scene.fits(thing, gap=3.5):
                scene.add(thing)
                break


def _within_reach(
    scene: ToyScene, start: Point, far: float, categories: Sequence[str]
) -> list[int]:
    """Return the indices of free things of these categories whose center is in reach, shuffled."""
    taken = {object_ for _, object_, _ in scene.relations}
    indices = []
    for index, entity in enumerate(scene.entities):
        x, y = entity.center
        if entity.category in categories and index not in taken:
            if np.hypot(x - start[0], y - start[1]) <= far:
                indices.append(index)
    return [int(index) for index in scene.rng.permutation(indices)]


def _reach_out(scene: ToyScene, index: int, human: Person) -> None:
    """Draw both arms: each holds a thing, stops short of a thing, or hangs down."""
    rng = scene.rng
    acts = ["hold", "reach", "hang"]
    first = acts[0] if scene.yes(0.86) else acts[rng.choice(3, p=[0, 0.8, 0.2])]
    second = acts[rng.choice(3, p=[0.2, 0.6, 0.2])] if first == "hold" else acts[rng.integers(1, 3)]
    if scene.quiet and second == "hold":
        second = "reach"
    candidates = _within_reach(scene, human.chest, _REACH, ["cup", "ball"])
    used: list[int] = []
    free_side = None
    for act in (first, second):
        side = free_side
        for target in candidates if act != "hang" else []:
            if target in used:
                continue
            right = int(scene.entities[target].center[0] > human.chest[0])
            wanted = (right if rng.random() < 0.8 else 1 - right) if side is None else side
            hand = _stretch(scene, target, human.shoulders[wanted], act)
            if hand is None:
                continue
            scene.add_arm(human, wanted, hand)
            used.append(target)
            free_side = 1 - wanted
            if act == "hold":
                scene.relate(index, target, "holds")
            break
        else:
            wanted = int(rng.integers(2)) if side is None else side
            hang(scene, human, wanted)
            free_side = 1 - wanted


def _stretch(scene: ToyScene, target: int, start: Point, act: str, part: int = 0) -> Point | None:
    """Return a position of a hand that holds or nearly holds the target, or None."""
    for _ in range(5):
        gap = -scene.rng.uniform(*TOUCH_OVERLAP) if act == "hold" else scene.rng.uniform(*REACH_GAP)
        hand = scene.hand_at(target, start, gap, part)
        if hand is not None:
            return hand
    return None


def hang(scene: ToyScene, human: Person, side: int) -> None:
    """Let an arm hang down, away from all things."""
    sign = 2 * side - 1
    x, y = human.shoulders[side]
    for attempt in range(10):
        spread = scene.rng.uniform(1, 9) if attempt < 9 else -4.0
        hand = (x + sign * spread, y + scene.rng.uniform(19, 25) * human.scale)
        if scene.hand_is_clear(hand):
            scene.add_arm(human, side, hand, bend=0.08)
            return


def _kick(scene: ToyScene, index: int, human: Person, side: int) -> None:
    """Draw the kicking leg: its foot touches a ball, stops short of it, or stands."""
    start = human.hips[side]
    act = "hold" if scene.yes(0.65) else "reach"
    for target in _within_reach(scene, _below(human, side), 35.0, ["ball"]):
        if scene.entities[target].center[1] < start[1] + 2:
            continue
        foot = _stretch(scene, target, start, act)
        if foot is None:
            continue
        scene.add_leg(human, side, foot)
        if act == "hold":
            scene.relate(index, target, "plays")
        return
    foot = (start[0] + (2 * side - 1) * 1.5, human.box[3] - HAND_RADIUS)
    scene.add_leg(human, side, foot)


def player_scene(scene: ToyScene) -> None:
    """Add two or three players and at least three instruments, matched at random."""
    rng = scene.rng
    count = int(rng.choice([2, 3], p=[0.4, 0.6]))
    top = rng.uniform(13, 52)
    middle = rng.uniform(68, 92)
    step = rng.uniform(42, 50)
    people = []
    for position in range(count):
        x = middle + (position - (count - 1) / 2) * step + rng.uniform(-3, 3)
        human = person(rng, x, top + rng.uniform(-4, 4))
        people.append((scene.add(human), human))
    for index, human in people:
        add_hats(scene, index, human)
    _line_up_instruments(scene, middle, top + rng.uniform(58, 68))
    for position in rng.permutation(count):
        index, human = people[position]
        _play(scene, index, human)


def _line_up_instruments(scene: ToyScene, middle: float, y: float) -> None:
    rng = scene.rng
    instruments = rng.choice(["guitar", "drum", "both"], p=[0.4, 0.25, 0.35])
    count = int(rng.choice([3, 4], p=[0.6, 0.4]))
    step = rng.uniform(38, 42) if count == 4 else rng.uniform(38, 46)
    people = [index for index, e in enumerate(scene.entities) if e.category == "person"]
    left = float(np.clip(middle - step * (count - 1) / 2, 20, 140 - step * (count - 1)))
    for position in range(count):
        for _ in range(8):
            x, height = left + position * step + rng.uniform(-3, 3), y + rng.uniform(-7, 7)
            guitars = instruments == "guitar" or (instruments == "both" and rng.random() < 0.5)
            thing = guitar(rng, x, height) if guitars else drum(rng, x, height + 5)
            if scene.fits(thing, gap=3.0, touching=people):
                scene.add(thing)
                break


def _play(scene: ToyScene, index: int, human: Person) -> None:
    """Match a player with a free instrument, to play it, hold it, or stop short of it."""
    rng = scene.rng
    predicate = str(rng.choice(["plays", "holds", ""], p=[0.58, 0.3, 0.12]))
    predicate = "" if scene.quiet else predicate
    for target in _instruments(scene, human):
        is_drum = scene.entities[target].category == "drum"
        if predicate == "plays":
            done = (_drumsticks if is_drum else _two_hands)(scene, human, target)
        elif predicate == "holds":
            done = _one_hand(scene, human, target, "hold")
        elif is_drum and rng.random() < 0.6:
            done = _drumsticks(scene, human, target, touch=False)
        else:
            done = _one_hand(scene, human, target, "reach")
        if done:
            if predicate:
                scene.relate(index, target, predicate)
            return
    for side in (0, 1):
        hang(scene, human, side)


def _instruments(scene: ToyScene, human: Person) -> list[int]:
    """Return the free instruments in the order to try them.

    Far instruments are out of reach, so a uniform draw would favor near ones. Therefore the nearest
    one is usually moved to the end.
    """
    targets = _within_reach(scene, human.chest, _PLAYER_REACH, ["guitar", "drum"])
    if targets and scene.rng.random() < 0.65:
        x = human.chest[0]
        nearest = min(targets, key=lambda index: abs(scene.entities[index].center[0] - x))
        targets.remove(nearest)
        targets.append(nearest)
    return targets


def _guitar_part(scene: ToyScene, target: int) -> int:
    """Return the outline of a guitar's lower body or neck; other instruments have one outline."""
    return int(scene.rng.choice([0, 2])) if scene.entities[target].category == "guitar" else 0


def _two_hands(scene: ToyScene, human: Person, target: int) -> bool:
    """Let both hands touch a guitar, one at the body and one at the neck."""
    neck_x, body_x = (scene.entities[target].outlines[part][:, 0].mean() for part in (2, 0))
    sides = (0, 1) if body_x < neck_x else (1, 0)
    body = _stretch(scene, target, human.shoulders[sides[0]], "hold", part=0)
    neck = _stretch(scene, target, human.shoulders[sides[1]], "hold", part=2)
    if body is None or neck is None or np.hypot(body[0] - neck[0], body[1] - neck[1]) < 9:
        return False
    scene.add_arm(human, sides[0], body)
    scene.add_arm(human, sides[1], neck)
    return True


def _one_hand(scene: ToyScene, human: Person, target: int, act: str) -> bool:
    """Let one hand touch or nearly touch an instrument; the other one hangs or stops short."""
    rng = scene.rng
    side = int(rng.integers(2))
    hand = _stretch(scene, target, human.shoulders[side], act, _guitar_part(scene, target))
    if hand is None:
        return False
    scene.add_arm(human, side, hand)
    others = _within_reach(scene, human.chest, _PLAYER_REACH, ["guitar", "drum"])
    other = target if rng.random() < 0.5 or not others else others[0]
    if rng.random() < 0.7:
        start = human.shoulders[1 - side]
        second = _stretch(scene, other, start, "reach", _guitar_part(scene, other))
        if second is not None:
            scene.add_arm(human, 1 - side, second)
            return True
    hang(scene, human, 1 - side)
    return True


def _drumsticks(scene: ToyScene, human: Person, target: int, touch: bool = True) -> bool:
    """Let both hands hold sticks whose tips are on the drum, or slightly above it."""
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
        scene.add_arm(human, side, hand)
        scene.draw(stick(hand, tip))
    return True


def bystander_scene(scene: ToyScene) -> None:
    """Add people without relations, except hats; the furniture has the relations."""
    rng = scene.rng
    for _ in range(int(rng.integers(1, 3))):
        spot = scene.free_spot(34, 86)
        if spot is None:
            return
        human = person(rng, spot[0] + 17, spot[1] + 13)
        index = scene.add(human)
        add_hats(scene, index, human)
        for side in (0, 1):
            hang(scene, human, side)
