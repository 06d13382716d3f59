"""Tiny copies of the layouts of public dense data sets: three pictures to train on and two to score, 32x48 px."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (32, 48)
COUNTS = {"train": 3, "val": 2, "test": 2}


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def picture(path: Path, seed: int = 0) -> None:
    save(path, np.random.default_rng([seed, *path.name.encode()]).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


def mask(path: Path, labels: list[int]) -> None:
    """Columns of the labels, in turn."""
    save(path, np.resize(np.array(labels, np.uint8), SIZE))


def depth(path: Path, metres: float, unit: float) -> None:
    """A ramp from half to one and a half times `metres`, with a first row of no reading; `unit` metres a step."""
    values = np.linspace(0.5, 1.5, SIZE[0] * SIZE[1]).reshape(SIZE) * metres / unit
    values[0] = 0
    save(path, values.astype(np.uint16))


def listing(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def ade20k(root: Path, labels: list[int]) -> None:
    for split, folder in (("train", "training"), ("val", "validation")):
        for i in range(COUNTS[split]):
            name = f"ADE_{split}_{i:08d}"
            picture(root / "ADEChallengeData2016/images" / folder / f"{name}.jpg")
            mask(root / "ADEChallengeData2016/annotations" / folder / f"{name}.png", labels)


def cityscapes(root: Path, labels: list[int], suffix: str = "labelIds") -> None:
    for split in ("train", "val"):
        for i in range(COUNTS[split]):
            name = f"ulm_{i:06d}_000019"
            picture(root / "leftImg8bit" / split / "ulm" / f"{name}_leftImg8bit.png")
            mask(root / "gtFine" / split / "ulm" / f"{name}_gtFine_{suffix}.png", labels)


def voc(root: Path, labels: list[int]) -> None:
    root = root / "VOCdevkit/VOC2012"
    for split in ("train", "val"):
        names = [f"2007_{split}{i}" for i in range(COUNTS[split])]
        listing(root / "ImageSets/Segmentation" / f"{split}.txt", names)
        for name in names:
            picture(root / "JPEGImages" / f"{name}.jpg")
            coloured = Image.fromarray(np.resize(np.array(labels, np.uint8), SIZE), mode="P")
            coloured.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
            (root / "SegmentationClass").mkdir(exist_ok=True)
            coloured.save(root / "SegmentationClass" / f"{name}.png")


def context(root: Path, labels: list[int]) -> None:
    root = root / "VOC2010"
    for split in ("train", "val"):
        names = [f"2008_{split}{i}" for i in range(COUNTS[split])]
        listing(root / "ImageSets/SegmentationContext" / f"{split}.txt", names)
        for name in names:
            picture(root / "JPEGImages" / f"{name}.jpg")
            mask(root / "SegmentationClassContext" / f"{name}.png", labels)


def cocostuff(root: Path, labels: list[int], suffix: str = "") -> None:
    for split in ("train", "val"):
        for i in range(COUNTS[split]):
            picture(root / "images" / f"{split}2017" / f"{i:012d}.jpg")
            mask(root / "annotations" / f"{split}2017" / f"{i:012d}{suffix}.png", labels)


def nyuv2(root: Path, lists: bool = True, metres: float = 3.0, unit: float = 0.001) -> None:
    for split, folder in (("train", "sync"), ("test", "official_splits/test")):
        pairs = [(f"kitchen/rgb_{i:05d}.jpg", f"kitchen/sync_depth_{i:05d}.png") for i in range(COUNTS[split])]
        for rgb, gt in pairs:
            picture(root / folder / rgb)
            depth(root / folder / gt, metres, unit)
        if lists:
            listing(root / f"nyu_{split}.txt", [f"/{rgb} /{gt} 518.8579" for rgb, gt in pairs])


def kitti(root: Path, metres: float = 20.0, unit: float = 1 / 256) -> None:
    for split in ("train", "test"):
        lines = []
        for i in range(COUNTS[split]):
            drive = f"2011_09_26_drive_00{COUNTS[split]}{i}_sync"
            rgb = f"2011_09_26/{drive}/image_02/data/{i:010d}.png"
            gt = f"{drive}/proj_depth/groundtruth/image_02/{i:010d}.png"
            picture(root / "input" / rgb)
            depth(root / "gt_depth" / gt, metres, unit)
            lines.append(f"{rgb} {gt} 721.5377")
        listing(root / f"kitti_eigen_{split}.txt", [*lines, f"2011_09_26/x_{split}.png None 721.5377"])


SEGMENT: dict[str, Callable[[Path, list[int]], None]] = {
    "ade20k": ade20k, "cityscapes": cityscapes, "voc": voc, "context": context, "cocostuff": cocostuff,
}  # fmt: skip
DEPTH: dict[str, Callable[[Path], None]] = {"nyuv2": nyuv2, "kitti": kitti}
LABELS = [1, 2, 8, 12, 17]  # each counts in every one of the data sets (or is ignored in Cityscapes)


def make(kind: str, root: Path) -> tuple[str, str]:
    """Write the layout of `kind` into `root`; its SPEC and task."""
    if kind in SEGMENT:
        SEGMENT[kind](root, LABELS)
        return f"{kind}:{root}", "segment"
    DEPTH[kind](root)
    return f"{kind}:{root}", "depth"


def outspoken(detector: Any) -> Any:
    """A detector whose heads start with torch's own weights, so that it finds things untrained."""
    for name, layer in detector.named_modules():
        if name.endswith(("cls_score", "bbox_pred")) and "rpn" not in name:
            layer.reset_parameters()
    return detector
