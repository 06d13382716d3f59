"""What a number was measured with: no naked score.

A `Result` is metrics plus the `Protocol` they were measured under, stored as `result.json`. Two results may stand in
one table column only when their protocols agree in everything but the encoder and the seeds (`Protocol.column`).
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from cutline.config import Config
from cutline.errors import DataError

# The number a task is judged by, its unit's factor for tables, and whether more is better.
HEADLINE: dict[str, tuple[str, float, bool]] = {
    "segment": ("miou", 100.0, True),
    "depth": ("rmse", 1.0, False),
    "classify": ("top1", 100.0, True),
    "detect": ("ap", 100.0, True),
    "retrieve": ("i2t_r1", 100.0, True),
    "zeroshot-segment": ("miou", 100.0, True),
    "adapt": ("top1", 100.0, True),
    "proposals": ("hiou", 100.0, True),
    "zeroshot-classify": ("top1", 100.0, True),
}


def version() -> str:
    return importlib.metadata.version("cutline")


def slug(name: str) -> str:
    """A folder name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits of the SHA-256 of the JSON of `parts` (or of raw bytes)."""
    return fingerprint_of(parts)


def fingerprint_of(parts: Iterable[Any]) -> str:
    """The same of parts that are made one by one, such as the bytes of weights."""
    h = hashlib.sha256()
    for p in parts:
        h.update(p if isinstance(p, bytes) else json.dumps(p, sort_keys=True, default=str).encode())
        h.update(b"\0")
    return h.hexdigest()[:16]


def digest(path: str | Path) -> bytes:
    """SHA-256 of a file's contents."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def combine(digests: Iterable[tuple[str | Path, bytes]]) -> str:
    """Fingerprint of files by their names and `digest`s, in the order given."""
    h = hashlib.sha256()
    for path, found in digests:
        h.update(Path(path).name.encode() + b"\0")
        h.update(found)
    return h.hexdigest()[:16]


def hash_files(paths: Iterable[str | Path]) -> str:
    """Fingerprint of the files' names and contents, in the order given."""
    return combine((path, digest(path)) for path in paths)


class _Stored(Config):
    """JSON in which NaN and infinity survive (pydantic writes null, which is then no number)."""

    model_config = ConfigDict(ser_json_inf_nan="constants")


class Protocol(_Stored):
    """How a score was measured.

    task: "segment", "depth", "retrieve", …; data: the SPEC as the user gave it; data_fingerprint: of what was read;
    split: which part was scored; settings: everything else that can change the number (crop, resize, cap, head,
    labels used, prompts, class names, …); encoder: what was measured and the hash of its weights; seed; version.
    """

    task: str
    data: str
    data_fingerprint: str
    split: str
    settings: dict[str, Any] = Field(default_factory=dict)
    encoder: str = ""
    encoder_hash: str = ""
    seed: int = 0
    version: str = Field(default_factory=version)

    def column(self) -> str:
        """Scores with equal `column` can be compared; encoder and seed are what a comparison varies."""
        return fingerprint(self.task, self.data_fingerprint, self.split, self.settings, self.version)


class Result(_Stored):
    """Metrics (name → value, in the units the task states) and how they were measured."""

    metrics: dict[str, float]
    protocol: Protocol
    per_class: dict[str, dict[str, float]] = Field(default_factory=dict)  # metric → class → value
    seconds: float = 0.0

    def write(self, folder: str | Path) -> Path:
        """Write `result.json` into `folder`, atomically."""
        path = Path(folder) / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, self.model_dump_json(indent=2).encode())
        return path

    @classmethod
    def read(cls, folder: str | Path) -> "Result":
        """Read the `result.json` of a run directory; raises `DataError` if there is none or it does not parse."""
        path = Path(folder) / "result.json"
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError) as e:
            raise DataError(f"cannot read a result from {str(path)!r}: {e}") from e


def check_comparable(results: Iterable[Result]) -> None:
    """Raise `DataError` naming the first difference if the results' protocols do not fit in one column."""
    rows = list(results)
    for r in rows[1:]:
        if r.protocol.column() == rows[0].protocol.column():
            continue
        a, b = rows[0].protocol.model_dump(), r.protocol.model_dump()
        flat_a, flat_b = ({**p.pop("settings"), **p} for p in (a, b))
        skip = {"encoder", "encoder_hash", "seed", "data"}
        names = sorted(k for k in flat_a.keys() | flat_b.keys() if k not in skip and flat_a.get(k) != flat_b.get(k))
        diff = "; ".join(f"{k}: {flat_a.get(k)!r} against {flat_b.get(k)!r}" for k in names)
        raise DataError(
            f"two scores with different protocols cannot share a column: {diff}. Measure them the same way."
        )


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` so that `path` holds either the old bytes or all of the new ones, also after a kill."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
