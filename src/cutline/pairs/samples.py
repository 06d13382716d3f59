"""What every source of pairs gives (`Sample`), what it is asked for (`Wanted`), and how text is cleaned.

A source kind is a `Feed`: a list of parts (shards, files) read one after the other. `create` alone decides about
cleaning, duplicates, types and commits, so that a new kind of source only has to find pictures and text.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from cutline.pairs.report import IngestReport

OWN = ("key", "image", "width", "height")  # columns every table has; `alt` joins them when there is any text


class Picture(NamedTuple):
    """Where a picture lies: the bytes [position, position + size) of `uri` (all, if None), or `data`."""

    uri: str | None
    position: int | None
    size: int
    width: int | None
    height: int | None
    tail: bytes  # the last bytes, for the fingerprint
    data: bytes | None = None


class Sample(NamedTuple):
    """A picture and the raw values of `Wanted.columns`, in their order (bytes are UTF-8 text to be)."""

    key: str
    picture: Picture
    values: list[Any]


class Missing(NamedTuple):
    """A sample that gives no row, and why."""

    key: str
    reason: str


class Feed(Protocol):
    """A source of samples in a fixed order.

    parts: names of its parts, for messages. identity: what must be the same for an unfinished `create` to go on.
    alt, captions: the fields taken where the user names none.
    """

    parts: list[str]
    identity: list[Any]

    @property
    def alt(self) -> str | None: ...
    @property
    def captions(self) -> str | None: ...
    def samples(self, part: int, wanted: "Wanted", report: IngestReport) -> Iterator[Sample | Missing]: ...


@dataclass(frozen=True)
class Wanted:
    """Columns to fill beside the picture: name → field. A field is `name`, or `name:key.key` into JSON.

    `texts` names those that hold text (alt text, captions): they are cleaned, and a sample with none is skipped.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    texts: frozenset[str] = frozenset()
    inline: bool = False
    prefix_keys: bool = False

    @property
    def columns(self) -> list[str]:
        return list(self.fields)


def split_field(spec: str) -> tuple[str, list[str]]:
    """`json:captions.0` → ("json", ["captions", "0"]); `txt` → ("txt", [])."""
    name, _, path = spec.partition(":")
    return name, path.split(".") if path else []


def dig(value: Any, path: list[str]) -> Any:
    """Follow `path` through dicts and lists; None where it leads nowhere."""
    for step in path:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.lstrip("-").isdigit() and -len(value) <= int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def parse_json(data: bytes | str, key: str, report: IngestReport) -> Any:
    """The JSON value, or None (counted) where it does not parse."""
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        report.repair("text is not UTF-8: bad bytes replaced", key)
        return parse_json(bytes(data).decode("utf-8", "replace"), key, report)  # type: ignore[arg-type]
    except ValueError:
        report.repair("JSON does not parse: taken as empty", key)
        return None


def clean(value: Any, key: str, report: IngestReport) -> str | list[str] | None:
    """Text as stored: decoded, without stray spaces at its ends; empty is None; a list keeps its non-empty parts."""
    if value is None:
        return None
    if isinstance(value, list):
        parts = [clean(v, key, report) for v in value]
        return [p for p in parts if isinstance(p, str)] or None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            report.repair("text is not UTF-8: bad bytes replaced", key)
            value = value.decode("utf-8", "replace")
    if isinstance(value, dict):
        report.repair("text is a JSON object: taken as missing", key)
        return None
    value = str(value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # half a surrogate pair, from a JSON escape
            report.repair("text is not UTF-8: bad bytes replaced", key)
            value = value.encode("utf-8", "replace").decode()
    stripped = value.strip("\0 \t\r\n\f\v\u00a0\ufeff\u3000")
    if not stripped:
        report.repair("empty text: taken as missing", key)
        return None
    if len(stripped) != len(value):
        report.repair("stray spaces at the ends removed", key)
    return str(stripped)


def sniff(values: list[Any], text: bool) -> pa.DataType:
    """The Arrow type of a column from its first values."""
    seen = [v for v in values if v is not None]
    flat = [x for v in seen for x in (v if isinstance(v, list) else [v])]
    inner = pa.string() if text else _scalar(flat)
    return pa.list_(inner) if any(isinstance(v, list) for v in seen) else inner


def _scalar(seen: list[Any]) -> pa.DataType:
    kinds = {type(v) for v in seen}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def fit(value: Any, kind: pa.DataType, key: str, report: IngestReport) -> Any:
    """`value` as the column's type wants it; what does not fit becomes None and is counted."""
    if value is None:
        return None
    if pa.types.is_list(kind):
        parts = [fit(v, kind.value_type, key, report) for v in (value if isinstance(value, list) else [value])]
        return [p for p in parts if p is not None]
    if isinstance(value, list):
        report.repair("a list where one value was expected: first one kept", key)
        return fit(value[0] if value else None, kind, key, report)
    if pa.types.is_string(kind):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    right = {pa.bool_(): (bool,), pa.int64(): (int,), pa.float64(): (int, float)}[kind]
    if type(value) in right and not (kind == pa.int64() and not -(2**63) <= value < 2**63):
        return value
    report.repair(f"a value that is not {kind}: taken as missing", key)
    return None
