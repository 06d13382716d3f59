"""Reading a table, filters, versions, and adding columns to it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from pairs_made import picture, sample, write_tar

from cutline.errors import DataError
from cutline.pairs import Pairs, Provenance, create, create_from_rows


def test_read_keeps_order_and_repeats(table):
    rows = [119, 3, 3, 0, 77]
    got = table.read(rows, ["image", "key"])
    assert [r["key"] for r in got] == [f"{n:06d}" for n in rows]
    assert [r["image"] for r in got] == [picture(n % 50) for n in rows]
    assert table.read([], ["key"]) == []
    assert table.read(np.array([1, 2]), ["alt"]) == [{"alt": "alt 1"}, {"alt": "alt 2"}]


def test_read_refuses_what_is_not_there(table):
    with pytest.raises(DataError, match=r"no column 'altt'; it has key, image, width, height, alt, captions, score"):
        table.read([0], ["altt"])
    for row in (-1, 120):
        with pytest.raises(IndexError):
            table.read([row], ["key"])
    with pytest.raises(DataError, match="no table of pairs.*cutline pairs create"):
        Pairs.open("nowhere.lance")


def test_read_from_many_threads(table):
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 120, 30).tolist() for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda rows: table.read(rows, ["key", "image"]), batches))
    for rows, got in zip(batches, results, strict=True):
        assert [(r["key"], r["image"]) for r in got] == [(f"{n:06d}", picture(n % 50)) for n in rows]


def test_a_deleted_or_shortened_shard_costs_only_its_rows(table, shards):
    folder = Path(shards).parent
    (folder / "00001.tar").unlink()
    (folder / "00002.tar").write_bytes((folder / "00002.tar").read_bytes()[:4000])
    got = table.read([0, 40, 119], ["key", "image"])
    assert got[0] == {"key": "000000", "image": picture(0)}
    assert got[1]["image"] is None
    assert "00001.tar: No such file" in got[1]["error"]
    assert got[2]["image"] is None
    assert "it ends before byte" in got[2]["error"]


def test_pictures_inside_and_outside_the_table_can_be_mixed(tmp_path, monkeypatch):
    """Rows of one read may lie in tars, in files, in the table, and in the table's side files (larger ones)."""
    big = picture(1, "PNG", (600, 400))
    assert len(big) > 70_000
    monkeypatch.setattr("cutline.pairs.pictures.OPEN_FILES", 1)
    rows = [{"key": f"{i}", "image": [picture(0), big][i % 2]} for i in range(4)]
    create_from_rows(tmp_path / "t.lance", rows)
    tars = [write_tar(tmp_path / f"{i}.tar", sample(i)) for i in range(3)]
    (tmp_path / "ü #%.jpg").write_bytes(picture(9))
    uris = [lance.Blob.from_uri(t.as_uri(), 512, len(picture(i))) for i, t in enumerate(tars)]
    uris += [lance.Blob.from_uri((tmp_path / "ü #%.jpg").as_uri()), None]
    schema = lance.dataset(str(tmp_path / "t.lance")).schema
    more = pa.table(
        [pa.array(list("abcde")), lance.blob_array(uris), *(pa.nulls(5, f.type) for f in list(schema)[2:])],
        schema=schema,
    )
    lance.write_dataset(more, str(tmp_path / "t.lance"), mode="append", allow_external_blob_outside_bases=True)
    order = [8, 3, 6, 0, 7, 4, 5, 1, 2]
    expected = [picture(0), big, picture(0), big, picture(0), picture(1), picture(2), picture(9), None]
    for rows_a_file, loaded in ((16, False), (0, True)):  # places asked of Lance, and loaded for the whole table
        monkeypatch.setattr("cutline.pairs.pictures.ROWS_A_FILE", rows_a_file)
        pairs = Pairs.open(tmp_path / "t.lance")
        for _ in range(3):
            assert [r["image"] for r in pairs.read(order, ["image"])] == [expected[i] for i in order]
        assert (pairs._readers["image"].places is not None) == loaded


