"""The contract between what is done to rows (writers, fusers, scores, reinforcement) and the engine that runs it.

A `Work` is small and can be pickled: it says which columns it reads and which it adds, and loads models when told to,
once in each process. What it loads is a `Worker`, which takes batches of rows. A row that gives no value is a `Failed`
with its reason: the column is null there, and the reason is counted and reported.

What a worker makes of a row may depend on that row and on the batch it is in, and on nothing else (seed what is drawn
with the rows' keys): then a run that was killed, or that ran on a cluster, gives the same columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
from PIL import Image

from cutline.pairs import Provenance
from cutline.pairs.decode import BadPicture, decode

Row = dict[str, Any]  # "key", and the columns that the work reads, as `Pairs.read` gives them


@dataclass(frozen=True)
class Failed:
    """A row without a value. again: a second start of the same work may do better (a server that was away)."""

    reason: str
    again: bool = False


Made = Sequence[Mapping[str, Any] | Failed]  # one for each row: new column → value, or why there is none


class Worker:
    """A work that is loaded. tokens: generated (or, by a server, used) so far, for the estimate of the cost."""

    tokens: int = 0

    def prepare(self, rows: list[Row]) -> Any:
        """What needs no model (decoding, tokenising): called in another thread while `make` is at the batch before."""
        return rows

    def make(self, prepared: Any) -> Made:
        """What the model makes of a batch."""
        raise NotImplementedError(type(self).__name__)


class Work(Protocol):
    """reads: columns it needs; writes: new column → Arrow type (or its name, as in `Pairs.add_column`)."""

    @property
    def reads(self) -> list[str]: ...
    @property
    def writes(self) -> Mapping[str, "pa.DataType | str"]: ...
    def provenance(self) -> Provenance:
        """Of the new columns; equal for equal work, so a killed run knows that it goes on with its own."""

    def load(self) -> Worker:
        """Load models. Called once in every process that works."""


def picture_of(row: Row) -> Image.Image | Failed:
    """The upright RGB picture of a row that was read with "image"."""
    data = row["image"]
    if data is None:
        return Failed(f"picture cannot be read: {str(row.get('error', 'none stored')).rpartition(': ')[2]}")
    try:
        return Image.fromarray(decode(data) if isinstance(data, bytes) else data)
    except BadPicture as e:
        return Failed(f"picture: {e.reason}")


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type has a list in each row."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def texts_in(value: str | list[str | None] | None) -> list[str]:
    """The texts of a row in a column of text or of lists."""
    return [t for t in ([value] if isinstance(value, str) else value or []) if t]
