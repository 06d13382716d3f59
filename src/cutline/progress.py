"""Progress of long work: a rich bar with rate and time left on a terminal, a plain line now and then on a pipe."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between two plain lines


class Tick:
    """Call with the number of items done since the last call, and optionally a short note (a loss, say)."""

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.before, self.done, self.begun, self.printed = done, done, time.monotonic(), time.monotonic()
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self.task = self.bar.add_task(label, total=total, completed=done, rate="", note="")
            self.bar.start()

    def __call__(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        rate = (self.done - self.before) / max(now - self.begun, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, advance=n, rate=f"{rate:,.1f} {self.unit}/s", note=note)
        elif now - self.printed >= PLAIN_SECONDS:
            self.printed = now
            of = f"/{self.total:,}" if self.total else ""
            left = f", {(self.total - self.done) / rate:,.0f} s left" if self.total and rate else ""
            print(
                f"{self.label}: {self.done:,}{of} {self.unit}, {rate:,.1f}/s{left} {note}", file=sys.stderr, flush=True
            )

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self.bar is not None:
            self.bar.console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(
    label: str, total: int | None = None, unit: str = "items", show: bool = True, done: int = 0
) -> Iterator[Tick]:
    """Show progress of `total` items (None: unknown) while the body runs; `show=False` for ranks other than 0.

    done: items finished by an earlier start, which say nothing of the rate.
    """
    tick = Tick(label, total, unit, done) if show else _Silent(label, total, unit)
    try:
        yield tick
    finally:
        if tick.bar is not None:
            tick.bar.stop()


class _Silent(Tick):
    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.bar = None

    def __call__(self, n: int = 1, note: str = "") -> None:
        return None

    def say(self, line: str) -> None:
        return None
