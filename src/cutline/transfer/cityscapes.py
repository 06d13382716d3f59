"""Cityscapes: 19 classes, 2,975 pictures of 2048x1024 to train on and 500 to score (1604.01685).

Masks are gtFine's labelIds, of which the 19 classes of the benchmark count, or labelTrainIds where they have been made.
Ids and names are torchvision's. The split "test" has no public masks and is not opened.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cutline.transfer.data import DenseData, Task
from cutline.transfer.files import Row, build, missing, parse, root_of, serves
from cutline.transfer.targets import label_table, read_mask

LAYOUT = (
    "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and "
    "gtFine/{train,val}/CITY/*_gtFine_labelIds.png (or _gtFine_labelTrainIds.png)"
)
PICTURE, TRAIN_IDS, IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"


def open(rest: str, task: Task) -> DenseData:
    """Open `cityscapes:PATH`, the folder of leftImg8bit and gtFine."""
    from torchvision.datasets import Cityscapes

    spec = f"cityscapes:{rest}"
    serves("cityscapes", task, "segment")
    path, _ = parse("cityscapes", rest)
    root = root_of(spec, path, "leftImg8bit", LAYOUT)
    rows = {}
    for split in ("train", "val"):
        for folder in ("leftImg8bit", "gtFine"):
            if not (root / folder / split).is_dir():
                raise missing(spec, root, f"{folder}/{split}", LAYOUT)
        pictures = sorted((root / "leftImg8bit" / split).glob(f"*/*{PICTURE}"))
        rows[split] = [_row(p, root / "gtFine" / split) for p in pictures]
    counted = sorted((c.train_id, c.id, c.name) for c in Cityscapes.classes if 0 <= c.train_id < 255)
    others = [c.id for c in Cityscapes.classes if c.train_id == 255]
    by_id = label_table({label: k for k, label, _ in counted}, [*others, 255])
    by_train_id = label_table({k: k for k, _, _ in counted})

    def read(path: Path) -> NDArray[np.int16]:
        train = path.name.endswith(TRAIN_IDS)
        return read_mask(path, by_train_id if train else by_id, f"labels are 0 to {18 if train else 33}, and 255.")

    return build(spec, task, rows, read, [name for _, _, name in counted])


def _row(picture: Path, masks: Path) -> Row:
    key = picture.name.removesuffix(PICTURE)
    made, published = (masks / picture.parent.name / f"{key}{suffix}" for suffix in (TRAIN_IDS, IDS))
    return Row(key, picture, made if made.is_file() else published)
