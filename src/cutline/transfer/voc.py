"""PASCAL VOC 2012: 20 classes and the background, 1,464 pictures to train on and 1,449 to score; with +aug 10,582.

Masks are palette PNGs whose indices are the classes; 255, the outlines, does not count. The extra masks of SBD
(Hariharan et al., ICCV 2011) are used when they are there: pictures that trainaug.txt or aug.txt names, with masks of
SegmentationClassAug where VOC has none of its own. A picture of val is never trained on: SBD's own lists hold some. With classes=20 the background does not count.
"""

import sys
from functools import partial
from pathlib import Path

from cutline.transfer.data import DenseData, Task
from cutline.transfer.files import Row, build, choice, ids, missing, parse, root_of, serves
from cutline.transfer.targets import class_names, label_table, read_mask

LAYOUT = "VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation/{train,val}.txt}"
AUG = (
    "Segmentation/trainaug.txt",
    "Segmentation/train_aug.txt",
    "Segmentation/aug.txt",
    "SegmentationAug/train.txt",
    "SegmentationAug/trainaug.txt",
)


def open(rest: str, task: Task) -> DenseData:
    """Open `voc:PATH[,aug=auto|no][,classes=21|20]`: VOC2012, or VOCdevkit, or the folder they lie in."""
    spec = f"voc:{rest}"
    serves("voc", task, "segment")
    path, options = parse("voc", rest, aug="no", classes="20")
    root = root_of(spec, path, "JPEGImages", LAYOUT, "VOC2012", "VOCdevkit/VOC2012")
    lists, masks, extra = root / "ImageSets", root / "SegmentationClass", root / "SegmentationClassAug"
    for needed in (masks, *(lists / "Segmentation" / f"{name}.txt" for name in ("train", "val"))):
        if not needed.exists():
            raise missing(spec, root, str(needed.relative_to(root)), LAYOUT)
    train, val = (ids(lists / "Segmentation" / f"{name}.txt") for name in ("train", "val"))
    more = next((lists / name for name in AUG if (lists / name).is_file()), None)
    augmented = choice(spec, options, "aug", "auto", "no") == "auto" and more is not None and extra.is_dir()
    if augmented and more is not None:
        train = list(dict.fromkeys([*train, *ids(more)]))
    held_out = set(val)
    leaked = [name for name in train if name in held_out]
    if leaked:
        print(f"{spec}: {len(leaked)} pictures of val left out of train (such as {leaked[0]}).", file=sys.stderr)
    rows = {
        "train": [_row(name, root, masks, extra) for name in train if name not in held_out],
        "val": [_row(name, root, masks, masks) for name in val],
    }
    first = 0 if choice(spec, options, "classes", "21", "20") == "21" else 1
    classes = class_names("voc")[first:]
    table = label_table({k + first: k for k in range(len(classes))}, (255,) if first == 0 else (0, 255))
    read = partial(read_mask, table=table, advice="labels are 0 to 20, and 255.")
    return build(spec, task, rows, read, classes, {"aug": augmented})


def _row(name: str, root: Path, *masks: Path) -> Row:
    found = (p for folder in masks if (p := folder / f"{name}.png").is_file())
    return Row(name, root / "JPEGImages" / f"{name}.jpg", next(found, masks[0] / f"{name}.png"))
