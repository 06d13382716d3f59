"""Detection: readers and what is wrong with their files, jitter, the model beside torchvision's, training and records."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plain_ap import average_precision
from processes import run_cutline
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from cutline.config import check
from cutline.config import load as load_config
from cutline.errors import ConfigError, DataError
from cutline.record import Result
from cutline.towers.store import load_encoder
from cutline.train.optim import schedule
from cutline.transfer import masks as coco_masks
from cutline.transfer.batches import Cut
from cutline.transfer.data import open_data
from cutline.transfer.detect import DetectConfig, PreparedDetect, fit, score
from cutline.transfer.detector import Detector, LayerNorm2d
from cutline.transfer.jitter import ObjectBatches, jitter
from cutline.transfer.objects import Objects
from cutline.transfer.store import load
from cutline.transfer.store import save as save_model
from cutline.transfer.windows import use_relative, use_windows

QUICK: dict[str, Any] = {"steps": 3, "batch": 2, "channels": 16, "hidden": 32, "rois": 16, "lr": 1e-3}
CATEGORIES = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
COLOURS = {7: (220, 40, 40), 3: (40, 40, 220)}
Write = Callable[..., Path]


def picture(i: int, size: int = 48) -> tuple[np.ndarray, list[tuple[int, list[int]]]]:
    """A grey square picture with a red and a blue box apart from each other: (category, [x, y, width, height])."""
    rng = np.random.default_rng(i)
    image, found = rng.integers(90, 130, (size, size, 3)).astype(np.uint8), []
    for k, category in enumerate((7, 3)):
        w, h = rng.integers(12, 20, 2).tolist()
        x, y = (
            int(rng.integers(0, size // 2 - 19 + 16 * (k == 0))),
            int(rng.integers(0, size // 2 - 19)) + k * size // 2,
        )
        image[y : y + h, x : x + w] = COLOURS[category]
        found.append((category, [x, y, w, h]))
    return image, found


@pytest.fixture
def boxes(tmp_path: Path) -> Write:
    """Writes folder: data for detection; `change` may spoil the JSON of a split; returns the root."""

    def write(counts: dict[str, int] | None = None, change: Any = None, masks: bool = False, size: int = 48) -> Path:
        for split, count in (counts or {"train": 4, "val": 2}).items():
            (tmp_path / split / "images").mkdir(parents=True, exist_ok=True)
            content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
            for i in range(count):
                image, found = picture(i + (100 if split == "val" else 0), size)
                Image.fromarray(image).save(tmp_path / split / "images" / f"{i}.png")
                content["images"].append({"id": i, "file_name": f"{i}.png", "width": size, "height": size})
                for category, (x, y, w, h) in found:
                    mask = np.zeros((size, size), bool)
                    mask[y : y + h, x : x + w] = True
                    row = {"id": len(content["annotations"]), "image_id": i, "category_id": category}
                    row |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                    content["annotations"].append(row | ({"segmentation": counts_of(mask)} if masks else {}))
            if change is not None:
                change(split, content)
            (tmp_path / split / "boxes.json").write_text(json.dumps(content))
        return tmp_path

    return write


def counts_of(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths down the columns, off first, written out."""
    flat, counts, value = mask.T.ravel().tolist(), [0], False
    for v in flat:
        if v != value:
            counts.append(0)
            value = v
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def scored(model: Detector, data: Any, split: str) -> dict[str, float]:
    """Plain average precision of a model on a split."""
    samples = [data.splits[split].read(i) for i in range(len(data.splits[split]))]
    found = model.predict([s.image for s in samples])
    return average_precision([(s.target, f) for s, f in zip(samples, found)], len(data.classes))


def objects(corners: list[list[float]], labels: list[int], crowd: list[bool] | None = None) -> Objects:
    b = np.array(corners, np.float32).reshape(-1, 4)
    flags = np.array(crowd if crowd else [False] * len(b), bool)
    return Objects(b, np.array(labels, np.int64), flags, np.prod(b[:, 2:] - b[:, :2], 1))


# Data


def test_categories_are_numbered_by_id_and_boxes_become_corners(boxes: Write) -> None:
    data = open_data(f"folder:{boxes()}", "detect")
    assert data.classes == ["blue", "red"]
    sample, (_, found) = data.split("train").read(1), picture(1)
    assert sample.image.shape == (48, 48, 3)
    for category, (x, y, w, h), corners, label in zip(
        [c for c, _ in found], [b for _, b in found], sample.target.boxes, sample.target.labels
    ):
        assert corners.tolist() == [x, y, x + w, y + h]
        assert data.classes[label] == {7: "red", 3: "blue"}[category]
    assert data.notes["masks"] is False


