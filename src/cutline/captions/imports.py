"""Captions that others have written, joined to a table by an id or a URL (`cutline caption import`).

Recap-DataComp-1B is parquet with `url`, `re_caption`, …; VeCap-300M is JSON, one object of URL → caption. Also .jsonl, .csv,
.tsv, and .json with a list of objects or an object of objects. Files are read in parts and joined as Arrow arrays; only
captions that match a row are kept, so memory holds the table's ids and its new captions, and not the files. What does
not parse is counted and left out, and so is the rest of a file that is cut off.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field
from rich.markup import escape

from cutline.captions.work import is_list
from cutline.config import Config
from cutline.errors import DataError
from cutline.pairs import Pairs, Provenance
from cutline.pairs.adding import check_new
from cutline.pairs.columns import PIECE, ColumnJob, commit_columns
from cutline.pairs.files import rows_of
from cutline.pairs.report import Count, IngestReport, utf8
from cutline.pairs.sources import matching_files
from cutline.pairs.values import SPACES
from cutline.progress import progress
from cutline.record import fingerprint

FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
BLOCK = 65_536  # captions read at a time
CHUNK = 1 << 20  # characters of JSON read at a time
LONGEST = 16 * CHUNK  # of one value in JSON
LISTS = pa.large_list(pa.large_string())  # of texts; large, since all new captions may exceed 2 GB


class CaptionReport(Config):
    """What came of an import. filled: rows with a caption now; unmatched: captions whose id no row has; duplicates:
    captions of a row that had one already (the first is kept); skipped: what could not be used, by reason.
    """

    column: str
    rows: int
    filled: int = 0
    captions: int = 0
    unmatched: int = 0
    duplicates: int = 0
    skipped: dict[str, Count] = Field(default_factory=dict)

    def __rich__(self) -> str:
        lost = escape(
            "".join(f"\n  left out, {why}: {c.n:,} ({', '.join(c.examples)})" for why, c in self.skipped.items())
        )
        return (
            f"[bold]{self.column}[/bold]: {self.filled:,} of {self.rows:,} rows have a caption; of {self.captions:,} "
            f"read, {self.unmatched:,} match no row and {self.duplicates:,} are a second one of a row{lost}"
        )


def import_captions(
    pairs: Pairs, files: Sequence[str], by: str, field: str, column: str, id_field: str | None = None, show: bool = True
) -> CaptionReport:
    """Add the captions of `files` (paths, brace and glob patterns) as a new `column`, null for rows without one.

    by: the table's column to join by ("key", "uid", "url"); field: the text in the files, or a list of texts; id_field: of
    the files, if it is not called as in the table. The column is of lists where any row has several. Raises `DataError`
    for columns and files that are not there and if nothing matches; the table is then as it was.
    """
    paths = [path for pattern in files for path in matching_files(pattern)]
    unknown = next((path for path in paths if path.suffix not in FORMATS), None)
    if unknown is not None:
        raise DataError(
            f"{str(unknown)!r} is of no format that is known here: {', '.join(FORMATS)}. Convert or unpack it first."
        )
    source = {"files": fingerprint([[p.name, p.stat().st_size] for p in paths]), "by": id_field or by, "field": field}
    provenance = Provenance(
        how="caption import", model=", ".join(p.name for p in paths[:8]), inputs=[by], settings=source
    )
    pairs.check_columns([by])
    check_new(ColumnJob(pairs, column, {column: "string"}, provenance, [by]), again=False)
    report = CaptionReport(column=column, rows=len(pairs))
    join = _Join(_ids(pairs, by), report)
    with progress(f"import {column}", len(paths), "files", show) as tick:
        for path in paths:
            for ids, texts in _read(path, id_field or by, field, report):
                join.add(ids, texts)
            tick(1)
    join.settle()
    report.filled = int((join.place >= 0).sum())
    if not report.filled:
        seen = f"such as {join.example!r}" if join.example else "and there is none"
        raise DataError(
            f"none of {report.captions:,} captions in {paths[0].name} and the others has an id that is in the column "
            f"{by!r} of {pairs.path!r} (the files' ids are those of {id_field or by!r}, {seen}). {_reasons(report)}"
        )
    commit_columns(pairs, {column: pa.field(column, join.kind)}, provenance, lambda: join.pieces(column))
    return report


def _reasons(report: CaptionReport) -> str:
    return "; ".join(f"{why}: {c.n:,} ({', '.join(c.examples[:2])})" for why, c in report.skipped.items())


def _ids(pairs: Pairs, by: str) -> pa.Array:
    """The ids of all rows of the table, null for rows outside the filter."""
    column = pairs.dataset.to_table(columns=[by])[by]
    if not (pa.types.is_string(column.type) or pa.types.is_integer(column.type)):
        raise DataError(f"the column {by!r} holds {column.type}: captions are joined by text or whole numbers.")
    ids = column.cast(pa.large_string()).combine_chunks()
    if pairs.rows is None:
        return ids
    inside = np.zeros(len(ids), bool)
    inside[pairs.rows] = True
    return pc.if_else(pa.array(inside), ids, None)


class _Join:
    """Captions by row. place: for each row of the table where its texts are, −1: nowhere."""

    def __init__(self, ids: pa.Array, report: CaptionReport) -> None:
        self.ids, self.report = ids, report
        self.place = np.full(len(ids), -1, np.int64)
        self.texts: list[pa.Array] = []
        self.waiting: list[tuple[pa.Array, pa.Array]] = []
        self.example = ""

    def add(self, ids: pa.Array, texts: pa.Array) -> None:
        """Captions (large_string ids, `LISTS`). They wait until there are many, since a join looks at every row."""
        self.waiting.append((ids, texts))
        if sum(len(i) for i, _ in self.waiting) >= max(BLOCK, len(self.ids)):
            self.settle()

    def settle(self) -> None:
        """Join what waits."""
        if not self.waiting:
            return
        ids, texts = (pa.concat_arrays(parts) for parts in zip(*self.waiting))
        self.waiting = []
        self.example = self.example or str(next(iter(ids), ""))
        hit = pc.index_in(self.ids, value_set=ids, skip_nulls=True).fill_null(-1).to_numpy()  # the first of equal ids
        new = (hit >= 0) & (self.place < 0)
        used, which = np.unique(hit[new], return_inverse=True)
        self.place[new] = sum(map(len, self.texts)) + which
        self.texts.append(texts.take(pa.array(used)))
        known = pc.sum(pc.is_in(ids, value_set=self.ids)).as_py() or 0
        self.report.captions += len(ids)
        self.report.unmatched += len(ids) - known
        self.report.duplicates += known - len(used)

    @property
    def kind(self) -> pa.DataType:
        several = any((pc.max(pc.list_value_length(t)).as_py() or 0) > 1 for t in self.texts)
        return pa.list_(pa.string()) if several else pa.string()

    def pieces(self, column: str) -> Iterator[Mapping[str, pa.Array]]:
        """The column in order, a piece at a time."""
        texts, kind = pa.concat_arrays(self.texts), self.kind
        for start in range(0, len(self.place), PIECE):
            place = self.place[start : start + PIECE]
            found = texts.take(pa.array(place, mask=place < 0))
            yield {column: (found if is_list(kind) else pc.list_element(found, 0)).cast(kind)}


def _read(path: Path, by: str, field: str, report: CaptionReport) -> Iterator[tuple[pa.Array, pa.Array]]:
    """(ids, texts) of a file, in parts; texts are cleaned, and what has no id or no text is counted and left out."""
    parts = _parquet(path, by, field) if path.suffix == ".parquet" else _lines(path, by, field, report)
    for ids, texts in parts:
        texts = _cleaned(texts)
        has_id, has_text = ids.is_valid(), pc.greater(pc.list_value_length(texts), 0)
        for why, good in (("no id", has_id), ("no text", pc.or_(has_text, pc.invert(has_id)))):
            lacking = len(ids) - (pc.sum(good).as_py() or 0)
            if lacking:
                count = report.skipped.setdefault(why, Count())
                count.n += lacking - 1
                count.add(path.name)
        good = pc.and_(has_id, has_text)
        yield ids.filter(good), texts.filter(good)


def _parquet(path: Path, by: str, field: str) -> Iterator[tuple[pa.Array, pa.Array]]:
    try:
        with pq.ParquetFile(path) as file:
            _check_fields(path, [by, field], file.schema_arrow.names)
            for batch in file.iter_batches(BLOCK, columns=[by, field]):
                texts = batch[field]
                if not is_list(texts.type):
                    texts = pa.ListArray.from_arrays(pa.array(range(len(texts) + 1), pa.int32()), texts)
                yield batch[by].cast(pa.large_string()), texts.cast(LISTS)
    except pa.ArrowException as e:
        raise DataError(f"{str(path)!r} is not a parquet file with text in {field!r} that can be read: {e}") from e


def _check_fields(path: Path, fields: Sequence[str], have: Sequence[str]) -> None:
    for name in fields:
        if name not in have:
            raise DataError(f"{str(path)!r} has no field {name!r}; it has {', '.join(have)}.")


def _lines(path: Path, by: str, field: str, report: CaptionReport) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Of every other kind of file: records as Python objects, `BLOCK` of them at a time."""
    records = _records(path, by, field, report)
    while block := list(islice(records, BLOCK)):
        ids = [None if i is None else utf8(str(i)) for i, _ in block]
        texts = [[utf8(t) for t in (v if isinstance(v, list) else [v]) if isinstance(t, str)] for _, v in block]
        yield pa.array(ids, pa.large_string()), pa.array(texts, LISTS)


