"""`check` names what is wrong by reason; `export` and `create` are each other's inverse."""

import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pairs_made import picture, sample, write_tar
from PIL import Image

from cutline.errors import DataError
from cutline.pairs import Pairs, check, create, create_from_rows, export


def test_check_of_good_pairs_finds_nothing(table):
    report = check(table, show=False)
    assert (report.pictures, report.broken, report.bad, report.notes, report.captions) == (120, 0, {}, {}, {})


def test_brackets_in_names_are_printed_as_they_are(tmp_path):
    from rich.console import Console

    create_from_rows(tmp_path / "[a].lance", [{"key": "x[/b]y", "image": b"no picture"}])
    pairs = Pairs.open(tmp_path / "[a].lance", where="key LIKE '%[/b]%'")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for report in (check(pairs, show=False), pairs.info()):
        console.print(report)
    text = console.export_text()
    assert all(part in text for part in ("[a].lance", "x[/b]y", "where key LIKE '%[/b]%'"))


def test_check_of_flickr8k(tmp_path, real_data):
    create(tmp_path / "f.lance", [real_data / "flickr8k" / "00000.tar"], captions="json:captions", show=False)
    report = check(Pairs.open(tmp_path / "f.lance"), threads=2, show=False)
    assert (report.pictures, report.broken) == (1000, 0)


