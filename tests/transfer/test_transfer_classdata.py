"""Data of classes: label fractions, folders, webdataset tars, tables, scenes; and what is wrong with them is told."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classes_made import THINGS, encoded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cutline.errors import CutlineError, DataError
from cutline.transfer.classify import ClassifyConfig, classify, fit
from cutline.transfer.data import labelled, open_data

QUICK: dict[str, Any] = {"steps": 8, "batch": 6, "lr": 3e-3, "layer_decay": 1.0}
Make = Callable[..., Path]


# Label fractions


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 99), st.data())
def test_fractions_are_nested_and_hold_every_class_in_proportion(sizes: list[int], seed: int, data: Any) -> None:
    classes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    count, kinds = len(classes), len(sizes)
    few = data.draw(st.integers(kinds, count))
    many = data.draw(st.integers(few, count))
    chosen = labelled(count, few, seed, classes)
    assert set(chosen) <= set(labelled(count, many, seed, classes))
    assert len(chosen) == few
    own = np.bincount(classes[chosen], minlength=kinds)
    assert own.min() >= 1
    if few >= 0.6 * count and min(sizes) >= 2:  # the first of each class are then no more than their share
        assert np.abs(own - few * np.array(sizes) / count).max() < 2


def test_fewer_pictures_than_classes_are_refused(folders: Make, encoder: Any) -> None:
    spec = f"imagefolder:{folders()}"
    with pytest.raises(DataError, match=r"labels=0.1 is 1 of 12 pictures.* each of the 3 classes.*labels=3 or more"):
        fit(encoder, spec, ClassifyConfig(**QUICK, labels=0.1))
    assert fit(encoder, spec, ClassifyConfig(**QUICK, labels=0.25)).labels == 3


# Kinds of data


def test_a_folder_of_classes(folders: Make) -> None:
    root = folders()
    (root / "train" / ".cache").mkdir()
    data = open_data(f"imagefolder:{root}", "classify")
    assert data.classes == ["apple", "leaf", "sea"]
    assert data.split("train").labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    sample = data.split("val").read(3)
    assert (sample.key, int(sample.target)) == ("leaf/101.jpg", 1)
    with Image.open(root / "val/leaf/101.jpg") as picture:
        assert (sample.image == np.array(picture)).all()
    before = data.fingerprint
    assert open_data(f"imagefolder:{root}", "classify").fingerprint == before
    (root / "val/leaf/101.jpg").write_bytes(encoded("leaf", 7))
    assert open_data(f"imagefolder:{root}", "classify").fingerprint != before


def test_a_class_that_is_called_as_a_part(folders: Make) -> None:
    root = folders() / "val"
    (root / "sea").rename(root / "train")
    data = open_data(f"imagefolder:{root}", "zeroshot")
    assert (data.classes, list(data.splits)) == (["apple", "leaf", "train"], ["all"])
    assert data.split("all").labels.tolist() == [0, 0, 1, 1, 2, 2]
    (root.parent / "meta").mkdir()  # a folder beside the parts that is no class
    assert list(open_data(f"imagefolder:{root.parent}", "zeroshot").splits) == ["val"]
    with pytest.raises(DataError, match="val/train holds pictures, and should hold a folder of them for each class"):
        open_data(f"imagefolder:{root}", "classify")
    (root / "train/steam").mkdir()
    with pytest.raises(DataError, match="train holds folders, as a part.* and apple, leaf pictures, as a class does"):
        open_data(f"imagefolder:{root}", "zeroshot")


def test_webdataset_as_clip_benchmark_lays_it_out(tars: Make) -> None:
    root = tars()
    data = open_data(f"webdataset:{root}", "classify")
    assert data.classes == list(THINGS)
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 24, "test": 6}
    train = data.split("train")
    assert train.labels.tolist() == [i % 3 for i in range(24)]
    for row in (0, 11, 12, 23):  # of both tars, both forms
        with tarfile.open(root / f"train/{row // 12}.tar") as tar:
            member = tar.extractfile(f"s{row:07d}.{'webp' if row % 2 else 'jpg'}")
            assert (train.read(row).image == np.array(Image.open(member).convert("RGB"))).all()
    assert open_data(f"webdataset:{tars(names=False)}", "classify").classes == list(THINGS)
    (root / "classnames.txt").unlink()
    assert open_data(f"webdataset:{root}", "classify").classes == ["0", "1", "2"]
    with pytest.raises(DataError, match="no split 'val'; it has train, test. Say which one"):
        data.split("val")


def test_a_share_of_train_is_held_out_by_key(tars: Make) -> None:
    root = tars()
    held = {
        share: set(open_data(f"webdataset:{root},val={share}", "classify").split("val").keys) for share in (0.2, 0.5)
    }
    whole = set(open_data(f"webdataset:{root}", "classify").split("train").keys)
    assert held[0.2] < held[0.5] < whole
    data = open_data(f"webdataset:{root},val=0.5", "classify")
    assert set(data.split("train").keys) == whole - held[0.5]
    row = data.split("val").keys.index(sorted(held[0.5])[0])
    number = int(data.split("val").keys[row][-7:])
    assert int(data.split("val").read(row).target) == number % 3
    assert data.notes["held_out"] == 0.5


def test_a_table_of_pairs_with_classes(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_data(f"pairs:{table},label=what,split=part", "classify")
    assert data.classes == ["apple", "leaf", "sea"]
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 48, "val": 12}
    sample = data.split("val").read(1)
    assert (sample.key, int(sample.target), sample.image.shape) == ("k9", 0, (40, 32, 3))
    train = data.split("train")
    assert len(train.usable()) == 47
    assert train.counts() == (47, 1)
    assert "k7 has nothing in the column 'what'" in capsys.readouterr().err
    numbers = open_data(f"pairs:{table},label=number", "classify")
    assert numbers.classes == ["0", "10", "20"]
    assert numbers.notes == {"label": "number", "held_out": 0.1}
    assert len(numbers.split("train")) + len(numbers.split("val")) == 60


def test_scenes_of_one_kind_each() -> None:
    data = open_data("scenes:n=300,size=48,seed=2,objects=24", "classify")
    assert len(data.classes) == 24
    assert data.classes[:3] == ["apple", "banana", "pear"]
    from cutline.scenes import render
    from cutline.scenes.source import SceneConfig

    for part in ("train", "val"):
        for row in range(5):
            sample = data.split(part).read(row)
            seed, index = (int(v) for v in sample.key[1:].split("-"))
            full = render(seed, index, 48, SceneConfig(objects=24))
            assert {o["name"] for o in full["objects"]} == {data.classes[int(sample.target)]}
            assert (full["image"] == sample.image).all()
    assert {len(data.split(p)) for p in ("val", "test")} == {10_000}
    with pytest.raises(DataError, match="no picture of .* of its 96 classes"):
        open_data("scenes:n=50,size=48", "classify")


# What is wrong with the data


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folder:x", "did you mean 'imagefolder:x'"),
        ("imagefolder:/nowhere", "no folder /nowhere/train"),
        ("imagefolder:x,vall=1", "unknown option 'vall'; there are val=0.1"),
        ("imagefolder:x,val=2", "no share of train"),
        ("webdataset:/nowhere", "no folder /nowhere/train"),
        ("pairs:/nowhere.lance,label=x", "no table of pairs"),
    ],
)
def test_specs_that_do_not_work_say_why(spec: str, message: str) -> None:
    with pytest.raises(CutlineError, match=message):
        open_data(spec, "classify")


def test_a_class_without_a_picture(folders: Make, capsys: pytest.CaptureFixture[str]) -> None:
    root = folders()
    for path in (root / "val/sea").iterdir():
        path.unlink()
    data = open_data(f"imagefolder:{root}", "classify")
    assert "no picture (.jpg, .png, .webp, …) in the class folder 'sea'" in capsys.readouterr().err
    assert data.split("val").labels.tolist() == [0, 0, 1, 1]
    (root / "train/moon").mkdir()
    with pytest.raises(DataError, match="train has no picture .* in the class folder 'moon': put pictures there"):
        open_data(f"imagefolder:{root}", "classify")


def test_parts_that_do_not_fit(folders: Make) -> None:
    root = folders(parts=("train",))
    with pytest.raises(DataError, match="nothing to score on.*',val=0.1'"):
        open_data(f"imagefolder:{root}", "classify")
    (root / "val").mkdir()
    with pytest.raises(DataError, match="no picture with a class in val"):
        open_data(f"imagefolder:{root}", "classify")
    with pytest.raises(DataError, match="has a val part of its own: leave val=0.5 out"):
        open_data(f"imagefolder:{root},val=0.5", "classify")
    (root / "val/moon").mkdir()
    with pytest.raises(DataError, match="1 classes that train has not: moon"):
        open_data(f"imagefolder:{root}", "classify")


def test_a_broken_picture_is_counted_and_too_many_stop(
    folders: Make, encoder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(val=4)
    good = (root / "train/leaf/1.jpg").read_bytes()
    (root / "train/leaf/1.jpg").write_bytes(good[: len(good) // 2])
    (root / "val/sea/102.jpg").write_bytes(b"")
    result = classify(encoder, f"imagefolder:{root}", ClassifyConfig(**QUICK))
    assert {k: result.protocol.settings[k] for k in ("trained", "trained_skipped", "scored", "skipped")} == {
        "trained": 11, "trained_skipped": 1, "scored": 11, "skipped": 1,
    }  # fmt: skip
    told = capsys.readouterr().err
    assert "train: 1 of 12 pictures skipped (1 × picture broken)" in told
    assert "val: 1 of 12 pictures skipped (1 × picture broken). For example:\n  sea/102.jpg" in told
    (root / "train/leaf/2.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="2 of 12 pictures skipped[\\s\\S]*More than 10%"):
        fit(encoder, f"imagefolder:{root}", ClassifyConfig(**QUICK))


def test_a_class_whose_pictures_are_all_broken_stops(folders: Make, encoder: Any) -> None:
    root = folders(train=12)
    for i in range(1, 12):
        (root / f"train/sea/{i}.jpg").unlink()
    (root / "train/sea/0.jpg").write_bytes(b"broken")
    with pytest.raises(DataError, match="of the 25 training pictures none that can be read is of 'sea'"):
        fit(encoder, f"imagefolder:{root}", ClassifyConfig(**QUICK))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"cls": None}, "no class"),
        ({"cls": b"cat"}, "class is no number"),
        ({"cls": b"7"}, "class out of range"),
        ({"jpg": None}, "no picture"),
        ({"jpg": b"\xff\xd8\xff broken"}, "picture broken"),
    ],
)
def test_webdataset_samples_that_cannot_be_used(tars: Make, changed: dict[str, bytes | None], reason: str) -> None:
    def change(i: int, members: dict[str, bytes]) -> None:
        if i == 4:
            for extension, data in changed.items():
                del members[extension]
                members.update({extension: data} if data is not None else {})

    train = open_data(f"webdataset:{tars(change)}", "classify").split("train")
    assert train.usable() == [*range(4), *range(5, 24)]
    assert [e.reason for e in train.skipped.values()] == [reason]


def test_a_class_that_train_lacks_is_named(tars: Make) -> None:
    def change(i: int, members: dict[str, bytes]) -> None:
        if i % 3 == 2:
            members["cls"] = b"1"

    with pytest.raises(DataError, match="test has pictures of 1 classes that train has none of: 'sea'"):
        open_data(f"webdataset:{tars(change)}", "classify")


def test_a_split_without_a_tar(tars: Make) -> None:
    root = tars()
    for path in (root / "test").glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"test has no \.tar in it"):
        open_data(f"webdataset:{root}", "classify")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "label=COLUMN; there are key, image, .*what"),
        (",label=colour", "no column 'colour'; it has key, image, .*what"),
        (",label=what,split=colour", "no column 'colour'"),
        (",label=score", "holds double; a class is text or a whole number"),
        (",label=what,split=what", "no row is of train"),
    ],
)
def test_columns_that_do_not_fit_are_told(table: Path, options: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(f"pairs:{table}{options}", "classify")


# CIFAR


@pytest.mark.parametrize("labels", [1, 2])
def test_cifar_in_its_binary_version(tmp_path: Path, labels: int) -> None:
    rng = np.random.default_rng(0)
    names = "batches.meta.txt" if labels == 1 else "fine_label_names.txt"
    (tmp_path / names).write_text("cat\ndog\n\n")
    pictures = rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    records = [bytes([0] * (labels - 1) + [i % 2]) + p.transpose(2, 0, 1).tobytes() for i, p in enumerate(pictures)]
    files = ["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"] if labels == 1 else ["train.bin", "test.bin"]
    for k, file in enumerate(files):
        (tmp_path / file).write_bytes(b"".join(records[4 * k : 4 * k + 4]))
    data = open_data(f"cifar:{tmp_path}", "classify")
    train, test, first = data.split("train"), data.split("test"), 4 * (len(files) - 1)
    assert data.classes == ["cat", "dog"]
    assert (len(train), len(test)) == (first, 4)
    assert (train.read(first - 2).image == pictures[first - 2]).all()
    assert (test.read(1).image == pictures[first + 1]).all()
    assert test.labels.tolist() == [0, 1, 0, 1]
    (tmp_path / files[-1]).write_bytes(b"".join(records)[:-1])
    with pytest.raises(DataError, match="no multiple of"):
        open_data(f"cifar:{tmp_path}", "zeroshot")


def test_cifars_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"")
    with pytest.raises(DataError, match="pickles.*binary version"):
        open_data(f"cifar:{tmp_path}", "classify")
