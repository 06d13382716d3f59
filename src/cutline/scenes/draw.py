"""Drawing a scene: picture, semantic map, instances, boxes and depth, at any size.

Shapes: S the side of the picture in pixels. Labels agree with the picture to the pixel: a pixel belongs to an object
where the object covers at least half of it.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cutline.scenes.grounds import LEVELS, METRE, SKY_COLOURS, TILE, clouds, texture
from cutline.scenes.layout import Item, Scene
from cutline.scenes.objects import SKY
from cutline.scenes.sheet import sprite

FAR = 12.0  # metres: the range of the depth camera; ground beyond it and the sky have no reading (0)
Floats = NDArray[np.float32]


def draw(scene: Scene, size: int, labels: bool = True) -> dict[str, Any]:
    """The picture of a scene and its labels.

    image (S, S, 3) uint8; with `labels` also semantic (S, S) uint8, ids into `CLASSES`; depth (S, S) float32 metres,
    0 = no reading; instances (S, S) uint8, 0 = none, i + 1 = item i; boxes (N, 4) float32, x0 y0 x1 y1 in pixels
    around the visible part of each item.
    """
    top = min(max(math.ceil(scene.horizon * size - 0.5), 0), size)  # first row of the ground
    picture = np.empty((size, size, 3), np.float32)
    _sky(scene, picture[:top], size)
    _floor(scene, picture, top, size)
    instances = np.zeros((size, size), np.uint8)
    for item in scene.items:
        _shadow(scene, item, picture, top, size)
    for i, item in enumerate(scene.items):
        _sprite(scene, item, picture, instances, i + 1, size)
    picture *= np.array(scene.light, np.float32)
    np.clip(picture, 0, 255, picture)
    result: dict[str, Any] = {"image": picture.astype(np.uint8)}
    if labels:
        ids = np.array([0, *(SKY + 1 + item.kind for item in scene.items)], np.uint8)
        metres = np.array([0, *(item.depth for item in scene.items)], np.float32)
        semantic, depth = ids[instances], metres[instances]
        empty = instances == 0
        rows = np.arange(size)
        semantic = np.where(empty, np.where(rows < top, SKY, scene.ground).astype(np.uint8)[:, None], semantic)
        depth = np.where(empty, floor_depth(scene, size)[:, None], depth)
        result |= {"semantic": semantic, "depth": depth, "instances": instances}
        result["boxes"] = _boxes(instances, len(scene.items))
    return result


def floor_depth(scene: Scene, size: int) -> Floats:
    """Depth of the bare ground in each pixel row, metres, (S,): f·h / (y − y0), 0 where there is no reading."""
    below = (np.arange(size) + 0.5) / size - scene.horizon
    with np.errstate(divide="ignore"):
        depth = scene.focal * scene.height / below
    return np.where((below > 0) & (depth <= FAR), depth, 0).astype(np.float32)


def _sky(scene: Scene, picture: Floats, size: int) -> None:
    if not len(picture):
        return
    high, low, cloud, cover = (np.array(c, np.float32) for c in SKY_COLOURS[scene.sky])
    up = scene.horizon - (np.arange(len(picture), dtype=np.float32) + 0.5) / size
    fade = np.minimum(up / 0.4, 1) ** 0.6
    picture[:] = (low + fade[:, None] * (high - low))[:, None]
    far = 18 / (up + 0.12)  # clouds lie in a plane above
    across = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    v = (far * 0.6 + scene.clouds[0] * 256).astype(np.int32) & 255
    u = (far[:, None] * across * 1.2 + scene.clouds[1] * 256).astype(np.int32) & 255
    alpha = clouds()[v[:, None], u] * (cover * np.minimum(up / 0.05, 1))[:, None]
    picture += alpha[..., None] * (cloud - picture)


def _floor(scene: Scene, picture: Floats, top: int, size: int) -> None:
    """Perspective lookup in the ground's texture, one level of it per row."""
    if top == size:
        return
    turn, scale, shift_x, shift_z = scene.grain
    below = (np.arange(top, size) + 0.5) / size - scene.horizon
    z = scene.focal / below * (METRE * scale)  # texels of level 0 from the camera
    across = ((np.arange(size) + 0.5) / size - 0.5) / scene.focal
    # A pixel is z/(f·S) texels wide and z/((y−y0)·S) deep; the level follows their geometric mean.
    footprint = z / size / np.sqrt(scene.focal * below)
    level = np.clip(np.log2(np.maximum(footprint, 1)).round().astype(np.int64), 0, LEVELS - 1)
    side, start = TILE >> level, texture(scene.ground).starts[level]
    zl, shrink = z / (1 << level), 1.0 / (1 << level)
    cos, sin = math.cos(turn), math.sin(turn)
    x = zl[:, None] * across
    u = (x * cos + (zl * sin + shift_x * TILE * shrink)[:, None]).astype(np.int64) & (side - 1)[:, None]
    v = ((zl * cos + shift_z * TILE * shrink)[:, None] - x * sin).astype(np.int64) & (side - 1)[:, None]
    colours = texture(scene.ground).texels.take(start[:, None] + v * side[:, None] + u, 0)
    haze = (0.85 * np.exp(-below / 0.03)).astype(np.float32)[:, None, None]
    picture[top:] = colours + haze * (np.array(SKY_COLOURS[scene.sky][1], np.float32) - colours)


