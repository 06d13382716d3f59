"""`export`: a table back to webdataset tars or parquet files, pictures included.

Shards are written one after the other under a temporary name and renamed when whole, so a second start of the same
export goes on behind the last one.
"""

import io
import itertools
import json
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cutline import record
from cutline.errors import DataError
from cutline.pairs.columns import to_arrow
from cutline.pairs.headers import kind_of
from cutline.pairs.keys import Keys
from cutline.pairs.report import IngestReport
from cutline.pairs.table import Pairs, is_blob
from cutline.progress import progress

BATCH = 256
EXTENSION = {"jpeg": "jpg", "tiff": "tif", None: "bin"}
NOTE = "export.json"


def export(
    pairs: Pairs,
    out: str | Path,
    format: str = "webdataset",
    columns: Sequence[str] | None = None,
    shard_size: int = 10_000,
    show: bool = True,
) -> IngestReport:
    """Write `pairs` to the folder `out` in shards of `shard_size` rows; pictures that cannot be read are left out.

    webdataset: `00000.tar`, … with KEY.jpg (or .png, …), the alt text as KEY.txt and the other columns as KEY.json; a
    `.` in a key becomes `_`, because webdataset ends the key there. parquet: `00000.parquet`, … with the picture's
    bytes in `image`. columns: those to write beside the key and picture (all). Both can be read back by `create`
    (`--alt txt --captions json:captions`). A second start takes whole shards as they are.

    Raises `DataError` for a folder that holds something else, an unknown format or column.
    """
    writers = {"webdataset": ("tar", _tar), "parquet": ("parquet", _parquet)}
    if format not in writers:
        raise DataError(f"no format {format!r}; choose {' or '.join(writers)}.")
    suffix, write = writers[format]
    columns = [c for c in columns or pairs.columns if c not in ("key", "image")]
    out, begun = Path(out), time.monotonic()
    pairs.check_columns(columns)
    if format == "webdataset":
        _check_names(pairs)
    _claim(out, {"pairs": pairs.fingerprint, "format": format, "columns": columns, "shard_size": shard_size})
    report = IngestReport(out=str(out))
    with progress(f"export {format}", len(pairs), "pairs", show) as tick:
        for number, start in enumerate(range(0, len(pairs), shard_size)):
            stop = min(start + shard_size, len(pairs))
            path = out / f"{number:05d}.{suffix}"
            if path.exists():
                report.kept += stop - start
            else:
                temporary = path.with_name(f".{path.name}.tmp")
                write(temporary, _rows(pairs, range(start, stop), columns, report), pairs, columns)
                temporary.replace(path)
            tick(stop - start)
    report.seconds = time.monotonic() - begun
    return report


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or see that it holds the beginning of this very export."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{str(out)!r} is a file; export writes a folder of shards. Choose another name.")
    note = out / NOTE
    if note.exists():
        if json.loads(note.read_bytes()) != settings:
            raise DataError(
                f"{str(out)!r} holds an export of other pairs or settings. Choose another folder, or delete it."
            )
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"the folder {str(out)!r} is not empty. Choose another one.")
    out.mkdir(parents=True, exist_ok=True)
    record.write_atomic(note, json.dumps(settings).encode())


def _check_names(pairs: Pairs) -> None:
    """No two keys may become one name, and runs of one name would be one sample."""
    names = Keys()
    for start in range(0, len(pairs), 4096):
        keys = pairs.take(range(start, min(start + 4096, len(pairs))), ["key"])["key"].to_pylist()
        new = names.add([_name(k) for k in keys])
        if not new.all():
            again = keys[int((~new).argmax())]
            raise DataError(
                f"the key {again!r} and another one give the same file name {_name(again)!r}; export to parquet."
            )


def _name(key: str) -> str:
    return key.replace(".", "_")


def _rows(pairs: Pairs, rows: range, columns: list[str], report: IngestReport) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), BATCH):
        for row in pairs.read(rows[start : start + BATCH], ["key", "image", *columns]):
            if row["image"] is None:
                report.skip("picture cannot be read", f"{row['key']}: {row.get('error', 'null')}")
                continue
            report.kept += 1
            yield row


def _tar(path: Path, rows: Iterator[dict[str, Any]], pairs: Pairs, columns: list[str]) -> None:
    blobs = {f.name for f in pairs.schema if is_blob(f)}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for row in rows:
            name = _name(row["key"])
            files = {_extension(row["image"]): row["image"]}
            if isinstance(row.get("alt"), str):  # a list of texts goes into the JSON
                files["txt"] = row["alt"].encode()
            files |= {f"{c}.{_extension(row[c])}": row[c] for c in columns if c in blobs and row[c] is not None}
            rest = {"key": row["key"]} | {
                c: row[c] for c in columns if c not in blobs and not (c == "alt" and "txt" in files)
            }
            files["json"] = json.dumps(rest, ensure_ascii=False, default=_plain).encode()
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _extension(data: bytes) -> str:
    kind = kind_of(data)
    return EXTENSION.get(kind) or str(kind)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _parquet(path: Path, rows: Iterator[dict[str, Any]], pairs: Pairs, columns: list[str]) -> None:
    schema = pa.schema(
        [pa.field("key", pa.string()), pa.field("image", pa.large_binary())]
        + [pa.field(c, pa.large_binary() if is_blob(f := pairs.schema.field(c)) else f.type) for c in columns]
    )
    with pq.ParquetWriter(path, schema) as writer:
        while some := list(itertools.islice(rows, BATCH)):
            arrays = [to_arrow([row[f.name] for row in some], len(some), f.type, f.name) for f in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
