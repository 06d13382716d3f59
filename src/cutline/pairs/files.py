"""Pictures in files: a folder with texts beside the pictures, or a table of paths (csv, tsv, jsonl, parquet).

Rows of a table that name the same picture one after the other become one pair with several captions, as Flickr8k's and
Flickr30k's caption files have them. A parquet column that holds the pictures' bytes gives pictures stored in the table.
"""

import csv
import json
import os
from collections.abc import Iterator
from errno import EILSEQ, EINVAL
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from cutline.errors import DataError
from cutline.pairs.content import TAIL
from cutline.pairs.headers import HEAD, PICTURES, picture_size
from cutline.pairs.report import IngestReport, utf8
from cutline.pairs.samples import Missing, Picture, Sample, Wanted, dig, split_field
from cutline.pairs.values import NOT_UTF8, parse_json

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
PATHS = ("image", "path", "file", "file_name", "filename", "filepath", "file_path", "image_path", "image_file", "img")
TEXTS = ("alt", "alt_text", "txt", "text", "caption", "title", "description")
REST = "\0"  # the name of cells beyond the columns, which no column can have
ROWS = 1024  # parquet rows in memory at a time
FIRST = 4096  # rows of a jsonl that tell its columns: each row may leave out what it has no value for


def picture_file(path: Path, inline: bool) -> Picture:
    """The picture in a file. Raises OSError, also for a name that is not UTF-8, which no table can point at."""
    if not inline and utf8(str(path)) != str(path):
        raise OSError(EILSEQ, "its name is not UTF-8")
    try:
        f = open(path, "rb")  # noqa: SIM115
    except ValueError as e:  # a NUL or half a surrogate pair in it
        raise OSError(EINVAL, "its name is no file name") from e
    with f:
        size = os.fstat(f.fileno()).st_size

        def read(at: int, n: int) -> bytes:
            return os.pread(f.fileno(), min(n, max(size - at, 0)), at)

        width, height = picture_size(read(0, HEAD), read) or (None, None)
        data = read(0, size) if inline else None
        return Picture(path.as_uri(), None, size, width, height, read(max(size - TAIL, 0), TAIL), data)


def picture_bytes(data: bytes) -> Picture:
    """A picture that comes as bytes and is stored in the table."""
    shape = picture_size(data[:HEAD], lambda at, n: data[at : at + n])
    width, height = shape or (None, None)
    return Picture(None, None, len(data), width, height, data[-TAIL:], data)


class FolderFeed:
    """Pictures of a folder and its subfolders, sorted; texts in files of the same stem. A field is their extension.

    The key is the path below the folder, without the extension.
    """

    alt, captions = "txt", None

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.parts = [str(folder)]
        self.identity: list[Any] = [str(self.folder)]
        if next(_pictures(self.folder), None) is None:
            tars = " It holds tars: name them, as in 'FOLDER/*.tar'." if any(self.folder.glob("*.tar")) else ""
            raise DataError(f"no picture (.jpg, .png, .webp, …) was found in the folder {str(folder)!r}.{tars}")

    def samples(self, part: int, wanted: Wanted, report: IngestReport) -> Iterator[Sample | Missing]:
        fields = [split_field(f) for f in wanted.fields.values()]
        for path in _pictures(self.folder):
            key = path.relative_to(self.folder).with_suffix("").as_posix()
            try:
                picture = picture_file(path, wanted.inline)
            except OSError as e:
                yield Missing(key, f"picture file cannot be read ({e.strerror})")
                continue
            found: dict[str, Any] = {}
            for name, _ in fields:
                beside = path.parent / f"{path.stem}.{name}"
                if name and name not in found and beside.is_file():
                    found[name] = beside.read_bytes()
            whole = {name: parse_json(found[name], key, report) for name, at in fields if at and name in found}
            yield Sample(key, picture, [dig(whole.get(name), at) if at else found.get(name) for name, at in fields])


