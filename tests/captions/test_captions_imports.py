"""Captions of others, joined by id or URL from the formats they are published in."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pairs_made import picture

from cutline.captions import imports
from cutline.captions.imports import import_captions, json_items
from cutline.errors import DataError
from cutline.pairs import Pairs, create_from_rows


def url(n: int) -> str:
    return f"https://example.org/{n}.jpg?a=1,2:3"


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    """Twelve rows; the URL of the last two is the same, and one has none."""
    rows = [
        {"key": f"k{n}", "image": picture(n), "alt": "a", "url": None if n == 5 else url(min(n, 10)), "number": 100 + n}
        for n in range(12)
    ]
    create_from_rows(tmp_path / "t.lance", rows)
    return Pairs.open(tmp_path / "t.lance")


def column(pairs: Pairs, name: str) -> list[Any]:
    found = Pairs.open(pairs.path)
    return [r[name] for r in found.read(range(len(found)), [name])]


# (id, caption): of rows 3, 0, 7, of none, of row 0 again, of row 2 without a text, of rows 10 and 11
ENTRIES = [(url(3), " three "), (url(0), "zero"), (url(7), "seven"), (url(99), "none"), (url(0), "again"), (url(2), " "), (url(10), "ten")]  # fmt: skip
EXPECTED = ["zero", None, None, "three", None, None, None, "seven", None, None, "ten", "ten"]


def written(folder: Path, kind: str) -> list[str]:
    """The entries in two files of a kind."""
    paths = []
    for i, part in enumerate((ENTRIES[:4], ENTRIES[4:])):
        path = folder / f"{i}.{kind.split()[0]}"
        records = [{"sha256": "x", "url": u, "re_caption": c} for u, c in part]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(r) + "\n" for r in records))
        elif kind == "csv":
            path.write_text("url,re_caption\n" + "".join(f'"{u}","{c}"\n' for u, c in part))
        elif kind == "json list":
            path.write_text(json.dumps(records, indent=1))
        elif kind == "json object":  # as VeCap has it
            path.write_text(json.dumps(dict(part)))
        else:
            path.write_text(json.dumps({r.pop("url"): r for r in records}))
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("block", [2, 65_536])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "json list", "json object", "json object of objects"])
def test_captions_are_joined_whatever_the_format(
    pairs: Pairs, tmp_path: Path, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "BLOCK", block)
    monkeypatch.setattr(imports, "CHUNK", 7 if block == 2 else 1 << 20)
    report = import_captions(pairs, written(tmp_path, kind), "url", "re_caption", "caption_recap", show=False)
    assert column(pairs, "caption_recap") == EXPECTED
    assert (report.filled, report.captions, report.unmatched, report.duplicates) == (5, 6, 1, 1)
    assert {why: c.n for why, c in report.skipped.items()} == {"no text": 1}
    assert "5 of 12 rows have a caption" in report.__rich__()
    provenance = Pairs.open(pairs.path).provenance("caption_recap")
    assert provenance is not None
    assert (provenance.how, provenance.inputs, provenance.settings["field"]) == (
        "caption import",
        ["url"],
        "re_caption",
    )


def test_several_captions_of_a_row_make_a_column_of_lists(pairs: Pairs, tmp_path: Path) -> None:
    records = [{"id": 103, "texts": ["a", None, " b\n"]}, {"id": 101, "texts": "c"}, {"id": "102", "texts": []}]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, records)))
    report = import_captions(pairs, [str(tmp_path / "f.jsonl")], "number", "texts", "many", id_field="id", show=False)
    assert column(pairs, "many")[:5] == [None, ["c"], None, ["a", "b"], None]
    assert report.filled == 2
    table = pa.table({"id": [103, 101, None], "texts": [["x", "y"], ["z"], ["w"]]})
    pq.write_table(table, tmp_path / "f.parquet")
    report = import_captions(pairs, [str(tmp_path / "f.parquet")], "number", "texts", "more", id_field="id", show=False)
    assert column(pairs, "more")[:4] == [None, ["z"], None, ["x", "y"]]
    assert report.skipped["no id"].n == 1


def test_rows_outside_the_filter_stay_null(pairs: Pairs, tmp_path: Path) -> None:
    files = written(tmp_path, "parquet")
    report = import_captions(pairs.where("key != 'k0' AND key != 'k11'"), files, "url", "re_caption", "c", show=False)
    assert column(pairs, "c") == [None, *EXPECTED[1:11], None]
    assert (report.rows, report.filled) == (10, 3)


def test_broken_records_and_a_file_cut_off_are_counted_by_name_and_the_rest_is_taken(
    pairs: Pairs, tmp_path: Path
) -> None:
    lines = [json.dumps({"url": u, "re_caption": c}) for u, c in ENTRIES]
    (tmp_path / "a.jsonl").write_bytes("\n".join([lines[0], "{broken", lines[1], "[]"]).encode() + b"\n\xff")
    (tmp_path / "b.json").write_text(json.dumps(dict(ENTRIES[2:]))[:-12])
    (tmp_path / "c.json").write_text('"a caption"')
    files = [str(tmp_path / n) for n in ("a.jsonl", "b.json", "c.json")]
    report = import_captions(pairs, files, "url", "re_caption", "c", show=False)
    assert column(pairs, "c") == [*EXPECTED[:10], None, None]
    assert report.skipped["line is not a JSON object"].n == 3
    lost = report.skipped["JSON cut off or broken: the rest of it is lost"]
    assert lost.n == 2
    assert "b.json: no value that can be read" in lost.examples[0]
    assert "c.json: it is neither a list nor an object" in lost.examples[1]


def test_captions_with_half_a_character_are_repaired(pairs: Pairs, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({url(1): "half \ud83d of a pair"}))
    import_captions(pairs, [str(tmp_path / "a.json")], "url", "re_caption", "c", show=False)
    assert column(pairs, "c")[1] == "half ? of a pair"


def test_what_cannot_be_joined_is_refused_and_the_table_is_as_it_was(pairs: Pairs, tmp_path: Path) -> None:
    files = written(tmp_path, "parquet")
    before = Pairs.open(pairs.path).version
    for options, message in {
        ("uid", "re_caption", "c"): "no column 'uid'",
        ("url", "caption", "c"): r"0\.parquet' has no field 'caption'; it has sha256, url, re_caption",
        ("url", "re_caption", "alt"): "has a column 'alt' already",
        ("url", "re_caption", "a b"): "'a b' cannot be the name of a column",
        ("key", "re_caption", "c"): r"has no field 'key'",
    }.items():
        with pytest.raises(DataError, match=message):
            import_captions(pairs, files, *options, show=False)
    with pytest.raises(DataError, match=r"none of 6 captions.*'number'.*such as 'https://example.org/3"):
        import_captions(pairs, files, "number", "re_caption", "c", id_field="url", show=False)
    with pytest.raises(DataError, match="no such file"):
        import_captions(pairs, [str(tmp_path / "*.tsv")], "url", "re_caption", "c", show=False)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a parquet file"):
        import_captions(pairs, [str(tmp_path / "bad.parquet")], "url", "re_caption", "c", show=False)
    assert Pairs.open(pairs.path).version == before


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_json_is_read_in_parts(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "CHUNK", chunk)
    for value in ([1, 23, 4.5, "a]", None, {"b": [2]}, [], True], {"a": 12, "b}": "x,:", "": {"c": []}}, [], {}):
        for text in (json.dumps(value), json.dumps(value, indent=2), f" \n{json.dumps(value)}\n"):
            expected = list(value.items()) if isinstance(value, dict) else [(None, v) for v in value]
            assert list(json_items(io.StringIO(text))) == expected


def test_files_of_other_formats_and_values_nested_too_deeply_are_told(pairs: Pairs, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a.jsonl.gz' is of no format.*Convert or unpack it first"):
        import_captions(pairs, [str(tmp_path / "a.jsonl.gz")], "url", "caption", "new", show=False)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="JSON cut off or broken"):
        import_captions(pairs, [str(tmp_path / "deep.json")], "url", "caption", "new", show=False)


@pytest.mark.parametrize("kind", [pa.large_list(pa.large_string()), pa.list_(pa.string(), 2)])
def test_every_kind_of_list_of_parquet_is_read(pairs: Pairs, tmp_path: Path, kind: pa.DataType) -> None:
    key = pairs.read([0], ["key"])[0]["key"]
    pq.write_table(pa.table({"key": [key], "caption": pa.array([["a dog", "a cat"]], kind)}), tmp_path / "f.parquet")
    import_captions(pairs, [str(tmp_path / "f.parquet")], "key", "caption", "new", show=False)
    assert Pairs.open(pairs.path).read([0], ["new"])[0]["new"] == ["a dog", "a cat"]
