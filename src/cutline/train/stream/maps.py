"""Label maps (class ids, depth, normals) as columns, and as the view "image" of a picture shows them.

`cutline label` stores a map as PNG bytes, at most as large as its picture and of its aspect (`label_size`):

- "segment": class ids in 8 bits, or 16 from 255 classes on; the largest value there is means no class;
- "depth": 16 bits, 0 for no reading; the value times `scale` of the provenance is metres, or, for models that give only
  relative (inverse) depth, each picture's own range is spread over 1 … 65535 (`unit: relative`, read as 0 … 1);
- "normals": three channels of 8 bits, (n + 1) · 127.5, all 0 for none; x to the right, y down, z away from the camera.

In training, the crop, resize and flip that were drawn for the picture are replayed on the map, by the exact position of
every pixel of the view in it: class ids are those of the nearest pixel, the others are interpolated between the pixels
that have a value, and a mirrored normal looks the other way. Operations of RandAugment that move pixels are refused.
Sources that give arrays (the embedded scenes: `semantic`, `depth`) are read as they are.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cutline.errors import ConfigError, DataError
from cutline.objectives.base import Map
from cutline.train.stream.randaugment import MOVING
from cutline.train.stream.replay import Unusable
from cutline.train.stream.source import Cached, Source, check_columns
from cutline.train.stream.transforms import Augment, Augmentation

Array = NDArray[Any]
NONE = -1  # no class
RELATIVE = "relative"  # unit of a depth column; else "metres"
MILLIMETRE = 0.001  # metres: the scale that depth is stored with


def label_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Of the map of a picture: its shorter side is `side`, or the picture's own where that is smaller."""
    scale = min(1.0, side / min(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def encode_classes(ids: Array, classes: int) -> bytes:
    """Ids (h, w), with `NONE` for no class."""
    kind = np.uint8 if classes <= 255 else np.uint16
    return _png(np.where(ids == NONE, np.iinfo(kind).max, ids).astype(kind))


def encode_depth(metres: Array) -> bytes:
    """Metres (h, w) in millimetres, up to 65.535 m; 0, negative and not finite values are no reading."""
    there = np.isfinite(metres) & (metres > 0)
    return _png(
        np.where(there, np.clip(np.round(np.where(there, metres, 0) / MILLIMETRE), 1, 65535), 0).astype(np.uint16)
    )


def encode_relative(values: Array) -> bytes:
    """Values (h, w) of no unit, their range spread over 1 … 65535."""
    there = np.isfinite(values)
    low, high = (values[there].min(), values[there].max()) if there.any() else (0.0, 0.0)
    spread = (np.where(there, values, low) - low) / max(float(high - low), 1e-12) * 65534 + 1
    return _png(np.where(there, np.round(spread), 0).astype(np.uint16))


def encode_normals(normals: Array) -> bytes:
    """Unit vectors (h, w, 3), all 0 for none."""
    there = np.abs(normals).sum(2, keepdims=True) > 0
    return _png(np.where(there, np.round((normals + 1) * 127.5).clip(0, 255), 0).astype(np.uint8))


def decode_map(data: Any, kind: str, scale: float = MILLIMETRE) -> Array:
    """A stored map, or an array as a source gives it: ids (h, w) int32, depth (h, w) float32, normals (h, w, 3) float32.

    scale: of stored depth. Raises `DataError` for bytes that are no such map.
    """
    stored = isinstance(data, bytes)
    try:
        values = np.asarray(Image.open(io.BytesIO(data))) if stored else np.asarray(data)
    except (OSError, ValueError, SyntaxError) as e:
        raise DataError(f"a label map cannot be read: {e}") from e
    if values.ndim != (3 if kind == "normals" else 2):
        raise DataError(f"a label map of {kind} cannot have the shape {values.shape}.")
    if kind == "segment":
        ids = values.astype(np.int32)
        return np.where(ids == np.iinfo(values.dtype).max, np.int32(NONE), ids) if stored else ids
    if kind == "depth":
        return values.astype(np.float32) * np.float32(scale if stored else 1)
    if not stored:
        return values.astype(np.float32)
    normals = values.astype(np.float32) / 127.5 - 1
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    return np.where(values.any(2, keepdims=True), normals, np.float32(0))


def aligned(values: Array, kind: str, how: Augmentation, size: tuple[int, int]) -> Array:
    """A decoded map as the view of `size` (H, W) shows it: ids or depth (H, W), normals (3, H, W).

    Pixel i of the view lies at top + (i + ½) · height / H of the picture, and that times h / how.size[0] in the map.
    """
    h, w = values.shape[:2]
    y = (how.top + (np.arange(size[0]) + 0.5) * (how.height / size[0])) * (h / how.size[0]) - 0.5
    x = (how.left + (np.arange(size[1]) + 0.5) * (how.width / size[1])) * (w / how.size[1]) - 0.5
    x = x[::-1] if how.flip else x
    if kind == "segment":
        rows, columns = (np.floor(at + 0.5).astype(int).clip(0, n - 1) for at, n in ((y, h), (x, w)))
        ids: Array = values[rows][:, columns]
        return ids
    if kind == "depth":
        return _between(values[..., None], values > 0, y, x)[..., 0]
    normals = _between(values, np.abs(values).sum(2) > 0, y, x)
    normals = normals / np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-6)
    if how.flip:
        normals[..., 0] *= -1
    return np.ascontiguousarray(normals.transpose(2, 0, 1))


def _between(values: Array, there: Array, y: Array, x: Array) -> Array:
    """Bilinear values (Y, X, C) of (h, w, C) at rows y and columns x, of the pixels that are `there`; 0 where those make
    up less than half."""
    total, weight = np.zeros((len(y), len(x), values.shape[2]), np.float32), np.zeros((len(y), len(x)), np.float32)
    for row, of_row in _sides(y, values.shape[0]):
        for column, of_column in _sides(x, values.shape[1]):
            part = of_row[:, None] * of_column * there[row][:, column]
            total += part[..., None] * values[row][:, column]
            weight += part
    mean: Array = np.where((weight >= 0.5)[..., None], total / np.maximum(weight, 1e-6)[..., None], np.float32(0))
    return mean


def _sides(at: Array, length: int) -> list[tuple[Array, Array]]:
    low = np.floor(at)
    share = (at - low).astype(np.float32)
    return [(low.astype(int).clip(0, length - 1), 1 - share), ((low + 1).astype(int).clip(0, length - 1), share)]


def _png(pixels: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class LabelMaps:
    """The maps that objectives ask of a source. Raises `ConfigError` for columns that are not there or are other maps."""

    def __init__(self, source: Source, maps: Sequence[Map], augment: Augment, replayed: bool) -> None:
        self.maps = list(maps)
        inner: Any = source.source if isinstance(source, Cached) else source
        self.scales: dict[str, float] = {}
        for m in maps:
            made_by = f"Make it with: cutline label PAIRS --expert {m.kind} --with MODEL --as {m.column}"
            check_columns(source, [m.column], m.by, made_by)
            provenance = inner.provenance(m.column) if hasattr(inner, "provenance") else None
            settings = provenance.settings if provenance else {}
            _check_settings(m, settings)
            self.scales[m.column] = float(settings.get("scale", MILLIMETRE))
        if augment.operations and maps and not replayed:
            raise ConfigError(
                f"{maps[0].by} learns from label maps, which RandAugment's rotations and shifts of the picture would leave "
                f"behind: set data.augment.operations=0 (it is {augment.operations})."
            )

    @property
    def columns(self) -> list[str]:
        return [m.column for m in self.maps]

    def of(self, row: Mapping[str, Any], how: Augmentation) -> dict[str, Array]:
        """Column → the map as the view that `how` makes shows it; without any label where the row has none.

        Raises `Unusable` for a map that is not of its picture's aspect, and `DataError` for values that are no labels.
        """
        moved = [name for name, _ in how.operations if name in MOVING]
        if moved and self.maps:
            raise ConfigError(
                f"{self.maps[0].by} learns from label maps, and the stored augmentations (data.replay) hold {moved[0]}, "
                "which would leave them behind: make them with `cutline reinforce … augment.operations=0`."
            )
        return {m.column: self._one(m, row, how) for m in self.maps}

    def _one(self, m: Map, row: Mapping[str, Any], how: Augmentation) -> Array:
        if row[m.column] is None:
            shape = (3, m.size, m.size) if m.kind == "normals" else (m.size, m.size)
            return np.full(shape, NONE, np.int32) if m.kind == "segment" else np.zeros(shape, np.float32)
        values = decode_map(row[m.column], m.kind, self.scales[m.column])
        (h, w), (height, width) = values.shape[:2], how.size
        if abs(h * width - w * height) > (height + width) / 2 or h > height or w > width:  # more than rounding explains
            raise Unusable("label map of another size than the picture", f"{m.column} {w}x{h} of {width}x{height}")
        if m.kind == "segment" and values.max(initial=0) >= m.classes:
            raise DataError(
                f"{row['key']}: {m.column!r} holds class {values.max()}, and {m.by}.classes is {m.classes} (ids 0 to "
                f"{m.classes - 1}). Set it to the number of classes."
            )
        return aligned(values, m.kind, how, (m.size, m.size))


def _check_settings(m: Map, settings: Mapping[str, Any]) -> None:
    """The request against what the provenance says of the column, as far as it says something."""
    kind, classes, unit = (settings.get(k) for k in ("expert", "classes", "unit"))
    if kind is not None and kind != m.kind:
        raise ConfigError(
            f"{m.by} needs a map of {m.kind}, and the column {m.column!r} holds {kind}. Name another column."
        )
    if m.kind == "segment" and classes is not None and len(classes) != m.classes:
        raise ConfigError(
            f"the column {m.column!r} has {len(classes)} classes, and {m.by}.classes is {m.classes}: set it to "
            f"{len(classes)}."
        )
    if m.kind == "depth" and unit is not None and (unit == RELATIVE) != m.relative:
        raise ConfigError(
            f"the column {m.column!r} holds {unit} depth: set {m.by}.relative={str(unit == RELATIVE).lower()}."
        )