def _pictures(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """In sorted order, one folder's names in memory at a time; without hidden files and links to a folder `above`."""
    real = folder.resolve()
    if real in above:
        return
    with os.scandir(folder) as it:
        entries = sorted((e.name, e.is_dir()) for e in it if not e.name.startswith("."))
    for name, is_folder in entries:
        if is_folder:
            yield from _pictures(folder / name, (*above, real))
        elif name.rpartition(".")[2].lower() in PICTURES:
            yield folder / name


class TableFeed:
    """Rows of a table file. One column holds the pictures' paths (beside the table, or absolute) or bytes.

    A field is a column; `column:key` reaches into its JSON. The key is the column `key` or `id`, else the path without
    its extension, else the row's number.
    """

    def __init__(self, path: Path, folder: Path | None = None, image: str | None = None) -> None:
        self.path, self.folder = path.resolve(), (folder or path.parent).resolve()
        self.parts = [str(path)]
        self.identity: list[Any] = [str(self.path), path.stat().st_size, str(self.folder), image]
        first = _first(self.path)
        if not first:
            raise DataError(f"the table {str(path)!r} has no rows.")
        self.columns = list(first)
        self.image = image or next((c for c in PATHS if c in first), "")
        if self.image not in first:
            raise DataError(
                f"no column of {str(path)!r} looks like the pictures' paths or bytes ({image or ', '.join(PATHS)}); "
                f"it has {', '.join(self.columns)}. Name it with --image COLUMN."
            )
        if str(first[self.image]).startswith(("http://", "https://")):
            raise DataError(
                f"column {self.image!r} of {str(path)!r} holds URLs. Download the pictures first, for example with "
                "img2dataset into webdataset tars, and create the table from those."
            )
        self.id = next((c for c in ("key", "id", "image_id") if c in first), None)
        self.captions = "captions" if "captions" in first else None
        self.alt = next((c for c in TEXTS if c in first), None)

    def samples(self, part: int, wanted: Wanted, report: IngestReport) -> Iterator[Sample | Missing]:
        fields = [split_field(f) for f in wanted.fields.values()]
        for name, _ in fields:
            if name and name not in self.columns:
                raise DataError(f"{str(self.path)!r} has no column {name!r}; it has {', '.join(self.columns)}.")
        many = [name == "captions" for name in wanted.fields]
        for number, (where, rows) in enumerate(groupby(rows_of(self.path, report), key=self._where(wanted))):
            group = list(rows)
            key, picture = self._picture(where, group[0], number, wanted)
            if picture is None:
                lost = isinstance(where, str) and where
                yield Missing(key, "picture file cannot be read (No such file or directory)" if lost else "no picture")
                continue
            if len(group) > 1 and not any(many):
                report.repair("several rows for one picture: first one kept (name the texts with --captions)", key)
            values: list[Any] = []
            for (name, at), all_rows in zip(fields, many):
                got = [self._value(row.get(name), at, key, report) for row in group[: None if all_rows else 1]]
                flat = [x for v in got for x in (v if isinstance(v, list) else [v])]
                values.append(flat if all_rows and (len(group) > 1 or isinstance(got[0], list)) else got[0])
            yield Sample(key, picture, values)

    def _where(self, wanted: Wanted) -> Any:
        """What tells one picture from the next: its path, or a number where the bytes are in the table."""
        count = iter(range(1 << 62))

        def where(row: dict[str, Any]) -> str | int:
            value = row.get(self.image)
            return value if isinstance(value, str) else next(count)

        return where

    def _picture(
        self, where: str | int, row: dict[str, Any], number: int, wanted: Wanted
    ) -> tuple[str, Picture | None]:
        key = str(row[self.id]) if self.id and row.get(self.id) is not None else None
        if isinstance(where, str):
            key = key or os.path.splitext(Path(where).as_posix())[0]
            path = self.folder / where
            try:
                return key, picture_file(path, wanted.inline) if where else None
            except OSError:
                return key, None
        value = row.get(self.image)
        data = value.get("bytes") if isinstance(value, dict) else value
        key = key or f"{self.path.stem}-{number:08d}"
        return key, picture_bytes(data) if isinstance(data, bytes) else None

    def _value(self, value: Any, at: list[str], key: str, report: IngestReport) -> Any:
        if not at:
            return value
        return dig(parse_json(value.encode(), key, report) if isinstance(value, str) else value, at)


def names_pictures(path: Path, image: str | None) -> bool:
    """Whether a table file found in a folder tells where the pictures are (img2dataset's own parquet files do not)."""
    first = _first(path)
    return image in first if image else any(c in first for c in PATHS)


def _first(path: Path) -> dict[str, Any]:
    """The columns of a table, each with the value in the first row that has it."""
    first: dict[str, Any] = {}
    for row in islice(rows_of(path), FIRST if path.suffix == ".jsonl" else 1):
        for name, value in row.items():
            first.setdefault(name, value)
    return first


def rows_of(path: Path, report: IngestReport | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a table file as dicts. Text that is not UTF-8 is repaired and counted."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as f:
                for batch in f.iter_batches(ROWS):
                    yield from batch.to_pylist()
        except pa.ArrowException as e:
            raise DataError(f"{str(path)!r} is not a parquet file that can be read: {e}") from e
        return
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as text:
        lines = (_told(line, number, report) for number, line in enumerate(text, 1))
        if path.suffix == ".jsonl":
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line) if line.strip() else None
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    yield row
                elif line.strip() and report is not None:
                    report.skip("line is not a JSON object", f"line {number}")
            return
        table = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", restkey=REST)
        try:
            for row in table:
                if row.pop(REST, None) and report is not None:
                    report.repair("row has more cells than columns: the last ones left out", f"line {table.line_num}")
                yield row
        except csv.Error as e:
            raise DataError(f"{str(path)!r}, line {table.line_num}: {e}. Is a quote not closed there?") from e


def _told(line: str, number: int, report: IngestReport | None) -> str:
    if "\ufffd" in line and report is not None:
        report.repair(NOT_UTF8, f"line {number}")
    return line.replace("\0", "")
