"""Rows made by a program (rendered scenes, another table's rows) as a table of pairs."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cutline.errors import DataError
from cutline.pairs.files import picture_bytes
from cutline.pairs.ingest import ingest
from cutline.pairs.provenance import Provenance
from cutline.pairs.report import IngestReport
from cutline.pairs.samples import OWN, Missing, Sample, Wanted


class RowsFeed:
    """Rows made by a program: dicts with `key`, `image` (bytes) and any other columns."""

    alt = captions = None

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows, self.parts = iter(rows), [""]
        self.identity: list[Any] = []

    def samples(self, part: int, wanted: Wanted, report: IngestReport) -> Iterator[Sample | Missing]:
        for row in self.rows:
            if row["image"] is None:
                yield Missing(row["key"], "no picture")
            else:
                yield Sample(row["key"], picture_bytes(row["image"]), [row.get(name) for name in wanted.columns])


def create_from_rows(
    out: str | Path, rows: Iterable[dict[str, Any]], *, provenance: Provenance | None = None, max_bad: float = 0.1
) -> IngestReport:
    """Make the table `out` of `rows`: dicts with `key` (str), `image` (encoded bytes) and the columns of the first row.

    The pictures are stored in the table. `alt` and `captions` are cleaned as text; widths and heights are read from the
    pictures. If an earlier start with the same provenance was cut off, the rows written by it are taken from `rows` and
    dropped, so `rows` must give the same rows again. Raises `DataError` as `create` does.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise DataError(f"no rows were given for {str(out)!r}.")
    names = [name for name in first if name not in OWN]
    names = names if "alt" in names else ["alt", *names]
    wanted = Wanted({name: name for name in names}, frozenset({"alt", "captions"} & set(names)), inline=True)
    feed = RowsFeed(itertools.chain([first], rows))
    provenance = provenance or Provenance(how="create_from_rows")
    return ingest(out, [feed], [wanted], provenance, need_text=False, max_bad=max_bad, show=False)
