"""Textures of grounds and skies: value noise and patterns made once, tiled, with smaller copies for the distance."""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cutline.scenes.objects import GROUNDS

Floats = NDArray[np.float32]
TILE = 512  # texels a side of level 0
LEVELS = 9
METRE = 160.0  # texels of level 0 per camera height (not per metre: see `layout`)


@dataclass(frozen=True)
class Texture:
    """texels: (N, 3) of all levels one after another; starts: index of each level's first texel."""

    texels: Floats
    starts: NDArray[np.int64]


def noise(rng: np.random.Generator, cells: int, octaves: int = 4, stretch: int = 1) -> Floats:
    """Tileable value noise in [0, 1], (TILE, TILE); `cells` lattice cells a side, `stretch` times fewer in x."""
    total = np.zeros((TILE, TILE), np.float32)
    for o in range(octaves):
        ny, nx = min(cells << o, TILE), max(min(cells << o, TILE) // stretch, 1)
        total += _lattice(rng.random((ny, nx)).astype(np.float32)) * np.float32(0.5**o)
    total -= total.min()
    scaled: Floats = total / total.max()
    return scaled


def _lattice(values: Floats) -> Floats:
    for axis in (0, 1):
        n = values.shape[axis]
        at = (np.arange(TILE) * (n / TILE)).astype(np.float32)
        low = at.astype(int)
        t = at - low
        t = t * t * (3 - 2 * t)
        t = t[:, None] if axis == 0 else t[None, :]
        values = np.take(values, low % n, axis) * (1 - t) + np.take(values, (low + 1) % n, axis) * t
    return values


def _mix(amount: Floats, *stops: tuple[int, int, int]) -> Floats:
    """Colours along a ramp; (TILE, TILE) → (TILE, TILE, 3), 0 to 255."""
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(amount, at, [s[c] for s in stops]) for c in range(3)], -1).astype(np.float32)


def _planks(rng: np.random.Generator) -> Floats:
    plank = np.arange(TILE) // 64
    shift = rng.permutation(8)[plank % 8] * 61
    along = (np.arange(TILE)[None, :] + shift[:, None]) % TILE
    tone = rng.random((8, 2))[plank[:, None] % 8, along // 256]
    grain = noise(rng, 128, 2, stretch=32)
    picture = _mix((0.55 * tone + 0.45 * grain).astype(np.float32), (126, 78, 42), (176, 118, 68), (206, 152, 96))
    gap = ((np.arange(TILE) % 64 < 3)[:, None]) | (along % 256 < 3)
    picture[gap] *= 0.5
    return picture


def _tiles(rng: np.random.Generator) -> Floats:
    cell = np.arange(TILE) // 128
    dark = ((cell[:, None] + cell[None, :]) % 2).astype(np.float32)
    picture = _mix(dark * 0.7 + 0.3 * noise(rng, 8), (232, 228, 218), (150, 166, 178), (88, 112, 132))
    joint = np.arange(TILE) % 128 < 4
    picture[joint[:, None] | joint[None, :]] = (196, 192, 186)
    return picture


def _ground(name: str) -> Floats:
    rng = np.random.default_rng(GROUNDS.index(name) + 11)
    if name == "grass":
        return _mix(0.6 * noise(rng, 64, 3) + 0.4 * noise(rng, 6), (44, 96, 30), (86, 142, 44), (138, 184, 74))
    if name == "sand":
        ripple = 0.5 + 0.5 * np.sin(np.arange(TILE) * (2 * np.pi / 64))[:, None] * noise(rng, 8)
        return _mix(0.5 * ripple + 0.5 * noise(rng, 48, 3), (184, 146, 92), (222, 190, 134), (242, 218, 168))
    if name == "wooden floor":
        return _planks(rng)
    if name == "asphalt":
        speck = noise(rng, 256, 1) ** 2
        return _mix(0.55 * speck + 0.45 * noise(rng, 8), (58, 58, 62), (92, 92, 96), (140, 140, 142))
    if name == "snow":
        return _mix(noise(rng, 8, 5), (196, 208, 226), (232, 238, 246), (252, 252, 255))
    return _tiles(rng)


@functools.cache
def texture(ground: int) -> Texture:
    """The texture of a ground, with all its levels."""
    level = _ground(GROUNDS[ground])
    levels = [level]
    while len(levels) < LEVELS:
        n = level.shape[0] // 2
        level = level.reshape(n, 2, n, 2, 3).mean((1, 3), dtype=np.float32)
        levels.append(level)
    starts = np.cumsum([0, *(v.shape[0] ** 2 for v in levels[:-1])])
    return Texture(np.concatenate([v.reshape(-1, 3) for v in levels]), starts)


@functools.cache
def clouds() -> Floats:
    """Cover of clouds, 0 to 1, (256, 256), tileable."""
    n = noise(np.random.default_rng(5), 4, 6)[::2, ::2]
    cover: Floats = np.clip((n - 0.45) * 3.2, 0, 1)
    return cover


# Sky colours: top, horizon, cloud colour, how much cloud.
SKY_COLOURS: tuple[tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int], float], ...] = (
    ((64, 132, 214), (188, 218, 240), (255, 255, 255), 0.12),
    ((86, 146, 208), (200, 220, 234), (250, 250, 252), 0.95),
    ((88, 84, 150), (250, 176, 112), (255, 150, 120), 0.6),
    ((148, 156, 166), (206, 210, 214), (122, 128, 138), 0.7),
)
