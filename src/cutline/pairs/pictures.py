"""Encoded bytes of the pictures of a table, in any order, from many threads.

A picture in a local file is read with `pread` through a few open files: on cached tars this is several times faster
than Lance's own `read_blobs`, and one missing shard costs only its own rows. Everything else (stored in the table, or
on an object store) goes through `read_blobs`.
"""

import os
import threading
from collections import OrderedDict
from typing import IO, Any
from urllib.parse import unquote, urlparse

import numpy as np
import pyarrow as pa

EXTERNAL = 3  # Lance's descriptor kind for bytes outside the table
OPEN_FILES = 64

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


class PictureReader:
    """Reads one blob column of a Lance dataset."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column
        self.files = Files()

    def read(self, rows: "np.ndarray[Any, np.dtype[np.int64]]", descriptors: pa.StructArray) -> list[Bytes]:
        """One entry per row; `descriptors` are what Lance gives for the column at these rows."""
        out: list[Bytes] = [(None, None)] * len(rows)
        valid = descriptors.is_valid().to_pylist()
        kind, position, size, base, uri = (
            descriptors.field(name).to_pylist() for name in ("kind", "position", "size", "blob_id", "blob_uri")
        )
        others = []
        for i in range(len(rows)):
            if not valid[i]:
                continue
            if kind[i] == EXTERNAL and base[i] == 0 and uri[i].startswith("file:"):
                out[i] = self._local(uri[i], position[i], size[i])
            else:
                others.append(i)
        if others:
            for i, value in zip(others, self._blobs([int(rows[i]) for i in others])):
                out[i] = value
        return out

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
