"""Hats, tables, chairs and boxes of the built-in data set, and what is on, under or inside them.

For every relation there is a look-alike: a hat just above a head, a cup just above a table or in
front of it, a ball in front of a box. What tells them apart is contact, a small shadow, or which of
two things covers the other.
"""

from collections.abc import Callable

from .drawing import Scene
from .shapes import (
    Entity,
    Layer,
    Person,
    ball,
    carton,
    chair,
    cup,
    drum,
    guitar,
    hat,
    shadow,
    table,
)

_SMALL: dict[str, Callable[..., Entity]] = {"cup": cup, "ball": ball, "hat": hat}


def add_hats(scene: Scene, index: int, one: Person) -> None:
    """Put hats on a head, a little above it, or beside it."""
    rng = scene.rng
    x, top = one.head[0], one.head[1] - one.head_radius
    worn = scene.yes(0.5)
    if worn or rng.random() < 0.4:
        base = top + rng.uniform(2.8, 4.2) if worn else top - rng.uniform(3.8, 5.2)
        thing = hat(rng, x + rng.uniform(-1.5, 1.5), base, Layer.PERSON + 0.6)
        if scene.fits(thing, gap=1, touching=[index]):
            added = scene.add(thing)
            if worn:
                scene.relate(index, added, "wears")
    if rng.random() < 0.2:
        side = rng.choice((-1, 1))
        beside = hat(rng, x + side * rng.uniform(20, 25), one.head[1] + rng.uniform(-6, 10))
        if scene.fits(beside, gap=1):
            scene.add(beside)


def furnish(scene: Scene, wanted: int) -> None:
    """Fill free areas with furniture and lone things until ``wanted`` entities are there.

    One piece of furniture is always tried, so that its classes do not become rare.
    """
    groups = [_table_group, _chair_group, _box_group]
    for attempt in range(8):
        missing = wanted - len(scene.entities)
        if missing <= 0 and attempt:
            return
        if missing == 1 and attempt:
            _lone_thing(scene)
        else:
            groups[scene.rng.choice(3, p=[0.38, 0.38, 0.24])](scene)


def _lone_thing(scene: Scene) -> None:
    """A thing that relates to nothing."""
    rng = scene.rng
    big, small = scene.free_spot(34, 42), scene.free_spot(20, 16)
    if big is not None and rng.random() < 0.5:
        make = guitar if rng.random() < 0.5 else drum
        thing = make(rng, big[0] + 17, big[1] + 24)
    elif small is not None:
        kind = str(rng.choice(list(_SMALL)))
        thing = _SMALL[kind](rng, small[0] + 10, small[1] + 14)
    else:
        return
    if scene.fits(thing, gap=2):
        scene.add(thing)


def _small_thing(scene: Scene, kind: str, x: float, base: float, layer: float, owner: int) -> int:
    """Add a small thing over its furniture ``owner``; return its index or -1 if it does not fit."""
    thing = _SMALL[kind](scene.rng, x, base, layer)
    if not scene.fits(thing, gap=1, touching=[owner]):
        return -1
    return scene.add(thing)


def _kinds(scene: Scene, count: int) -> list[str]:
    """Kinds of ``count`` small things; mostly the same one."""
    rng = scene.rng
    kinds = [str(kind) for kind in rng.choice(["cup", "ball", "hat"], size=count)]
    return [kinds[0]] * count if rng.random() < 0.65 else kinds


def _table_group(scene: Scene) -> None:
    """A table with things on it, just above it, under it, in front of it or beside it."""
    rng = scene.rng
    width, height = rng.uniform(40, 60), rng.uniform(31, 38)
    spot = scene.free_spot(width, height + 23)
    if spot is None:
        return
    x, y = spot[0], spot[1] + 19
    owner = scene.add(table(rng, x, y, width, height))
    places = [0.27, 0.73] if width < 53 else [0.22, 0.5, 0.78]
    kinds = _kinds(scene, 2 * len(places))
    for number, share in enumerate(places):
        at = x + share * width + rng.uniform(-1, 1)
        if rng.random() < 0.6:
            lies = scene.yes(0.6)
            base = y + rng.uniform(4, 7) if lies else y - rng.uniform(3.5, 5.0)
            added = _small_thing(scene, kinds[number], at, base, Layer.THING, owner)
            if added >= 0 and lies:
                scene.draw([shadow(at + 1.5, base - 0.3, 11)])
                scene.relate(added, owner, "on")
        if 0 < number < len(places) - 1 or rng.random() < 0.45:
            _below(scene, owner, kinds[-1 - number], at)


def _below(scene: Scene, owner: int, kind: str, x: float) -> None:
    """A thing between the legs of furniture, covered by them, or in front of all of it."""
    rng = scene.rng
    x0, _, x1, bottom = scene.entities[owner].box
    under = scene.yes(0.6)
    if under:
        x = min(max(x, x0 + 11), x1 - 11)
        added = _small_thing(scene, kind, x, bottom - rng.uniform(2, 4), Layer.BEHIND, owner)
        if added >= 0:
            scene.relate(added, owner, "under")
        return
    x = x0 + 5 if x < (x0 + x1) / 2 else x1 - 5
    _small_thing(scene, kind, x, bottom + rng.uniform(2, 4), Layer.FRONT, owner)


def _chair_group(scene: Scene) -> None:
    """A chair with a thing on its seat, a hat on its back or near it, a ball under it."""
    rng = scene.rng
    width, height = rng.uniform(25, 29), rng.uniform(39, 45)
    spot = scene.free_spot(width + 8, height + 18)
    if spot is None:
        return
    x, y = spot[0] + 7, spot[1] + 13
    owner = scene.add(chair(rng, x, y, width, height))
    kinds = _kinds(scene, 3)
    seat = y + 0.52 * height
    if rng.random() < 0.7:
        lies = scene.yes(0.6)
        base = seat - rng.uniform(1, 3) if lies else seat - 6 - rng.uniform(3.5, 5.0)
        at = x + 0.6 * width
        added = _small_thing(scene, kinds[0], at, base, Layer.THING, owner)
        if added >= 0 and lies:
            scene.draw([shadow(at + 1.5, base - 0.3, 11)])
            scene.relate(added, owner, "on")
    if rng.random() < 0.5:
        hung = scene.yes(0.6)
        base = y + rng.uniform(3.5, 5.5) if hung else y - rng.uniform(3.5, 5.0)
        added = _small_thing(scene, "hat", x + 1.75, base, Layer.THING, owner)
        if added >= 0 and hung:
            scene.relate(added, owner, "on")
    if rng.random() < 0.55:
        _below(scene, owner, kinds[2], x + width / 2)


def _box_group(scene: Scene) -> None:
    """An open box with things inside of it, whose lower part it covers, or in front of it."""
    rng = scene.rng
    width, height = rng.uniform(28, 44), rng.uniform(21, 26)
    spot = scene.free_spot(width, height + 20)
    if spot is None:
        return
    x, y = spot[0], spot[1] + 14
    owner = scene.add(carton(rng, x, y, width, height))
    places = [0.5] if width < 36 else [0.27, 0.73]
    kinds = _kinds(scene, 2)
    for number, share in enumerate(places):
        inside = scene.yes(0.6)
        base = y + rng.uniform(11, 13)
        if not inside and rng.random() < 0.4:
            base = y + height + rng.uniform(1, 3)
        layer = Layer.THING if inside else Layer.FRONT
        at = x + share * width + rng.uniform(-1, 1)
        added = _small_thing(scene, kinds[number], at, base, layer, owner)
        if added >= 0 and inside:
            scene.relate(added, owner, "inside of")
