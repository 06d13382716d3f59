"""Adding columns: made batch by batch beside the table, then added to it in one commit.

Results are appended, batch by batch, to files in `<table>/_cutline/add-NAME/`, one for each `PIECE` rows. A record of such
a file names its rows, so batches may come in any order (from several machines), and a row that was made again counts as
the last record has it. After a kill the next start takes what is there (a torn last record is dropped, by its checksum)
and goes on; the table itself changes once, at the end, with values, digests and provenance together. Another process may
add other columns meanwhile: Lance refuses the older of two commits, and the commit is made again on the newer version.
"""

import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lance
import numpy as np
import pyarrow as pa
from lance.blob import BlobType
from lance.commit import CommitConflictError

from cutline import record
from cutline.errors import DataError
from cutline.pairs import content
from cutline.pairs.ingest import table_shape
from cutline.pairs.journal import side_folder
from cutline.pairs.provenance import CONTENT, FAILED, KEY, Provenance
from cutline.pairs.report import EXAMPLES, Count, count

if TYPE_CHECKING:
    from cutline.pairs.table import Pairs

PIECE = 65_536  # rows of one file
HELD = 2**28  # bytes of a piece that are in memory at a time when columns are committed
TRIES = 10  # commits, when other writers are quicker
RECORD = struct.Struct("<II")  # bytes, checksum; before the bytes of each record
Function = Callable[[list[dict[str, Any]]], Sequence[Any]]
Offsets = np.ndarray[tuple[int], np.dtype[np.int64]]
# In each record beside the values: the row's place in the Lance table; why it has no value; whether to try it again.
BESIDE = [pa.field("_row", pa.int64()), pa.field("_failed", pa.string()), pa.field("_again", pa.bool_())]


