"""Folders, tables of paths, COCO captions and Hugging Face datasets as sources."""

import csv
import json
import os
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pairs_made import picture

from cutline.errors import DataError
from cutline.pairs import Pairs, create


def rows(out: Path, columns=("key", "image", "alt")) -> list[dict]:
    pairs = Pairs.open(out)
    return pairs.read(range(len(pairs)), list(columns))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures in two subfolders, one with a name that URIs must escape."""
    for i, name in enumerate(["b/x 1#%.jpg", "a/é.jpg", "a/v1.2.png"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, "PNG" if name.endswith("png") else "JPEG"))
    return tmp_path / "photos"


def test_folder_with_texts_beside_the_pictures(tmp_path, folder):
    (folder / "b" / "x 1#%.txt").write_text(" one \n")
    (folder / "a" / "é.txt").write_text("two")
    (folder / "a" / "é.json").write_text('{"who": {"name": "me"}, "captions": ["p", "q"]}')
    (folder / "a" / "v1.2.txt").write_text("three")
    (folder / "a" / ".hidden.jpg").write_bytes(b"x")
    create(tmp_path / "t.lance", [folder], captions="json:captions", fields={"who": "json:who.name"}, show=False)
    assert rows(tmp_path / "t.lance", ["key", "image", "alt", "captions", "who"]) == [
        {"key": "a/v1.2", "image": picture(2, "PNG"), "alt": "three", "captions": None, "who": None},
        {"key": "a/é", "image": picture(1), "alt": "two", "captions": ["p", "q"], "who": "me"},
        {"key": "b/x 1#%", "image": picture(0), "alt": "one", "captions": None, "who": None},
    ]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("beside", [True, False])
def test_table_of_paths(tmp_path, folder, suffix, beside):
    """The same rows in each kind of table, in the folder or named as the source."""
    table = folder / f"metadata.{suffix}"
    names = ["b/x 1#%.jpg", "a/é.jpg", "a/none.jpg"]
    data = [{"file_name": n, "text": f'say "{i}", ünï', "licence": "CC0"} for i, n in enumerate(names)]
    if suffix == "jsonl":
        table.write_text("\n".join(json.dumps(d) for d in data) + "\n\n", encoding="utf-8")
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(data), table)
    else:
        with open(table, "w", newline="", encoding="utf-8-sig") as f:
            writer = csv.DictWriter(f, list(data[0]), delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(data)
    report = create(
        tmp_path / "t.lance", [folder if beside else table], fields={"licence": "licence"}, max_bad=0.5, show=False
    )
    assert rows(tmp_path / "t.lance", ["key", "image", "alt", "licence"]) == [
        {"key": "b/x 1#%", "image": picture(0), "alt": 'say "0", ünï', "licence": "CC0"},
        {"key": "a/é", "image": picture(1), "alt": 'say "1", ünï', "licence": "CC0"},
    ]
    (reason,) = report.skipped
    assert reason.startswith("picture file cannot be read")
    with pytest.raises(DataError, match="has no column 'title'; it has file_name, text, licence"):
        create(tmp_path / "u.lance", [table], alt="title", show=False)


def test_jsonl_rows_may_leave_out_keys(tmp_path, folder):
    data = [{"licence": "CC0"}, {"image": "a/é.jpg"}, {"image": "b/x 1#%.jpg", "key": "k", "captions": ["p", "q"]}]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, data)))
    create(tmp_path / "t.lance", [folder], need_text=False, max_bad=0.5, show=False)
    assert rows(tmp_path / "t.lance", ["key", "captions"]) == [
        {"key": "a/é", "captions": None}, {"key": "k", "captions": ["p", "q"]}
    ]  # fmt: skip


def test_several_rows_of_one_picture_become_its_captions(tmp_path, folder):
    (folder / "captions.csv").write_text("image,caption\na/é.jpg,one\na/é.jpg, two \nb/x 1#%.jpg,three\n")
    create(tmp_path / "t.lance", [folder / "captions.csv"], captions="caption", show=False)
    assert rows(tmp_path / "t.lance", ["key", "alt", "captions"]) == [
        {"key": "a/é", "alt": "one", "captions": ["one", "two"]},
        {"key": "b/x 1#%", "alt": "three", "captions": ["three"]},
    ]
    report = create(tmp_path / "u.lance", [folder / "captions.csv"], show=False)
    assert "several rows for one picture" in next(iter(report.repaired))


def test_table_text_that_is_not_utf8(tmp_path, folder):
    (folder / "t.csv").write_bytes(b"image,caption\nb/x 1#%.jpg,caf\xe9\n")
    report = create(tmp_path / "t.lance", [folder / "t.csv"], show=False)
    assert rows(tmp_path / "t.lance", ["alt"]) == [{"alt": "caf\ufffd"}]
    assert report.repaired["text is not UTF-8: bad bytes replaced"].n == 1


def test_parquet_that_holds_the_pictures(tmp_path):
    for name, cell in {"plain": lambda b: b, "hf": lambda b: {"bytes": b, "path": None}}.items():
        data = [{"id": i, "image": cell(picture(i)), "caption": f"c{i}"} for i in range(4)]
        data[2]["image"] = None
        pq.write_table(pa.Table.from_pylist(data), tmp_path / f"{name}.parquet")
        report = create(tmp_path / f"{name}.lance", [tmp_path / f"{name}.parquet"], max_bad=0.5, show=False)
        assert rows(tmp_path / f"{name}.lance") == [
            {"key": str(i), "image": picture(i), "alt": f"c{i}"} for i in (0, 1, 3)
        ]
        assert report.skipped["no picture"].n == 1


def test_dates_of_a_parquet_are_plain_text(tmp_path):
    data = [{"image": picture(0), "text": "x", "date": date(2020, 1, 2), "more": {"at": date(2020, 1, 2)}}]
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "t.parquet")
    fields = {name: name for name in ("date", "more")}
    create(tmp_path / "t.lance", [tmp_path / "t.parquet"], fields=fields, show=False)
    assert rows(tmp_path / "t.lance", list(fields)) == [{"date": "2020-01-02", "more": '{"at": "2020-01-02"}'}]


def test_keys_of_tables_are_prefixed_too(tmp_path):
    for name in "xy":
        data = [{"id": i, "image": picture(i), "caption": f"c{i}"} for i in range(2)]
        pq.write_table(pa.Table.from_pylist(data), tmp_path / f"{name}.parquet")
    create(tmp_path / "t.lance", [str(tmp_path / "?.parquet")], prefix_keys=True, show=False)
    assert [r["key"] for r in rows(tmp_path / "t.lance", ["key"])] == ["x/0", "x/1", "y/0", "y/1"]


def test_tables_that_do_not_name_pictures(tmp_path, folder):
    (tmp_path / "urls.csv").write_text("image,caption\nhttps://example.org/a.jpg,x\n")
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("image,caption\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    for name, message in [
        ("urls.csv", "holds URLs.*img2dataset"), ("none.csv", "it has a, b.*--image"), ("empty.csv", "has no rows"),
        ("broken.parquet", "not a parquet file"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            create(tmp_path / "t.lance", [tmp_path / name], show=False)
    (folder / "own.csv").write_text("photo,caption\na/é.jpg,x\n")
    create(tmp_path / "t.lance", [folder / "own.csv"], image="photo", show=False)
    assert rows(tmp_path / "t.lance", ["key"]) == [{"key": "a/é"}]


def coco(folder: Path, given: str = "") -> str:
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "license": i} for i in (7, 3, 5)],
        "annotations": [{"image_id": i, "caption": f" {c} {i}"} for c in "ab" for i in (3, 7)],
    }
    path = folder / "annotations" / "captions_val2017.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    for i in (7, 3, 5):
        (folder / "val2017").mkdir(exist_ok=True)
        (folder / "val2017" / f"{i}.jpg").write_bytes(picture(i))
    return f"coco:{path}{given}"


def test_names_and_keys_that_utf8_cannot_hold(tmp_path, folder):
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(picture(0))
    report = create(tmp_path / "f.lance", [folder], need_text=False, max_bad=0.5, show=False)
    assert report.skipped["picture file cannot be read (its name is not UTF-8)"].n == 1
    table = folder / "t.jsonl"
    lines = [
        '{"image": "a/é.jpg", "id": "\\ud800x"}',
        '{"image": "a\\u0000.jpg", "id": "y"}',
        '{"image": ".", "id": "z"}',
    ]
    table.write_text("\n".join(lines))
    report = create(tmp_path / "t.lance", [table], need_text=False, max_bad=0.9, show=False)
    assert [row["key"] for row in rows(tmp_path / "t.lance", ["key"])] == ["?x"]
    assert report.skipped["picture file cannot be read (No such file or directory)"].n == 2


def test_a_folder_that_links_to_itself_is_read_once(tmp_path, folder):
    (folder / "a" / "me").symlink_to(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "y.jpg").write_bytes(picture(5))
    (tmp_path / "other" / "back").symlink_to(folder)
    (folder / "c").symlink_to(tmp_path / "other")
    create(tmp_path / "t.lance", [folder], need_text=False, show=False)
    assert [r["key"] for r in rows(tmp_path / "t.lance", ["key"])] == ["a/v1.2", "a/é", "b/x 1#%", "c/y"]


def test_a_named_field_that_no_pair_has_is_told(tmp_path, folder):
    (folder / "a" / "é.txt").write_text("two")
    create(tmp_path / "t.lance", [folder], captions="json:captoins", fields={"order": "json:x"}, max_bad=1, show=False)
    told = Pairs.open(tmp_path / "t.lance").report.repaired["field found in no pair: its column is empty"]
    assert [e.split(" (")[0] for e in told.examples] == ["json:captoins for captions", "json:x for order"]


def test_csv_with_too_many_cells_or_an_open_quote(tmp_path, folder):
    table = folder / "t.csv"
    table.write_text("image,text\na/é.jpg,a dog, running\n")
    report = create(tmp_path / "t.lance", [table], show=False)
    assert report.repaired["row has more cells than columns: the last ones left out"].examples == ["line 2 (t.csv)"]
    table.write_text('image,text\na/é.jpg,"' + "x" * 200_000)
    with pytest.raises(DataError, match="Is a quote not closed there"):
        create(tmp_path / "u.lance", [table], show=False)


@pytest.mark.parametrize("content", [{"images": [{"id": 1}], "annotations": []},
                                     {"images": [{"file_name": "x"}], "annotations": [{"caption": "y"}]}])  # fmt: skip
def test_json_that_is_not_coco(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="is not COCO JSON"):
        create(tmp_path / "t.lance", [f"coco:{tmp_path / 'a.json'}"], show=False)


def test_coco_captions(tmp_path):
    source = coco(tmp_path / "coco")
    report = create(tmp_path / "t.lance", [source], fields={"licence": "license"}, max_bad=0.5, show=False)
    assert rows(tmp_path / "t.lance", ["key", "image", "alt", "captions", "licence"]) == [
        {"key": str(i), "image": picture(i), "alt": None, "captions": [f"a {i}", f"b {i}"], "licence": i}
        for i in (7, 3)
    ]
    assert report.skipped["no text"].examples == ["5 (captions_val2017.json)"]
    with pytest.raises(DataError, match="Name their folder: coco:"):
        create(tmp_path / "u.lance", [f"{source},{tmp_path}"], show=False)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(DataError, match="not COCO JSON"):
        create(tmp_path / "u.lance", [f"coco:{tmp_path}/bad.json"], show=False)


def test_coco_file_names_that_name_no_file_are_counted(tmp_path):
    source = coco(tmp_path / "coco")
    path = Path(source.removeprefix("coco:"))
    content = json.loads(path.read_text())
    content["images"] += [{"id": 8, "file_name": name} for name in ("", "a\0.jpg", "\ud800.jpg")]
    path.write_text(json.dumps(content))
    for inline in (False, True):
        out = tmp_path / f"{inline}.lance"
        report = create(out, [source], inline=inline, need_text=False, max_bad=0.5, show=False)
        assert (report.kept, sum(c.n for c in report.skipped.values())) == (3, 3)


def test_coco_instances_have_no_captions(tmp_path, real_data):
    source = f"coco:{real_data}/coco_small/instances_val2017.json"
    with pytest.raises(DataError, match=r"no pair was found|no text"):
        create(tmp_path / "t.lance", [source], show=False)
    assert create(tmp_path / "t.lance", [source], need_text=False, show=False).kept == 128
    first = Pairs.open(tmp_path / "t.lance").read([0], ["key", "image", "width", "height"])[0]
    folder = real_data / "coco_small" / "val2017"
    assert first["image"] == (folder / f"{first['key']}.jpg").read_bytes()


def test_hugging_face_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "p.jpg").write_bytes(picture(2))
    cells = [
        {"bytes": picture(0), "path": None},
        {"bytes": picture(1, "PNG"), "path": "x.png"},
        str(tmp_path / "p.jpg"),
        None,
    ]
    features = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string"),
                                  "captions": datasets.Sequence(datasets.Value("string"))})  # fmt: skip
    data = datasets.Dataset.from_dict(
        {"photo": cells, "text": ["a ", "b", "c", "d"], "captions": [["x", "y"], [], ["z"], None]}, features=features
    )
    datasets.DatasetDict({"train": data.select([3]), "val": data}).save_to_disk(tmp_path / "hf")
    report = create(tmp_path / "t.lance", [f"hf:{tmp_path / 'hf'}:val"], max_bad=0.5, show=False)
    assert rows(tmp_path / "t.lance", ["key", "image", "alt", "captions"]) == [
        {"key": "00000000", "image": picture(0), "alt": "a", "captions": ["x", "y"]},
        {"key": "00000001", "image": picture(1, "PNG"), "alt": "b", "captions": None},
        {"key": "00000002", "image": picture(2), "alt": "c", "captions": ["z"]},
    ]
    assert report.skipped["no picture"].n == 1
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        create(tmp_path / "u.lance", [f"hf:{tmp_path / 'hf'}:test"], show=False)
    with pytest.raises(DataError, match="cannot load the Hugging Face dataset"):
        create(tmp_path / "u.lance", [f"hf:{tmp_path / 'no'}"], show=False)


def test_hugging_face_columns_of_paths(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "p.jpg").write_bytes(picture(0))
    files = [str(tmp_path / "p.jpg"), str(tmp_path / "none.jpg"), "", "a\0b"]
    data = {"file": files, "number": [1] * 4, "text": ["a"] * 4}
    datasets.Dataset.from_dict(data).save_to_disk(tmp_path / "hf")
    report = create(tmp_path / "t.lance", [f"hf:{tmp_path / 'hf'}"], image="file", max_bad=1, show=False)
    assert rows(tmp_path / "t.lance") == [{"key": "00000000", "image": picture(0), "alt": "a"}]
    assert {reason: c.n for reason, c in report.skipped.items()} == {
        "picture file cannot be read (No such file or directory)": 1, "no picture": 1,
        "picture file cannot be read (its name is no file name)": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"no picture \(4,"):
        create(tmp_path / "u.lance", [f"hf:{tmp_path / 'hf'}"], image="number", show=False)


def test_sources_of_several_kinds_in_one_table(tmp_path, folder, shards):
    for name in ("b/x 1#%", "a/é", "a/v1.2"):
        (folder / f"{name}.txt").write_text(name)
    report = create(tmp_path / "t.lance", [folder, shards], show=False)
    assert report.kept == 123
    assert rows(tmp_path / "t.lance", ["key", "alt"])[-1] == {"key": "b/x 1#%", "alt": "b/x 1#%"}
