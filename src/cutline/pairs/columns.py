"""Adding a column: made piece by piece beside the table, then added to it in one commit.

A function's results are appended, call by call, to files in `<table>/_cutline/add-NAME/`, one for each `PIECE` rows.
After a kill the next start takes what is there (a torn last record is dropped, by its checksum) and goes on; the table
itself changes once, at the end, with values, digest and provenance together. Another process may add another column
meanwhile: Lance refuses the older of two commits, and the commit is made again on the newer version. Pieces do not
depend on each other, so they can also be made in any order, by several machines.
"""

import io
import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
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
from cutline.pairs.provenance import CONTENT, KEY, Provenance

if TYPE_CHECKING:
    from cutline.pairs.table import Pairs

PIECE = 65_536  # rows of one piece
TRIES = 10  # commits, when other writers are quicker
RECORD = struct.Struct("<III")  # rows, bytes, checksum; before the bytes of each record
Function = Callable[[list[dict[str, Any]]], Sequence[Any]]


class ColumnJob:
    """An unfinished column of a table.

    pairs: the table; with a filter, only rows that pass it are given to the function and the others are null.
    type: an Arrow type, its name, "blob" for values stored as Lance blobs, or None for that of the first values.
    """

    def __init__(
        self,
        pairs: "Pairs",
        name: str,
        type: "pa.DataType | str | None",
        provenance: Provenance,
        columns: Sequence[str],
    ) -> None:
        self.pairs, self.name, self.provenance, self.columns = pairs, name, provenance, list(columns)
        self.type, self.blob = type, type == "blob"
        self.kind = parse_type(type)
        self.total = int(pairs.dataset.count_rows())
        self.folder = job_folder(pairs.path, name)

    @property
    def pieces(self) -> int:
        return -(-self.total // PIECE)

    def settings(self) -> dict[str, Any]:
        """What a second start must share with the first; provenance counts but for its time."""
        return {
            "type": str(self.type), "columns": self.columns, "where": self.pairs.filter,
            "rows": record.fingerprint(table_shape(self.pairs.dataset)),
            "provenance": self.provenance.model_dump(mode="json", exclude={"time"}),
        }  # fmt: skip

    def open(self) -> None:
        """Begin, or go on with what an earlier start left. Raises `DataError` if that was another job."""
        settings = json.loads(json.dumps(self.settings()))
        if (self.folder / "job.json").exists():
            earlier = json.loads((self.folder / "job.json").read_bytes())
            differ = [k for k in settings if earlier[k] != settings[k]]
            if differ:
                raise DataError(
                    f"an unfinished column {self.name!r} of {self.pairs.path!r} was begun with other settings "
                    f"({', '.join(differ)}). Go on with the same ones, or give restart=True to drop it."
                )
            if earlier["kind"]:
                self.kind = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(earlier["kind"]))).field(0).type
        else:
            drop_job(self.pairs.path, self.name)  # what a kill in the midst of dropping another job has left
        self.folder.mkdir(parents=True, exist_ok=True)
        self._note()

    def _note(self) -> None:
        kind = self.schema.serialize().to_pybytes().hex() if self.kind is not None else ""
        record.write_atomic(self.folder / "job.json", json.dumps(self.settings() | {"kind": kind}).encode())

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([pa.field(self.name, self.kind)])

    def rows(self, piece: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """The rows of a piece that the function is given, numbered as in `pairs`."""
        start, stop = piece * PIECE, min((piece + 1) * PIECE, self.total)
        if self.pairs.rows is None:
            return np.arange(start, stop)
        first, last = np.searchsorted(self.pairs.rows, [start, stop])
        return np.arange(first, last)

    def done(self, piece: int) -> int:
        """How many of `rows(piece)` have values on disk; a torn end of the file is cut off."""
        path = self._path(piece)
        if not path.exists():
            return 0
        rows, end = 0, 0
        with open(path, "r+b") as f:
            for n, data in _records(f):
                rows, end = rows + n, end + RECORD.size + len(data)
            f.truncate(end)
        return rows

    def run(self, piece: int, function: Function, batch: int, tick: Callable[[int], Any]) -> None:
        """Make the values of a piece, `batch` rows a call, from where an earlier start stopped."""
        rows = self.rows(piece)
        done = self.done(piece)
        tick(done)
        if done == len(rows):
            return
        with open(self._path(piece), "ab") as f:
            for start in range(done, len(rows), batch):
                some = rows[start : start + batch].tolist()
                values = to_arrow(function(self.pairs.read(some, self.columns)), len(some), self.kind, self.name)
                if self.kind is None:
                    self._settle(values.type)
                data = pa.RecordBatch.from_arrays([values], schema=self.schema).serialize()
                f.write(RECORD.pack(len(some), data.size, zlib.crc32(data)) + data.to_pybytes())
                f.flush()
                tick(len(some))

    def _settle(self, kind: pa.DataType) -> None:
        """Hold the type of the first values, before any is written."""
        if pa.types.is_null(kind):
            raise DataError(
                f"the first values of the column {self.name!r} are all None, so its type is not known. Give type=."
            )
        self.kind = kind
        self._note()

    def values(self) -> Iterator[pa.Array]:
        """All values, in the order of the table; null for rows outside the filter."""
        for piece in range(self.pieces):
            with open(self._path(piece), "rb") if self._path(piece).exists() else io.BytesIO() as f:
                arrays = [pa.ipc.read_record_batch(pa.py_buffer(d), self.schema).column(0) for _, d in _records(f)]
            array = pa.concat_arrays(arrays) if arrays else pa.nulls(0, self.kind)
            start, stop = piece * PIECE, min((piece + 1) * PIECE, self.total)
            if self.pairs.rows is not None:
                within = self.pairs.rows[self.rows(piece)] - start
                places = np.full(stop - start, -1)
                places[within] = np.arange(len(within))
                array = array.take(pa.array(places, mask=places < 0))
            assert len(array) == stop - start
            yield array

    def commit(self) -> None:
        """Add the column to the newest version of the table and drop the pieces."""
        if self.kind is None:
            raise DataError(
                f"no row was given to the function of the column {self.name!r}, so its type is not known. Give type=."
            )
        commit_column(self.pairs, self.name, self.kind, self.blob, self.provenance, self.values)
        drop_job(self.pairs.path, self.name)

    def _path(self, piece: int) -> Path:
        return self.folder / f"{piece:08d}.rows"


def job_folder(table: str, name: str) -> Path:
    return side_folder(table) / f"add-{name}"


def drop_job(table: str, name: str) -> None:
    shutil.rmtree(job_folder(table, name), ignore_errors=True)


def _records(f: Any) -> Iterator[tuple[int, bytes]]:
    """(rows, bytes) of the whole records of a file, up to its end or the first torn one."""
    while len(head := f.read(RECORD.size)) == RECORD.size:
        rows, size, checksum = RECORD.unpack(head)
        data = f.read(size)
        if len(data) < size or zlib.crc32(data) != checksum:
            return
        yield rows, data


def commit_column(
    pairs: "Pairs", name: str, kind: pa.DataType, blob: bool, provenance: Provenance,
    values: Callable[[], Iterator[pa.Array]],
) -> None:  # fmt: skip
    """Add a column in one commit; `values` gives its arrays and may be called again if another writer was quicker."""
    digest = content.START
    for array in values():
        digest = content.chain(digest, array)
    field = lance.blob_field(name) if blob else pa.field(name, kind)
    field = field.with_metadata({KEY: provenance.model_dump_json(), CONTENT: digest})
    shape = table_shape(pairs.dataset)
    for _ in range(TRIES):
        dataset = lance.dataset(pairs.path)
        if name in dataset.schema.names:
            raise exists(pairs.path, name)
        if table_shape(dataset) != shape:
            raise DataError(
                f"the rows of {pairs.path!r} were changed by another program while the column {name!r} was made. "
                "Open the table again and make the column anew."
            )
        schema = pa.schema([field])
        batches = (pa.RecordBatch.from_arrays([_stored(a, blob)], schema=schema) for a in values())
        try:
            dataset.add_columns(pa.RecordBatchReader.from_batches(schema, batches))
            return
        except CommitConflictError:
            continue
    raise DataError(
        f"other writers changed {pairs.path!r} at each of {TRIES} tries to add the column {name!r}. "
        "Nothing is lost: start again when they have ended."
    )


def _stored(values: pa.Array, blob: bool) -> pa.Array:
    if not blob:
        return values
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
        vectors = [v for v in values if isinstance(v, np.ndarray) and v.ndim == 1]
        if vectors and len(vectors) == count and len({(v.dtype, v.shape) for v in vectors}) == 1:
            flat = pa.array(np.concatenate(vectors))
            array = pa.FixedSizeListArray.from_arrays(flat, len(vectors[0]))
            return array if kind in (None, array.type) else array.cast(kind)
        return pa.array([v.tolist() if isinstance(v, np.ndarray) else v for v in values], kind)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError) as e:
        wanted = f" as {kind}" if kind is not None else ""
        raise DataError(f"the values of the column {name!r} cannot be stored{wanted}: {e}. Give type=.") from e
