"""`Pairs`: a Lance table of pictures and text, opened at one version.

Rows are numbered 0 … len − 1 in the order of the table, or of the rows that pass the filter. A `Pairs` never changes
under its reader: adding a column makes a new version, which `open` shows.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lance
import numpy as np
import pyarrow as pa

from cutline import record
from cutline.errors import DataError
from cutline.pairs.columns import Function
from cutline.pairs.info import Info
from cutline.pairs.ingest import REPORT, SHAPE, STATE, table_shape
from cutline.pairs.pictures import PictureReader
from cutline.pairs.provenance import CONTENT, FAILED, KEY, Provenance
from cutline.pairs.report import Count, IngestReport
from cutline.pairs.samples import OWN

Rows = np.ndarray[tuple[int], np.dtype[np.int64]]


class Version(NamedTuple):
    """A version of the table: its number and when it was written."""

    number: int
    time: str


class Pairs:
    """A table of pairs. Reading is thread-safe."""

    def __init__(self, dataset: Any, path: str, filter: str | None = None) -> None:
        """Use `Pairs.open`."""
        self.dataset, self.path, self.filter = dataset, path, filter
        self.rows: Rows | None = None if filter is None else _matching(dataset, filter)  # 8 bytes a row
        self._readers = {f.name: PictureReader(dataset, f.name) for f in dataset.schema if is_blob(f)}

    @classmethod
    def open(
        cls, path: str | Path, where: str | None = None, version: int | None = None, unfinished: bool = False
    ) -> "Pairs":
        """Open a table, its newest version or `version`; `where` is a Lance (SQL) filter over the columns.

        Raises `DataError` if there is no table, for a bad filter, for a version that is not there, and for a table
        whose `create` was cut off, unless `unfinished` asks for the pairs written so far.
        """
        try:
            dataset = lance.dataset(str(path))
        except (ValueError, OSError) as e:
            hint = "an unfinished create" if (Path(path) / "_cutline").is_dir() else "no table of pairs"
            raise DataError(f"{str(path)!r} is {hint}. Make one with: cutline pairs create {path} SOURCE") from e
        if version is not None:
            try:
                dataset = dataset.checkout_version(version)
            except (ValueError, OSError) as e:
                have = ", ".join(str(v["version"]) for v in dataset.versions()[-10:])
                raise DataError(f"{str(path)!r} has no version {version}; the last are {have}.") from e
        if _schema_note(dataset, STATE) == "unfinished" and not unfinished:
            raise DataError(
                f"the create of {str(path)!r} was cut off after {dataset.count_rows():,} pairs. "
                "Run the same `cutline pairs create` again and it goes on from there."
            )
        missing = [name for name in ("key", "image") if name not in dataset.schema.names]
        if missing:
            raise DataError(f"{str(path)!r} is a Lance table without the column {missing[0]!r}, so no table of pairs.")
        return cls(dataset, str(path), where)

    def where(self, filter: str) -> "Pairs":
        """The rows that pass a Lance (SQL) filter, such as `width >= 64 AND alt IS NOT NULL`, and the earlier ones."""
        return Pairs(self.dataset, self.path, f"({self.filter}) AND ({filter})" if self.filter else filter)

    def __len__(self) -> int:
        return self._count if self.rows is None else len(self.rows)

    @cached_property
    def _count(self) -> int:
        return int(self.dataset.count_rows())

    @cached_property
    def schema(self) -> pa.Schema:
        """Arrow schema, with what is known about each column in its field metadata."""
        return self.dataset.schema

    @cached_property
    def columns(self) -> list[str]:
        return list(self.schema.names)

    @property
    def version(self) -> int:
        return int(self.dataset.version)

    def versions(self) -> list[Version]:
        """All versions, oldest first; each can be opened."""
        return [Version(v["version"], v["timestamp"].isoformat(timespec="seconds")) for v in self.dataset.versions()]

    @property
    def finished(self) -> bool:
        return _schema_note(self.dataset, STATE) != "unfinished"

    @property
    def report(self) -> IngestReport | None:
        """The ingest report, if the table was made by `create`."""
        text = _schema_note(self.dataset, REPORT)
        return IngestReport.model_validate_json(text) if text else None

    def provenance(self, column: str) -> Provenance | None:
        """Where a column came from; None for one that was not written by Cutline."""
        self.check_columns([column])
        text = (self.schema.field(column).metadata or {}).get(KEY.encode())
        return Provenance.model_validate_json(text) if text else None

    def digest(self, column: str) -> str:
        """Of a column's values, taken when they were written (see `content`); "" for one that Cutline did not write."""
        self.check_columns([column])
        return str((self.schema.field(column).metadata or {}).get(CONTENT.encode(), b"").decode())

    def check_fresh(self, column: str, source: str) -> None:
        """Raise `DataError` if `column` is known to be made from other values than `source` has now."""
        made = self.provenance(column)
        then, now = made and made.read.get(source), self.digest(source)
        if then and now and then != now:
            raise DataError(
                f"{source!r} was written anew since {column!r} was made from it: drop {column!r} and make it again."
            )

    def failed(self, column: str) -> dict[str, Count]:
        """The rows that have no value in a column because it could not be made, counted by reason."""
        self.check_columns([column])
        text = (self.schema.field(column).metadata or {}).get(FAILED.encode())
        return {reason: Count.model_validate(c) for reason, c in json.loads(text or b"{}").items()}

    def info(self) -> Info:
        """What `cutline pairs info` prints."""
        return Info(self)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the contents: columns, values, filter; equal for the same data at another place.

        Made of the digests that were taken when the columns were written (see `cutline.pairs.content`), so it costs
        nothing; rows or columns changed by other programs are known by the names of their files.
        """
        return self.fingerprint_of(self.schema.names)

    def fingerprint_of(self, columns: Sequence[str]) -> str:
        """The same of these columns (and those that the filter names) alone, so that adding others changes nothing."""
        digests: list[Any] = []
        for field in self.schema:
            if field.name not in columns and not re.search(rf"\b{re.escape(field.name)}\b", self.filter or ""):
                continue
            digests.append([field.name, str(field.type), self.digest(field.name) or self._files()])
        shape = table_shape(self.dataset)
        foreign = [] if shape == _schema_note(self.dataset, SHAPE) else [shape, self._files()]
        return record.fingerprint(sorted(digests), len(self), self.filter, foreign)

    def _files(self) -> list[str]:
        return [f.path for fragment in self.dataset.get_fragments() for f in fragment.data_files()]

    def take(self, rows: Sequence[int] | Rows, columns: Sequence[str]) -> pa.Table:
        """Columns of some rows as Arrow, in the order asked; pictures come as Lance's descriptors, not as bytes."""
        self.check_columns(columns)
        return self.dataset.take(self._index(rows), columns=list(columns))

    def picture_names(self, rows: Sequence[int] | Rows) -> list[str | None]:
        """The file names that the pictures had where they lie; None for those stored in the table."""
        return self._readers["image"].names(_one_chunk(self.take(rows, ["image"])["image"]))

    def picture_uris(self, rows: Sequence[int] | Rows) -> list[str | None]:
        """The URIs of the files that hold the pictures; None for those stored in the table."""
        column = self.take(rows, ["image"])["image"].to_pylist()
        return [(d or {}).get("blob_uri") or None for d in column]

    def _index(self, rows: Sequence[int] | Rows) -> Rows:
        """Row numbers in the Lance table."""
        index = np.asarray(rows, dtype=np.int64)
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"rows {index.min()} to {index.max()} asked of a table with {len(self)}")
        return index if self.rows is None else self.rows[index]

    def read(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """One dict per row, in the order asked (rows may repeat), with the columns asked for.

        "image" is the encoded bytes, or None where they cannot be read, with the reason under "error". Text is str,
        list[str] or None; a fixed-size list (an embedding) is a numpy array, and so is a list of them, (n, D). Raises `DataError` for an unknown column
        and IndexError for a row that is not there.
        """
        self.check_columns(columns)
        index = self._index(rows)
        if not len(index):
            return []
        plain = [c for c in columns if c not in self._readers]
        table = self.dataset.take(index, columns=plain) if plain else {}
        out: list[dict[str, Any]] = [{} for _ in rows]
        for name in columns:
            reader = self._readers.get(name)
            if reader is None:
                for item, value in zip(out, values(table[name])):
                    item[name] = value
                continue
            for item, (data, error) in zip(out, reader.read(index)):
                item[name] = data
                if error is not None:
                    item["error"] = error
        return out

    def add_column(
        self,
        name: str,
        values: "Sequence[Any] | pa.Array | Function",
        *,
        columns: Sequence[str] = ("key",),
        type: "pa.DataType | str | None" = None,
        provenance: Provenance | None = None,
        batch: int = 256,
        restart: bool = False,
        show: bool = True,
    ) -> "Pairs":
        """Add a column in a new version of the table, and return the table at that version.

        values: one for each row, or a function from rows (as `read` gives them, with `columns`) to one value for each.
        Results of a function are kept as they come, so after a kill the same call goes on behind the last `batch`;
        whether it is the same is judged by `provenance` and the settings (the function itself cannot be compared).
        restart drops what an earlier start left. With a filter, rows outside it become null.
        type: an Arrow type, or "blob" for large bytes that are read one by one; None takes the type of the first batch.

        Raises `DataError` for a column that exists, rows that changed meanwhile, and values that do not fit.
        """
        from cutline.pairs.adding import add_column

        return add_column(self, name, values, columns, type, provenance, batch, restart, show)

    def drop(self, name: str) -> "Pairs":
        """The table without a column, as a new version; older versions keep it. Raises `DataError`."""
        self.check_columns([name])
        if name in OWN:
            raise DataError(f"the column {name!r} cannot be dropped: every table of pairs has it.")
        dataset = lance.dataset(self.path)
        try:
            dataset.drop_columns([name])
        except (OSError, ValueError) as e:
            raise DataError(f"the column {name!r} could not be dropped: {e}") from e
        return Pairs.open(self.path, self.filter)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise `DataError` for a column that is not there."""
        unknown = [c for c in columns if c not in self.columns]
        if unknown:
            raise DataError(
                f"{self.path!r} has no column {', '.join(map(repr, unknown))}; it has {', '.join(self.columns)}."
            )

    def __repr__(self) -> str:
        kept = f" where {self.filter}" if self.filter else ""
        return f"Pairs({self.path!r}{kept}: {len(self):,} pairs, version {self.version})"


def is_blob(field: pa.Field) -> bool:
    """Whether a column holds Lance blobs, such as the pictures."""
    return str(getattr(field.type, "extension_name", "")) == "lance.blob.v2"


def values(column: pa.ChunkedArray) -> list[Any]:
    """Python values of a column; a vector (a fixed-size list of numbers) or a list of vectors becomes one array per row."""
    many = pa.types.is_list(column.type)
    vector = column.type.value_type if many else column.type
    if pa.types.is_fixed_size_list(vector) and pa.types.is_primitive(vector.value_type):
        array = _one_chunk(column)
        vectors = array.flatten() if many else array.drop_null()
        flat = vectors.flatten()
        if len(flat) == len(vectors) * vector.list_size and not flat.null_count:  # no null inside
            rows = flat.to_numpy(zero_copy_only=False).reshape(-1, vector.list_size)
            there = iter(np.split(rows, np.cumsum(array.drop_null().value_lengths())[:-1]) if many else rows)
            return [next(there) if valid else None for valid in array.is_valid().to_pylist()]
    return list(column.to_pylist())


def _one_chunk(column: pa.ChunkedArray) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _matching(dataset: Any, filter: str) -> Rows:
    try:
        found = dataset.scanner(columns=["_rowoffset"], filter=filter).to_table()
    except (ValueError, OSError) as e:
        reason = str(e).split(", /home/")[0].removeprefix("Invalid user input: ")
        names = ", ".join(f.name for f in dataset.schema if not is_blob(f))
        raise DataError(f"the filter {filter!r} cannot be used: {reason} Columns to filter by: {names}.") from e
    rows: Rows = np.sort(found["_rowoffset"].to_numpy().astype(np.int64))
    return rows


def _schema_note(dataset: Any, key: str) -> str:
    return str((dataset.schema.metadata or {}).get(key.encode(), b"").decode())
