"""One batch after the other: read, prepare, make, pack. The same on this machine and in every actor of a cluster."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from cutline.captions.work import Failed, Worker
from cutline.pairs.columns import ColumnJob


class Batch(NamedTuple):
    """Rows of one step, numbered as in the table that is worked on, and the piece of the job they belong to."""

    piece: int
    rows: list[int]


class Packed(NamedTuple):
    """What came of a batch: the record for the job's file, and what is counted of it."""

    piece: int
    record: bytes
    rows: int
    failed: list[str]
    tokens: int


def pack(job: ColumnJob, worker: Worker, batch: Batch, prepared: Any) -> Packed:
    """Make a prepared batch, and its record."""
    before = worker.tokens
    made = worker.make(prepared)
    assert len(made) == len(batch.rows), f"{len(made)} results for {len(batch.rows)} rows"
    failed = [(m.reason, m.again) if isinstance(m, Failed) else None for m in made]
    values = {c: [None if isinstance(m, Failed) else m[c] for m in made] for c in job.kinds}
    record = job.pack(batch.rows, values, failed)
    return Packed(batch.piece, record, len(made), [f[0] for f in failed if f], worker.tokens - before)


def work_through(job: ColumnJob, worker: Worker, batches: Iterable[Batch]) -> Iterator[Packed]:
    """Make batches one after the other; the next one is read and prepared by another thread meanwhile."""

    def ahead(batch: Batch) -> tuple[Batch, Any]:
        return batch, worker.prepare(job.pairs.read(batch.rows, job.reads))

    with ThreadPoolExecutor(1, "prepare") as pool:
        coming: deque[Future[tuple[Batch, Any]]] = deque()
        for batch in batches:
            coming.append(pool.submit(ahead, batch))
            if len(coming) > 1:
                yield pack(job, worker, *coming.popleft().result())
        while coming:
            yield pack(job, worker, *coming.popleft().result())
