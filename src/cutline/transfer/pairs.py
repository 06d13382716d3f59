"""A table of pairs with a column that holds each picture's class: text or whole numbers.

`split=COLUMN` names a column that says train, val (or validation) and test; rows with anything else in it are left out.
Without it a tenth of the rows, or the share `val=`, is held out by their keys; for "zeroshot", which trains nothing, all
rows are one part, "all". A row without a class is skipped.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from cutline.errors import DataError
from cutline.pairs import Pairs
from cutline.transfer.classes import PARTS, Pictures, class_data, scored_parts, spec_options, val_share
from cutline.transfer.data import DenseData, Skip, Task

HELD_OUT = 0.1
ALSO = {"validation": "val"}  # as Hugging Face calls it


def open(rest: str, task: Task) -> DenseData:
    """Open `pairs:TABLE.lance,label=COLUMN[,split=COLUMN][,val=0.1]`."""
    path, options = spec_options("pairs", rest, {"label": "COLUMN", "split": "COLUMN", "val": "0.1"})
    spec, table = f"pairs:{rest}", Pairs.open(path)
    if "label" not in options:
        raise DataError(f"{spec}: say which column has the classes with label=COLUMN; there are {_list(table)}.")
    label, split, share = options["label"], options.get("split"), val_share(spec, options)
    columns = ["key", label, *([split] if split else [])]
    values = table.take(np.arange(len(table)), columns)
    labels = _labels(values[label], label, table)
    if task == "zeroshot" and share is not None:
        raise DataError(f"{spec}: nothing is trained here, so nothing is held out: leave val= out.")
    if split is None:
        share = None if task == "zeroshot" else share or HELD_OUT
        of = ["train"] * len(table)
    else:
        of = [ALSO.get(str(v), str(v)) for v in values[split].to_pylist()]
    rows = {name: [i for i, part in enumerate(of) if part == name] for name in PARTS}
    if not (any(rows.values()) if task == "zeroshot" else rows["train"]):
        have = ", ".join(map(repr, sorted(set(of))[:5]))
        raise DataError(f"{spec}: no row is of train; {split!r} holds {have}, and should hold train, val and test.")
    trained = set() if task == "zeroshot" else {labels[i] for i in rows["train"]} - {None}
    kept = sorted(
        set(labels) - {None}, key=lambda v: (v not in trained, v)
    )  # the trained first, should more be refused
    whole = _pictures(table, values["key"].to_pylist(), labels, label, kept)
    wanted = scored_parts([name for name, found in rows.items() if found], task)
    parts = {name: whole.take(rows[name]) for name in wanted}
    if task == "zeroshot" and split is None:
        parts = {"all": whole}
    notes = {"label": label, **({"split": split} if split else {})}
    return class_data(spec, task, parts, [str(v) for v in kept], share, notes)


def _list(table: Pairs) -> str:
    return ", ".join(table.columns)


def _labels(column: "pa.ChunkedArray", name: str, table: Pairs) -> list[Any]:
    """Text stripped, whole numbers as they are, None for nothing. Raises `DataError` for a column of other things."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not text and not pa.types.is_integer(kind) and not pa.types.is_boolean(kind):
        raise DataError(
            f"the column {name!r} of {table.path!r} holds {kind}; a class is text or a whole number. "
            f"The columns are {_list(table)}."
        )
    return [(v.strip() or None) if isinstance(v, str) else v for v in column.to_pylist()]


def _pictures(table: Pairs, keys: list[str], labels: list[Any], name: str, classes: list[Any]) -> Pictures:
    index = {value: i for i, value in enumerate(classes)}
    ids = np.array([index.get(v, -1) for v in labels], np.int64)
    problems = {
        i: Skip("no class", f"{keys[i]} has nothing in the column {name!r}.") for i, v in enumerate(labels) if v is None
    }

    def read(row: int) -> bytes:
        found = table.read([row], ["image"])[0]
        if found["image"] is None:
            raise Skip("picture unreadable", f"{keys[row]}: {found.get('error', 'there is none')}")
        data: bytes = found["image"]
        return data

    return Pictures(keys, ids, read, [table.fingerprint_of(["image"])] * len(keys), problems)
