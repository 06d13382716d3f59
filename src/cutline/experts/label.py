"""`cutline label`: what an expert says of every picture, as a column of small label maps (CLIPTeX, 2310.14108).

How maps are stored is described in `cutline.train.stream.maps`; classes, unit and scale stand in the column's provenance.

No Auto class of transformers gives surface normals, so `normals` are computed from the depth that an expert gives, in
metres, under the assumption of a pinhole camera without distortion whose horizontal field of view is `fov` degrees and
whose axis goes through the middle of the picture. With P(u, v) = d · ((u − c_u) / f, (v − c_v) / f, 1) the normal is the
cross product of ∂P/∂v and ∂P/∂u, by central differences on the label's grid, turned to the camera. A wrong field of view
tilts them, and on an edge of depth they are those of the wall that joins both sides; where a neighbour has no reading
there is none. Relative depth does not determine normals and is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from cutline.captions.work import Failed, Made, Row, Worker, picture_of
from cutline.config import Config, apply, check
from cutline.errors import ConfigError
from cutline.experts.models import Description, Task, describe_expert, load_expert
from cutline.pairs import Pairs, Provenance
from cutline.train.stream import maps

SHOWN = 64  # rows that the summary looks at


class LabelWork(Config):
    """A `Work` that writes a column of label maps.

    model: "hf:FOLDER or ID", or the folder of `cutline transfer segment|depth`. side: pixels of the shorter side of a map,
    which is never larger than the picture; 64 are four for each patch of a ViT-B/16 on the whole picture. unit: of what
    a depth model gives (auto: metres where its config says so, or else relative, which is inverse depth; say metres for
    a model that gives them and does not tell). fov: degrees, for normals.
    """

    expert: Literal["segment", "depth", "normals"]
    model: str = Field(min_length=1)
    column: str = Field(min_length=1)
    side: int = Field(64, ge=1)
    unit: Literal["auto", "metres", "relative"] = "auto"
    fov: float = Field(60.0, gt=0, lt=180)
    device: str = "auto"
    _known: Description | None = PrivateAttr(None)

    @property
    def reads(self) -> list[str]:
        return ["image"]

    @property
    def writes(self) -> Mapping[str, str]:
        return {self.column: "binary"}

    @property
    def task(self) -> Task:
        return "segment" if self.expert == "segment" else "depth"

    def described(self) -> Description:
        """Of the expert. Raises `ConfigError` for normals of relative depth."""
        if self._known is None:
            known = describe_expert(self.model, self.task)
            if self.task == "depth" and self.unit != "auto":
                known = known._replace(unit=self.unit)
            if self.expert == "normals" and known.unit == maps.RELATIVE:
                raise ConfigError(
                    f"{self.model!r} gives relative depth, which does not determine normals: take a model whose depth is in "
                    "metres (GLPN, ZoeDepth, Depth Pro, Depth Anything's metric ones, a run of `cutline transfer depth`), or "
                    "say unit=metres."
                )
            self._known = known
        return self._known

    def provenance(self) -> Provenance:
        known = self.described()
        settings: dict[str, Any] = {"expert": self.expert, "side": self.side}
        if self.expert == "segment":
            settings["classes"] = known.classes
        elif self.expert == "depth":
            settings |= {"unit": known.unit, "scale": 1 / 65535 if known.unit == maps.RELATIVE else maps.MILLIMETRE}
        else:
            settings["fov"] = self.fov
        return Provenance(how="label", model=known.name, inputs=["image"], settings=settings)

    def load(self) -> "LabelWorker":
        return LabelWorker(self)


@dataclass
class _Prepared:
    """failed: of each row, why it has no picture; sizes: of the maps of the others; inputs: the expert's."""

    failed: list[Failed | None]
    sizes: list[tuple[int, int]]
    inputs: Any


