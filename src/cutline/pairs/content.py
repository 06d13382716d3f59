"""Digests of a column's values, so that a table's fingerprint changes when its data change and not when it moves.

A digest is a chain over the batches a column was written in: `chain(previous, digest(values))`. It does not depend on
how Arrow slices, pads or offsets its buffers. A picture kept in place counts by its length and its last bytes
(`TAIL` of them: compressed data or a checksum, which any edit changes), because reading it whole would undo the
indexing without a copy.
"""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

TAIL = 32
START = "0" * 32


def chain(previous: str, values: "pa.Array") -> str:
    """The digest after `values` (any Arrow array without extension types) have followed `previous`."""
    h = hashlib.sha256(previous.encode())
    _feed(h, values)
    return h.hexdigest()[:32]


def _feed(h: Any, values: "pa.Array") -> None:
    t = values.type
    h.update(f"{t}:{len(values)}:{values.null_count};".encode())
    if pa.types.is_null(t):
        return
    if values.null_count:
        h.update(np.packbits(np.asarray(values.is_null())).tobytes())
        values = values.drop_null()
    if pa.types.is_dictionary(t):
        _feed(h, values.dictionary_decode())
    elif pa.types.is_struct(t):
        for child in values.flatten():
            _feed(h, child)
    elif pa.types.is_fixed_size_list(t):
        _feed(h, values.flatten())
    elif pa.types.is_list(t) or pa.types.is_large_list(t):
        h.update(np.diff(np.asarray(values.offsets)).astype("<i8").tobytes())
        _feed(h, values.flatten())
    elif pa.types.is_boolean(t):
        h.update(np.packbits(np.asarray(values)).tobytes())
    elif (width := _width(t)) is not None:
        _, data = values.buffers()
        at = values.offset * width
        h.update(memoryview(data)[at : at + len(values) * width] if data is not None else b"")
    else:  # strings and bytes of any width
        plain = values.cast(pa.large_binary())
        _, offsets, data = plain.buffers()
        ends = np.frombuffer(offsets, np.int64)[plain.offset : plain.offset + len(plain) + 1]
        h.update(np.diff(ends).astype("<i8").tobytes())
        if data is not None and len(ends):
            h.update(memoryview(data)[ends[0] : ends[-1]])


def _width(t: "pa.DataType") -> int | None:
    """Bytes of one value of a fixed-width type, else None."""
    try:
        return int(t.bit_width) // 8
    except ValueError:
        return None
