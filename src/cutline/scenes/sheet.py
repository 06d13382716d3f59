"""Sprites: the sheet of objects, decoded once when first needed, with smaller copies and colour variants.

A sprite is a premultiplied RGBA picture ("RGBa") with a transparent rim, and a pyramid of it, each level half the
size of the one before; `level` gives the one that has about one pixel for each pixel of the picture.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cutline.scenes.objects import OBJECTS

SHEET = Path(__file__).with_name("objects.webp")
CELL, COLUMNS = 240, 10
COARSE = 16  # cells a side of the rough mask
_HUES = {"red": 352, "orange": 24, "yellow": 48, "green": 125, "blue": 212, "purple": 275, "pink": 325}  # degrees


@dataclass(frozen=True)
class Sprite:
    """levels: premultiplied pictures, large to small; width, height of the opaque part in pixels of level 0."""

    levels: tuple[Image.Image, ...]
    width: float
    height: float
    rim: int = 2  # transparent pixels around level 0; a level l has rim / 2^l

    def level(self, scale: float) -> tuple[Image.Image, float]:
        """The level for drawing at `scale` (pixels of the picture per pixel of level 0), and its own scale."""
        i = 0 if scale >= 0.75 else min(int(math.log2(0.75 / scale)) + 1, len(self.levels) - 1)
        return self.levels[i], 0.5**i


@functools.cache
def _cells() -> list[NDArray[np.uint8]]:
    sheet = np.asarray(Image.open(SHEET).convert("RGBA"))
    cells = []
    for i in range(len(OBJECTS)):
        y, x = i // COLUMNS * CELL, i % COLUMNS * CELL
        cell = sheet[y : y + CELL, x : x + CELL]
        rows, columns = (np.flatnonzero((cell[..., 3] > 40).any(axis)) for axis in (1, 0))
        cells.append(np.ascontiguousarray(cell[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]))
    return cells


@functools.cache
def aspects() -> tuple[float, ...]:
    """Width over height of each object."""
    return tuple(c.shape[1] / c.shape[0] for c in _cells())


@functools.cache
def coarse(kind: int) -> NDArray[np.bool_]:
    """Rough mask of an object, (COARSE, COARSE), for judging occlusion without drawing."""
    alpha = Image.fromarray(_cells()[kind][..., 3]).resize((COARSE, COARSE), Image.Resampling.BOX)
    return np.asarray(alpha) > 127


@functools.cache
def sprite(kind: int, colour: str) -> Sprite:
    """The sprite of object `kind`; `colour` is its own colour or one of its `hues`."""
    cell = _cells()[kind]
    if colour != OBJECTS[kind].colour:
        cell = _repaint(cell, colour)
    height, width = cell.shape[:2]
    rim = 2
    # A multiple of 16 in both directions, so that halving four times never shifts the picture by part of a pixel.
    full: NDArray[Any] = np.zeros((*(-(-(n + 2 * rim) // 16) * 16 for n in (height, width)), 4), np.uint8)
    full[rim : rim + height, rim : rim + width] = cell
    levels = [Image.fromarray(full, "RGBA").convert("RGBa")]
    for _ in range(4):
        levels.append(levels[-1].reduce(2))
    return Sprite(tuple(levels), width, height, rim)


def _repaint(cell: NDArray[np.uint8], colour: str) -> NDArray[np.uint8]:
    """Turn the hue of the pixels near the main hue to `colour`; shading and the other colours stay."""
    hsv = np.asarray(Image.fromarray(cell[..., :3].copy()).convert("HSV")).astype(np.float32)
    hue, saturation = hsv[..., 0] * (360 / 256), hsv[..., 1]
    weight = (saturation * (cell[..., 3] > 127)).ravel()
    histogram = np.bincount((hue.ravel() // 10).astype(int) % 36, weights=weight, minlength=36)
    main = float(np.argmax(histogram + np.roll(histogram, 1) + np.roll(histogram, -1))) * 10 + 5
    away = (hue - main + 180) % 360 - 180
    turned = (_HUES[colour] + away * 0.6) % 360
    near = (np.abs(away) < 50) & (saturation > 60)
    hsv[..., 0] = np.where(near, turned, hue) * (256 / 360)
    if colour == "green":  # full green looks far brighter than any other hue
        hsv[..., 1:] *= np.where(near, np.float32(0.78), 1)[..., None]
    rgb = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))
    return np.dstack([rgb, cell[..., 3]])
