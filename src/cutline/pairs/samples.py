"""What every source of pairs gives (`Sample`), and what it is asked for (`Wanted`).

A source kind is a `Feed`: a list of parts (shards, files) read one after the other. `create` alone decides about
cleaning, duplicates, types and commits, so that a new kind of source only has to find pictures and text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

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
    `prefix_keys` asks `create` to put the name of a feed's part before each of its keys.
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