def _records(path: Path, by: str, field: str, report: CaptionReport) -> Iterator[tuple[Any, Any]]:
    """(id, text or list of texts) of each record."""
    if path.suffix != ".json":
        ingest = IngestReport()
        for number, row in enumerate(rows_of(path, ingest)):
            if not number and path.suffix != ".jsonl":
                _check_fields(path, [by, field], list(row))
            yield row.get(by), row.get(field)
        for why, count in ingest.skipped.items():
            _skip(report, why, count.n, [f"{path.name}, {e}" for e in count.examples])
        return
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as text:
            for key, value in json_items(text):
                if isinstance(value, dict):
                    yield value.get(by) if key is None else key, value.get(field)
                else:
                    yield key, value
    except ValueError as e:
        _skip(report, "JSON cut off or broken: the rest of it is lost", 1, [f"{path.name}: {e}"])


def _skip(report: CaptionReport, why: str, n: int, examples: Sequence[str]) -> None:
    count = report.skipped.setdefault(why, Count())
    for example in examples:
        count.add(example)
    count.n += n - len(examples)


def _cleaned(lists: pa.Array) -> pa.Array:
    """`LISTS` without spaces around the texts, and without empty ones."""
    trimmed = pc.utf8_trim(lists.flatten(), characters=SPACES)
    good = pc.greater(pc.binary_length(trimmed), 0).fill_null(False)
    counts = np.bincount(pc.list_parent_indices(lists).filter(good).to_numpy(), minlength=len(lists))
    ends = np.concatenate([[0], np.cumsum(counts)])
    return pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), trimmed.filter(good))


