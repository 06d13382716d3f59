"""`Pairs.add_column`: one process, the pieces in order."""

import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from cutline.errors import DataError
from cutline.pairs.columns import (
    PIECE,
    ColumnJob,
    Function,
    commit_column,
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
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise DataError(f"{name!r} cannot be the name of a column: use letters, digits and _, beginning with a letter.")
    provenance = provenance or Provenance(how="add_column", inputs=list(columns) if callable(values) else [])
    newest = Pairs.open(pairs.path, pairs.filter)
    if name in newest.columns:
        found = newest.provenance(name)
        if callable(values) and job_folder(pairs.path, name).exists() and found and found.same_work(provenance):
            drop_job(pairs.path, name)  # an earlier start was killed after its commit: the column is whole
            return newest
        raise exists(pairs.path, name)
    if callable(values):
        _made(ColumnJob(pairs, name, type, provenance, columns), values, batch, restart, show)
    else:
        _given(pairs, name, values, type, provenance)
    return Pairs.open(pairs.path, pairs.filter)


def _given(pairs: Pairs, name: str, values: Any, type: "pa.DataType | str | None", provenance: Provenance) -> None:
    if pairs.filter is not None:
        raise DataError(
            f"values for {name!r} must cover the whole table: open it without a filter, or give a function."
        )
    array = to_arrow(values, len(pairs), parse_type(type), name)
    if pa.types.is_null(array.type):
        raise DataError(f"all values of the column {name!r} are None, so its type is not known. Give type=.")
    pieces = [array.slice(start, PIECE) for start in range(0, len(array), PIECE)]
    commit_column(pairs, name, array.type, type == "blob", provenance, lambda: iter(pieces))


def _made(job: ColumnJob, function: Function, batch: int, restart: bool, show: bool) -> None:
    path = job.pairs.path
    if "://" in path:
        raise DataError(
            f"{path!r} is remote, and results are kept beside the table as they come: copy it to a local disk."
        )
    with locked(path, f"add-{job.name}"):
        if restart:
            drop_job(path, job.name)
        job.open()
        with progress(f"column {job.name}", len(job.pairs), "rows", show) as tick:
            for piece in range(job.pieces):
                job.run(piece, function, batch, tick)
        job.commit()
