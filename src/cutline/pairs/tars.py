"""Webdataset tars: where each picture lies, read off the headers; no picture is copied or decoded.

A tar is a chain of 512-byte headers, each followed by its member's bytes. `members` walks the chain through a read
window that moves forward, so memory does not depend on the tar, and large pictures are jumped over. It knows ustar,
GNU (long names, base-256 sizes) and pax (path, size, global headers). `TarFeed` groups members into samples as
webdataset does: by name up to the first dot of the base name, in runs.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cutline.errors import DataError
from cutline.pairs.content import TAIL
from cutline.pairs.headers import HEAD, PICTURES, picture_size
from cutline.pairs.report import IngestReport
from cutline.pairs.samples import Missing, Picture, Sample, Wanted, dig, split_field
from cutline.pairs.values import parse_json

WINDOW = 64 * 1024  # bytes of one read; larger reads waste time on large pictures, smaller ones on small pictures
HEADER = struct.Struct("100s24x12s20xs100x8s80x155s12x")  # name, size, type, magic and version, prefix
NO_END = "no end mark (cut off between two files?)"
PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class BrokenTar(Exception):
    """The chain of headers ends or breaks at byte `position`; what came before is good."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(f"{reason} at byte {position:,}")
        self.reason, self.position = reason, position


class Window:
    """Bytes of a file by position, read ahead in pieces of `WINDOW`; quick where positions mostly go up."""

    def __init__(self, fd: int) -> None:
        self.fd, self.start, self.data = fd, 0, b""
        self.length = os.fstat(fd).st_size

    def reach(self, position: int, n: int) -> int:
        """Where byte `position` stands in `data`, with `n` bytes from there on; −1 if the file has not so many."""
        at = position - self.start
        if at < 0 or at + n > len(self.data):
            self.data = os.pread(self.fd, max(n, WINDOW), position)
            self.start, at = position, 0
            if len(self.data) < n:
                return -1
        return at

    def get(self, position: int, n: int) -> bytes:
        """Bytes [position, position + n), fewer at the end of the file."""
        at = position - self.start
        if at < 0 or at + n > len(self.data):
            at = max(self.reach(position, n), 0)
        return self.data[at : at + n]


