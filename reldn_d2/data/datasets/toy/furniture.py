"""Hats, tables, chairs and boxes of the toy dataset, and things on, under or inside them.

Every relation has a look-alike without relation: a hat just above a head, a cup just above a table
or in front of it, a ball in front of a box. They differ in contact, in a small shadow, or in which
of two things covers the other.
"""

from collections.abc import Callable

from .drawing import ToyScene
from .shapes import (
    DrawnEntity,
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

_SMALL: dict[str, Callable[..., DrawnEntity]] = {"cup": cup, "ball": ball, "hat": hat}


def add_hats(scene: ToyScene, index: int, human: Person) -> None:
    """Put hats on a head, slightly above it, or next to it."""
    rng = scene.rng
    x, top = human.head[0], human.head[1] - human.head_radius
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
        beside = hat(rng, x + side * rng.uniform(20, 25), human.head[1] + rng.uniform(-6, 10))
        if scene.fits(beside, gap=1):
            scene.add(beside)


def furnish(scene: ToyScene, num_entities: int) -> None:
    """Fill free areas with furniture and single things up to ``num_entities`` entities.

    At least one piece of furniture is tried, so that its classes do not become rare.
    """
    groups = [_table_group, _chair_group, _box_group]
    for attempt in range(8):
        missing = num_entities - len(scene.entities)
        if missing <= 0 and attempt:
            return
        if missing == 1 and attempt:
            _lone_thing(scene)
        else:
            groups[scene.rng.choice(3, p=[0.38, 0.38, 0.24])](scene)


def _lone_thing(scene: ToyScene) -> None:
    """Add a thing without relations."""
    rng = scene.rng
    big, small = scene.free_spot(34, 42), scene.free_spot(20, 16)
    if big is not None and rng.random() < 0.5:
        make = guitar if rng.random() < 0.5 else drum
        thing = make(rng, big[0] + 17, big[1] + 24)
    elif small is not None:
        category = str(rng.choice(list(_SMALL)))
        thing = _SMALL[category](rng, small[0] + 10, small[1] + 14)
    else:
        return
    if scene.fits(thing, gap=2):
        scene.add(thing)


def _small_thing(
    scene: ToyScene, category: str, x: float, base: float, layer: float, owner: int
) -> int:
    """Add a small thing at the furniture ``owner``; return its index, or -1 if it does not fit."""
    thing = _SMALL[category](scene.rng, x, base, layer)
    if not scene.fits(thing, gap=1, touching=[owner]):
        return -1
    return scene.add(thing)


def _categories(scene: ToyScene, count: int) -> list[str]:
    """Return the categories of ``count`` small things, mostly the same one."""
    rng = scene.rng
    categories = [str(category) for category in rng.choice(["cup", "ball", "hat"], size=count)]
    return [categories[0]] * count if rng.random() < 0.65 else categories


def _table_group(scene: ToyScene) -> None:
    """Add a table with things on it, just above it, under it, in front of it or next to it."""
    rng = scene.rng
    width, height = rng.uniform(40, 60), rng.uniform(31, 38)
    spot = scene.free_spot(width, height + 23)
    if spot is None:
        return
    x, y = spot[0], spot[1] + 19
    owner = scene.add(table(rng, x, y, width, height))
    places = [0.27, 0.73] if width < 53 else [0.22, 0.5, 0.78]
    categories = _categories(scene, 2 * len(places))
    for index, share in enumerate(places):
        at = x + share * width + rng.uniform(-1, 1)
        if rng.random() < 0.6:
            lies = scene.yes(0.6)
            base = y + rng.uniform(4, 7) if lies else y - rng.uniform(3.5, 5.0)
            added = _small_thing(scene, categories[index], at, base, Layer.THING, owner)
            if added >= 0 and lies:
                scene.draw([shadow(at + 1.5, base - 0.3, 11)])
                scene.relate(added, owner, "on")
        if 0 < index < len(places) - 1 or rng.random() < 0.45:
            _below(scene, owner, categories[-1 - index], at)


def _below(scene: ToyScene, owner: int, category: str, x: float) -> None:
    """Add a thing between the legs of furniture, covered by them, or in front of it."""
    rng = scene.rng
    x0, _, x1, bottom = scene.entities[owner].box
    under = scene.yes(0.6)
    if under:
        x = min(max(x, x0 + 11), x1 - 11)
        added = _small_thing(scene, category, x, bottom - rng.uniform(2, 4), Layer.BEHIND, owner)
        if added >= 0:
            scene.relate(added, owner, "under")
        return
    x = x0 + 5 if x < (x0 + x1) / 2 else x1 - 5
    _small_thing(scene, category, x, bottom + rng.uniform(2, 4), Layer.FRONT, owner)


def _chair_group(scene: ToyScene) -> None:
    """Add a chair with a thing on its seat, a hat on its back or near it, a thing under it."""
    rng = scene.rng
    width, height = rng.uniform(25, 29), rng.uniform(39, 45)
    spot = scene.free_spot(width + 8, height + 18)
    if spot is None:
        return
    x, y = spot[0] + 7, spot[1] + 13
    owner = scene.add(chair(rng, x, y, width, height))
    categories = _categories(scene, 3)
    seat = y + 0.52 * height
    if rng.random() < 0.7:
        lies = scene.yes(0.6)
        base = seat - rng.uniform(1, 3) if lies else seat - 6 - rng.uniform(3.5, 5.0)
        at = x + 0.6 * width
        added = _small_thing(scene, categories[0], at, base, Layer.THING, owner)
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
        _below(scene, owner, categories[2], x + width / 2)


def _box_group(scene: ToyScene) -> None:
    """Add an open box with things inside of it (it covers their lower part) or in front of it."""
    rng = scene.rng
    width, height = rng.uniform(28, 44), rng.uniform(21, 26)
    spot = scene.free_spot(width, height + 20)
    if spot is None:
        return
    x, y = spot[0], spot[1] + 14
    owner = scene.add(carton(rng, x, y, width, height))
    places = [0.5] if width < 36 else [0.27, 0.73]
    categories = _categories(scene, 2)
    for index, share in enumerate(places):
        inside = scene.yes(0.6)
        base = y + rng.uniform(11, 13)
        if not inside and rng.random() < 0.4:
            base = y + height + rng.uniform(1, 3)
        layer = Layer.THING if inside else Layer.FRONT
        at = x + share * width + rng.uniform(-1, 1)
        added = _small_thing(scene, categories[index], at, base, layer, owner)
        if added >= 0 and inside:
            scene.relate(added, owner, "inside of")
