"""Encoded bytes of the pictures of a table, in any order, from many threads.

A picture in a local file is read with `pread` through a few open files: on cached tars this is several times faster
than Lance's own `read_blobs`, and one missing shard costs only its own rows. Everything else (stored in the table, or
on an object store) goes through `read_blobs`.
"""

import os
import threading
from collections import OrderedDict
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlparse

import numpy as np
import pyarrow as pa

EXTERNAL = 3  # Lance's descriptor kind for bytes outside the table
OPEN_FILES = 64
LOAD_AT = 16  # places are loaded when one row in so many was read
ROWS_A_FILE = 16  # at least, on average, for that
INSIDE, NULL = -1, -2

Ints = np.ndarray[Any, np.dtype[Any]]
Bytes = tuple[bytes | None, str | None]  # (bytes, None), or (None, why not); (None, None) for a null


class Files:
    """The last used files, open. One that falls out is closed when no thread reads it any more (reference count)."""

    def __init__(self) -> None:
        self.files: OrderedDict[str, IO[bytes]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, uri: str) -> IO[bytes]:
        with self.lock:
            file = self.files.get(uri)
            if file is not None:
                self.files.move_to_end(uri)
                return file
        file = open(local_path(uri), "rb", buffering=0)  # noqa: SIM115
        with self.lock:
            self.files[uri] = file
            while len(self.files) > OPEN_FILES:
                self.files.popitem(last=False)
        return file


def local_path(uri: str) -> str:
    return unquote(urlparse(uri).path)


class Places(NamedTuple):
    """Where pictures lie. file: index into `uris`, or `INSIDE` (ask Lance), or `NULL`. 20 bytes a picture."""

    uris: list[str]
    file: Ints
    position: Ints
    size: Ints  # 0: the whole file

    @classmethod
    def of(cls, descriptors: pa.StructArray) -> "Places":
        """From what Lance gives for a blob column."""
        kind, base, position, size = (
            descriptors.field(name).fill_null(0).to_numpy().astype(np.int64)
            for name in ("kind", "blob_id", "position", "size")
        )
        uris = descriptors.field("blob_uri").dictionary_encode()
        names = uris.dictionary.to_pylist()
        file = uris.indices.fill_null(0).to_numpy().astype(np.int32)
        known = np.array([n.startswith("file:") for n in names] + [False])[file]
        file[(kind != EXTERNAL) | (base != 0) | ~known] = INSIDE
        file[~descriptors.is_valid().to_numpy(zero_copy_only=False)] = NULL
        return cls(names, file, position, size)

    @classmethod
    def load(cls, dataset: Any, column: str) -> "Places | None":
        """Of a whole column; None where nearly every picture has a file of its own, whose names would fill the memory."""
        index: dict[str, int] = {}
        parts = []
        for batch in dataset.to_batches(columns=[column]):
            part = cls.of(batch.column(0))
            new = np.array([index.setdefault(u, len(index)) for u in part.uris] + [0], np.int32)
            parts.append(part._replace(file=np.where(part.file >= 0, new[part.file], part.file)))
            if len(index) * ROWS_A_FILE > sum(len(p.file) for p in parts):
                return None
        return cls(list(index), *(np.concatenate([p[i] for p in parts]) for i in (1, 2, 3)))


class PictureReader:
    """Reads one blob column of a Lance dataset.

    The first reads ask Lance for the places of their rows. A reader that goes on to read a good part of the table, as
    training does, is given the places of all pictures, which halves the work of a read.
    """

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column
        self.files = Files()
        self.places: Places | None = None
        self.asked = 0  # rows, until the places are loaded
        self.lock = threading.Lock()

    def read(self, rows: "np.ndarray[Any, np.dtype[np.int64]]") -> list[Bytes]:
        """One entry per row of the table, in the order asked."""
        places = self._whole(len(rows))
        at = rows
        if places is None:
            taken = self.dataset.take(rows, columns=[self.column])[self.column]
            places, at = Places.of(pa.concat_arrays(taken.chunks)), np.arange(len(rows))
        out: list[Bytes] = [(None, None)] * len(rows)
        inside = []
        file, position, size = (values[at].tolist() for values in places[1:])
        for i, code in enumerate(file):
            if code >= 0:
                out[i] = self._local(places.uris[code], position[i], size[i])
            elif code == INSIDE:
                inside.append(i)
        if inside:
            for i, value in zip(inside, self._blobs([int(rows[i]) for i in inside])):
                out[i] = value
        return out

    def _whole(self, rows: int) -> Places | None:
        if self.places is None and self.asked >= 0:
            with self.lock:
                self.asked += rows
                if self.places is None and self.asked * LOAD_AT > self.dataset.count_rows():
                    self.places, self.asked = Places.load(self.dataset, self.column), -(1 << 62)
        return self.places

    def names(self, descriptors: pa.StructArray) -> list[str | None]:
        """The file name of each picture that lies outside the table, read off the tar's header where it is in one."""
        out: list[str | None] = []
        for d in descriptors.to_pylist():
            if d is None or d["kind"] != EXTERNAL:
                out.append(None)
            elif not d["size"]:
                out.append(os.path.basename(local_path(d["blob_uri"])))
            else:
                out.append(self._member(d["blob_uri"], d["position"]))
        return out

    def _member(self, uri: str, position: int) -> str | None:
        if not uri.startswith("file:") or position < 512:
            return None
        try:
            header = os.pread(self.files.get(uri).fileno(), 512, position - 512)
        except OSError:
            return None
        name = header[:100].rstrip(b"\0")
        return name.decode("utf-8", "replace") if header[257:262] == b"ustar" and len(name) < 100 else None

    def _local(self, uri: str, position: int, size: int) -> Bytes:
        try:
            if not size:  # the whole file
                with open(local_path(uri), "rb") as f:
                    return f.read(), None
            data = os.pread(self.files.get(uri).fileno(), size, position)
        except OSError as e:
            return None, f"{local_path(uri)}: {e.strerror}"
        if len(data) < size:
            return None, f"{local_path(uri)}: it ends before byte {position + size:,}, where the picture did"
        return data, None

    def _blobs(self, rows: list[int]) -> list[Bytes]:
        try:
            found = self.dataset.read_blobs(self.column, indices=rows, preserve_order=True)
            return [(data, None) for _, data in found]
        except (OSError, ValueError, RuntimeError) as e:
            if len(rows) == 1:
                return [(None, str(e).split(", /home")[0])]
            return [value for row in rows for value in self._blobs([row])]  # find the ones that fail
