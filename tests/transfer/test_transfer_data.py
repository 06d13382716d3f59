"""Dense data: SPECs, layouts, and what is skipped, counted or refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cutline.errors import CutlineError, DataError
from cutline.transfer import data
from cutline.transfer.data import Sample, Skip, Split, labelled, open_data
from cutline.transfer.metrics import IGNORE
from cutline.transfer.prepared import PreparedDense
from cutline.transfer.segment import SegmentConfig

Folder = Callable[..., Path]


def write(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path)


def test_a_folder_of_masks(folder: Folder) -> None:
    root = folder(train=3, val=2)
    data = open_data(f"folder:{root}", "segment")
    assert data.classes == ["ground", "red", "blue"]
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 3, "val": 2}
    sample = data.splits["val"].read(1)
    with Image.open(root / "val/masks/001.png") as mask, Image.open(root / "val/images/001.png") as image:
        assert (sample.target == np.array(mask)).all()
        assert (sample.image == np.array(image)).all()
    assert sample.target.dtype == np.int16


def test_classes_are_counted_in_train_when_not_named(folder: Folder) -> None:
    data = open_data(f"folder:{folder(names=False)}", "segment")
    assert data.classes == ["0", "1", "2"]


def test_labels_that_do_not_count(folder: Folder) -> None:
    """255, those given as ignore=, and classes named unlabelled; the ids of the others close up."""
    root = folder(train=1)
    (root / "classes.txt").write_text("\ufeffvoid\nred\nblue\n\n", encoding="utf-8")
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    write(root / "train/masks/000.png", np.kron(mask, np.ones((16, 16), np.uint8)))
    data = open_data(f"folder:{root}", "segment")
    assert data.classes == ["red", "blue"]
    assert data.splits["train"].read(0).target[::16, ::16].tolist() == [[IGNORE, 0], [1, IGNORE]]
    data = open_data(f"folder:{root},ignore=2", "segment")
    assert data.classes == ["red"]
    assert data.splits["train"].read(0).target[::16, ::16].tolist() == [[IGNORE, 0], [IGNORE, IGNORE]]


def test_a_blank_line_among_the_classes_whose_places_are_ids_is_refused(folder: Folder) -> None:
    root = folder(train=1)
    (root / "classes.txt").write_text("ground\n\nred\nblue\n")
    with pytest.raises(DataError, match=r"classes.txt is blank in line 2"):
        open_data(f"folder:{root}", "segment")


def test_palette_masks_are_read_as_indices(folder: Folder) -> None:
    root = folder(train=1)
    mask = Image.open(root / "train/masks/000.png").convert("L")
    before = np.array(mask)
    coloured = Image.fromarray(before, mode="P")
    coloured.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    coloured.save(root / "train/masks/000.png")
    assert (open_data(f"folder:{root}", "segment").splits["train"].read(0).target == before).all()


def spoil_size(root: Path) -> str:
    write(root / "train/masks/001.png", np.zeros((16, 32), np.uint8))
    return "size differs"


def spoil_label(root: Path) -> str:
    write(root / "train/masks/001.png", np.full((32, 32), 7, np.uint8))
    return "label out of range"


def spoil_missing(root: Path) -> str:
    (root / "train/masks/001.png").unlink()
    return "no target"


def spoil_picture(root: Path) -> str:
    data = (root / "train/images/001.png").read_bytes()
    (root / "train/images/001.png").write_bytes(data[: len(data) // 2])
    return "picture broken"


def spoil_empty_file(root: Path) -> str:
    (root / "train/images/001.png").write_bytes(b"")
    return "picture broken"


def spoil_mask(root: Path) -> str:
    (root / "train/masks/001.png").write_bytes(b"not a picture")
    return "target broken"


def spoil_rgb(root: Path) -> str:
    write(root / "train/masks/001.png", np.zeros((32, 32, 3), np.uint8))
    return "target broken"


def spoil_unlabelled(root: Path) -> str:
    write(root / "train/masks/001.png", np.full((32, 32), 255, np.uint8))
    return "target empty"


def test_an_archive_named_npy_is_counted(folder: Folder) -> None:
    root = folder(train=1)
    (root / "train/depth/000.png").unlink()
    with open(root / "train/depth/000.npy", "wb") as f:
        np.savez(f, depth=np.ones((32, 32)))
    with pytest.raises(Skip, match="cannot be read"):
        open_data(f"folder:{root}", "depth").splits["train"].read(0)


@pytest.mark.parametrize(
    "spoil",
    [spoil_size, spoil_label, spoil_missing, spoil_picture, spoil_empty_file, spoil_mask, spoil_rgb, spoil_unlabelled],
)
def test_a_sample_that_cannot_be_used_is_counted_and_told(
    folder: Folder, spoil: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(train=12, val=1)
    reason = spoil(root)
    train = open_data(f"folder:{root}", "segment").splits["train"]
    assert train.usable() == [0, *range(2, 12)]
    assert [e.reason for e in train.skipped.values()] == [reason]
    assert train.counts() == (11, 1)
    told = capsys.readouterr().err
    assert "1 of 12 pictures skipped" in told
    assert "001" in told


def test_nothing_is_decoded_before_training(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are in the headers; and which pictures have labels does not depend on what turns out to be broken."""
    root = folder(train=12, size=(24, 40))
    data = open_data(f"folder:{root}", "segment")
    monkeypatch.setattr("cutline.transfer.files.read_image", None)
    prepared = PreparedDense(SegmentConfig(labels=6), data, 64)
    assert prepared.crop == (24, 40)
    keys = prepared.split.keys
    assert keys == [data.split("train").keys[r] for r in labelled(12, 6, 0)]
    spoil_picture(root)
    assert PreparedDense(SegmentConfig(labels=6), open_data(f"folder:{root}", "segment"), 64).split.keys == keys