def test_where(table):
    some = table.where("score >= 50 AND alt LIKE '%1%'")
    expected = [n for n in range(100, 120) if "1" in str(n)]
    assert [r["key"] for r in some.read(range(len(some)), ["key"])] == [f"{n:06d}" for n in expected]
    assert some.read([3], ["image"]) == [{"image": picture(expected[3] % 50)}]
    assert len(some.where("score < 52")) == 4
    assert len(Pairs.open(table.path, where="score < 2")) == 4
    assert len(table.where("score < 0")) == 0
    assert table.where("score < 2").fingerprint != table.fingerprint
    for bad in ("scor < 2", "score <", "alt = 1 +", "image = 'x'"):
        with pytest.raises(DataError, match=r"Columns to filter by: key, width, height, alt, captions, score\."):
            table.where(bad)


def test_where_counts_rows_past_deleted_ones(table):
    lance.dataset(table.path).delete("key IN ('000003', '000050')")
    some = Pairs.open(table.path).where("score > 1")
    assert len(some) == 115
    assert [r["key"] for r in some.read([0, 1, 114], ["key"])] == ["000004", "000005", "000119"]


def test_added_values_with_provenance_and_old_versions(table):
    provenance = Provenance(
        how="score", model="m@1", prompt="p", sampling={"t": 0.2}, inputs=["alt"], settings={"k": [1]}
    )
    new = table.add_column("rank", np.arange(120), provenance=provenance)
    assert new.read([7, 0], ["rank"]) == [{"rank": 7}, {"rank": 0}]
    assert new.provenance("rank") == provenance
    assert new.provenance("alt").how == "create"
    assert new.fingerprint != table.fingerprint
    assert "rank" not in table.columns  # as it was opened
    old = Pairs.open(table.path, version=table.version)
    assert (old.columns, old.fingerprint) == (table.columns, table.fingerprint)
    assert [v.number for v in new.versions()][-2:] == [table.version, new.version]
    with pytest.raises(DataError, match="has no version 99; the last are 1, 2"):
        Pairs.open(table.path, version=99)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([["a"], [], None] * 40, None, [["a"], [], None]),
        ([np.full(4, i, np.float16) for i in range(120)], None, np.zeros(4)),
        ([None, 1, 2] * 40, "float32", [None, 1.0, 2.0]),
        ([None, b"\0x", b""] * 40, "blob", [None, b"\0x", b""]),
        (pa.array(["x", "y", None] * 40), None, ["x", "y", None]),
        ([[1.0, 2.0]] * 120, "float16[2]", np.array([1.0, 2.0])),
    ],
)
def test_kinds_of_values(table, values, kind, expected):
    new = table.add_column("v", values, type=kind)
    got = [r["v"] for r in new.read(range(3), ["v"])]
    if isinstance(expected, np.ndarray):
        assert got[0].dtype == np.float16
        np.testing.assert_array_equal(got[0], expected)
    else:
        assert got == expected
    assert new.fingerprint != table.fingerprint


def test_a_function_of_a_column_that_is_not_there_is_refused(table):
    with pytest.raises(DataError, match="has no column 'nope'; it has key"):
        table.add_column("v", lambda rows: [0] * len(rows), columns=["nope"], show=False)


def test_vectors_that_some_rows_lack_stay_vectors(table):
    new = table.add_column("v", [None if i % 3 else np.full(4, i, np.float16) for i in range(120)])
    assert new.schema.field("v").type == pa.list_(pa.float16(), 4)
    got = [r["v"] for r in new.read(range(4), ["v"])]
    assert got[1:3] == [None, None]
    np.testing.assert_array_equal(np.stack([got[0], got[3]]), np.array([[0.0] * 4, [3.0] * 4], np.float16))


def test_values_that_do_not_fit_are_refused(table):
    for values, kind, message in [
        (range(119), None, "119 values .* where 120 rows"),
        ([None] * 120, None, "type is not known"),
        (["x"] * 120, "int64", r"cannot be stored as int64.*Give type="),
        ([1, "x"] * 60, None, "cannot be stored"),
        ([1] * 120, "integer", "no column type is called 'integer'"),
    ]:
        with pytest.raises(DataError, match=message):
            table.add_column("v", values, type=kind)
    for name in ("key", "alt"):
        with pytest.raises(DataError, match=f"has a column '{name}' already.*drop"):
            table.add_column(name, range(120))
    with pytest.raises(DataError, match="cannot be the name"):
        table.add_column("a.b", range(120))
    with pytest.raises(DataError, match="must cover the whole table"):
        table.where("score > 2").add_column("v", [1])
    assert Pairs.open(table.path).columns == table.columns


