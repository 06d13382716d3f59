"""Public dense data sets: ids, names, units and splits of each layout, and what is said when it is not that layout."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dense_made as made
import numpy as np
import pytest
from PIL import Image

from cutline.errors import DataError
from cutline.record import Result
from cutline.transfer.data import Skip, labelled, open_data
from cutline.transfer.depth import DepthConfig, depth
from cutline.transfer.metrics import IGNORE
from cutline.transfer.segment import SegmentConfig, segment

KINDS = [*made.SEGMENT, *made.DEPTH]


@pytest.mark.parametrize(
    ("kind", "write", "options", "named"),
    [
        ("ade20k", made.ade20k, "", {0: None, 1: "wall", 8: "bed", 13: "person", 150: "flag", 255: None}),
        ("cityscapes", made.cityscapes, "", {0: None, 7: "road", 16: None, 24: "person", 33: "bicycle", 255: None}),
        ("cityscapes", lambda r, v: made.cityscapes(r, v, "labelTrainIds"), "", {0: "road", 18: "bicycle", 255: None}),
        ("voc", made.voc, "", {0: "background", 15: "person", 20: "tvmonitor", 255: None}),
        ("voc", made.voc, ",classes=20", {0: None, 15: "person", 20: "tvmonitor", 255: None}),
        ("context", made.context, "", {0: None, 1: "aeroplane", 37: "person", 59: "wood", 255: None}),
        ("context", made.context, ",classes=60", {0: "background", 1: "aeroplane", 59: "wood"}),
        ("cocostuff", made.cocostuff, "", {0: "person", 12: "stop sign", 89: "toothbrush", 91: "banner", 181: "wood"}),
        ("cocostuff", made.cocostuff, ",classes=81", {0: "person", 89: "toothbrush", 91: "background", 181: "background"}),
        ("cocostuff", lambda r, v: made.cocostuff(r, v, "_labelTrainIds"), "", {0: "person", 80: "banner", 255: None}),
    ],
)  # fmt: skip
def test_labels_become_the_classes_they_stand_for(
    tmp_path: Path, kind: str, write: Callable[[Path, list[int]], None], options: str, named: dict[int, str | None]
) -> None:
    write(tmp_path, list(named))
    data = open_data(f"{kind}:{tmp_path}{options}", "segment")
    sample = data.split("val").read(1)
    assert sample.image.shape == (*made.SIZE, 3)
    assert sample.target.dtype == np.int16
    stored = np.resize(np.array(list(named)), made.SIZE)
    for label, name in named.items():
        expected = IGNORE if name is None else data.classes.index(name)
        assert (sample.target[stored == label] == expected).all(), label


def test_class_lists_agree_with_torchvision_and_among_themselves(tmp_path: Path) -> None:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
    from torchvision.models.segmentation import FCN_ResNet50_Weights

    classes = {kind: open_data(made.make(kind, tmp_path / kind)[0], "segment").classes for kind in made.SEGMENT}
    counts = {"ade20k": 150, "cityscapes": 19, "voc": 21, "context": 59, "cocostuff": 171}
    assert {kind: len(set(names)) for kind, names in classes.items()} == counts
    assert classes["voc"][1:] == FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:]
    coco = [c for c in FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"][1:] if c != "N/A"]
    assert classes["cocostuff"][:80] == coco
    assert classes["cocostuff"][80:] == sorted(classes["cocostuff"][80:])  # as the data set numbers its stuff
    assert classes["context"] == sorted(classes["context"])
    assert {*classes["voc"][1:]} - {*classes["context"]} == {"diningtable"}  # which Context calls table


def test_raw_coco_labels_are_categories_less_one(tmp_path: Path) -> None:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    categories = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    known = [label for label in range(90) if categories[label + 1] != "N/A"]
    made.cocostuff(tmp_path, known)
    data = open_data(f"cocostuff:{tmp_path}", "segment")
    target = data.split("train").read(0).target.ravel()[: len(known)]
    assert [data.classes[k] for k in target] == [categories[label + 1] for label in known]


@pytest.mark.parametrize("kind", KINDS)
def test_splits_subsets_and_fingerprints(tmp_path: Path, kind: str) -> None:
    spec, task = made.make(kind, tmp_path)
    data = open_data(spec, task)
    second = "val" if task == "segment" else "test"
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 3, second: 2}
    assert len({*data.split("train").keys, *data.split(second).keys}) == (5 if kind in ("ade20k", "voc", "context", "kitti") else 3)  # fmt: skip
    assert {*labelled(3, 1, 0)} < {*labelled(3, 2, 0)}
    for part in data.splits.values():  # by the headers, and cut as what is read
        assert [part.size(r) for r in range(len(part))] == [part.read(r).image.shape[:2] for r in range(len(part))]
    assert data.fingerprint == open_data(spec, task).fingerprint
    targets = sorted(p for p in tmp_path.rglob("*.png") if "leftImg8bit" not in p.name and "input" not in p.parts)
    with Image.open(targets[-1]) as stored:
        made.save(targets[-1], np.roll(np.array(stored), 1, 1))
    assert data.fingerprint != open_data(spec, task).fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_each_trains_and_scores(tmp_path: Path, kind: str, encoder: Any) -> None:
    spec, task = made.make(kind, tmp_path)
    common: dict[str, Any] = {"steps": 2, "batch": 2, "head": "linear"}
    if task == "segment":
        result = segment(encoder, spec, SegmentConfig(**common))
    else:
        result = depth(encoder, spec, DepthConfig(**common, split="test"))
        assert result.protocol.settings["max_depth"] == (10 if kind == "nyuv2" else 80)
    assert result.protocol.settings["scored"] == 2
    assert np.isfinite(list(result.metrics.values())).all()


@pytest.mark.parametrize(
    ("task", "kind", "options"), [("segment", "ade20k", ["aux=0.4"]), ("depth", "kitti", ["split=test", "cutdepth=1"])]
)
def test_by_the_command(here: Any, tmp_path: Path, task: str, kind: str, options: list[str]) -> None:
    spec, _ = made.make(kind, tmp_path / "data")
    where = ["--encoder", "scratch:vit-tiny-64", "--data", spec, "--out", str(tmp_path / "run")]
    done = here("transfer", task, *where, "steps=2", "batch=2", "channels=64", *options)
    assert done.returncode == 0, done.stderr
    assert Result.read(tmp_path / "run").protocol.data == spec


def test_depth_is_in_metres(tmp_path: Path) -> None:
    for kind, metres, unit in (("nyuv2", 3.0, 0.001), ("kitti", 20.0, 1 / 256)):
        spec, _ = made.make(kind, tmp_path / kind)
        target = open_data(spec, "depth").split("test").read(0).target
        expected = np.linspace(0.5, 1.5, target.size).reshape(target.shape) * metres
        assert (target[0] == 0).all()
        assert np.allclose(target[1:], expected[1:], atol=unit)


def test_nyuv2_without_lists_is_read_by_its_folders(tmp_path: Path) -> None:
    made.nyuv2(tmp_path / "a")
    made.nyuv2(tmp_path / "b", lists=False)
    a, b = (open_data(f"nyuv2:{tmp_path / name}", "depth") for name in "ab")
    for split in ("train", "test"):
        assert a.split(split).keys == b.split(split).keys
        assert (a.split(split).read(1).target == b.split(split).read(1).target).all()


def test_kitti_keeps_the_bottom_of_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.kitti(tmp_path)
    monkeypatch.setattr("cutline.transfer.kitti.KB", (20, 30))
    whole = open_data(f"kitti:{tmp_path},cut=none", "depth").split("test").read(0)
    cut = open_data(f"kitti:{tmp_path}", "depth").split("test").read(0)
    assert (cut.image == whole.image[12:, 9:39]).all()
    assert (cut.target == whole.target[12:, 9:39]).all()


def labelled_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """nyu_depth_v2_labeled.mat of three pictures and splits.mat; a stand-in reads it where h5py is not installed."""
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    stored = {
        "images": rng.integers(1, 256, (3, 3, 640, 480), dtype=np.uint8),
        "depths": rng.uniform(1, 9, (3, 640, 480)).astype(np.float32),
        "rawDepths": rng.uniform(1, 9, (3, 640, 480)).astype(np.float32),
    }
    stored["rawDepths"][:, 100] = 0
    try:
        import h5py

        with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as f:
            for name, values in stored.items():
                f[name] = values
    except ImportError:
        (root / "nyu_depth_v2_labeled.mat").write_bytes(b"stand-in")
        monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=lambda path, mode: stored))
    savemat(root / "splits.mat", {"trainNdxs": [[3], [1]], "testNdxs": [[2]]})
    return stored


def test_the_labelled_nyuv2_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = labelled_set(tmp_path, monkeypatch)
    data = open_data(f"nyuv2:{tmp_path}", "depth")
    assert data.split("train").keys == ["00002", "00000"]
    sample = data.split("test").read(0)
    assert sample.image.shape == (480, 640, 3)
    assert (sample.image[7:474, 7:632] == stored["images"][1].transpose(2, 1, 0)[7:474, 7:632]).all()
    assert not sample.image[:7].any()
    assert (sample.target == stored["rawDepths"][1].T).all()
    filled = open_data(f"nyuv2:{tmp_path}/nyu_depth_v2_labeled.mat,depths=filled", "depth")
    assert (filled.split("test").read(0).target == stored["depths"][1].T).all()
    assert filled.fingerprint != data.fingerprint
    with pytest.raises(DataError, match="unknown option 'scale'; there are depths=filled and splits=splits.mat"):
        open_data(f"nyuv2:{tmp_path},scale=1", "depth")
    (tmp_path / "splits.mat").unlink()
    with pytest.raises(DataError, match="the official split is not at .*splits=FILE"):
        open_data(f"nyuv2:{tmp_path}", "depth")


def test_the_labelled_set_needs_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="pip install h5py"):
        open_data(f"nyuv2:{tmp_path}", "depth")


def test_voc_takes_the_extra_masks_and_leaves_val_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.voc(tmp_path, [1])
    root = tmp_path / "VOCdevkit/VOC2012"
    made.listing(root / "ImageSets/Segmentation/trainaug.txt", ["2007_train0", "2008_more", "2007_val1"])
    made.picture(root / "JPEGImages/2008_more.jpg")
    for name in ("2007_train0", "2008_more", "2007_val1"):
        made.mask(root / f"SegmentationClassAug/{name}.png", [2])
    train = open_data(f"voc:{tmp_path}", "segment").split("train")
    assert train.keys == ["2007_train0", "2007_train1", "2007_train2", "2008_more"]
    assert [int(train.read(row).target[0, 0]) for row in (0, 3)] == [1, 2]  # VOC's own mask before SBD's
    assert "1 pictures of val left out" in capsys.readouterr().err
    assert len(open_data(f"voc:{tmp_path},aug=no", "segment").split("train")) == 3


REMOVED = {
    "ade20k": ("ADEChallengeData2016/annotations/training", "no annotations/training"),
    "cityscapes": ("gtFine/val", "no gtFine/val"),
    "voc": ("VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", r"no ImageSets/Segmentation/val\.txt"),
    "context": ("VOC2010/ImageSets/SegmentationContext/train.txt", r"no ImageSets/SegmentationContext/train\.txt"),
    "cocostuff": ("annotations", "no train2017"),
    "nyuv2": ("nyu_test.txt", "no list or picture to test on"),
    "kitti": ("kitti_eigen_train.txt", r"no kitti_eigen_train\.txt"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_with_a_part_missing_says_what_it_expects_and_what_it_found(tmp_path: Path, kind: str) -> None:
    spec, task = made.make(kind, tmp_path)
    gone, message = REMOVED[kind]
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "nyuv2":
        shutil.rmtree(tmp_path / "official_splits")
    with pytest.raises(DataError, match=rf"{message}\. The layout is .*holds "):
        open_data(spec, task)
    with pytest.raises(DataError, match=r"The layout is .*does not exist"):
        open_data(f"{kind}:/nowhere", task)
    with pytest.raises(DataError, match=f"it cannot serve {'depth' if task == 'segment' else 'segment'}"):
        open_data(spec, "depth" if task == "segment" else "segment")
    with pytest.raises(DataError, match="unknown option 'sclae'"):
        open_data(f"{spec},sclae=1", task)


def test_a_split_without_pictures_is_refused(tmp_path: Path) -> None:
    made.ade20k(tmp_path, [1])
    for path in (tmp_path / "ADEChallengeData2016/images/validation").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="the split val has no pictures"):
        open_data(f"ade20k:{tmp_path}", "segment")
    made.kitti(tmp_path)
    (tmp_path / "kitti_eigen_test.txt").write_text("\n")
    with pytest.raises(DataError, match="the split test has no pictures"):
        open_data(f"kitti:{tmp_path}", "depth")


@pytest.mark.parametrize(
    ("kind", "target", "values", "reason"),
    [
        ("ade20k", "ADEChallengeData2016/annotations/training/ADE_train_00000001.png", np.full(made.SIZE, 151, np.uint8), "label out of range"),
        ("ade20k", "ADEChallengeData2016/annotations/training/ADE_train_00000001.png", np.ones((*made.SIZE, 3), np.uint8), "target broken"),
        ("voc", "VOCdevkit/VOC2012/SegmentationClass/2007_train1.png", np.full((9, 9), 1, np.uint8), "size differs"),
        ("voc", "VOCdevkit/VOC2012/JPEGImages/2007_train1.jpg", None, "picture missing"),
        ("context", "VOC2010/SegmentationClassContext/2008_train1.png", None, "no target"),
        ("cocostuff", "annotations/train2017/000000000001.png", np.full(made.SIZE, 11, np.uint8), "label out of range"),
        ("cityscapes", "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png", np.full(made.SIZE, 4, np.uint8), "target empty"),
        ("nyuv2", "sync/kitchen/rgb_00001.jpg", None, "picture missing"),
        ("kitti", "gt_depth/2011_09_26_drive_0031_sync/proj_depth/groundtruth/image_02/0000000001.png", None, "no target"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, kind: str, target: str, values: np.ndarray | None, reason: str
) -> None:
    spec, task = made.make(kind, tmp_path)
    path = tmp_path / target
    assert path.is_file()
    path.unlink() if values is None else made.save(path, values)
    train = open_data(spec, task).split("train")
    train.read(0)
    with pytest.raises(Skip, match=path.stem) as told:
        train.read(1)
    assert told.value.reason == reason


def test_a_line_of_a_list_that_is_no_pair_is_named(tmp_path: Path) -> None:
    made.nyuv2(tmp_path)
    (tmp_path / "nyu_train.txt").write_text("kitchen/rgb_00000.jpg\n")
    with pytest.raises(DataError, match=r"nyu_train\.txt: 'kitchen/rgb_00000\.jpg' is no line of"):
        open_data(f"nyuv2:{tmp_path}", "depth")


def test_no_val_says_that_there_is_a_test_split(tmp_path: Path, encoder: Any) -> None:
    made.nyuv2(tmp_path)
    with pytest.raises(DataError, match="has no split 'val'; it has train, test. Say which one to score"):
        depth(encoder, f"nyuv2:{tmp_path}", DepthConfig(steps=1))


@pytest.mark.parametrize(
    ("kind", "options", "hint"),
    [
        ("nyuv2", ",scale=1", r"by 0\.001 it would be 3\.\d* m"),
        ("kitti", ",scale=1", r"by 1/256 it would be 2\d\.?\d* m"),
        ("nyuv2", ",scale=0.000001", r"by 1000 it would be 3\.\d* m"),
    ],
)
def test_depth_in_the_wrong_unit_is_told_with_the_likely_factor(
    tmp_path: Path, kind: str, options: str, hint: str, encoder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, _ = made.make(kind, tmp_path)
    config = DepthConfig(steps=1, batch=2, head="linear", max_depth=1e5, min_depth=1e-6, split="test")
    depth(encoder, spec + options, config)
    told = capsys.readouterr().err
    assert "are these metres?" in told
    assert re.search(hint, told), told