def test_too_many_of_them_stop(folder: Folder) -> None:
    root = folder(train=8)
    spoil_size(root)
    with pytest.raises(DataError, match=r"1 of 8 pictures skipped \(1 × size differs\)[\s\S]*32x16"):
        open_data(f"folder:{root}", "segment").splits["train"].usable()


def test_depth_in_millimetres_metres_and_by_a_scale(folder: Folder) -> None:
    root = folder(train=3)
    stored = np.array(Image.open(root / "train/depth/000.png")).astype(np.float32)
    np.save(root / "train/depth/001.npy", stored / 1000)
    (root / "train/depth/001.png").unlink()
    Image.fromarray(stored / 1000, mode="F").save(root / "train/depth/002.tif")
    (root / "train/depth/002.png").unlink()
    train = open_data(f"folder:{root}", "depth").splits["train"]
    for row in range(3):
        assert np.allclose(train.read(row).target, stored / 1000)
        assert train.read(row).target.dtype == np.float32
    scaled = open_data(f"folder:{root},scale=0.0002", "depth").splits["train"]
    assert np.allclose(scaled.read(0).target, stored / 5000)


def test_depth_in_exr(folder: Folder) -> None:
    exr = pytest.importorskip("OpenEXR")
    root = folder(train=1)
    metres = np.linspace(1, 5, 32 * 32, dtype=np.float32).reshape(32, 32)
    with exr.File({"type": exr.scanlineimage}, {"Z": metres}) as f:
        f.write(str(root / "train/depth/000.exr"))
    (root / "train/depth/000.png").unlink()
    assert np.array_equal(open_data(f"folder:{root}", "depth").splits["train"].read(0).target, metres)
    (root / "train/depth/000.exr").write_bytes(b"v/1 broken")
    with pytest.raises(Skip, match="cannot be read"):
        open_data(f"folder:{root}", "depth").splits["train"].read(0)


