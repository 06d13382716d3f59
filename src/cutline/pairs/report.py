"""What `create` left out or put right, and what `check` found: counts by reason, each with a few examples."""

import reprlib
from typing import Any

from pydantic import Field, PrivateAttr
from rich.markup import escape

from cutline.config import Config
from cutline.errors import DataError

EXAMPLES = 5
REASONS = 20
DUPLICATE = "tell the keys of files apart with --prefix-keys if each counts from zero"


def utf8(text: str) -> str:
    """`text` without what UTF-8 cannot hold: bytes of a name in another encoding, half a surrogate pair from JSON."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()


class Count(Config):
    """How often, and the first few keys."""

    n: int = 0
    examples: list[str] = Field(default_factory=list)

    def add(self, example: str) -> None:
        self.n += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


def count(counts: dict[str, Count], reason: str, example: str) -> None:
    """One more for this reason; beyond the first `REASONS` of them (some servers put a number in each) for "other"."""
    known = reason in counts or len(counts) < REASONS
    counts.setdefault(reason if known else "other reasons", Count()).add(example)


class IngestReport(Config):
    """Rows kept, samples skipped, values lost and repaired by reason; stored in the table and printed by the CLI."""

    out: str = ""
    kept: int = 0
    skipped: dict[str, Count] = Field(default_factory=dict)
    lost: dict[str, Count] = Field(default_factory=dict)  # values that do not fit their column's type
    repaired: dict[str, Count] = Field(default_factory=dict)
    seconds: float = 0.0
    _where: str = PrivateAttr("")  # the part being read, said with each example
    _muted: bool = PrivateAttr(False)  # while `create` passes over samples that an earlier start has counted

    def skip(self, reason: str, key: str) -> None:
        self._count(self.skipped, reason, key)

    def lose(self, reason: str, key: str, value: Any) -> None:
        self._count(self.lost, reason, f"{key}: {reprlib.repr(value)}")

    def repair(self, reason: str, key: str) -> None:
        self._count(self.repaired, reason, key)

    def _count(self, counts: dict[str, Count], reason: str, key: str) -> None:
        if not self._muted:
            key = utf8(key)
            counts.setdefault(reason, Count()).add(f"{key} ({self._where})" if self._where else key)

    def at(self, where: str, muted: bool) -> None:
        """Name the part that the next examples are from; `muted` counts nothing until the next call."""
        self._where, self._muted = where, muted

    @property
    def bad(self) -> int:
        return sum(c.n for c in self.skipped.values())

    def demand(self, max_bad: float, can_prefix: bool) -> None:
        """Raise `DataError` if more than the share `max_bad` of the samples was skipped, or lost the value of a column.

        can_prefix: whether there is more than one file, and --prefix-keys was not given.
        """
        seen = self.kept + self.bad
        for reason, c in self.lost.items():
            share = min(c.n / seen, 1.0)
            if share > max_bad:
                raise DataError(
                    f"{c.n:,} of {seen:,} samples ({share:.0%}) have {reason} (for example {', '.join(c.examples[:2])}); "
                    f"{max_bad:.0%} are allowed. A column has the type of the first values: put the source right, name "
                    f"first a file with such values, or allow more with --max-bad {_step(share)}."
                )
        if not self.bad or self.bad <= max_bad * seen:
            return
        raise DataError(
            f"{self.bad:,} of {seen:,} samples ({self.bad / seen:.0%}) had to be skipped, more than the {max_bad:.0%} "
            f"allowed: {self.reasons()}. Put the source right{self._hints(can_prefix)}, or allow more with "
            f"--max-bad {_step(self.bad / seen)}."
        )

    def _hints(self, can_prefix: bool) -> str:
        hints = {"no text": "keep pictures without text with --keep-textless"}
        hints |= {"duplicate key": DUPLICATE} if can_prefix else {}
        return "".join(f", {hint}" for reason, hint in hints.items() if reason in self.skipped)

    def reasons(self) -> str:
        """The reasons of the skips, most frequent first, in one line."""
        ranked = sorted(self.skipped.items(), key=lambda item: -item[1].n)
        return "; ".join(f"{reason} ({c.n:,}, for example {', '.join(c.examples[:2])})" for reason, c in ranked)

    def __rich__(self) -> Any:
        rate = f", {self.kept / self.seconds:,.0f}/s" if self.seconds else ""
        title = f"[bold]{escape(self.out)}[/bold]: {self.kept:,} pairs{rate}"
        nothing = "nothing was skipped or repaired"
        return _print(title, {"skipped": self.skipped, "lost": self.lost, "repaired": self.repaired}, nothing)


class CheckReport(Config):
    """What decoding every picture and reading every caption found. `bad` pictures cannot be used, `notes` can."""

    path: str
    pictures: int = 0
    bad: dict[str, Count] = Field(default_factory=dict)
    notes: dict[str, Count] = Field(default_factory=dict)
    captions: dict[str, Count] = Field(default_factory=dict)
    seconds: float = 0.0

    @property
    def broken(self) -> int:
        return sum(c.n for c in self.bad.values())

    def __rich__(self) -> Any:
        title = f"[bold]{escape(self.path)}[/bold]: {self.pictures:,} pictures decoded, {self.broken:,} cannot be used"
        return _print(
            title, {"cannot be used": self.bad, "note": self.notes, "text": self.captions}, "nothing else found"
        )


def _print(title: str, groups: dict[str, dict[str, Count]], nothing: str) -> Any:
    from rich.console import Group
    from rich.table import Table

    table = Table("", "reason", "count", "examples")
    table.columns[2].justify = "right"
    for what, counts in groups.items():
        for reason, c in sorted(counts.items(), key=lambda item: -item[1].n):
            table.add_row(what, escape(reason), f"{c.n:,}", escape(", ".join(c.examples)))
    return Group(title, table if table.row_count else nothing)


def _step(share: float) -> str:
    return f"{min(1.0, share + 0.01):.2f}"
