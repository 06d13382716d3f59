"""Where a column came from; stored in the column's field metadata, and read back from any version of the table."""

import datetime
from typing import Any

from pydantic import Field

from cutline.config import Config
from cutline.record import version

KEY = "cutline:provenance"  # in the field metadata
CONTENT = "cutline:content"  # beside it: the digest of the column's values
FAILED = "cutline:failed"  # and the rows that have none, counted by reason


class Provenance(Config):
    """What made a column.

    how: a verb ("create", "caption write", "score", …); model: its name and revision; prompt; sampling: its settings;
    inputs: the columns or sources it read; read: the digests of the columns' values then; code: the version of the code; time: UTC, ISO 8601; settings: the rest.
    """

    how: str = ""
    model: str = ""
    prompt: str = ""
    sampling: dict[str, Any] = Field(default_factory=dict)
    inputs: list[str] = Field(default_factory=list)
    read: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    code: str = Field(default_factory=lambda: f"cutline {version()}")
    time: str = Field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def same_work(self, other: "Provenance") -> bool:
        """Whether the two would make the same values: equal in all but the time."""
        return self.model_copy(update={"time": ""}) == other.model_copy(update={"time": ""})