class LabelWorker(Worker):
    """Rows → maps, encoded. A picture that does not decode, and depth without a single reading, are `Failed`."""

    def __init__(self, work: LabelWork) -> None:
        self.work, self.known = work, work.described()
        self.expert = load_expert(work.model, work.task, work.device)

    def prepare(self, rows: list[Row]) -> _Prepared:
        pictures = [picture_of(row) for row in rows]
        ready = [np.array(p) for p in pictures if not isinstance(p, Failed)]
        sizes = [maps.label_size(p.shape[0], p.shape[1], self.work.side) for p in ready]
        failed = [p if isinstance(p, Failed) else None for p in pictures]
        return _Prepared(failed, sizes, self.expert.prepare(ready) if ready else None)

    def make(self, prepared: _Prepared) -> Made:
        said = iter(self.expert.predict(prepared.inputs, prepared.sizes) if prepared.sizes else [])
        return [self._value(next(said)) if reason is None else reason for reason in prepared.failed]

    def _value(self, said: NDArray[Any]) -> Mapping[str, bytes] | Failed:
        if self.work.expert == "segment":
            return {self.work.column: maps.encode_classes(said, len(self.known.classes))}
        if not (np.isfinite(said) & ((said > 0) | (self.known.unit == maps.RELATIVE))).any():
            return Failed("the expert gives no depth")
        if self.work.expert == "normals":
            return {self.work.column: maps.encode_normals(normals_of(said, self.work.fov))}
        encode = maps.encode_relative if self.known.unit == maps.RELATIVE else maps.encode_depth
        return {self.work.column: encode(said)}


def label_work(expert: str, model: str, column: str, overrides: Sequence[str] = ()) -> LabelWork:
    """The work of `cutline label`; overrides of its config. Raises `ConfigError` and, for the model, `DataError`."""
    taken = [o for o in overrides if o.partition("=")[0] in ("expert", "model", "column")]
    if taken:
        raise ConfigError(
            f"the override {taken[0]!r} would change what --expert, --with or --as say: change these instead."
        )
    values = {"expert": expert, "model": model, "column": column}
    return check(LabelWork, apply(values, list(overrides), LabelWork), given=list(overrides))


def normals_of(depth: NDArray[Any], fov: float) -> NDArray[np.float32]:
    """Depth (h, w) in metres, 0 for none → unit normals (h, w, 3), x right, y down, z away; 0 where there is none."""
    h, w = depth.shape
    if min(h, w) < 2:
        return np.zeros((h, w, 3), np.float32)
    there = np.isfinite(depth) & (depth > 0)
    focal = w / 2 / np.tan(np.radians(fov) / 2)
    u, v = (np.arange(w) + 0.5 - w / 2) / focal, (np.arange(h) + 0.5 - h / 2) / focal
    d = np.where(there, depth, np.nan).astype(np.float64)
    points = np.stack([d * u, d * v[:, None], d], axis=2)
    normals = np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1))
    normals /= np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-12)
    away = (normals * points).sum(2, keepdims=True) > 0
    normals = np.where(away, -normals, normals)
    known = there & np.isfinite(normals).all(2) & (np.abs(normals).sum(2) > 0)
    return np.where(known[..., None], normals, 0).astype(np.float32)


def summary(pairs: Pairs, column: str) -> tuple[list[str], str]:
    """Lines about a column of labels (what its first rows hold, their bytes), and the override by which a recipe names it."""
    provenance = pairs.provenance(column)
    settings = provenance.settings if provenance else {}
    kind, names = settings["expert"], settings.get("classes", [])
    stored = [row[column] for row in pairs.read(range(min(SHOWN, len(pairs))), [column]) if row[column] is not None]
    option = f"column: {column}"
    if kind == "segment":
        option += f", classes: {len(names)}"
    elif settings.get("unit") == maps.RELATIVE:
        option += ", relative: true"
    option = f"objectives.experts.{kind}='{{{option}}}'"
    if not stored:
        return [], option
    found = [maps.decode_map(data, kind, settings.get("scale", maps.MILLIMETRE)) for data in stored]
    if kind == "segment":
        ids = np.concatenate([f.ravel() for f in found])
        share = np.bincount(ids[ids >= 0], minlength=len(names)) / len(ids)
        said = ", ".join(f"{names[i]} {share[i]:.0%}" for i in np.argsort(-share)[:6] if share[i])
    elif kind == "depth":
        values = np.concatenate([f[f > 0] for f in found])
        low, mid, high = np.percentile(values, [5, 50, 95]) if len(values) else (0, 0, 0)
        unit = " m" if settings["unit"] == "metres" else " (relative)"
        said = f"5 % below {low:.3g}, half below {mid:.3g}, 95 % below {high:.3g}{unit}"
    else:
        there = np.concatenate([f[np.abs(f).sum(2) > 0] for f in found])
        said = f"mean normal ({', '.join(f'{x:.2f}' for x in there.mean(0))})" if len(there) else "none"
    mean = sum(map(len, stored)) / len(stored)
    h, w = found[0].shape[:2]
    return [f"  {said}", f"  {w} × {h} pixels, {mean:,.0f} bytes a row"], option
