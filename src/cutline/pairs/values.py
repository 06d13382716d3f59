"""Raw values of a batch of samples → Arrow columns: text cleaned, types held, what does not fit counted.

Text is checked for a whole batch at once, by Arrow; only rows with something to put right are touched in Python.
"""

import json
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cutline.pairs.report import IngestReport

SPACES = "\0 \t\r\n\f\v\u00a0\ufeff\u3000"
NOT_UTF8 = "text is not UTF-8: bad bytes replaced"


def parse_json(data: bytes, key: str, report: IngestReport) -> Any:
    """The JSON value, or None (counted) where it does not parse."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        report.repair(NOT_UTF8, key)
        text = data.decode("utf-8", "replace")
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError):
        report.repair("JSON does not parse: taken as missing", key)
        return None


_decoder = json.JSONDecoder()


def sniff(values: list[Any], text: bool) -> pa.DataType:
    """The Arrow type of a column from its first values."""
    seen = [v for v in values if v is not None]
    flat = [x for v in seen for x in (v if isinstance(v, list) else [v])]
    inner = pa.string() if text else _scalar(flat)
    return pa.list_(inner) if any(isinstance(v, list) for v in seen) else inner


def _scalar(seen: list[Any]) -> pa.DataType:
    kinds = {type(v) for v in seen}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def text_column(values: list[Any], field: pa.Field, keys: list[str], report: IngestReport) -> pa.Array:
    """Text as stored, of type string or list<string>: see `clean`. `values` is changed in place."""
    many = pa.types.is_list(field.type)
    if many:
        lists = [v if type(v) is list else [] if v is None else [v] for v in values]
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        flat, rows = list(chain.from_iterable(lists)), np.repeat(np.arange(len(lists)), lengths)
    else:
        flat, rows = values, np.arange(len(values))
    try:
        array = pa.array(flat, pa.string())
        odd = pc.or_kleene(pc.not_equal(pc.utf8_trim(array, SPACES), array), pc.equal(pc.binary_length(array), 0))
        wrong = np.unique(rows[odd.fill_null(many).to_numpy(zero_copy_only=False)]).tolist()
    except (pa.ArrowException, UnicodeEncodeError, TypeError):
        wrong = range(len(values))
    if not many and not wrong:
        return array
    for row in wrong:
        values[row] = _shape(clean(values[row], keys[row], report), field, keys[row], report)
    if many and not wrong:
        empty = lengths == 0
        offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32(), mask=np.append(empty, False))
        return pa.ListArray.from_arrays(offsets, array)
    return pa.array([_shape(v, field, k, report) for v, k in zip(values, keys)], field.type)


def _shape(value: Any, field: pa.Field, key: str, report: IngestReport) -> Any:
    """One string or a list of them, as the column wants it."""
    many = pa.types.is_list(field.type)
    if many or not isinstance(value, list):
        return [value] if many and isinstance(value, str | bytes) else value or None
    return _first(value, field, key, report)


def _first(value: list[Any], field: pa.Field, key: str, report: IngestReport) -> Any:
    """Of a list that meets a column of single values."""
    if len(value) > 1:
        report.lose(f"a list in {field.name!r}, which holds one value: first one kept", key, value)
    return value[0] if value else None


def clean(value: Any, key: str, report: IngestReport) -> str | list[str] | None:
    """Text as stored: decoded, without stray spaces at its ends; empty is None; a list keeps its non-empty parts."""
    if value is None:
        return None
    if isinstance(value, list):
        parts = [clean(v, key, report) for v in value]
        return [p for p in parts if isinstance(p, str)] or None
    if isinstance(value, dict):
        report.repair("text is a JSON object: taken as missing", key)
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            report.repair(NOT_UTF8, key)
            value = value.decode("utf-8", "replace")
    value = str(value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # half a surrogate pair, from a JSON escape
            report.repair(NOT_UTF8, key)
            value = value.encode("utf-8", "replace").decode()
    stripped = value.strip(SPACES)
    if not stripped:
        report.repair("empty text: taken as missing", key)
        return None
    if len(stripped) != len(value):
        report.repair("stray spaces at the ends removed", key)
    return str(stripped)


def plain_column(values: list[Any], field: pa.Field, keys: list[str], report: IngestReport) -> pa.Array:
    """Values of a field the user named, fitted to the column's type."""
    return pa.array([_fit(v, field, k, report) for v, k in zip(values, keys)], field.type)


def _fit(value: Any, field: pa.Field, key: str, report: IngestReport) -> Any:
    """`value` as the column's type wants it; what does not fit becomes None and is counted."""
    kind = field.type
    if value is None:
        return None
    if pa.types.is_list(kind):
        one = pa.field(field.name, kind.value_type)
        parts = [_fit(v, one, key, report) for v in (value if isinstance(value, list) else [value])]
        return [p for p in parts if p is not None]
    if isinstance(value, list):
        return _fit(_first(value, field, key, report), field, key, report)
    if pa.types.is_string(kind):
        if isinstance(value, bytes) or (isinstance(value, str) and not value.isascii()):
            return clean(value, key, report)
        as_json = isinstance(value, dict | bool | int | float)  # not dates, decimals, …
        return json.dumps(value, ensure_ascii=False, default=str) if as_json else str(value)
    right = {pa.bool_(): (bool,), pa.int64(): (int,), pa.float64(): (int, float)}[kind]
    if type(value) in right and not (kind == pa.int64() and not -(2**63) <= value < 2**63):
        return value
    report.lose(f"a value of {field.name!r} that is not {kind}: taken as missing", key, value)
    return None