def test_check_counts_every_kind_of_broken_picture(tmp_path):
    import io

    def saved(image: Image.Image, form: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    huge = bytearray(picture(0))
    at = huge.find(b"\xff\xc0")
    huge[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    pictures = {
        "0.jpg": picture(0),
        "1.jpg": picture(1, size=(99, 99))[:-300],
        "2.jpg": picture(2, mode="CMYK"),
        "3.png": saved(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
        "4.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "5.jpg": bytes(huge),
        "6.jpg": picture(6, "PNG"),
        "7.jpg": b"<html>404</html>",
        "8.webp": picture(8, "WEBP"),
    }
    texts = {"1": b"x\x07y", "2": b"word " * 80, "3": None}
    members = [m for name, data in pictures.items()
               for m in [(name, data), (f"{name[0]}.txt", texts.get(name[0], b"fine"))] if m[1] is not None]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    gone = write_tar(tmp_path / "gone.tar", sample(9))
    create(tmp_path / "t.lance", [path, gone], need_text=False, show=False)
    gone.unlink()
    report = check(Pairs.open(tmp_path / "t.lance"), show=False)
    assert report.pictures == 10
    assert {r: c.examples for r, c in report.bad.items() if "missing" not in r} == {
        "truncated": ["1"], "bomb": ["5"], "not a picture": ["7"],
    }  # fmt: skip
    assert report.bad["file or shard is missing"].n == 1
    assert "gone.tar" in report.bad["file or shard is missing"].examples[0]
    assert {r: c.examples for r, c in report.notes.items()} == {
        "CMYK: converted to RGB": ["2"], "16 bits a channel: scaled to 8": ["3"], "animated: first frame taken": ["4"],
        "named as jpeg, but png: decoded by its content": ["6"],
    }  # fmt: skip
    assert {r: c.examples for r, c in report.captions.items()} == {
        "alt: control characters": ["1"], "alt: more than 77 words": ["2"], "alt: missing": ["3"],
    }  # fmt: skip


def test_check_takes_jpegs_that_only_pillow_decodes(tmp_path):
    odd = bytearray(picture(0))
    odd[odd.find(b"\xff\xc0") + 11] = 0x31  # subsampling of 3 × 1, which TurboJPEG does not name
    create(tmp_path / "t.lance", [write_tar(tmp_path / "a.tar", sample(0, jpg=bytes(odd)))], show=False)
    report = check(Pairs.open(tmp_path / "t.lance"), show=False)
    assert (report.pictures, report.broken) == (1, 0)


def same(a: Pairs, b: Pairs, columns: list[str]) -> bool:
    return a.read(range(len(a)), columns) == b.read(range(len(b)), columns)


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_export_and_create_are_inverse(tmp_path, table, format):
    report = export(table, tmp_path / "out", format, shard_size=50, show=False)
    assert report.kept == 120
    suffix = {"webdataset": "tar", "parquet": "parquet"}[format]
    assert [p.name for p in sorted((tmp_path / "out").glob(f"*.{suffix}"))] == [f"{i:05d}.{suffix}" for i in range(3)]
    options = {"captions": "json:captions", "fields": {"score": "json:score"}} if format == "webdataset" else {
        "captions": "captions", "fields": {"score": "score"}
    }  # fmt: skip
    create(tmp_path / "again.lance", [tmp_path / "out" / f"*.{suffix}"], **options, show=False)
    again = Pairs.open(tmp_path / "again.lance")
    assert same(table, again, ["key", "image", "width", "height", "alt", "captions", "score"])
    assert again.fingerprint == table.fingerprint


def test_webdataset_reads_the_export(tmp_path, table):
    import webdataset

    export(table.where("score < 5"), tmp_path / "out", columns=["alt", "captions"], show=False)
    got = list(webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False))
    assert [s["__key__"] for s in got] == [f"{n:06d}" for n in range(10)]
    assert got[3]["jpg"] == picture(3)
    assert got[3]["txt"] == b"alt 3"
    assert json.loads(got[3]["json"]) == {"key": "000003", "captions": ["caption 3 a", "caption 3 b"]}


def test_export_of_hard_keys_vectors_and_blobs(tmp_path):
    keys = ["a/b.c", "ü " + "long" * 40, "plain"]
    create_from_rows(tmp_path / "t.lance", [{"key": k, "image": picture(i, "PNG")} for i, k in enumerate(keys)])
    pairs = Pairs.open(tmp_path / "t.lance").add_column("v", [np.arange(3.0) + i for i in range(3)])
    pairs = pairs.add_column("mask", [picture(7, "PNG"), None, b"raw"], type="blob")
    export(pairs, tmp_path / "tar", show=False)
    with tarfile.open(tmp_path / "tar" / "00000.tar") as tar:
        names = tar.getnames()
        notes = [json.loads(tar.extractfile(n).read()) for n in names if n.endswith(".json")]
        assert tar.extractfile("a/b_c.mask.png").read() == picture(7, "PNG")
    assert [n["key"] for n in notes] == keys
    assert notes[2]["v"] == [2.0, 3.0, 4.0]
    export(pairs, tmp_path / "parquet", "parquet", show=False)
    read = pq.read_table(tmp_path / "parquet" / "00000.parquet").to_pylist()
    assert [(r["key"], r["image"], r["v"], r["mask"]) for r in read] == [
        (k, picture(i, "PNG"), [0.0 + i, 1.0 + i, 2.0 + i], [picture(7, "PNG"), None, b"raw"][i])
        for i, k in enumerate(keys)
    ]


def test_vectors_of_each_augmentation_are_exported_to_parquet(table, tmp_path):
    vectors = [np.arange(8, dtype=np.float16).reshape(2, 4) + n for n in range(120)]
    pairs = table.add_column("dr_image", vectors, type=pa.list_(pa.list_(pa.float16(), 4)))
    export(pairs, tmp_path / "parquet", "parquet", show=False)
    rows = [
        r for f in sorted((tmp_path / "parquet").glob("*.parquet")) for r in pq.read_table(f)["dr_image"].to_pylist()
    ]
    assert rows == [v.tolist() for v in vectors]


def test_export_of_a_list_of_alt_texts(tmp_path):
    create(tmp_path / "t.lance", [write_tar(tmp_path / "a.tar", sample(0))], alt="json:captions", show=False)
    first = Pairs.open(tmp_path / "t.lance")
    export(first, tmp_path / "out", show=False)
    create(tmp_path / "back.lance", [tmp_path / "out" / "00000.tar"], alt="json:alt", show=False)
    assert same(first, Pairs.open(tmp_path / "back.lance"), ["key", "image", "alt"])


def test_export_refuses_what_it_would_spoil(tmp_path, table):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("keep")
    for out, options, message in [
        (tmp_path / "mine", {}, "is not empty"), (tmp_path / "mine" / "a.txt", {}, "is a file"),
        (tmp_path / "x", {"format": "zip"}, "no format 'zip'; choose webdataset or parquet"),
        (tmp_path / "x", {"columns": ["nope"]}, "no column 'nope'"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            export(table, out, **options, show=False)
    assert not (tmp_path / "x").exists()
    create_from_rows(tmp_path / "t.lance", [{"key": k, "image": picture(0)} for k in ("a.b", "a_b")])
    with pytest.raises(DataError, match="'a_b' and another one give the same file name"):
        export(Pairs.open(tmp_path / "t.lance"), tmp_path / "y", show=False)


def test_export_goes_on_and_leaves_unreadable_pictures_out(tmp_path, table, shards):
    export(table, tmp_path / "out", shard_size=40, show=False)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / "00002.tar").unlink()
    (tmp_path / "out" / ".00002.tar.tmp").write_bytes(b"half")
    stamp = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    assert export(table, tmp_path / "out", shard_size=40, show=False).kept == 120
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.tar")} == whole
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="other pairs or settings"):
        export(table, tmp_path / "out", shard_size=50, show=False)

    (Path(shards).parent / "00001.tar").unlink()
    report = export(Pairs.open(table.path), tmp_path / "rest", show=False)
    assert (report.kept, report.bad) == (80, 40)
    assert "00001.tar: No such file" in report.reasons()


def test_importing_the_room_is_cheap():
    code = "import sys, cutline.pairs; print([m for m in ('lance', 'pyarrow', 'torch', 'PIL', 'pydantic') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
