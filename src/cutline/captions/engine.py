"""The engine: one `Work` over the rows of a table, here or on a Ray cluster, with the same result.

Batches are rows that stand next to each other in the table; each is read and prepared while the one before is made. What
is made is written beside the table at once (`pairs.columns.ColumnJob`), so a run that is killed goes on behind its last
batch, and the columns appear in the table in one commit when all rows are there. Rows that fail become nulls with a
reason; those that may yet be made (a server was away) are tried by the next start, and only then, or when they are given
up (`accept`), are the columns added.
"""

import time
from collections.abc import Callable, Iterator
from itertools import chain
from math import sqrt
from typing import Literal

from pydantic import Field, model_validator

from cutline.captions.report import WorkReport
from cutline.captions.steps import Batch, Packed, work_through
from cutline.captions.work import Work
from cutline.config import Config
from cutline.errors import DataError
from cutline.pairs import Pairs
from cutline.pairs.adding import begun, check_new
from cutline.pairs.columns import ColumnJob
from cutline.pairs.report import count
from cutline.progress import Tick, progress

JUDGED = 100  # rows seen before the share of failed ones is judged
FIRM, QUICK = 5.0, 0.5  # seconds of work from which the rate is firm enough to tell, and where one waits for it
BURST = 0.1  # seconds: batches that come together were made together, and say nothing of the rate
LONG = 60.0  # seconds from which a run is long enough to be told what it will cost


class RunConfig(Config):
    """How a work is run.

    on: "local" or "ray" (the cluster of RAY_ADDRESS, or one started here); batch: rows a step; max_bad: share of failed
    rows at which the run stops; accept: leave null what a second start might make; workers, gpus: on Ray, how many load
    the model (None: one a GPU, or one a node) and the GPUs each holds (None: one where the cluster has any); estimate:
    make a few batches, tell what all of it costs, and stop.
    """

    on: Literal["local", "ray"] = "local"
    batch: int = Field(32, ge=1)
    max_bad: float = Field(0.1, ge=0, le=1)
    accept: bool = False
    workers: int | None = Field(None, ge=1)
    gpus: float | None = Field(None, ge=0)
    restart: bool = False
    estimate: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        if self.on == "local" and (self.workers is not None or self.gpus is not None):
            raise ValueError("workers and gpus are for on='ray' (--on ray); here one process works")
        return self


def run(
    pairs: Pairs, work: Work, name: str, config: RunConfig, show: bool = True, say: Callable[[str], None] = print
) -> tuple[Pairs, WorkReport]:
    """Do `work` to the rows of `pairs` and add its columns; returns the table with them and what was done.

    name: of the job (what `--as` says); a second start with the same name and an equal provenance goes on with it. The
    table is returned as it was where `config.estimate` stops after a few batches. Raises `DataError` for columns that
    exist, for another job under the name, and when more than `config.max_bad` of the rows fail.
    """
    pairs.check_columns(work.reads)
    if not len(pairs):
        raise DataError(f"no row of {pairs.path!r} passes the filter {pairs.filter!r}, so there is nothing to do." if pairs.filter
                        else f"{pairs.path!r} has no rows.")  # fmt: skip
    job = ColumnJob(pairs, name, dict(work.writes), work.provenance(), ["key", *work.reads])
    report = WorkReport(columns=list(work.writes), rows=len(pairs))
    if not check_new(job):
        return Pairs.open(pairs.path, pairs.filter), report
    with begun(job, config.restart):
        batches, left = _batches(job, config)
        with progress(name, len(pairs), "rows", show, done=len(pairs) - left) as tick:
            made = _local(job, work, batches) if config.on == "local" else _ray(job, work, batches, config)
            _write(job, made, report, config, left, tick, say)
        report.failed, report.again = job.failures()
        if config.estimate:
            return pairs, report
        report.demand(config.max_bad, config.accept)
        job.commit()
    return Pairs.open(pairs.path, pairs.filter), report


def _batches(job: ColumnJob, config: RunConfig) -> tuple[Iterator[Batch], int]:
    """What is still to be made, and how many rows that is.

    Where an earlier start was stopped because too many rows had failed, its failed rows are made again.
    """
    missing = [job.missing(piece) for piece in range(job.pieces)]
    failed, again = job.failures()
    stored = len(job.pairs) - sum(map(len, missing)) + again
    if stored and sum(c.n for c in failed.values()) > config.max_bad * stored:
        missing = [job.missing(piece, retry=True) for piece in range(job.pieces)]

    def cut() -> Iterator[Batch]:
        for piece, rows in enumerate(missing):
            for start in range(0, len(rows), config.batch):
                yield Batch(piece, rows[start : start + config.batch].tolist())

    return cut(), sum(map(len, missing))


def _write(
    job: ColumnJob, made: Iterator[Packed], report: WorkReport, config: RunConfig, left: int, tick: Tick,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Put what comes into the job's files, judge it, and tell once what the whole will cost."""
    begun, warm, told = time.monotonic(), (0.0, 0), False  # warm: time and rows of the first batch, which loads things
    for packed in made:
        job.append(packed.piece, packed.record)
        report.done += packed.rows
        report.tokens += packed.tokens
        report.seconds = time.monotonic() - begun
        tick(packed.rows)
        for reason in packed.failed:
            count(report.failed, reason, "")
        _judge(report, config.max_bad)
        seconds, rows = report.seconds - warm[0], report.done - warm[1]
        if not warm[1] or seconds < BURST:
            warm = (report.seconds, report.done)
        elif not told and seconds > (QUICK if config.estimate else FIRM):
            told = True
            whole = seconds / rows * left
            if config.estimate or whole > LONG:
                say(_cost(left, rows / seconds, whole, report.tokens / report.done * left))
            if config.estimate:
                return
    if config.estimate and report.done:
        say(f"all {report.done:,} rows were made in {report.seconds:,.1f} s, loading included")


def _cost(rows: int, rate: float, seconds: float, tokens: float) -> str:
    time_ = (
        f"{seconds:,.0f} s"
        if seconds < 120
        else f"{seconds / 60:,.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:,.1f} h"
    )
    more = f", {tokens:,.0f} tokens" if tokens else ""
    return f"{rows:,} rows at {rate:,.1f} rows/s: about {time_}{more}"


def _judge(report: WorkReport, max_bad: float) -> None:
    """Stop if the share of failed rows is above `max_bad` by more than chance (three standard deviations)."""
    allowed = max_bad * report.done
    if report.done >= JUDGED and report.bad > allowed + 3 * sqrt(allowed):
        reasons = "; ".join(f"{reason} ({c.n:,})" for reason, c in report.failed.items())
        raise DataError(
            f"{report.bad:,} of the first {report.done:,} rows failed, more than the {max_bad:.0%} allowed: {reasons}. "
            "What was made is kept. Put the cause right and run the same command again, which tries the failed rows once more, "
            "or allow more with --max-bad."
        )


def _local(job: ColumnJob, work: Work, batches: Iterator[Batch]) -> Iterator[Packed]:
    first = next(batches, None)
    if first is not None:  # else nothing is left, and no model need be loaded
        yield from work_through(job, work.load(), chain([first], batches))


def _ray(job: ColumnJob, work: Work, batches: Iterator[Batch], config: RunConfig) -> Iterator[Packed]:
    from cutline.captions.cluster import TASK, on_ray

    return on_ray(job, work, batches, config.workers, config.gpus, 1 if config.estimate else TASK)
