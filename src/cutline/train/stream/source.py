"""Where rows come from: the contract of a source, how a recipe names one, and a cache for small ones."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from cutline.errors import ConfigError


class Source(Protocol):
    """A table of pictures. `read` is thread-safe and gives a dict per row in the order asked.

    "image" is encoded bytes, an (H, W, 3) uint8 array, or None where it cannot be read (the reason is then in "error");
    "key" is a string; a caption column gives a string, a list of strings or None.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def columns(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def read(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]: ...


def open_source(spec: str, where: str | None = None) -> Source:
    """`scenes:n=…,size=…` → the embedded scenes (no Lance needed); anything else → the Lance table of that path."""
    if spec == "scenes" or spec.startswith("scenes:"):
        from cutline.scenes import Scenes, parse_spec

        if where is not None:
            raise ConfigError(f"scenes have no rows to filter: drop where={where!r}, or write them to a table first.")
        scenes: Source = Scenes(parse_spec(spec))
        return scenes
    from cutline.pairs import Pairs

    pairs = Pairs.open(spec)
    table: Source = pairs.where(where) if where is not None else pairs
    return table


def check_columns(source: Source, wanted: Iterable[str], by: str = "", made_by: str = "") -> None:
    """Raise `ConfigError` naming the first wanted column the source lacks, what there is, and what is nearest.

    by: the key of the recipe that wants it; made_by: a sentence on how to make it.
    """
    for column in wanted:
        if column not in source.columns:
            near = difflib.get_close_matches(column, source.columns, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            have = ", ".join(sorted(source.columns))
            need = f"{by} needs a column that is not there: " if by else ""
            more = f" {made_by}" if made_by else ""
            raise ConfigError(f"{need}the data have no column {column!r}; they have: {have}.{hint}{more}")


def fingerprint_of(source: Source, columns: Sequence[str]) -> str:
    """Of what is read of a source: a column that was added to a table in the meantime changes nothing."""
    inner = source.source if isinstance(source, Cached) else source
    of = getattr(inner, "fingerprint_of", None)
    return str(of(columns)) if of else source.fingerprint


class Cached:
    """A source that keeps every row it has read, for small data that are costly to make (rendered scenes).

    Shareable between streams. Two threads may read the same row at the same time; both get equal values.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.fingerprint, self.columns = source.fingerprint, source.columns
        self._rows: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        rows = [int(r) for r in rows]
        wanted = set(columns)
        missing = [r for r in dict.fromkeys(rows) if not wanted <= self._rows.get(r, {}).keys()]
        if missing:
            for r, values in zip(missing, self.source.read(missing, columns), strict=True):
                self._rows.setdefault(r, {}).update(values)  # atomic, and loses no column of another thread
        found = [self._rows[r] for r in rows]  # looked up by name: another thread may be adding columns
        return [{c: row[c] for c in (*columns, "error") if c in row} for row in found]
