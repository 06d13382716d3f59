"""`create`: what becomes of good and of bad sources."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pairs_made import picture, sample, write_tar

from cutline.errors import DataError
from cutline.pairs import IngestReport, Pairs, create, create_from_rows
from cutline.pairs.keys import prefixes
from cutline.pairs.sources import expand


def make(tmp_path: Path, members: list, **options) -> tuple[Pairs, IngestReport]:
    """A table of one tar, with any share of bad samples allowed."""
    path = write_tar(tmp_path / "in.tar", members, options.pop("form", tarfile.USTAR_FORMAT))
    options = {"captions": "json:captions", "max_bad": 1.0, "show": False, **options}
    report = create(tmp_path / "out.lance", [path], **options)
    return Pairs.open(tmp_path / "out.lance"), report


def counts(report: IngestReport) -> dict[str, int]:
    return {reason: c.n for reason, c in {**report.skipped, **report.lost, **report.repaired}.items()}


def test_flickr8k(tmp_path, real_data):
    shards = str(real_data / "flickr8k" / "{00000..00003}.tar")
    report = create(tmp_path / "f.lance", [shards], alt="txt", captions="json:captions", show=False)
    pairs = Pairs.open(tmp_path / "f.lance")
    assert report.kept == len(pairs) == 4000
    with tarfile.open(real_data / "flickr8k" / "00002.tar") as tar:
        names = tar.getnames()
        key = names[300].split(".")[0]
        image, text, rest = (tar.extractfile(f"{key}.{e}").read() for e in ("jpg", "txt", "json"))
    (row,) = pairs.where(f"key = '{key}'").read([0], ["key", "image", "width", "height", "alt", "captions"])
    assert row == {
        "key": key, "image": image, "width": 144, "height": 144, "alt": text.decode().strip(),
        "captions": [c.strip() for c in json.loads(rest)["captions"]],
    }  # fmt: skip
    size = sum(p.stat().st_size for p in (tmp_path / "f.lance").rglob("*") if p.is_file())
    assert size < 3_000_000  # of 38 MB of tars: no picture was copied


def test_columns_and_types(table):
    assert len(table) == 120
    assert {f.name: str(f.type) for f in table.schema if f.name != "image"} == {
        "key": "string", "width": "int32", "height": "int32", "alt": "string",
        "captions": "list<item: string>", "score": "double",
    }  # fmt: skip
    (row,) = table.read([77], table.columns)
    assert row == {
        "key": "000077", "image": picture(27), "width": 24, "height": 16, "alt": "alt 77",
        "captions": ["caption 77 a", "caption 77 b"], "score": 38.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a{00..02}.tar", ["a00.tar", "a01.tar", "a02.tar"]),
        ("{x,y}{1..2}", ["x1", "x2", "y1", "y2"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{008..011}", ["008", "009", "010", "011"]),
        ("no{brace}", ["no{brace}"]),
    ],
)
def test_brace_patterns(pattern, names):
    assert expand(pattern) == names


def test_text_is_repaired_and_counted(tmp_path):
    bad_json = json.dumps({"captions": ["ok", "", "  ", "tail \n", "half \ud83d"]}).encode()
    pairs, report = make(
        tmp_path,
        [
            *sample(0, txt=b"caf\xe9 au lait"),
            *sample(1, txt=b"  two dogs \n"),
            *sample(2, txt=b" \n"),
            *sample(3, json=b"{broken"),
            *sample(4, json=bad_json),
            *sample(5, json=b'{"captions": "one string"}'),
            *sample(6, json=b'{"captions": {"en": "x"}}'),
            *sample(7, txt="\ufeffwith a mark, ünïcode 犬".encode()),
        ],
    )
    rows = pairs.read(range(8), ["alt", "captions"])
    assert [r["alt"] for r in rows] == [
        "caf\ufffd au lait", "two dogs", None, "alt 3", "alt 4", "alt 5", "alt 6", "with a mark, ünïcode 犬",
    ]  # fmt: skip
    assert rows[3]["captions"] is None
    assert rows[4]["captions"] == ["ok", "tail", "half ?"]
    assert rows[5]["captions"] == ["one string"]
    assert rows[6]["captions"] is None
    assert counts(report) == {
        "text is not UTF-8: bad bytes replaced": 2, "stray spaces at the ends removed": 3,
        "empty text: taken as missing": 3, "JSON does not parse: taken as missing": 1,
        "text is a JSON object: taken as missing": 1,
    }  # fmt: skip


def test_samples_without_a_row_are_counted_with_examples(tmp_path):
    pairs, report = make(
        tmp_path,
        [
            *sample(0),
            *sample(1, jpg=None),
            *sample(2, txt=None, json=None),
            *sample(3, txt=b"", json=b"{}"),
            *sample(4, jpg=b""),
            *sample(5),
            *sample(0),
        ],
    )
    assert [r["key"] for r in pairs.read([0, 1], ["key"])] == ["000000", "000005"]
    assert counts(report) == {
        "no picture": 1, "no text": 2, "zero-byte picture": 1, "duplicate key": 1, "empty text: taken as missing": 1,
    }  # fmt: skip
    assert report.skipped["no text"].examples == ["000002 (in.tar)", "000003 (in.tar)"]
    assert pairs.report.skipped == report.skipped  # stored in the table


def test_pictures_without_text_stay_if_wished(tmp_path):
    pairs, report = make(tmp_path, sample(0, txt=None, json=None), need_text=False)
    assert pairs.read([0], ["alt", "captions"]) == [{"alt": None, "captions": None}]
    assert counts(report) == {"field found in no pair: its column is empty": 1}


def test_duplicate_keys_are_found_across_batches_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("cutline.pairs.ingest.BATCH", 7)
    monkeypatch.setattr("cutline.pairs.ingest.COMMIT", 7)
    a = write_tar(tmp_path / "a.tar", [m for n in range(20) for m in sample(n)])
    b = write_tar(tmp_path / "b.tar", [m for n in range(15, 40) for m in sample(n)])
    report = create(tmp_path / "t.lance", [a, b], max_bad=0.2, show=False)
    assert report.kept == 40
    assert counts(report) == {"duplicate key": 5}
    report = create(tmp_path / "u.lance", [a, b], prefix_keys=True, show=False)
    assert report.kept == 45
    assert Pairs.open(tmp_path / "u.lance").read([44], ["key"]) == [{"key": "b/000039"}]
    with pytest.raises(DataError, match="with --prefix-keys"):
        create(tmp_path / "v.lance", [a, b], max_bad=0, show=False)


def test_prefixes_of_keys_tell_files_of_the_same_name_apart(tmp_path):
    assert prefixes(["a/0.tar", "b/1.tar"]) == ["0/", "1/"]
    assert prefixes(["x/a/0.tar", "x/b/0.tar", "x/b/1.tar"]) == ["a/0/", "b/0/", "b/1/"]
    assert prefixes(["a/0.tar", "a/0.parquet"]) == ["0.tar/", "0.parquet/"]
    path = str(write_tar(tmp_path / "a.tar", sample(0)))
    with pytest.raises(DataError, match=r"duplicate key \(1, (?!.*prefix)"):
        create(tmp_path / "t.lance", [path, path], prefix_keys=True, show=False)


def test_truncated_tar_keeps_its_whole_samples(tmp_path):
    good = write_tar(tmp_path / "a.tar", [m for n in range(30) for m in sample(n)])
    raw = good.read_bytes()
    cut = tmp_path / "cut.tar"
    for at in (raw.find(b"000017.jpg") + 700, raw.find(b"000017.txt") + 515, raw.find(b"000017.json") + 100):
        cut.write_bytes(raw[:at])
        report = create(tmp_path / f"{at}.lance", [cut], captions="json:captions", show=False)
        kept = len(Pairs.open(tmp_path / f"{at}.lance"))
        assert kept in (17, 18)  # with its json gone, sample 17 still has a picture and alt text
        assert (kept == 18) == (at > raw.find(b"000017.json"))
        (reason,) = counts(report)
        assert "cut off" in reason
        assert "at byte" in report.skipped[reason].examples[0]


def test_too_many_bad_samples_stop_the_work_and_say_how_to_go_on(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample(0), *sample(1), *sample(2, txt=None)])
    with pytest.raises(DataError, match=r"1 of 3 samples \(33%\).*no text.*--max-bad"):
        create(tmp_path / "t.lance", [path], show=False)
    assert create(tmp_path / "t.lance", [path], max_bad=0.5, show=False).kept == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.txt", b"a"), ("2.txt", b"b")], "no picture"),
        ([], "no pair was found"),
        ([("1.jpg", picture(0))], "no text"),
    ],
)
def test_source_without_a_pair_leaves_nothing(tmp_path, members, message):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        create(tmp_path / "t.lance", [path], max_bad=1.0, show=False)
    assert not (tmp_path / "t.lance").exists()


def test_bad_sources_are_named(tmp_path, shards):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b" + bytes(20))
    write_tar(tmp_path / "00000.tar", sample(0))
    for source, message in [
        (str(tmp_path / "{00000..00002}.tar"), r"no such file: .*00001\.tar, .*00002\.tar .*1 others are there"),
        (str(tmp_path / "{3..1}.tar"), "names no file: the range in it must go up"),
        (str(tmp_path / "empty"), "no picture"),
        (str(tmp_path / "nothing"), "no such file or folder"),
        (str(tmp_path / "x.tar.gz"), "compressed .gzip"),
        (str(tmp_path / "*.parquet"), "no such file"),
        ("s3://bucket/a.tar", "remote"),
        (str(Path(shards).parent), r"holds tars.*\*\.tar"),
        (f"coco:{tmp_path}/none.json", "no such file"),
    ]:
        with pytest.raises(DataError, match=message):
            create(tmp_path / "t.lance", [source], show=False)
    assert not (tmp_path / "t.lance").exists()


def test_an_existing_table_or_folder_is_left_alone(tmp_path, table, shards):
    with pytest.raises(DataError, match=r"exists already \(120 pairs\)"):
        create(table.path, [shards], show=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(DataError, match="no table of pairs"):
        create(tmp_path / "mine", [shards], show=False)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert len(Pairs.open(table.path)) == 120


def test_inline_pictures_outlive_their_source(tmp_path):
    pairs, _ = make(tmp_path, [m for n in range(5) for m in sample(n)], inline=True)
    (tmp_path / "in.tar").unlink()
    assert [r["image"] for r in pairs.read([4, 0], ["image"])] == [picture(4), picture(0)]


def test_fields_keep_one_type(tmp_path):
    values = ["1", "2.5", '"text"', "null", "true", "99999999999999999999999"]
    members = [m for n, v in enumerate(values) for m in sample(n, json=f'{{"x": {v}, "y": {n}}}'.encode())]
    pairs, _ = make(tmp_path, members, captions=None, fields={"x": "json:x", "y": "json:y", "z": "json:none"})
    assert [r["y"] for r in pairs.read(range(6), ["y"])] == list(range(6))
    assert [r["x"] for r in pairs.read(range(6), ["x"])] == ["1", "2.5", "text", None, "true", values[5]]
    with pytest.raises(DataError, match="cannot be the name of a field"):
        create(tmp_path / "u.lance", [tmp_path / "in.tar"], fields={"key": "json:x"}, show=False)


def test_field_of_another_type_than_the_first_values_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("cutline.pairs.ingest.COMMIT", 2)
    members = [m for n, v in enumerate(["1", "2", "0.5", "4"]) for m in sample(n, json=f'{{"x": {v}}}'.encode())]
    pairs, report = make(tmp_path, members, captions=None, fields={"x": "json:x"})
    assert [r["x"] for r in pairs.read(range(4), ["x"])] == [1, 2, None, 4]
    assert counts(report) == {"a value of 'x' that is not int64: taken as missing": 1}
    assert pairs.report.lost == report.lost
    with pytest.raises(DataError, match=r"1 of 4 samples \(25%\) have a value of 'x' .*000002: 0\.5.*--max-bad 0\.26"):
        create(tmp_path / "u.lance", [tmp_path / "in.tar"], fields={"x": "json:x"}, max_bad=0.2, show=False)


def test_lists_that_come_after_single_values(tmp_path, monkeypatch):
    monkeypatch.setattr("cutline.pairs.ingest.COMMIT", 2)
    texts = ['"a"', '"b"', '["c"]', '["d", "e"]']
    members = [m for n, v in enumerate(texts) for m in sample(n, json=f'{{"x": {v}}}'.encode())]
    pairs, report = make(tmp_path, members, alt="json:x", captions="json:x", fields={"x": "json:x"})
    got = pairs.read(range(4), ["alt", "captions", "x"])
    assert [r["captions"] for r in got] == [["a"], ["b"], ["c"], ["d", "e"]]
    assert [r["alt"] for r in got] == [r["x"] for r in got] == ["a", "b", "c", "d"]
    assert counts(report) == {f"a list in {n!r}, which holds one value: first one kept": 1 for n in ("alt", "x")}


def test_types_are_those_of_a_whole_first_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("cutline.pairs.ingest.BATCH", 2)
    members = [m for n, v in enumerate([0, None, 0.5]) for m in sample(n, json=json.dumps({"x": v}).encode())]
    pairs, report = make(tmp_path, members, captions=None, fields={"x": "json:x"})
    assert [r["x"] for r in pairs.read(range(3), ["x"])] == [0.0, None, 0.5]
    assert not counts(report)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("size", [(40, 30), (300, 7)])
def test_sizes_come_from_the_headers(tmp_path, form, size):
    extension = {"JPEG": "jpg"}.get(form, form.lower())
    member = (f"a.{extension}", picture(1, form, size))
    pairs, _ = make(tmp_path, [member, ("a.txt", b"text")])
    (row,) = pairs.read([0], ["width", "height", "image"])
    assert (row["width"], row["height"], row["image"]) == (*size, member[1])


def test_size_of_a_jpeg_with_large_metadata_and_a_turn(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9286] = "x" * 30_000
    pairs, _ = make(tmp_path, [("a.jpg", picture(1, size=(40, 30), exif=exif)), ("a.txt", b"text")])
    assert pairs.read([0], ["width", "height"]) == [{"width": 30, "height": 40}]


def test_rows_made_by_a_program(tmp_path):
    rows = [
        {"key": f"s{i}", "image": picture(i, "PNG"), "alt": f" a{i}", "captions": ["x", f"y{i}"], "kind": "good"}
        for i in range(9)
    ]
    report = create_from_rows(tmp_path / "t.lance", iter(rows))
    pairs = Pairs.open(tmp_path / "t.lance")
    assert report.kept == 9
    assert pairs.columns == ["key", "image", "width", "height", "alt", "captions", "kind"]
    assert pairs.read([8], ["key", "image", "alt", "captions", "kind", "width"]) == [
        {"key": "s8", "image": picture(8, "PNG"), "alt": "a8", "captions": ["x", "y8"], "kind": "good", "width": 24}
    ]
    with pytest.raises(DataError, match="no rows"):
        create_from_rows(tmp_path / "u.lance", [])


def test_fingerprint_is_of_the_contents(tmp_path, shards, table):
    options = {"captions": "json:captions", "fields": {"score": "json:score"}, "show": False}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for shard in Path(shards).parent.iterdir():
        (moved / shard.name).write_bytes(shard.read_bytes())
    create(tmp_path / "same.lance", [str(moved / "*.tar")], **options)
    assert Pairs.open(tmp_path / "same.lance").fingerprint == table.fingerprint

    prints = {table.fingerprint}
    for name, change in {
        "text": {"txt": b"other"},
        "picture": {"jpg": picture(1234)},
        "caption": {"json": b"{}"},
    }.items():
        write_tar(moved / "00001.tar", [m for n in range(40, 80) for m in sample(n, **(change if n == 60 else {}))])
        create(tmp_path / f"{name}.lance", [str(moved / "*.tar")], **options)
        prints.add(Pairs.open(tmp_path / f"{name}.lance").fingerprint)
    assert len(prints) == 4


def test_keys_set_merges_its_runs():
    from cutline.pairs.keys import Keys

    keys, seen = Keys(), set()
    rng = np.random.default_rng(0)
    for _ in range(60):
        batch = [str(x) for x in rng.integers(0, 5000, 100)]
        expected = []
        for k in batch:
            expected.append(k not in seen)
            seen.add(k)
        assert keys.add(batch).tolist() == expected
    assert len(keys.runs) <= 13