def test_zero_negative_nan_and_infinite_depth_are_no_readings(folder: Folder) -> None:
    root = folder(train=1)
    (root / "train/depth/000.png").unlink()
    depth = np.full((32, 32), 2.0)
    depth[0, :5] = [0, -1, np.nan, np.inf, -np.inf]
    np.save(root / "train/depth/000.npy", depth)
    target = open_data(f"folder:{root}", "depth").splits["train"].read(0).target
    assert (target[0, :5] == 0).all()
    assert (target[1:] == 2).all()
    np.save(root / "train/depth/000.npy", np.full((32, 32), np.nan))
    with pytest.raises(Skip, match="no labelled pixel"):
        open_data(f"folder:{root}", "depth").splits["train"].read(0)


def test_pickled_npy_is_refused(folder: Folder) -> None:
    root = folder(train=1)
    (root / "train/depth/000.png").unlink()
    np.save(root / "train/depth/000.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(Skip, match="cannot be read"):
        open_data(f"folder:{root}", "depth").splits["train"].read(0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("foldr:x", "did you mean 'folder:x'"),
        ("camvid", "did you mean 'camvid:…'"),
        ("/data/x", "kind:path"),
        ("folder:/nowhere", "no pictures in"),
        ("folder:/x,scal=2", "unknown option 'scal'"),
        ("folder:/x,scale=mm", "scale=0.001"),
        ("folder:/x,scale=0", "must be above 0"),
        ("folder:/x,ignore=sky", "ignore=0"),
        ("camvid:/nowhere", "classes.txt"),
        ("scenes:n=10,size=3", "size"),
    ],
)
def test_specs_that_do_not_work_say_why(spec: str, message: str) -> None:
    with pytest.raises(CutlineError, match=message):
        open_data(spec, "segment")


def test_a_split_that_is_not_there_is_named(folder: Folder) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        open_data(f"folder:{folder()}", "segment").split("test")


def test_the_fingerprint_follows_the_contents(folder: Folder) -> None:
    root = folder()
    before = open_data(f"folder:{root}", "segment").fingerprint
    assert open_data(f"folder:{root}", "segment").fingerprint == before
    assert open_data(f"folder:{root},ignore=1", "segment").fingerprint != before
    write(root / "val/masks/000.png", np.zeros((32, 32), np.uint8))
    assert open_data(f"folder:{root}", "segment").fingerprint != before


def test_no_more_pictures_are_kept_than_the_bytes_for_them_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.zeros((10, 10, 3), np.uint8)
    monkeypatch.setattr(data, "CACHE_BYTES", 3 * (picture.nbytes + 8))
    split = Split("val", [str(i) for i in range(50)], lambda i: Sample(str(i), picture, np.array(i)))
    assert [int(split.read(i).target) for i in range(50)] == list(range(50))
    assert len(split._cache) == 3


def test_scenes_keep_their_splits_apart() -> None:
    data = open_data("scenes:n=3,size=48,seed=9", "depth")
    assert len(data.splits["train"]) == 3
    assert len(data.splits["test"]) >= 500
    first = [data.splits[name].read(0) for name in ("train", "val", "test")]
    assert len({s.key for s in first}) == 3
    for s in first:
        assert s.image.shape == (48, 48, 3)
        assert s.target.dtype == np.float32
        assert s.target.min() >= 0
        assert s.target.max() <= data.max_depth


@given(st.integers(1, 200), st.integers(0, 99), st.data())
def test_label_subsets_are_nested_and_the_same_for_every_arm(count: int, seed: int, data: st.DataObject) -> None:
    few = data.draw(st.integers(1, count))
    many = data.draw(st.integers(few, count))
    assert set(labelled(count, few, seed)) <= set(labelled(count, many, seed))
    assert len(labelled(count, few, seed)) == few
    assert labelled(count, None, seed) == list(range(count))
    assert labelled(count, few, seed) == labelled(count, few, seed)


def test_label_shares_and_too_many_labels() -> None:
    assert len(labelled(200, 0.05, 0)) == 10
    assert len(labelled(5, 0.01, 0)) == 1
    with pytest.raises(DataError, match="more pictures than the 5"):
        labelled(5, 6, 0)
