"""The tar indexer against Python's tarfile, and against webdataset's grouping."""

import io
import os
import struct
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_made import picture, write_tar

from cutline.pairs.headers import picture_size
from cutline.pairs.tars import BrokenTar, Window, members

NAME = st.text(st.characters(exclude_characters="\0/\n", exclude_categories=["Cs"]), min_size=1, max_size=20)
PATH = st.lists(NAME, min_size=1, max_size=12).map("/".join).filter(lambda p: p.strip("/. ") and not p.endswith("/"))
FORM = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
KIND = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])


def index(path: Path) -> list[tuple[str, int, int]]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(members(Window(fd)))
    finally:
        os.close(fd)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(PATH, st.binary(max_size=1500), KIND), max_size=8), FORM, st.data())
def test_finds_what_tarfile_finds(tmp_path_factory, entries, form, data):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    common = {"comment": "global"} if data.draw(st.booleans()) else None
    with tarfile.open(path, "w", format=form, pax_headers=common) as tar:
        for name, content, kind in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "" if kind in (tarfile.REGTYPE, tarfile.DIRTYPE) else "x" * 150
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # ustar cannot hold this name
                continue
        empty = not tar.members
    if empty:  # tarfile does not open an archive of a global header alone
        return
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert index(path) == expected


def test_reads_sizes_in_base_256_and_from_pax(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x" * 700)])
    plain = bytearray(path.read_bytes())
    plain[124:136] = b"\x80" + (700).to_bytes(11, "big")
    plain[148:156] = b"%06o\0 " % (sum(plain[:148]) + sum(plain[156:512]) + 8 * 32)
    path.write_bytes(plain)
    assert index(path) == [("a.txt", 512, 700)]

    info = tarfile.TarInfo("b.txt")
    info.size, info.pax_headers = 700, {"size": "700", "path": "c.txt"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"x" * 700))
    raw = bytearray(path.read_bytes())
    raw[1024 + 124 : 1024 + 136] = b"0" * 11 + b"\0"  # the size is in the pax header only
    path.write_bytes(raw)
    assert index(path) == [("c.txt", 1536, 700)]


@pytest.mark.parametrize("cut", [300, 600, 700, 512 * 3 + 100, 512 * 4 - 1])
def test_cut_off_tar_gives_what_came_before_and_says_where(tmp_path, cut):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x" * 100), ("b.txt", b"y" * 900)])
    path.write_bytes(path.read_bytes()[:cut])
    found = []
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(BrokenTar, match="cut off|no end mark"):
        found.extend(members(Window(fd)))
    os.close(fd)
    assert found == ([("a.txt", 512, 100)] if cut >= 612 else [])


def test_damaged_header_is_told_with_its_position(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x" * 100), ("b.txt", b"y" * 900)])
    raw = bytearray(path.read_bytes())
    raw[1024:1536] = os.urandom(512)
    path.write_bytes(raw)
    with pytest.raises(BrokenTar, match=r"damaged header at byte 1,024"):
        index(path)


@pytest.mark.parametrize("record", [b"12 size=abc\n", b"13 size=-999\n"])
def test_damaged_pax_size_is_told(tmp_path, record):
    header = tarfile.TarInfo("p")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + record + bytes(512 - len(record)) + path.read_bytes())
    with pytest.raises(BrokenTar, match="damaged pax header"):
        index(path)


def test_long_name_longer_than_the_tar_is_told_and_not_allocated(tmp_path):
    header = bytearray(tarfile.TarInfo("p").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[124:136], header[148:156] = b"L", b"\xbf" + b"\xff" * 11, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "a.tar"
    path.write_bytes(header + bytes(2048))
    with pytest.raises(BrokenTar, match="cut off in a header at byte 0"):
        index(path)


def test_groups_as_webdataset_does(tmp_path):
    import webdataset

    from cutline.pairs import Pairs, create

    names = [
        "x/a.b/1.jpg",
        "x/a.b/1.seg.png",
        "x/a.b/1.txt",
        "2.JPG",
        "2.txt",
        ".hidden.jpg",
        "3.jpg",
        "3.txt",
        "plain",
    ]
    path = write_tar(
        tmp_path / "a.tar", [(n, picture(i) if "txt" not in n else n.encode()) for i, n in enumerate(names)]
    )
    create(tmp_path / "t.lance", [path], show=False)
    rows = (p := Pairs.open(tmp_path / "t.lance")).read(range(len(p)), ["key", "image", "alt"])
    theirs = [s for s in webdataset.WebDataset(str(path), shardshuffle=False) if "jpg" in s and "txt" in s]
    assert [(r["key"], r["image"], r["alt"]) for r in rows] == [
        (s["__key__"], s["jpg"], s["txt"].decode()) for s in theirs
    ]


def test_nonsense_sizes_of_pictures_are_unknown():
    png = b"\x89PNG\r\n\x1a\n" + bytes(8) + struct.pack(">II", 2**32 - 1, 9)
    bmp = b"BM" + bytes(16) + struct.pack("<ii", -5, -(2**31))
    assert picture_size(png, lambda at, n: b"") is None
    assert picture_size(bmp, lambda at, n: b"") is None


def test_large_pictures_are_jumped_over(tmp_path, monkeypatch):
    """Bytes read stay near one window a header when the members are much larger than the window."""
    path = write_tar(tmp_path / "a.tar", [(f"{i}.bin", bytes(3_000_000)) for i in range(4)])
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: read.append(n) or pread(fd, n, at))
    assert len(index(path)) == 4
    assert sum(read) <= 6 * 64 * 1024