def test_boxes_are_put_right_counted_and_told(boxes: Write, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(split: str, content: dict[str, Any]) -> None:
        if split == "train":
            first = content["annotations"][0]
            first["bbox"] = [40, -5, 20, 20]  # reaches out by 12 and by 5
            extra = [{"bbox": [5, 5, 0, 9]}, {"bbox": [60, 5, 9, 9]}]
            content["annotations"] += [{**first, "id": 900 + i, **e} for i, e in enumerate(extra)]

    data = open_data(f"folder:{boxes({'train': 20, 'val': 2}, spoil)}", "detect")
    assert data.split("train").read(0).target.boxes[0].tolist() == [40, 0, 48, 15]
    assert len(data.split("train").read(0).target) == 2
    told = capsys.readouterr().err
    assert (
        "train: 2 of 42 objects dropped (1 × box without area, 1 × box outside of its picture), 1 of 42 boxes cut"
        in told
    )
    assert "boxes.json, annotation 0 of 0.png: x 40 to 60, y -5 to 15, in a picture of 48x48" in told
    assert data.notes["put_right"]["train"] == {"box without area": 1, "box outside of its picture": 1, "box cut": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(bbox=[1, 2, 3]), r"bbox\" \[1, 2, 3\]"),
        (lambda a: a.update(bbox=[0, 0, float("nan"), 2]), "four finite numbers"),
        (lambda a: a.update(category_id=99), "category 99, which is not listed"),
        (lambda a: a.update(image_id="x"), "picture 'x', which is not listed"),
    ],
)
def test_too_many_bad_objects_stop_with_an_example(boxes: Write, change: Any, message: str) -> None:
    root = boxes(change=lambda split, content: [change(a) for a in content["annotations"]])
    with pytest.raises(DataError, match=f"(?s){message}.*More than 10% dropped is too many") as e:
        open_data(f"folder:{root}", "detect")
    assert "8 of 8 objects dropped" in str(e.value)


def test_pictures_without_objects_stay_as_negatives_and_missing_ones_are_skipped(
    boxes: Write, encoder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(split: str, content: dict[str, Any]) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 0]

    root = boxes({"train": 12, "val": 2}, spoil)
    (root / "train/images/3.png").unlink()
    data = open_data(f"folder:{root}", "detect")
    assert len(data.split("train").read(0).target) == 0
    assert data.split("train").read(0).target.boxes.shape == (0, 4)
    model = fit(encoder, data, DetectConfig(**QUICK))
    assert (model.labels, model.skipped) == (11, 1)
    assert "1 × picture missing" in capsys.readouterr().err


def test_a_picture_of_another_size_than_listed_is_skipped(boxes: Write) -> None:
    data = open_data(f"folder:{boxes(change=lambda s, c: c['images'][0].update(width=40))}", "detect")
    with pytest.raises(DataError, match="is 48x48 and listed as 40x48"):
        data.split("train").read(0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "val/boxes.json").unlink(), r"no annotations of val\. The layout is .*boxes.json"),
        (lambda r: (r / "train/images").rename(r / "elsewhere"), "no pictures of train: there is no folder"),
        (lambda r: (r / "val/boxes.json").write_text("{"), "cannot be read as COCO JSON"),
        (lambda r: (r / "val/boxes.json").write_text("{}"), "no list 'images', 'annotations', 'categories'"),
    ],
)
def test_a_split_without_its_files_is_named(boxes: Write, spoil: Any, message: str) -> None:
    root = boxes()
    spoil(root)
    with pytest.raises(DataError, match=message):
        open_data(f"folder:{root}", "detect")


def test_other_categories_in_val_are_named(boxes: Write) -> None:
    root = boxes(
        change=lambda s, c: c.update(categories=[*CATEGORIES[:1], {"id": 3, "name": "green" if s == "val" else "blue"}])
    )
    with pytest.raises(DataError, match=r"categories of val are not those of train: it lacks \(3, 'blue'\) and adds"):
        open_data(f"folder:{root}", "detect")


def test_coco_photos_are_all_usable(real_data: Path) -> None:
    data = open_data(f"coco:{real_data / 'coco_small'}", "detect")  # JSON at the root
    assert len(data.classes) == 80
    for split in data.splits.values():
        assert split.usable() == list(range(128))
    assert data.split("train").read(0).target.boxes[0] == pytest.approx([0.54, 93.85, 306.33, 236.77], abs=0.01)