class ColumnJob:
    """Unfinished columns of a table.

    pairs: the table; with a filter, only rows that pass it are made and the others are null. name: of the job. kinds:
    column → an Arrow type, its name, "blob" for values stored as Lance blobs, or None for that of the first values.
    reads: the columns the values are made of.
    """

    def __init__(
        self,
        pairs: "Pairs",
        name: str,
        kinds: "Mapping[str, pa.DataType | str | None]",
        provenance: Provenance,
        reads: Sequence[str],
    ) -> None:
        self.pairs, self.name, self.reads = pairs, name, list(reads)
        self.provenance = having_read(pairs, provenance, reads)
        self.given = {column: str(kind) for column, kind in kinds.items()}
        self.blobs = {column for column, kind in kinds.items() if isinstance(kind, str) and kind == "blob"}
        self.kinds = {column: parse_type(kind) for column, kind in kinds.items()}
        self.total = int(pairs.dataset.count_rows())
        self.folder = job_folder(pairs.path, name)

    @property
    def pieces(self) -> int:
        return -(-self.total // PIECE)

    def settings(self) -> dict[str, Any]:
        """What a second start must share with the first; provenance counts but for its time."""
        return {
            "types": self.given, "columns": self.reads, "where": self.pairs.filter,
            "rows": record.fingerprint(table_shape(self.pairs.dataset)),
            "provenance": self.provenance.model_dump(mode="json", exclude={"time"}),
        }  # fmt: skip

    def open(self) -> None:
        """Begin, or go on with what an earlier start left. Raises `DataError` if that was another job."""
        settings = json.loads(json.dumps(self.settings()))
        if (self.folder / "job.json").exists():
            earlier = json.loads((self.folder / "job.json").read_bytes())
            then, now = ({**s, **s.get("provenance", {})} for s in (earlier, settings))
            was = then.pop("read", {})
            differ = [f"{c!r} has been written anew" for c, digest in now.pop("read").items() if was.get(c) != digest]
            differ += [
                f"{k}: {then.get(k)!r} then, {v!r} now"
                for k, v in now.items()
                if k != "provenance" and then.get(k) != v
            ]
            if differ:
                raise DataError(
                    f"an unfinished column {self.name!r} of {self.pairs.path!r} was begun with other settings "
                    f"({'; '.join(differ)}). Go on with the same ones, or give restart=True (--restart) to drop it."
                )
            settled = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(earlier["kinds"])))
            self.kinds |= {field.name: field.type for field in settled}
        else:
            drop_job(self.pairs.path, self.name)  # what a kill in the midst of dropping another job has left
        self.folder.mkdir(parents=True, exist_ok=True)
        self._note()

    def _note(self) -> None:
        known = pa.schema([pa.field(c, k) for c, k in self.kinds.items() if k is not None])
        note = self.settings() | {"kinds": known.serialize().to_pybytes().hex()}
        record.write_atomic(self.folder / "job.json", json.dumps(note).encode())

    @property
    def schema(self) -> pa.Schema:
        """Of the records."""
        return pa.schema([*BESIDE, *(pa.field(c, k) for c, k in self.kinds.items())])

    def rows(self, piece: int) -> Offsets:
        """The rows of a piece that are to be made, numbered as in `pairs`."""
        start, stop = self._span(piece)
        if self.pairs.rows is None:
            return np.arange(start, stop)
        first, last = np.searchsorted(self.pairs.rows, [start, stop])
        return np.arange(first, last)

    def missing(self, piece: int, retry: bool = False) -> Offsets:
        """Those of `rows(piece)` that have no record yet, or one that is to be tried again (retry: all that failed);
        cuts off a torn record."""
        rows = self.rows(piece)
        if not self._path(piece).exists():
            return rows
        done = np.zeros(PIECE, np.bool_)
        with open(self._path(piece), "r+b") as f:
            end = 0
            for at, batch in self._records(f):
                end = at
                places = batch["_row"].to_numpy() - piece * PIECE
                done[places] = ~(batch["_failed"].is_valid() if retry else batch["_again"]).to_numpy(
                    zero_copy_only=False
                )
            f.truncate(end)
        return rows[~done[self.pairs._index(rows) - piece * PIECE]]

    def pack(self, rows: Sequence[int], values: Mapping[str, Any], failed: Sequence[tuple[str, bool] | None]) -> bytes:
        """A record: values of some rows (as numbered in `pairs`), and for each None or (why it has none, again?)."""
        arrays = {c: to_arrow(values[c], len(rows), kind, c) for c, kind in self.kinds.items()}
        if None in self.kinds.values():
            self._settle(arrays)
        beside = [
            pa.array(self.pairs._index(rows)),
            pa.array([f and f[0] for f in failed], pa.string()),
            pa.array([bool(f and f[1]) for f in failed]),
        ]
        data = pa.RecordBatch.from_arrays([*beside, *arrays.values()], schema=self.schema).serialize()
        return RECORD.pack(data.size, zlib.crc32(data)) + bytes(data)

    def append(self, piece: int, packed: bytes) -> None:
        """Put a record into the file of its piece."""
        with open(self._path(piece), "ab") as f:
            f.write(packed)

    def _settle(self, arrays: Mapping[str, pa.Array]) -> None:
        """Hold the types of the first values, before any is written."""
        for column, array in arrays.items():
            if pa.types.is_null(array.type):
                raise DataError(
                    f"the first values of the column {column!r} are all None, so its type is not known. Give type=."
                )
            self.kinds[column] = array.type
        self._note()

    def failures(self) -> tuple[dict[str, Count], int]:
        """Rows without a value by reason, with keys as examples; and how many of them may be tried again."""
        reasons: dict[str, Count] = {}
        again = 0
        for piece in range(self.pieces):
            last: dict[int, tuple[str, bool]] = {}
            for _, batch in self._stored(piece):
                rows = batch["_row"].to_pylist()
                for row, why, more in zip(rows, batch["_failed"].to_pylist(), batch["_again"].to_pylist()):
                    if why is not None:
                        last[row] = (why, more)
                    elif last:
                        last.pop(row, None)
            for row, (why, more) in sorted(last.items()):
                full = why in reasons and len(reasons[why].examples) == EXAMPLES
                count(reasons, why, "" if full else self._key(row))
                again += more
        return reasons, again

    def _key(self, offset: int) -> str:
        return str(self.pairs.dataset.take([offset], columns=["key"])["key"][0])

    def values(self) -> Iterator[dict[str, pa.Array]]:
        """All values by column, in the order of the table; null for rows outside the filter and for failed ones.

        In spans of a piece, or of less where a piece does not fit into `HELD` bytes.
        """
        for piece in range(self.pieces):
            start, stop = self._span(piece)
            ends, count = [0], 0
            where = np.full((2, stop - start), -1)  # which record has a row's value, and at which place
            for end, batch in self._stored(piece):
                places = batch["_row"].to_numpy() - start
                where[0, places], where[1, places] = len(ends) - 1, np.arange(len(places))
                ends.append(end)
                count += len(places)
            step = max(256, int((stop - start) * min(1.0, HELD / max(ends[-1], 1))))
            for first in range(0, stop - start, step):
                yield self._between(piece, ends, where[:, first : first + step])

    def _between(self, piece: int, ends: list[int], where: np.ndarray[Any, Any]) -> dict[str, pa.Array]:
        needed = np.unique(where[0][where[0] >= 0])
        batches = []
        if len(needed):
            with open(self._path(piece), "rb") as f:
                for i in needed.tolist():
                    f.seek(ends[i])
                    batches.append(next(self._records(f))[1])
        starts = np.cumsum([0, *(len(b) for b in batches)])
        places = starts[np.searchsorted(needed, where[0])] + where[1] if len(needed) else where[1]
        index = pa.array(places, mask=where[0] < 0)
        table = pa.Table.from_batches(batches, self.schema)
        return {c: _one(table[c]).take(index) if batches else pa.nulls(len(index), k) for c, k in self.kinds.items()}

    def commit(self) -> None:
        """Add the columns to the newest version of the table and drop the pieces."""
        unknown = [c for c, kind in self.kinds.items() if kind is None]
        if unknown:
            raise DataError(
                f"no row was given to the function of the column {unknown[0]!r}, so its type is not known. Give type=."
            )
        reasons, _ = self.failures()
        fields = {c: lance.blob_field(c) if c in self.blobs else pa.field(c, k) for c, k in self.kinds.items()}
        commit_columns(self.pairs, fields, self.provenance, self.values, reasons)
        drop_job(self.pairs.path, self.name)

    def _span(self, piece: int) -> tuple[int, int]:
        return piece * PIECE, min((piece + 1) * PIECE, self.total)

    def _path(self, piece: int) -> Path:
        return self.folder / f"{piece:08d}.rows"

    def _stored(self, piece: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        if self._path(piece).exists():
            with open(self._path(piece), "rb") as f:
                yield from self._records(f)

    def _records(self, f: Any) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(where it ends, values) of the whole records of a file, up to its end or the first torn one."""
        while len(head := f.read(RECORD.size)) == RECORD.size:
            size, checksum = RECORD.unpack(head)
            data = f.read(size)
            if len(data) < size or zlib.crc32(data) != checksum:
                return
            yield f.tell(), pa.ipc.read_record_batch(pa.py_buffer(data), self.schema)


def having_read(pairs: "Pairs", provenance: Provenance, columns: Sequence[str]) -> Provenance:
    """The provenance of what is made from these columns as they are now."""
    return provenance.model_copy(update={"read": {c: digest for c in columns if (digest := pairs.digest(c))}})


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def job_folder(table: str, name: str) -> Path:
    return side_folder(table) / f"add-{name}"


def drop_job(table: str, name: str) -> None:
    shutil.rmtree(job_folder(table, name), ignore_errors=True)


def commit_columns(
    pairs: "Pairs", fields: Mapping[str, pa.Field], provenance: Provenance,
    values: Callable[[], Iterator[Mapping[str, pa.Array]]], failed: Mapping[str, Count] | None = None,
) -> None:  # fmt: skip
    """Add columns in one commit; `values` gives their arrays and may be called again if another writer was quicker."""
    digests = dict.fromkeys(fields, content.START)
    for arrays in values():
        digests = {c: content.chain(digest, arrays[c]) for c, digest in digests.items()}
    notes = {KEY: provenance.model_dump_json()}
    if failed:
        notes[FAILED] = json.dumps({reason: count.model_dump() for reason, count in failed.items()})
    schema = pa.schema([f.with_metadata(notes | {CONTENT: digests[c]}) for c, f in fields.items()])
    shape = table_shape(pairs.dataset)
    for _ in range(TRIES):
        dataset = lance.dataset(pairs.path)
        for name in fields:
            if name in dataset.schema.names:
                raise exists(pairs.path, name)
        if table_shape(dataset) != shape:
            raise DataError(
                f"the rows of {pairs.path!r} were changed by another program while the column {next(iter(fields))!r} "
                "was made. Open the table again and make the column anew."
            )
        batches = (
            pa.RecordBatch.from_arrays(
                [_blobs(arrays[f.name]) if _is_blob(f) else arrays[f.name] for f in schema], schema=schema
            )
            for arrays in values()
        )
        try:
            dataset.add_columns(pa.RecordBatchReader.from_batches(schema, batches))
            return
        except CommitConflictError:
            continue
    raise DataError(
        f"other writers changed {pairs.path!r} at each of {TRIES} tries to add the column {next(iter(fields))!r}. "
        "Nothing is lost: start again when they have ended."
    )


def _is_blob(field: pa.Field) -> bool:
    return isinstance(field.type, BlobType)


def _blobs(values: pa.Array) -> pa.Array:
    nothing = [pa.nulls(len(values), t) for t in (pa.string(), pa.uint64(), pa.uint64())]
    names = ["data", "uri", "position", "size"]
    storage = pa.StructArray.from_arrays([values, *nothing], names=names, mask=values.is_null())
    return pa.ExtensionArray.from_storage(BlobType(), storage)


def exists(path: str, name: str) -> DataError:
    return DataError(
        f"{path!r} has a column {name!r} already. Choose another name, or drop it first with "
        f"Pairs.open({path!r}).drop({name!r}); older versions of the table keep it."
    )


def parse_type(type: "pa.DataType | str | None") -> pa.DataType | None:
    """`string`, `float32`, `list<string>`, `float16[512]` (a vector), … → an Arrow type; "blob" → large_binary."""
    if type is None or isinstance(type, pa.DataType):
        return type
    if type == "blob":
        return pa.large_binary()
    if inner := re.fullmatch(r"list<(.+)>", type):
        return pa.list_(parse_type(inner[1]))
    if vector := re.fullmatch(r"(\w+)\[(\d+)\]", type):
        return pa.list_(parse_type(vector[1]), int(vector[2]))
    try:
        return pa.type_for_alias(type)
    except ValueError as e:
        raise DataError(
            f"no column type is called {type!r}. Use string, list<string>, bool, int64, float32, "
            "a vector as float16[512], blob, or an Arrow type."
        ) from e


def to_arrow(values: Any, count: int, kind: pa.DataType | None, name: str) -> pa.Array:
    """Values as an Arrow array of type `kind` (None: of their own). Arrays of one shape become fixed-size lists."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not isinstance(values, pa.Array):
        values = list(values)
    if len(values) != count:
        raise DataError(
            f"{len(values):,} values were given for the column {name!r} where {count:,} rows want one each."
        )
    try:
        if isinstance(values, pa.Array):
            return values if kind in (None, values.type) else values.cast(kind)
        missing = np.array([v is None for v in values])
        vectors = [v for v in values if isinstance(v, np.ndarray) and v.ndim == 1]
        if vectors and len(vectors) + missing.sum() == count and len({(v.dtype, v.shape) for v in vectors}) == 1:
            nothing = np.zeros_like(vectors[0])
            flat = pa.array(np.concatenate([nothing if v is None else v for v in values]))
            mask = pa.array(missing) if missing.any() else None
            array = pa.FixedSizeListArray.from_arrays(flat, len(nothing), mask=mask)
            return array if kind in (None, array.type) else array.cast(kind)
        if (width := _vector_width(kind)) and all(
            v is None or (isinstance(v, np.ndarray) and v.shape[1:] == (width,)) for v in values
        ):
            return _lists_of_vectors(values, kind, width)
        return pa.array([v.tolist() if isinstance(v, np.ndarray) else v for v in values], kind)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError) as e:
        wanted = f" as {kind}" if kind is not None else ""
        raise DataError(f"the values of the column {name!r} cannot be stored{wanted}: {e}. Give type=.") from e


def _vector_width(kind: pa.DataType | None) -> int:
    """Of the vectors in a column of lists of them; 0 for any other column."""
    if kind is None or not pa.types.is_list(kind) or not pa.types.is_fixed_size_list(kind.value_type):
        return 0
    return int(kind.value_type.list_size) if pa.types.is_primitive(kind.value_type.value_type) else 0


def _lists_of_vectors(values: list[Any], kind: pa.DataType, width: int) -> pa.Array:
    """Arrays (n, width) or None → a column of lists of vectors, without a Python object for each number."""
    missing = np.array([v is None for v in values])
    ends = np.cumsum([0, *(0 if v is None else len(v) for v in values)])
    flat = [np.asarray(v).reshape(-1) for v in values if v is not None]
    numbers = pa.array(np.concatenate(flat) if flat else np.empty(0, np.float16)).cast(kind.value_type.value_type)
    offsets = pa.array(ends, pa.int32(), mask=np.append(missing, False))
    return pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(numbers, width)).cast(kind)
