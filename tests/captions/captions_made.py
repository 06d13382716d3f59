"""A work for testing the engine: the alt text in capitals and its length, written so that it can be counted and broken."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from cutline.captions.work import Failed, Worker, picture_of
from cutline.errors import DataError
from cutline.pairs import Provenance


@dataclass
class Capitals:
    """bad: keys without a value, for good; away: keys that a second start may make; log: a file told of every batch."""

    log: str = ""
    bad: tuple[str, ...] = ()
    away: tuple[str, ...] = ()
    die: str = ""  # the worker that meets this key dies, once
    seconds: float = 0.0
    pictures: bool = False
    writes: dict[str, str] = field(default_factory=lambda: {"loud": "string", "length": "int32"})

    @property
    def reads(self) -> list[str]:
        return ["alt", "image"] if self.pictures else ["alt"]

    def provenance(self) -> Provenance:
        return Provenance(how="capitals", inputs=["alt"])

    def load(self) -> "Shouter":
        return Shouter(self)


class Shouter(Worker):
    def __init__(self, work: Capitals) -> None:
        self.work = work

    def make(self, rows):
        if self.work.log:
            with open(self.work.log, "a") as f:
                print(len(rows), rows[0]["key"], file=f)
        time.sleep(self.work.seconds)
        self.tokens += len(rows)
        return [self._one(row) for row in rows]

    def _one(self, row):
        if row["key"] == self.work.die and not Path(self.work.log + ".died").exists():
            Path(self.work.log + ".died").touch()
            os._exit(1)
        if row["key"] == "raise":
            raise DataError("the server is gone.")
        if row["key"] in self.work.bad:
            return Failed("no text")
        if row["key"] in self.work.away:
            return Failed("timed out", again=True)
        if self.work.pictures and isinstance(picture_of(row), Failed):
            return picture_of(row)
        return {"loud": row["alt"].upper(), "length": len(row["alt"])}
