"""Webdataset tars in which samples are looked up by uid, for joining them to a table.

One pass over the headers notes where each sample lies: 24 bytes of memory a sample, 0.3 GB for the 12.8 million of
DataCompDR-12M. A sample is then one read of its bytes, headers included.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from cutline.errors import DataError
from cutline.pairs.report import Count
from cutline.pairs.tars import NO_END, BrokenTar, Window, members
from cutline.progress import progress

OPEN = 16  # files kept open
PLACE = np.dtype([("uid", np.uint64), ("shard", np.int32), ("start", np.int64), ("length", np.int32)])
Sample = dict[str, bytes]  # extension → content


class Broken(Exception):
    """A sample that cannot be used, and why."""


class Shards:
    """Samples by the "uid" in their `json`, or by their names (by_key). Can be pickled.

    skipped: samples and ends of tars that are lost, by reason. Raises `DataError` if there is no sample at all.
    """

    def __init__(self, paths: Sequence[str | Path], by_key: bool = False, show: bool = True) -> None:
        self.paths, self.by_key = [str(p) for p in paths], by_key
        self.skipped: dict[str, Count] = {}
        self.example = ""  # one of the uids
        self._files: dict[int, int] = {}  # shard → descriptor
        parts = []
        with progress("index", len(self.paths), "tars", show) as tick:
            for shard, path in enumerate(self.paths):
                parts.append(np.array([(_hash(uid), shard, *span) for uid, *span in self._index(path)], PLACE))
                tick(1)
        places = np.concatenate(parts)
        _, first = np.unique(places["uid"], return_index=True)  # sorted by uid; the first of equal ones
        self.places = places[first]
        if len(first) < len(places):
            self.skipped["uid was there before: the first is kept"] = Count(n=len(places) - len(first))
        if not len(first):
            raise DataError(f"no sample was found. {self.__rich__()}")

    def __len__(self) -> int:
        return len(self.places)

    def __rich__(self) -> str:
        lost = "".join(f"\n  {why}: {c.n:,} ({', '.join(c.examples)})" for why, c in self.skipped.items())
        return escape(f"{len(self):,} samples in {len(self.paths):,} tars{lost}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def __contains__(self, uid: str) -> bool:
        return self._place(uid) is not None

    def sample(self, uid: str) -> Sample | None:
        """The sample of a uid, or None. Raises `Broken`."""
        place = self._place(uid)
        return None if place is None else self._read(place)

    def _place(self, uid: str) -> int | None:
        hashed = np.uint64(_hash(uid))
        place = int(np.searchsorted(self.places["uid"], hashed))
        return place if place < len(self) and self.places["uid"][place] == hashed else None

    def first(self, count: int) -> Iterator[Sample]:
        """The first samples that can be read."""
        for place in np.lexsort((self.places["start"], self.places["shard"]))[:count].tolist():
            try:
                yield self._read(place)
            except Broken:
                continue

    def _read(self, place: int) -> Sample:
        _, shard, start, length = self.places[place].item()
        if shard not in self._files:
            while len(self._files) >= OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        data = io.BytesIO(os.pread(self._files[shard], length, start))
        try:
            with tarfile.open(fileobj=data) as tar:
                return {_split(m.name)[1]: file.read() for m in tar if (file := tar.extractfile(m))}
        except (tarfile.TarError, OSError) as e:
            raise Broken("its part of the tar cannot be read") from e

    def _index(self, path: str) -> Iterator[tuple[str, int, int]]:
        """(uid, start, length) of each sample of a tar: the bytes with its headers."""
        fd = os.open(path, os.O_RDONLY)
        window, key, uid, start, end = Window(fd), "", "", 0, 0
        try:
            for name, at, size in members(window):
                stem, extension = _split(name)
                if stem != key:
                    self.example = self.example or uid
                    if uid:
                        yield uid, start, end - start
                    elif key:
                        self._lose("sample without a uid", key, path)
                    key, uid, start = stem, stem.rpartition("/")[2] if self.by_key else "", end
                if extension == "json" and not self.by_key:
                    uid = _uid(window.get(at, size))
                end = at + -(-size // 512) * 512
        except BrokenTar as e:
            if e.reason == NO_END:
                self._lose("tar without an end mark: all of it was read", str(e), path)
            else:
                self._lose("tar cut off or damaged: the rest of it is lost", str(e), path)
                key = uid = ""  # its last sample may lack a member
        finally:
            os.close(fd)
        self.example = self.example or uid
        if uid:
            yield uid, start, end - start
        elif key:
            self._lose("sample without a uid", key, path)

    def _lose(self, reason: str, what: str, path: str) -> None:
        self.skipped.setdefault(reason, Count()).add(f"{what} ({Path(path).name})")


def _hash(uid: str) -> int:
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "little")


def _split(name: str) -> tuple[str, str]:
    """A member's sample and extension, as webdataset tells them apart: at the first dot of the base name."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :].lower())


def _uid(data: bytes) -> str:
    try:
        content = json.loads(data)
    except ValueError:
        return ""
    return str(content.get("uid") or "") if isinstance(content, dict) else ""