def test_coco_layouts(boxes: Write, tmp_path: Path) -> None:
    root, coco = boxes(), tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split / "boxes.json").rename(coco / "annotations" / f"instances_{split}2017.json")
        (root / split / "images").rename(coco / f"{split}2017")
    assert len(open_data(f"coco:{coco}", "detect").split("val")) == 2
    with pytest.raises(DataError, match="known kinds: coco, folder, scenes, voc"):
        open_data("lvis:x", "detect")


def test_voc_boxes_count_from_one_and_difficult_objects_are_crowds(tmp_path: Path) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "VOC2007" / folder).mkdir(parents=True)
    root = tmp_path / "VOC2007"
    thing = "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>1</xmin><ymin>5</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>"
    for i, split in enumerate(("train", "val")):
        Image.new("RGB", (40, 30)).save(root / f"JPEGImages/{i}.jpg")
        things = thing.format("dog", 0) + thing.format("cat", 1)
        text = f"<annotation><size><width>40</width><height>30</height></size>{things}</annotation>"
        (root / f"Annotations/{i}.xml").write_text(text)
        (root / f"ImageSets/Main/{split}.txt").write_text(f"{i}\n")
    data = open_data(f"voc:{tmp_path}", "detect")
    found = data.split("val").read(0).target
    assert len(data.classes) == 20
    assert found.boxes[0].tolist() == [0, 4, 20, 30]
    assert [data.classes[k] for k in found.labels] == ["dog", "cat"]
    assert found.crowd.tolist() == [False, True]
    (root / "Annotations/1.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"1.xml cannot be read as VOC XML"):
        open_data(f"voc:{tmp_path}", "detect").split("val").read(0)
    (root / "ImageSets/Main/val.txt").unlink()
    with pytest.raises(DataError, match=r"no pictures of val: .*val.txt is missing"):
        open_data(f"voc:{tmp_path}", "detect")


def test_scenes_give_tight_boxes_and_masks() -> None:
    data = open_data("scenes:n=3,size=64,seed=1,objects=24", "detect")
    assert len(data.classes) == 24
    for i in range(3):
        found = data.split("train").read(i).target
        assert found.masks is not None
        for box, mask, area in zip(found.boxes, found.masks, found.areas, strict=True):
            rows, columns = np.where(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert area == mask.sum()


# Masks


def test_run_lengths_decode_packed_and_as_a_list() -> None:
    mask = np.zeros((5, 4), bool)
    mask[1:3, 1:] = mask[4, 2] = True
    counts = counts_of(mask)["counts"]
    assert (coco_masks.decode({"size": [5, 4], "counts": counts}, 5, 4) == mask).all()
    assert coco_masks.unpack("614") == [6, 1, 4]
    assert (coco_masks.decode({"size": [5, 4], "counts": packed(counts)}, 5, 4) == mask).all()
    long = [100_000, 3, 70_000, 5, 12]  # from the fourth on as differences, of either sign
    assert coco_masks.unpack(packed(long)) == long


def packed(counts: list[int]) -> str:
    """Run lengths packed, as maskApi.c's rleToString writes them."""
    text = ""
    for i, count in enumerate(counts):
        x = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            c = x & 0x1F
            x >>= 5
            more = x != -1 if c & 0x10 else x != 0
            text += chr((c | 0x20 if more else c) + 48)
    return text


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"size": [4, 4], "counts": [3, 2]}, "add up to 5 and not to 4 × 4"),
        ({"size": [4, 5], "counts": [20]}, "run lengths for"),
        ({"size": [4, 4], "counts": "\x7f!"}, "something else"),
        ({"size": [4, 4], "counts": "P"}, "ends within a number"),
        ({"counts": [16]}, "neither"),
        ([[1, 1, 2, 2]], "at least three pairs"),
    ],
)
def test_masks_that_do_not_decode_are_told(segment: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coco_masks.decode(segment, 4, 4)


def test_a_picture_with_a_broken_mask_is_skipped_and_without_all_masks_there_are_none(
    boxes: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(split: str, content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"]["counts"] = [5]

    data = open_data(f"folder:{boxes(change=spoil, masks=True)}", "detect")
    assert data.notes["masks"]
    with pytest.raises(DataError, match=r"0.png has a mask that does not decode: run lengths that add up to 5"):
        data.split("train").read(0)
    assert data.split("train").read(1).target.masks.sum() == data.split("train").read(1).target.areas.sum()
    partly = open_data(
        f"folder:{boxes(change=lambda s, c: c['annotations'][0].pop('segmentation'), masks=True)}", "detect"
    )
    assert not partly.notes["masks"]
    assert "train: 1 of 8 objects have no mask, so masks are left out" in capsys.readouterr().err


def test_polygons_are_drawn() -> None:
    mask = coco_masks.decode([[1, 2, 5, 2, 5, 6, 1, 6]], 8, 8)
    assert (mask == np.pad(np.ones((4, 4), bool), ((2, 2), (1, 3)))).all()
    assert (coco_masks.decode(coco_masks.encode(mask[None])[0], 8, 8) == mask).all()


# Jitter


def cut(**values: Any) -> Cut:
    return Cut(
        **{"crop": (64, 64), "scale": (0.3, 2.0), "flip": True, "short": None, "fill": (9, 9, 9), "empty": 0} | values
    )


def test_jitter_moves_picture_boxes_and_masks_together() -> None:
    data = open_data("scenes:n=4,size=64,seed=1,objects=24", "detect")
    for seed in range(12):
        sample = data.split("train").read(seed % 4)
        sample.target.masks[:] = sample.target.masks  # the sample itself must stay as it is
        before = sample.target.boxes.copy()
        image, target = jitter(sample, cut(), np.random.default_rng(seed))
        assert image.shape == (3, 64, 64)
        assert (sample.target.boxes == before).all()
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = torch.where(mask > 0)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_boxes_without_masks_follow_the_picture() -> None:
    image = np.full((40, 60, 3), 50, np.uint8)
    image[10:30, 20:50] = 200
    sample = type("S", (), {"key": "k", "image": image, "target": objects([[20, 10, 50, 30]], [4])})()
    for seed in range(20):
        canvas, target = jitter(sample, cut(scale=(0.5, 1.5)), np.random.default_rng(seed))
        rows, columns = torch.where(canvas[0] > 125)
        x0, y0, x1, y1 = target["boxes"][0].tolist()
        assert [x0, y0, x1, y1] == pytest.approx(
            [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1], abs=1.01
        )
        assert target["labels"].tolist() == [5]


def test_unscaled_pictures_keep_their_boxes_and_crowds_are_left_out() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    target = objects([[3.5, 4, 20, 30], [0, 0, 64, 64]], [0, 1], [False, True])
    sample = type("S", (), {"key": "k", "image": image, "target": target})()
    _, found = jitter(sample, cut(scale=(1.0, 1.0), flip=False), np.random.default_rng(0))
    assert found["boxes"].tolist() == [[3.5, 4, 20, 30]]
    assert found["labels"].tolist() == [1]


def test_batches_follow_from_seed_and_step_alone() -> None:
    split = open_data("scenes:n=6,size=64,seed=1,objects=24", "detect").split("train")
    one, two = (ObjectBatches(split, range(6), 4, 3, cut(), threads=t) for t in (1, 3))
    for a, b in zip(one.iterate(0, 4), two.iterate(0, 4), strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.images, b.images)
        assert all(torch.equal(p[k], q[k]) for p, q in zip(a.targets, b.targets, strict=True) for k in p)
    assert torch.equal(next(one.iterate(2, 3)).images, list(two.iterate(0, 3))[2].images)


# Model


def ready(**values: Any) -> DetectConfig:
    """A config with nothing left open."""
    whole = {
        "size": 64,
        "scale": (1.0, 1.0),
        "channels": 16,
        "hidden": 32,
        "anchors": 8.0,
        "rois": 16,
        "min_score": 0.0,
    }
    return DetectConfig(**{**whole, **values})


class Levels(torch.nn.Module):
    """A detector's encoder and pyramid as torchvision's detectors take a backbone."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.out_channels, self.model = model.config.channels, [model]

    def forward(self, images: torch.Tensor) -> Any:
        return self.model[0].levels(images)


@pytest.mark.parametrize("masks", [True, False])
def test_forward_equals_torchvisions_own_detector(encoder: Any, masks: bool) -> None:
    torch.manual_seed(0)
    model = Detector(encoder, ready(), ["a", "b"], masks)
    names, c = ["0", "1", "2", "3"], 16
    parts: dict[str, Any] = {
        "min_size": 64, "max_size": 64, "image_mean": list(encoder.mean), "image_std": list(encoder.std),
        "rpn_anchor_generator": AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5),
        "rpn_head": RPNHead(c, 3, conv_depth=2), "rpn_post_nms_top_n_train": 1000, "rpn_post_nms_top_n_test": 64, "_skip_resize": True,
        "box_roi_pool": MultiScaleRoIAlign(names, 7, 2),
        "box_head": FastRCNNConvFCHead((c, 7, 7), [c] * 4, [32], norm_layer=LayerNorm2d),
        "box_predictor": FastRCNNPredictor(32, 3), "box_score_thresh": 0.0, "box_batch_size_per_image": 16,
    }  # fmt: skip
    if masks:
        parts |= {"mask_roi_pool": MultiScaleRoIAlign(names, 14, 2), "mask_predictor": MaskRCNNPredictor(c, c, 3),
                  "mask_head": MaskRCNNHeads(c, [c] * 4, 1, norm_layer=LayerNorm2d)}  # fmt: skip
    peer: Any = (MaskRCNN if masks else FasterRCNN)(Levels(model), **parts)
    peer.rpn.load_state_dict(model.rpn.state_dict())
    peer.roi_heads.load_state_dict(model.roi_heads.state_dict())
    pictures = [torch.rand(3, 64, 64), torch.rand(3, 40, 64)]
    with torch.no_grad():
        for ours, theirs in zip(model.eval()(pictures), peer.eval()(pictures), strict=True):
            assert len(ours["boxes"]) > 10
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    targets = [{"boxes": torch.tensor([[5.0, 5, 30, 40]]), "labels": torch.tensor([1]),
                **({"masks": torch.ones(1, 64, 64, dtype=torch.uint8)} if masks else {})}] * 2  # fmt: skip
    squares = [torch.rand(3, 64, 64)] * 2
    torch.manual_seed(1)
    losses = model.train()(squares, targets)
    torch.manual_seed(1)
    assert {k: v.item() for k, v in peer.train()(squares, targets).items()} == {k: v.item() for k, v in losses.items()}


def test_anchors_and_pooling_have_the_exact_strides_of_patch_14(make_encoder: Any) -> None:
    model = Detector(make_encoder(patch=14, size=28), ready(anchors=4.0), ["a"], False)
    assert model.rpn.anchor_generator.strides == (3.5, 7.0, 14.0, 28.0, 56.0)
    levels = model.levels(torch.zeros(1, 3, 56, 84))
    assert [tuple(m.shape[-2:]) for m in levels.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert model.roi_heads.box_roi_pool.scales == [1 / 3.5, 1 / 7, 1 / 14, 1 / 28]
    from torchvision.models.detection.image_list import ImageList

    found = model.rpn.anchor_generator(ImageList(torch.zeros(1, 3, 56, 84), [(56, 84)]), list(levels.values()))[0]
    centres = (found[: 16 * 24 * 3 : 3, :2] + found[: 16 * 24 * 3 : 3, 2:]) / 2
    assert centres[25].tolist() == [3.5, 3.5]  # row 1, column 1


def test_hierarchical_towers_bring_their_own_pyramid() -> None:
    model = Detector(load_encoder("scratch:mci0-128"), ready(), ["a"], False)
    levels = model.levels(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in levels.values()] == [(16, s, s) for s in (16, 8, 4, 2, 1)]


def test_cascade_repeats_its_stages_and_averages_their_scores(encoder: Any) -> None:
    torch.manual_seed(0)
    model = Detector(encoder, ready(head="cascade"), ["a", "b"], True)
    targets = [{"boxes": torch.tensor([[5.0, 5, 30, 40]]), "labels": torch.tensor([2]),
                "masks": torch.ones(1, 64, 64, dtype=torch.uint8)}, {"boxes": torch.zeros(0, 4),
                "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 64, dtype=torch.uint8)}]  # fmt: skip
    losses = model([torch.rand(3, 64, 64)] * 2, targets)
    assert {f"loss_classifier_{k}" for k in range(3)} | {"loss_mask"} <= losses.keys()
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.roi_heads.parameters())
    heads, levels = model.eval().roi_heads, model.levels(torch.rand(1, 3, 64, 64))
    boxes, probabilities = [torch.tensor([[4.0, 4, 30, 30], [10, 20, 60, 50]])], []
    with torch.no_grad():
        found = heads(levels, boxes, [(64, 64)])[0][0]
        for k, weights in enumerate(((10.0, 10, 5, 5), (20.0, 20, 10, 10), (30.0, 30, 15, 15))):
            features = heads.box_head[k](heads.box_roi_pool(levels, boxes, [(64, 64)]))
            logits, offsets = heads.box_predictor[k](features)
            probabilities.append(logits.softmax(1))
            d = offsets / torch.tensor(weights)
            size, centre = boxes[0][:, 2:] - boxes[0][:, :2], (boxes[0][:, 2:] + boxes[0][:, :2]) / 2
            centre, size = centre + d[:, :2] * size, size * d[:, 2:].exp()
            boxes = [torch.cat([centre - size / 2, centre + size / 2], 1).clamp(0, 64)]
    mean = torch.stack(probabilities).mean(0)[:, 1:]
    assert found["scores"][0].item() == pytest.approx(mean.max().item(), rel=1e-4)
    assert torch.allclose(found["boxes"][0], boxes[0][mean.max(1).values.argmax()], atol=1e-3)


@pytest.mark.parametrize("name", ["scratch:vit-tiny-64", "scratch:vit_tiny_patch16_224"])
def test_one_window_is_global_attention_and_more_are_not(name: str) -> None:
    plain, windowed, split = (load_encoder(name) for _ in range(3))
    side = 64 if "64" in name else 128
    windowed.load_state_dict(plain.state_dict())
    split.load_state_dict(plain.state_dict())
    grid = side // plain.patch
    everywhere = use_windows(windowed, grid)
    assert everywhere == ([0, 1, 2, 3] if plain.num_layers < 5 else [2, 5, 8, 11])
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        for a, b in zip(plain.eval()(images), windowed.eval()(images), strict=True):
            assert torch.equal(a, b)
        if len(everywhere) < plain.num_layers:
            use_windows(split, 3)  # windows that do not divide the grid of 8
            assert split.eval()(images)[-1].shape == plain(images)[-1].shape
            assert not torch.allclose(split(images)[0], plain(images)[0], atol=1e-3)


def test_a_window_sees_its_own_patches_alone() -> None:
    from cutline.transfer.windows import Windows

    windows, tokens = Windows(2, 8, 1), torch.arange(1 + 3 * 5).float()[None, :, None]
    windows.grid = (3, 5)
    (cut_up,) = windows.before(torch.nn.Identity(), (tokens,))
    assert cut_up.shape == (6, 5, 1)
    assert cut_up[:, 0, 0].tolist() == [0] * 6  # every window has the class token
    assert cut_up[0, 1:, 0].tolist() == [1, 2, 6, 7]
    assert cut_up[5, 1:, 0].tolist() == [15, 0, 0, 0]
    assert torch.equal(windows.after(torch.nn.Identity(), (), cut_up), tokens)


@pytest.mark.parametrize("name", ["scratch:vit-tiny-64", "scratch:vit_tiny_patch16_224"])
@pytest.mark.parametrize("window", [None, 3])
def test_relative_positions_by_formula(name: str, window: int | None) -> None:
    encoder = load_encoder(name).eval()
    images = torch.randn(2, 3, 5 * encoder.patch, 7 * encoder.patch)
    if window:
        use_windows(encoder, window)
    with torch.no_grad():
        plain = encoder(images)
        use_relative(encoder, 5, window)
        for a, b in zip(copy.deepcopy(encoder)(images), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the tables begin at zero
    blocks = (
        encoder.visual.transformer.resblocks if hasattr(encoder.visual, "transformer") else encoder.visual.trunk.blocks
    )
    attention = blocks[0].attn  # of all patches, or of a window
    for table in attention.relative.parameters():
        torch.nn.init.normal_(table)
    seen: list[Any] = []
    native = isinstance(attention, torch.nn.MultiheadAttention)
    attention.register_forward_pre_hook(lambda m, a, k: seen.append((a[0], k["attn_mask"])), with_kwargs=True)
    with torch.no_grad():
        encoder(images)
    x, bias = seen[0]
    grid = (3, 3) if window and len(blocks) > 4 else (5, 7)
    heads, prefix, width = attention.num_heads, x.shape[1] - grid[0] * grid[1], attention.head_dim
    weight, shift = (
        (attention.in_proj_weight, attention.in_proj_bias) if native else (attention.qkv.weight, attention.qkv.bias)
    )
    q = (x @ weight[: x.shape[2]].T + shift[: x.shape[2]]).reshape(len(x), -1, heads, width)
    size = (len(attention.relative.rows) + 1) // 2
    tables = [attention.relative.rows, attention.relative.columns]
    if size != grid[1]:  # seven columns of a table for five
        tables[1] = torch.nn.functional.interpolate(tables[1].T[None], 2 * grid[1] - 1, mode="linear")[0].T
    bias = bias.reshape(len(x), heads, *bias.shape[-2:])
    assert not bias[:, :, :prefix].any()
    assert not bias[:, :, :, :prefix].any()
    for i, j in ((0, 0), (1, 5), (grid[0] * grid[1] - 1, 2)):
        (yi, xi), (yj, xj) = divmod(i, grid[1]), divmod(j, grid[1])
        r = tables[0][yi - yj + grid[0] - 1] + tables[1][xi - xj + grid[1] - 1]
        torch.testing.assert_close(bias[:, :, prefix + i, prefix + j], q[:, prefix + i] @ r, rtol=1e-4, atol=1e-4)


def test_a_tower_without_plain_attention_takes_no_window() -> None:
    with pytest.raises(ConfigError, match="window=14: .*Leave window out"):
        use_windows(load_encoder("scratch:mci0-128"), 14)
    with pytest.raises(ConfigError, match="relative=true: .*Leave relative out"):
        use_relative(load_encoder("scratch:mci0-128"), 14, None)
    with pytest.raises(ConfigError, match="relative positions are learnt inside the encoder"):
        check(DetectConfig, {"relative": True, "frozen": True})


# Training


def test_detection_overfits_eight_pictures(boxes: Write, encoder: Any) -> None:
    data = open_data(f"folder:{boxes({'train': 8, 'val': 2}, size=64)}", "detect")
    options: dict[str, Any] = {"layer_decay": 1, "drop_path": 0, "weight_decay": 0, "scale": (1, 1), "flip": False}
    model = fit(encoder, data, DetectConfig(steps=120, batch=4, channels=16, hidden=64, rois=32, lr=3e-3, **options))
    assert scored(model, data, "train")["ap50"] > 0.9


def test_open_choices_follow_from_the_pictures(boxes: Write) -> None:
    data = open_data(f"folder:{boxes()}", "detect")
    config = PreparedDetect(DetectConfig(), data, 768).config
    assert (config.size, config.scale, config.channels, config.hidden) == (64, (1.0, 2.0), 256, 1024)
    assert (config.anchors, config.rois, config.steps, config.warmup, config.masks) == (2.0, 64, 400, 20, False)
    large = PreparedDetect(DetectConfig(size=1024), data, 768).config
    assert (large.scale, large.anchors, large.rois) == ((0.1, 2.0), 8.0, 512)  # ViTDet's
    with pytest.raises(DataError, match="has no masks of its objects"):
        PreparedDetect(DetectConfig(masks=True), data, 64)
    assert load_config(DetectConfig, None, ["scale=[0.1,2]"]).scale == (0.1, 2.0)
    with pytest.raises(ConfigError, match="from small to large"):
        load_config(DetectConfig, None, ["scale=[2,1]"])


def test_the_rate_drops_where_vitdets_does() -> None:
    rate = [schedule(s, 184_375, 250, "drops") for s in (0, 249, 163_888, 163_889, 177_546, 177_547)]
    assert rate == pytest.approx([1 / 250, 1, 1, 0.1, 0.1, 0.01])


def test_the_same_seed_gives_the_same_detector_and_it_predicts_alike_when_loaded(
    boxes: Write, encoder: Any, tmp_path: Path
) -> None:
    data = open_data(f"folder:{boxes(masks=True)}", "detect")
    config = DetectConfig(**QUICK, head="cascade", labels=3, min_score=0)
    one, two = (fit(encoder, data, config) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    other = fit(encoder, data, config.model_copy(update={"seed": 1}))
    assert not torch.equal(one.rpn.head.cls_logits.weight, other.rpn.head.cls_logits.weight)
    assert one.labels == 3
    save_model(one, tmp_path / "model")
    images = [picture(5)[0], picture(6, 70)[0][:50]]
    for a, b in zip(one.predict(images), load(tmp_path).predict(images), strict=True):
        assert a.keys() == {"boxes", "labels", "scores", "masks"}
        assert len(a["boxes"])
        assert all(np.array_equal(a[k], b[k]) for k in a)
        assert (np.diff(a["scores"]) <= 0).all()
        assert set(a["labels"].tolist()) <= {0, 1}
    assert a["masks"].shape[1:] == (50, 70)
    assert a["boxes"].max() <= 70


def test_half_precision_trains_and_boxes_stay_single(boxes: Write, encoder: Any) -> None:
    model = fit(encoder, f"folder:{boxes()}", DetectConfig(**QUICK, precision="bf16", frozen=True, min_score=0))
    found = model.predict([picture(1)[0]])[0]
    assert found["boxes"].dtype == np.float32
    assert len(np.unique(found["boxes"][:, 0] % 1)) > 10  # not on bfloat16's grid
    for a, b in zip(model.encoder.state_dict().values(), encoder.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# Scores. These need faster-coco-eval, a dependency of the package.


def example() -> list[tuple[Objects, dict[str, np.ndarray]]]:
    """Two pictures whose scores pycocotools 2.0.11 gives as `STATS`."""

    def found(corners: Any, labels: Any, scores: Any) -> dict[str, np.ndarray]:
        return {"boxes": np.array(corners, np.float32), "labels": np.array(labels), "scores": np.array(scores)}

    first = objects([[10, 10, 110, 110], [200, 200, 220, 220]], [0, 1])
    of_first = found([[12, 12, 108, 108], [200, 200, 225, 225], [300, 300, 340, 340]], [0, 1, 0], [0.9, 0.7, 0.4])
    of_second = found([[52, 48, 112, 108], [0, 0, 20, 20]], [1, 0], [0.85, 0.3])
    return [(first, of_first), (objects([[50, 50, 110, 110]], [1]), of_second)]


STATS = {"ap": 0.726238, "ap50": 1, "ap75": 0.752475, "ap_small": 0.3, "ap_medium": 0.8, "ap_large": 0.9}


def test_average_precision_of_the_example_is_pycocotools() -> None:
    assert average_precision(example(), 2) == pytest.approx(STATS, abs=1e-6)
    from cutline.transfer.average_precision import AveragePrecision

    scores = AveragePrecision(["cat", "dog"], False)
    for truth, found in example():
        scores.update(truth, found)
    assert scores.scores() == pytest.approx(STATS, abs=1e-6)
    assert sum(scores.by_class()["ap"].values()) / 2 == pytest.approx(STATS["ap"], abs=1e-6)


@pytest.mark.parametrize("with_masks", [False, True])
def test_average_precision_equals_its_formula_on_random_objects(with_masks: bool) -> None:
    from cutline.transfer.average_precision import AveragePrecision

    rng = np.random.default_rng(0)
    scores, pictures = AveragePrecision(["a", "b", "c"], with_masks), []

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        corner = rng.integers(0, 60, (count, 2))
        corners = np.hstack([corner, corner + rng.integers(8, 60, (count, 2))]).clip(0, 120)
        grid = np.arange(120)
        inside = [(grid >= c[0]) & (grid < c[2]) & ((grid >= c[1]) & (grid < c[3]))[:, None] for c in corners]
        return corners.astype(np.float32), np.array(inside).reshape(count, 120, 120)

    for _ in range(12):
        corners, inside = some(int(rng.integers(0, 6)))
        n = len(corners)
        truth = Objects(
            corners, rng.integers(0, 3, n), rng.random(n) < 0.2, inside.sum((1, 2)).astype(np.float32), inside
        )
        more, also = some(6)
        near = np.vstack([corners + (rng.integers(-4, 5, corners.shape) if not with_masks else 0), more]).astype(
            np.float32
        )
        found = {"boxes": near, "labels": rng.integers(0, 3, len(near)), "scores": rng.random(len(near)).astype(np.float32),
                 "masks": np.concatenate([inside, also])}  # fmt: skip
        found["labels"][:n] = truth.labels
        pictures.append((truth, found))
        scores.update(truth, found)
    got, prefix = scores.scores(), "mask_" if with_masks else ""
    plain = average_precision(pictures, 3, with_masks)
    assert {k: got[prefix + k] for k in plain} == pytest.approx(plain, abs=1e-6)


def test_nothing_found_scores_nothing_and_no_objects_are_told() -> None:
    from cutline.transfer.average_precision import AveragePrecision

    nothing = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    scores = AveragePrecision(["cat", "dog"], False)
    with pytest.raises(DataError, match="no objects"):
        scores.scores()
    scores.update(example()[0][0], nothing)
    assert scores.scores() == {"ap": 0, "ap50": 0, "ap75": 0}


def test_the_command_writes_result_model_log_and_grid(tmp_path: Path) -> None:
    spec = "scenes:n=4,size=64,seed=1,objects=24"
    options = [f"{k}={v}" for k, v in QUICK.items()] + ["pictures=3", "min_score=0"]
    done = run_cutline(
        "transfer",
        "detect",
        "--encoder",
        "scratch:vit-tiny-64",
        "--data",
        spec,
        "--out",
        str(tmp_path / "out"),
        *options,
    )
    assert done.returncode == 0, done.stderr
    assert "ap50" in done.stdout
    result = Result.read(tmp_path / "out")
    assert {"ap", "ap50", "mask_ap"} <= result.metrics.keys()
    assert result.protocol.settings["anchors"] == 2.0
    assert result.protocol.settings["masks"] is True
    model = load(tmp_path / "out")
    assert score(model, spec).metrics == pytest.approx(result.metrics)
    with Image.open(tmp_path / "out/samples.png") as grid:
        assert grid.width > 600
    with pytest.raises(DataError, match="other classes"):
        score(model, "scenes:n=4,size=64,seed=1,objects=32")