def json_items(text: TextIO) -> Iterator[tuple[str | None, Any]]:
    """(key, value) of the members of a JSON object, or (None, value) of those of a list, without holding all of it.

    Raises ValueError where it does not parse.
    """
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,:]*")
    buffer = ""
    while not buffer and (more := text.read(CHUNK)):
        buffer = more.lstrip()
    if buffer[:1] not in ("[", "{"):
        raise ValueError("it is neither a list nor an object")
    close, at, key = "]" if buffer[0] == "[" else "}", 1, None
    while True:
        at = between.match(buffer, at).end()  # type: ignore[union-attr]
        if buffer[at : at + 1] == close and key is None:
            return
        try:
            value, end = decode(buffer, at)
            whole = end < len(buffer) and buffer[end] in " \t\r\n,:]}"  # else a number may go on
        except ValueError:
            whole = False
        except RecursionError as e:
            raise ValueError("a value is nested too deeply") from e
        if not whole:
            more = text.read(CHUNK)
            if not more or len(buffer) - at > LONGEST:
                raise ValueError(f"no value that can be read after {buffer[max(0, at - 20) : at + 20]!r}")
            buffer, at = buffer[at:] + more, 0
            continue
        at = end
        if close == "}" and key is None:
            key = str(value)
        else:
            yield key, value
            key = None
