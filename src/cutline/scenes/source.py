"""`Scenes`: the embedded world as a source of pictures, texts and dense labels, drawn on demand.

Scene i of a seed is a pure function of (seed, i): its objects and captions do not depend on the size or the mix.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationError, field_validator

from cutline.config import Config
from cutline.errors import ConfigError, DataError
from cutline.record import fingerprint
from cutline.scenes.alt import KINDS, MIXES, alt_text
from cutline.scenes.captions import captions
from cutline.scenes.draw import draw
from cutline.scenes.layout import Scene, kinds_of, layout
from cutline.scenes.objects import FAMILIES, OBJECTS

WORLD = 1  # raise when the pictures, texts or labels of a (seed, index) change
PREFIX = "scenes:"


class SceneConfig(Config):
    """n: scenes; size: side in pixels; seed: of the world; mix: of the alt texts, a name or shares by kind.

    objects: how many of the 96 the world has (a multiple of 8, the first of each family); `CLASSES` stay the same.
    """

    n: int = Field(20_000, ge=1, lt=2**40)
    size: int = Field(64, ge=48, le=448)
    seed: int = Field(0, ge=0, lt=2**63)
    mix: str | dict[str, float] = "web"
    objects: int = Field(len(OBJECTS), ge=24, le=len(OBJECTS), multiple_of=len(FAMILIES))

    @field_validator("mix")
    @classmethod
    def _known(cls, mix: str | dict[str, float]) -> str | dict[str, float]:
        if isinstance(mix, str):
            if mix not in MIXES:
                raise ValueError(
                    f"unknown mix {mix!r}: take one of {', '.join(MIXES)}, or shares of {', '.join(KINDS)}"
                )
        elif not set(mix) <= set(KINDS) or min(mix.values(), default=0) < 0 or sum(mix.values()) <= 0:
            raise ValueError(f"a mix gives shares (0 or more, not all 0) of the kinds {', '.join(KINDS)}")
        return mix

    def shares(self) -> dict[str, float]:
        """Kind → share, in the order of `KINDS`, summing to 1."""
        given = MIXES[self.mix] if isinstance(self.mix, str) else self.mix
        return {k: given.get(k, 0.0) / sum(given.values()) for k in KINDS}


def parse_spec(spec: str) -> SceneConfig:
    """`scenes:n=20000,size=64,seed=0,mix=web` (any subset, any order) as a config; raises `ConfigError`."""
    if not spec.startswith(PREFIX):
        raise ConfigError(
            f"{spec!r} is not a spec of scenes: write for example 'scenes:n=20000,size=64,seed=0,mix=web'."
        )
    values: dict[str, str] = {}
    for part in filter(None, spec.removeprefix(PREFIX).split(",")):
        key, equals, value = (p.strip() for p in part.partition("="))
        if key not in SceneConfig.model_fields:
            raise ConfigError(f"unknown key {key!r} in {spec!r}: valid keys are {', '.join(SceneConfig.model_fields)}.")
        if not equals or not value:
            raise ConfigError(f"{part!r} in {spec!r} is not of the form key=value.")
        if key in values:
            raise ConfigError(f"{key!r} is given twice in {spec!r}.")
        values[key] = value
    try:
        return SceneConfig.model_validate(values)
    except ValidationError as e:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'][:1]))}: {p['msg']} (got {p['input']!r})" for p in e.errors())
        raise ConfigError(f"{spec!r}: {problems}.") from e


def render(seed: int, index: int, size: int, config: SceneConfig | None = None) -> dict[str, Any]:
    """Everything about one scene: the columns of `Scenes` as a dict. `config` only gives the mix and the objects."""
    config = config or SceneConfig.model_validate({})
    return _row(seed, index, size, config.objects, config.shares(), set(COLUMNS))


_LABELS = ("semantic", "depth", "instances", "boxes", "objects")
COLUMNS = ("key", "image", "width", "height", "alt", "alt_kind", "captions", *_LABELS)


def _row(seed: int, index: int, size: int, objects: int, shares: dict[str, float], columns: set[str]) -> dict[str, Any]:
    scene = layout(seed, index, objects)
    row: dict[str, Any] = {"key": f"s{seed}-{index:08d}", "width": size, "height": size}
    labels = not columns.isdisjoint(_LABELS)
    if labels or "image" in columns:
        row |= draw(scene, size, labels)
    if "objects" in columns:
        row["objects"] = _objects(scene, row["boxes"])
    if not columns.isdisjoint(("captions", "alt", "alt_kind")):
        row["captions"] = captions(scene, seed, index)
        row["alt"], row["alt_kind"] = alt_text(scene, row["captions"], shares, kinds_of(objects), seed, index)
    return row


def _objects(scene: Scene, boxes: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": item.name, "instance": i + 1, "box": tuple(float(v) for v in boxes[i]), "visible": item.visible,
            "depth": item.depth, "colour": item.colour,
        }
        for i, item in enumerate(scene.items)
    ]  # fmt: skip


class Scenes:
    """A source of `config.n` scenes; see `COLUMNS`.

    image (S, S, 3) uint8; semantic (S, S) uint8 ids into `CLASSES`; depth (S, S) float32 metres, 0 = no reading (the
    sky, and ground beyond 12 m); instances (S, S) uint8, 0 = none, i + 1 = row i of boxes (N, 4), which are x0 y0 x1 y1
    in pixels; objects: name, instance, box, visible share, depth, colour of each, farthest first; captions: five
    strings; alt, alt_kind: see `alt`. Thread-safe: nothing is kept but the decoded sprites.
    """

    def __init__(self, config: SceneConfig) -> None:
        self.config = config
        self.columns = list(COLUMNS)
        self.fingerprint = fingerprint(
            "scenes", WORLD, config.n, config.size, config.seed, config.shares(), config.objects
        )
        self._shares = config.shares()

    def __len__(self) -> int:
        return self.config.n

    def read(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """The asked columns of the asked rows, in order; raises `DataError` for an unknown column or row."""
        unknown = [c for c in columns if c not in COLUMNS]
        if unknown:
            raise DataError(f"scenes have no column {unknown[0]!r}: take some of {', '.join(COLUMNS)}.")
        outside = [r for r in rows if not 0 <= r < self.config.n]
        if outside:
            raise DataError(f"there is no scene {outside[0]}: rows run from 0 to {self.config.n - 1}.")
        wanted, c = set(columns), self.config
        drawn = (_row(c.seed, int(r), c.size, c.objects, self._shares, wanted) for r in rows)
        return [{name: row[name] for name in columns} for row in drawn]
