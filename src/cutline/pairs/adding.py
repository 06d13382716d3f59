"""`Pairs.add_column`: one process, the pieces in order."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import lance
import pyarrow as pa

from cutline.errors import DataError
from cutline.pairs import columns as rooms
from cutline.pairs.columns import (
    ColumnJob,
    Function,
    commit_columns,
    drop_job,
    exists,
    job_folder,
    parse_type,
    to_arrow,
)
from cutline.pairs.journal import locked
from cutline.pairs.provenance import Provenance
from cutline.pairs.table import Pairs
from cutline.progress import progress


def add_column(
    pairs: Pairs, name: str, values: "Sequence[Any] | pa.Array | Function", columns: Sequence[str],
    type: "pa.DataType | str | None", provenance: Provenance | None, batch: int, restart: bool, show: bool,
) -> Pairs:  # fmt: skip
    """See `Pairs.add_column`."""
    provenance = provenance or Provenance(how="add_column", inputs=list(columns) if callable(values) else [])
    job = ColumnJob(pairs, name, {name: type}, provenance, columns)
    if not callable(values):
        if check_new(job, again=False):
            _given(pairs, name, values, type, provenance)
    elif check_new(job):
        _made(job, values, batch, restart, show)
    return Pairs.open(pairs.path, pairs.filter)


def check_new(job: ColumnJob, again: bool = True) -> bool:
    """Whether the job's columns are still to be made; raises `DataError` for names that are taken or no names.

    again: a job that was killed after its commit counts as done, and is tidied up.
    """
    newest = Pairs.open(job.pairs.path)
    for name in job.kinds:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise DataError(
                f"{name!r} cannot be the name of a column: use letters, digits and _, beginning with a letter."
            )
        if name in newest.columns:
            found = newest.provenance(name)
            if again and job_folder(job.pairs.path, job.name).exists() and found and found.same_work(job.provenance):
                drop_job(job.pairs.path, job.name)
                return False
            raise exists(job.pairs.path, name)
    return True


def _given(pairs: Pairs, name: str, values: Any, type: "pa.DataType | str | None", provenance: Provenance) -> None:
    if pairs.filter is not None:
        raise DataError(
            f"values for {name!r} must cover the whole table: open it without a filter, or give a function."
        )
    array = to_arrow(values, len(pairs), parse_type(type), name)
    if pa.types.is_null(array.type):
        raise DataError(f"all values of the column {name!r} are None, so its type is not known. Give type=.")
    pieces = [{name: array.slice(start, rooms.PIECE)} for start in range(0, len(array), rooms.PIECE)]
    field = lance.blob_field(name) if type == "blob" else pa.field(name, array.type)
    commit_columns(pairs, {name: field}, provenance, lambda: iter(pieces))


def _made(job: ColumnJob, function: Function, batch: int, restart: bool, show: bool) -> None:
    with begun(job, restart), progress(f"column {job.name}", len(job.pairs), "rows", show) as tick:
        for piece in range(job.pieces):
            rows = job.missing(piece)
            tick(len(job.rows(piece)) - len(rows))
            for start in range(0, len(rows), batch):
                some = rows[start : start + batch].tolist()
                values = function(job.pairs.read(some, job.reads))
                job.append(piece, job.pack(some, {job.name: values}, [None] * len(some)))
                tick(len(some))
        job.commit()


@contextlib.contextmanager
def begun(job: ColumnJob, restart: bool) -> Iterator[None]:
    """Hold a job's lock, and open it anew or where an earlier start left it."""
    path = job.pairs.path
    if "://" in path:
        raise DataError(
            f"{path!r} is remote, and results are kept beside the table as they come: copy it to a local disk."
        )
    with locked(path, f"add-{job.name}"):
        if restart:
            drop_job(path, job.name)
        job.open()
        yield
