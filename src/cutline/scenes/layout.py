"""Where everything is in a scene, without drawing it: `layout(seed, index)`, the same at every picture size.

The camera is a pinhole at height h above a plane ground, with focal length f and horizon y0, both in picture sides
(x and y run from 0 to 1; y down). Pitch is a shift of the picture plane, so upright things stay upright and a ground
point seen at y lies at the depth z = f·h / (y − y0). An object of true height H at depth z is s = f·H / z high.

The scale cannot be read off the geometry: h is unknown, and a scene's objects have heights H in a band relative to h,
so that an apple seen from 15 cm and an elephant seen from 1.5 m make the same picture with ten times the depth. Only
knowing the objects tells which. Ground textures are scaled with h, so they do not give it away either.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from cutline.scenes.dice import LAYOUT, Dice
from cutline.scenes.objects import FAMILIES, GROUNDS, OBJECTS, SKIES
from cutline.scenes.sheet import COARSE, aspects, coarse

CAMERA = (0.1, 2.0)  # metres above the ground
BAND = (0.4, 2.2)  # true heights of a scene's objects over the camera's height
REACH = 6.0  # depth of the farthest object over the camera's height; 12 m at most
COUNTS = (0.09, 0.25, 0.27, 0.19, 0.10, 0.05, 0.03, 0.02)  # shares of scenes with 1, 2, … objects
MIN_VISIBLE = 0.5  # every object shows this share of itself or more, so that all may be named and counted
_GRID = 48


@dataclass(frozen=True)
class Item:
    """One object in a scene. x, y: where it touches the ground, in picture sides; size: its height, likewise;
    depth in metres; angle in radians; visible: share of it that is in the picture and not hidden; gain: its tint."""

    kind: int
    colour: str
    x: float
    y: float
    size: float
    depth: float
    angle: float
    flip: bool
    gain: tuple[float, float, float]
    visible: float

    @property
    def name(self) -> str:
        return OBJECTS[self.kind].name

    @property
    def width(self) -> float:
        return self.size * aspects()[self.kind]


@dataclass(frozen=True)
class Scene:
    """One scene; lengths in picture sides unless said otherwise. items: nearest last (painter's order)."""

    height: float  # of the camera, metres
    focal: float
    horizon: float
    ground: int
    sky: int
    grain: tuple[float, float, float, float]  # of the ground: turn, scale, two offsets
    clouds: tuple[float, float]
    light: tuple[float, float, float]  # gain of red, green, blue
    sun: float  # −1 from the left … 1 from the right
    items: tuple[Item, ...]


@cache
def kinds_of(objects: int) -> tuple[int, ...]:
    """The kinds in a world of so many objects: the first of each family, evenly."""
    each = objects // len(FAMILIES)
    return tuple(k for k in range(len(OBJECTS)) if k % (len(OBJECTS) // len(FAMILIES)) < each)


def layout(seed: int, index: int, objects: int = len(OBJECTS)) -> Scene:
    """The scene number `index` of the world `seed` with so many kinds of objects."""
    scene, dice, kinds = _begin(seed, index, objects)
    return replace(scene, items=_place(dice, kinds, scene.height, scene.focal, scene.horizon))


def intended(seed: int, index: int, objects: int = len(OBJECTS)) -> list[int]:
    """The kind of every object that scene `index` is to show, before they are placed; one for which no place is found
    is left out of the scene. Costs a fraction of `layout`."""
    return _begin(seed, index, objects)[2]


def _begin(seed: int, index: int, objects: int) -> tuple[Scene, Dice, list[int]]:
    """A scene without its objects, the dice as they lie then, and the objects' kinds."""
    dice = Dice(seed, index, LAYOUT)
    anchor = dice.choice(kinds_of(objects))  # drawn first and evenly, so that rare heights do not make rare objects
    height = math.exp(dice.uniform(*_window(anchor)))
    focal, horizon = dice.uniform(0.95, 1.5), dice.uniform(0.1, 0.42)
    warmth, bright = dice.uniform(-1, 1), dice.uniform(0.72, 1.12)
    light = (bright * (1 + 0.1 * warmth), bright, bright * (1 - 0.12 * warmth))
    grain = (dice.uniform(0, math.pi), dice.uniform(0.7, 1.5), dice.uniform(), dice.uniform())
    ground, sky = dice.below(len(GROUNDS)), dice.below(len(SKIES))
    clouds, sun = (dice.uniform(), dice.uniform()), dice.uniform(-1, 1)
    count = 1 + dice.weighted(COUNTS)
    kinds = _choose(dice, kinds_of(objects), anchor, height, count)
    return Scene(height, focal, horizon, ground, sky, grain, clouds, light, sun, ()), dice, kinds


def _window(kind: int) -> tuple[float, float]:
    """The logarithms of the camera heights that suit an object."""
    h = OBJECTS[kind].height
    return math.log(max(CAMERA[0], h / BAND[1])), math.log(min(CAMERA[1], h / BAND[0]))


@cache
def _weights() -> tuple[float, ...]:
    """Chance of each object among those that suit a camera: the more, the fewer camera heights suit it."""
    return tuple(1 / (high - low) for low, high in map(_window, range(len(OBJECTS))))


def _choose(dice: Dice, world: tuple[int, ...], anchor: int, height: float, count: int) -> list[int]:
    """Kinds of the objects: the anchor and others of fitting height, mostly of one or two families, some repeated."""
    fitting = [k for k in world if BAND[0] <= OBJECTS[k].height / height <= BAND[1]]
    theme = dice.uniform()
    families = {OBJECTS[anchor].family, OBJECTS[dice.choice(fitting)].family if theme > 0.4 else ""}
    themed = [k for k in fitting if theme > 0.7 or OBJECTS[k].family in families]
    kinds: list[int] = []
    kind = anchor
    while True:
        if kind not in kinds or len(set(kinds)) == len(fitting):
            copies = 1 + dice.weighted((0.72, 0.16, 0.08, 0.04))
            kinds += [kind] * min(copies, count - len(kinds))
        if len(kinds) == count:
            return kinds
        pool = themed if dice.chance(0.85) and len(set(themed) - set(kinds)) > 0 else fitting
        kind = pool[dice.weighted([_weights()[k] for k in pool])]


def _place(dice: Dice, kinds: list[int], height: float, focal: float, horizon: float) -> tuple[Item, ...]:
    shrink = len(kinds) ** -0.3
    items: list[Item] = []
    masks: list[int] = []
    wholes: list[int] = []
    paint = {k: _paint(dice, k) for k in sorted(set(kinds))}
    for kind in kinds:
        ratio = OBJECTS[kind].height / height
        for _ in range(12):
            low = ratio * focal / dice.uniform(0.6 * REACH, REACH)
            high = ratio * (dice.uniform(0.84, 0.98) - horizon)
            wanted = math.exp(dice.uniform(math.log(0.42), math.log(0.95))) * shrink
            size = min(max(wanted, low), high, 0.85)
            wide = size * aspects()[kind]
            x = dice.uniform(min(0.3 * wide, 0.5), max(1 - 0.3 * wide, 0.5))
            y = horizon + size / ratio
            colour = paint[kind] if dice.chance(0.6) else _paint(dice, kind)
            item = Item(
                kind, colour, x, y, size, focal * OBJECTS[kind].height / size, dice.uniform(-0.2, 0.2),
                dice.chance(0.5), _tint(dice), 1.0,
            )  # fmt: skip
            mask, whole = _bits(item)
            seen = _seen([*items, item], [*masks, mask], [*wholes, whole])
            if min(seen) >= MIN_VISIBLE:
                items, masks, wholes = [*items, item], [*masks, mask], [*wholes, whole]
                break
    seen = _seen(items, masks, wholes)
    order = sorted(range(len(items)), key=lambda i: -items[i].depth)
    return tuple(Item(**{**items[i].__dict__, "visible": seen[i]}) for i in order)


def _tint(dice: Dice) -> tuple[float, float, float]:
    bright = dice.uniform(0.84, 1.1)
    return bright * dice.uniform(0.95, 1.05), bright * dice.uniform(0.95, 1.05), bright * dice.uniform(0.95, 1.05)


def _paint(dice: Dice, kind: int) -> str:
    o = OBJECTS[kind]
    return dice.choice(o.hues) if o.hues and dice.chance(0.75) else o.colour


def _bits(item: Item) -> tuple[int, int]:
    """The rough mask on a grid over the picture as the bits of an integer, and the cells of the whole object."""
    wide, high = item.width * _GRID, item.size * _GRID
    left, top = item.x * _GRID - wide / 2, item.y * _GRID - high
    columns = np.arange(math.floor(left + 0.5), math.floor(left + wide + 0.5) or 1)
    rows = np.arange(math.floor(top + 0.5), math.floor(top + high + 0.5) or 1)
    u = np.clip(((columns + 0.5 - left) * (COARSE / wide)).astype(int), 0, COARSE - 1)
    v = np.clip(((rows + 0.5 - top) * (COARSE / high)).astype(int), 0, COARSE - 1)
    mask = coarse(item.kind)[v[:, None], COARSE - 1 - u if item.flip else u]
    whole = int(np.count_nonzero(mask))
    grid = np.zeros((_GRID, _GRID), np.bool_)
    inside = mask[(rows >= 0) & (rows < _GRID)][:, (columns >= 0) & (columns < _GRID)]
    r, c = max(int(rows[0]), 0), max(int(columns[0]), 0)
    grid[r : r + inside.shape[0], c : c + inside.shape[1]] = inside
    return int.from_bytes(np.packbits(grid).tobytes(), "big"), whole


def _seen(items: list[Item], masks: list[int], wholes: list[int]) -> list[float]:
    """Visible share of each item."""
    shares = []
    for i, item in enumerate(items):
        mask = masks[i]
        for j, other in enumerate(items):
            if (other.depth, j) < (item.depth, i):
                mask &= ~masks[j]
        shares.append(mask.bit_count() / max(wholes[i], 1))
    return shares
