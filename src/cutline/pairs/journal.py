"""What makes long writes to a table survive a kill: one writer at a time, and a note of how far it has come.

The note lies in `<table>/_cutline/`, a folder that Lance does not look at, and is replaced atomically *before* each
commit with the state before (`now`) and after it (`next`); the rows in the table say which of the two is true.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cutline.errors import DataError
from cutline.record import write_atomic


def side_folder(table: str | Path) -> Path:
    return Path(table) / "_cutline"


@contextlib.contextmanager
def locked(table: str | Path, name: str) -> Iterator[None]:
    """Hold the lock `name` of a table; raises `DataError` if another process has it. It ends with the process."""
    folder = side_folder(table)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise DataError(
                f"another process is at work on {str(table)!r} ({name}). Wait until it has ended, or stop it."
            ) from e
        yield


class Journal:
    """The note of an unfinished `create`."""

    def __init__(self, table: str | Path) -> None:
        self.path = side_folder(table) / "create.json"

    def read(self) -> dict[str, Any] | None:
        try:
            note = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        assert isinstance(note, dict)
        return note

    def write(self, **note: Any) -> None:
        write_atomic(self.path, json.dumps(note).encode())

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: columns that others are making
            self.path.parent.rmdir()