def members(window: Window) -> Iterator[tuple[str, int, int]]:
    """(name, position, size) of the regular files of a tar, in order: bytes [position, position + size) of the tar.

    Raises `BrokenTar` where the tar is cut off or its headers are damaged.
    """
    position, long_name = 0, ""
    pax: dict[str, str] = {}
    everywhere: dict[str, str] = {}  # of global pax headers
    while True:
        at = window.reach(position, 512)
        if at < 0:
            raise BrokenTar("cut off in a header" if position < window.length else NO_END, position)
        name, octal, kind, magic, prefix = HEADER.unpack_from(window.data, at)
        try:
            size = int(octal[:11], 8)
        except ValueError:
            size = -1  # empty, base-256, or oddly padded
        if size < 0 or magic[:5] != b"ustar":
            header = window.data[at : at + 512]
            if header == bytes(512):
                return
            try:
                size = _number(octal)
                if not _checksum_fits(header):
                    raise ValueError
            except ValueError:
                raise BrokenTar("damaged header", position) from None
        start = position + 512
        if kind in b"LKxgX":  # the header of a header
            if start + size > window.length:
                raise BrokenTar("cut off in a header", position)
            data = window.get(start, size)
            if kind == b"L":
                long_name = _text(data)
            elif kind == b"g":
                everywhere.update(_pax(data, position))
            elif kind in b"xX":
                pax = _pax(data, position)
            position = start + -(-size // 512) * 512
            continue
        if everywhere or pax:
            pax = everywhere | pax
            size = _pax_size(pax, size, position)
        if kind in b"123456":  # links, devices and folders have no bytes
            size = 0
        elif kind in b"0\x007":
            full = pax.get("path") or long_name or _name(name, prefix, magic)
            if start + size > window.length:
                raise BrokenTar(f"cut off in {full!r}", position)
            if not full.endswith("/"):
                yield full, start, size
        position = start + -(-size // 512) * 512
        if long_name or pax:
            long_name, pax = "", {}


def _number(field: bytes) -> int:
    """An octal or base-256 number of a header; raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    value = int(text, 8) if text else 0
    if value < 0:
        raise ValueError
    return value


def _checksum_fits(header: bytes) -> bool:
    return sum(header) - sum(header[148:156]) + 8 * 32 == _number(header[148:156])


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(name: bytes, prefix: bytes, magic: bytes) -> str:
    name = name.split(b"\0", 1)[0]
    if prefix[0] and magic[:6] == b"ustar\0":  # GNU's own format uses the bytes of the prefix for other things
        name = prefix.split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _pax(data: bytes, position: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of a pax header."""
    records = {}
    at = 0
    while at < len(data) and data[at]:
        blank = data.find(b" ", at, at + 20)
        try:
            length = int(data[at:blank])
            key, _, value = data[blank + 1 : at + length - 1].partition(b"=")
            if blank < 0 or length < 5:
                raise ValueError
        except ValueError:
            raise BrokenTar("damaged pax header", position) from None
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += length
    return records


def _pax_size(pax: dict[str, str], size: int, position: int) -> int:
    """The size that a pax header gives, else `size`."""
    told = pax.get("size")
    if told is None:
        return size
    if not (told.isascii() and told.isdigit()):
        raise BrokenTar("damaged pax header", position)
    return int(told)


class TarFeed:
    """Samples of tar shards. A field is the extension of a member (`txt`), or `json:key` for a key in a JSON member."""

    def __init__(self, shards: list[Path]) -> None:
        self.shards = [p.resolve() for p in shards]
        self.parts = [str(p) for p in shards]
        self.alt, self.captions = "txt", None
        self.identity: list[Any] = [[str(p), p.stat().st_size] for p in self.shards]
        for p in self.shards:
            with open(p, "rb") as f:
                packed = PACKED.get(f.read(2))
            if packed:
                raise DataError(
                    f"{p} is compressed ({packed}): a picture in it has no byte range to point at. "
                    "Unpack it to a plain .tar first."
                )

    def samples(self, part: int, wanted: Wanted, report: IngestReport) -> Iterator[Sample | Missing]:
        shard = self.shards[part]
        fd = os.open(shard, os.O_RDONLY)
        try:
            yield from _Grouper(shard, fd, wanted, report).samples()
        finally:
            os.close(fd)


class _Grouper:
    """Members of one shard → samples."""

    def __init__(self, shard: Path, fd: int, wanted: Wanted, report: IngestReport) -> None:
        self.shard, self.window, self.wanted, self.report = shard, Window(fd), wanted, report
        self.uri = shard.as_uri()
        self.fields = [split_field(f) for f in wanted.fields.values()]
        self.fields = [(name.lower(), path) for name, path in self.fields]
        self.extensions = {name for name, _ in self.fields}

    def samples(self) -> Iterator[Sample | Missing]:
        key, found, picture, broken = "", dict[str, bytes](), None, False
        try:
            for name, start, size in members(self.window):
                stem = name.rfind("/") + 1
                dot = name.find(".", stem)
                if dot <= stem:  # no extension, or a dot file: not a part of a sample
                    continue
                if name[:dot] != key:
                    if key:
                        yield self.sample(key, picture, found)
                    key, found, picture = name[:dot], {}, None
                extension = name[dot + 1 :].lower()
                if extension in PICTURES:
                    picture = picture or self.picture(start, size)
                elif extension in self.extensions:
                    found[extension] = self.window.get(start, size)
        except BrokenTar as e:
            broken = e.reason != NO_END
            if broken:
                self.report.skip("tar cut off or damaged: the rest of it is lost", str(e))
            else:
                self.report.repair(f"tar with {NO_END}", str(e))
        if key and not (broken and (picture is None or not found)):  # the sample in which it broke is counted already
            yield self.sample(key, picture, found)

    def picture(self, start: int, size: int) -> Picture:
        window = self.window
        shape = picture_size(
            window.get(start, min(size, HEAD)), lambda at, n: window.get(start + at, min(n, max(size - at, 0)))
        )
        data = os.pread(window.fd, size, start) if self.wanted.inline else None
        tail = window.get(start + max(size - TAIL, 0), min(size, TAIL))
        width, height = shape or (None, None)
        return Picture(self.uri, start, size, width, height, tail, data)

    def sample(self, key: str, picture: Picture | None, found: dict[str, bytes]) -> Sample | Missing:
        key = key.removeprefix("./")
        if picture is None:
            return Missing(key, "no picture")
        values: list[Any] = []
        parsed: dict[str, Any] = {}
        for name, path in self.fields:
            value: Any = found.get(name)
            if value is not None and path:
                if name not in parsed:
                    parsed[name] = parse_json(value, key, self.report)
                value = dig(parsed[name], path)
            values.append(value)
        return Sample(key, picture, values)