def test_drop_and_replace(table):
    new = table.add_column("v", range(120))
    gone = new.drop("v")
    assert "v" not in gone.columns
    assert gone.fingerprint == table.fingerprint
    assert gone.add_column("v", ["x"] * 120).read([0], ["v"]) == [{"v": "x"}]
    assert Pairs.open(table.path, version=new.version).read([5], ["v"]) == [{"v": 5}]
    with pytest.raises(DataError, match="cannot be dropped"):
        table.drop("image")
    with pytest.raises(DataError, match="no column 'w'"):
        table.drop("w")


def test_function_over_rows(table, monkeypatch):
    monkeypatch.setattr("cutline.pairs.columns.PIECE", 50)
    sizes = []

    def made(rows):
        sizes.append(len(rows))
        assert set(rows[0]) == {"image", "alt"}
        return [f"{len(r['image'])} {r['alt']}" for r in rows]

    new = table.add_column("made", made, columns=["image", "alt"], batch=20, show=False)
    assert sizes == [20, 20, 10, 20, 20, 10, 20]
    assert [r["made"] for r in new.read(range(120), ["made"])] == [
        f"{len(picture(n % 50))} alt {n}" for n in range(120)
    ]


def test_function_over_a_filtered_table_leaves_the_rest_null(table, monkeypatch):
    monkeypatch.setattr("cutline.pairs.columns.PIECE", 50)
    some = table.where("score >= 10 AND score < 35")
    new = some.add_column("made", lambda rows: [r["key"] for r in rows], show=False)
    assert len(new) == 50  # with the same filter
    whole = Pairs.open(table.path)
    got = [r["made"] for r in whole.read(range(120), ["made"])]
    assert got == [f"{n:06d}" if 20 <= n < 70 else None for n in range(120)]


def test_function_that_gives_too_few_values_is_refused(table):
    with pytest.raises(DataError, match=r"255 values|119 values"):
        table.add_column("v", lambda rows: [1] * (len(rows) - 1), show=False)
    assert Pairs.open(table.path).columns == table.columns


def test_two_writers_of_two_columns_both_succeed(table):
    meet = threading.Barrier(2)

    def write(name):
        def made(rows):
            if rows[0]["key"] == "000000":
                meet.wait()
            return [f"{name} {r['key']}" for r in rows]

        Pairs.open(table.path).add_column(name, made, show=False)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["a", "b"]))
    rows = Pairs.open(table.path).read(range(120), ["a", "b"])
    assert rows == [{"a": f"a {n:06d}", "b": f"b {n:06d}"} for n in range(120)]


def test_a_writer_overtaken_at_every_try_says_so_and_loses_nothing(table, monkeypatch):
    """The commit of another program between our reading of the table and our commit is a conflict each time."""
    from cutline.pairs import columns

    monkeypatch.setattr(columns, "TRIES", 2)
    real, n = lance.LanceDataset.add_columns, [0]

    def overtaken(self, *args, **options):
        n[0] += 1
        real(lance.dataset(table.path), pa.field(f"other{n[0]}", pa.int32()))
        return real(self, *args, **options)

    with monkeypatch.context() as m:
        m.setattr(lance.LanceDataset, "add_columns", overtaken)
        with pytest.raises(DataError, match="other writers changed"):
            table.add_column("v", lambda rows: [r["key"] for r in rows], show=False)
    again = table.add_column("v", lambda rows: pytest.fail("made again"), show=False)
    assert again.read([119], ["v", "other2"]) == [{"v": "000119", "other2": None}]


def test_rows_changed_meanwhile_are_noticed(table):
    def made(rows):
        lance.dataset(table.path).delete("key = '000001'")
        return [1] * len(rows)

    with pytest.raises(DataError, match="rows of .* were changed by another program"):
        table.add_column("v", made, show=False)
    assert Pairs.open(table.path).fingerprint != table.fingerprint


def test_info_prints_what_there_is(table):
    from rich.console import Console

    new = table.add_column("score2", range(120), provenance=Provenance(how="score", model="m@1", inputs=["alt"]))
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(new.info())
    text = console.export_text()
    for part in ("120 pairs", new.fingerprint, "score · m@1 · alt", "list<string>", "00002.tar", "float64", "picture"):
        assert part in text.replace("double", "float64"), part


def test_create_inside_a_where_of_nothing(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample(0))
    create(tmp_path / "t.lance", [path], show=False)
    nothing = Pairs.open(tmp_path / "t.lance", where="width < 0")
    assert len(nothing) == 0
    assert nothing.read([], ["image"]) == []
