"""What a run of a work has done: rows made, rows that failed by reason, rate and tokens."""

from typing import Any

from pydantic import Field

from cutline.config import Config
from cutline.errors import DataError
from cutline.pairs.report import Count


class WorkReport(Config):
    """rows: that the work was for; done: by this start; failed: reason → count and keys, of all starts; again: how many
    of those a second start may still make; tokens: generated or, by a server, used."""

    columns: list[str]
    rows: int
    done: int = 0
    failed: dict[str, Count] = Field(default_factory=dict)
    again: int = 0
    seconds: float = 0.0
    tokens: int = 0

    @property
    def bad(self) -> int:
        return sum(c.n for c in self.failed.values())

    def reasons(self) -> str:
        ranked = sorted(self.failed.items(), key=lambda item: -item[1].n)
        return "; ".join(f"{reason} ({c.n:,}, for example {', '.join(c.examples[:2])})" for reason, c in ranked)

    def demand(self, max_bad: float, accept: bool) -> None:
        """Raise `DataError` if too many rows failed, or some may be made by a second start and are not given up."""
        if self.bad > max_bad * self.rows:
            raise DataError(
                f"{self.bad:,} of {self.rows:,} rows failed, more than the {max_bad:.0%} allowed: {self.reasons()}. What "
                "was made is kept and nothing was added to the table. Put the cause right and run the same command again, "
                f"or allow more with --max-bad {min(1.0, self.bad / self.rows + 0.01):.2f}."
            )
        if self.again and not accept:
            raise DataError(
                f"{self.again:,} of {self.rows:,} rows are still to be made: {self.reasons()}. The others are kept, and "
                "nothing was added to the table yet. Run the same command again to try these rows once more, or with "
                "--accept-failed to leave them null."
            )

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        rate = f", {self.done / self.seconds:,.1f} rows/s" if self.seconds and self.done else ""
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        title = f"[bold]{', '.join(self.columns)}[/bold]: {self.rows - self.bad:,} of {self.rows:,} rows{rate}{tokens}"
        if not self.failed:
            return title
        table = Table("no value because", "count", "examples")
        for reason, c in sorted(self.failed.items(), key=lambda item: -item[1].n):
            table.add_row(escape(reason), f"{c.n:,}", escape(", ".join(c.examples)))
        return Group(title, table)