def _shadow(scene: Scene, item: Item, picture: Floats, top: int, size: int) -> None:
    """A dark contact patch and a softer one away from the light, on the ground only."""
    for reach, wide, deep, dark in ((0.0, 0.42, 0.16, 0.55), (0.3, 0.55, 0.3, 0.3)):
        rx = wide * item.width * size
        ry = (deep * item.width * (item.y - scene.horizon) / scene.focal + 0.004) * size
        x, y = (item.x - reach * scene.sun * item.width) * size, (item.y - 0.004) * size
        x0, x1 = max(int(x - 2.2 * rx), 0), min(int(x + 2.2 * rx) + 1, size)
        y0, y1 = max(int(y - 2.2 * ry), top), min(int(y + 2.2 * ry) + 1, size)
        if x0 >= x1 or y0 >= y1:
            continue
        gx = np.exp(-(((np.arange(x0, x1, dtype=np.float32) + 0.5 - x) / rx) ** 2))
        gy = np.exp(-(((np.arange(y0, y1, dtype=np.float32) + 0.5 - y) / ry) ** 2))
        picture[y0:y1, x0:x1] *= (1 - dark * gy[:, None] * gx)[..., None]


def _sprite(scene: Scene, item: Item, picture: Floats, instances: NDArray[np.uint8], number: int, size: int) -> None:
    art = sprite(item.kind, item.colour)
    scale = item.size * size / art.height  # pixels of the picture per pixel of the sprite
    level, shrink = art.level(scale)
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    x, y, wide, high = item.x * size, item.y * size, item.width * size, item.size * size
    reach_x, lift = wide / 2 * cos, wide / 2 * abs(sin)
    lean = high * sin
    x0, x1 = max(int(x - reach_x + min(lean, 0)) - 1, 0), min(int(x + reach_x + max(lean, 0)) + 2, size)
    y0, y1 = max(int(y - high * cos - lift) - 1, 0), min(int(y + lift) + 2, size)
    if x0 >= x1 or y0 >= y1:
        return
    k = shrink / scale
    mirror = -1.0 if item.flip else 1.0
    ax, bx = cos * k * mirror, sin * k * mirror
    ay, by = -sin * k, cos * k
    cx = (art.rim + art.width / 2) * shrink - ax * (x - x0) - bx * (y - y0)
    cy = (art.rim + art.height) * shrink - ay * (x - x0) - by * (y - y0)
    data = (ax, bx, cx, ay, by, cy)
    part = level.transform((x1 - x0, y1 - y0), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    pixels = np.asarray(part).astype(np.float32)
    alpha = pixels[..., 3:] * np.float32(1 / 255)
    side = (np.arange(x0, x1, dtype=np.float32) + 0.5 - x) * np.float32(0.3 * scene.sun / max(wide, 1))
    gain = (1 + side)[:, None] * np.array(item.gain, np.float32)
    under = picture[y0:y1, x0:x1]
    under *= 1 - alpha
    under += np.minimum(pixels[..., :3] * gain, pixels[..., 3:])
    instances[y0:y1, x0:x1][pixels[..., 3] >= 127.5] = number


def _boxes(instances: NDArray[np.uint8], count: int) -> Floats:
    boxes = np.zeros((count, 4), np.float32)
    for i in range(count):
        mask = instances == i + 1
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        if len(rows):
            boxes[i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
