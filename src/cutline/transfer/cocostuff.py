"""COCO-Stuff 164k (1612.03716): 80 things and 91 stuff classes, 118,287 pictures to train on and 5,000 to score.

Masks are the published stuffthingmaps (labels 0 to 181, COCO's category id less 1, of which 11 things never occur), or
*_labelTrainIds.png where mmsegmentation's converter has been over them (0 to 170). 255 does not count. The order of
the classes is that of the labels: the things, then the stuff by alphabet; names are the data set's. With classes=81 it is
COCO-Object: the background, which is all stuff, and the 80 things.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cutline.transfer.data import DenseData, Task
from cutline.transfer.files import Row, build, choice, missing, parse, root_of, serves
from cutline.transfer.targets import class_names, label_table, read_mask

LAYOUT = "{images,annotations}/{train2017,val2017}"
THINGS = 80
TRAIN_IDS = "_labelTrainIds.png"
NEVER = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # things that COCO numbered and then left out


def open(rest: str, task: Task) -> DenseData:
    """Open `cocostuff:PATH[,classes=171|81]`; masks may also lie in stuffthingmaps/."""
    spec = f"cocostuff:{rest}"
    serves("cocostuff", task, "segment")
    path, options = parse("cocostuff", rest, classes="81")
    objects = choice(spec, options, "classes", "171", "81") == "81"
    root = root_of(spec, path, "images", LAYOUT)
    masks = root_of(spec, path, "train2017", LAYOUT, "annotations", "stuffthingmaps")
    rows = {}
    for split in ("train", "val"):
        images, targets = root / "images" / f"{split}2017", masks / f"{split}2017"
        for folder in (images, targets):
            if not folder.is_dir():
                raise missing(spec, root, str(folder.relative_to(root)), LAYOUT)
        rows[split] = [_row(p, targets) for p in sorted(images.glob("*.jpg"))]
    classes = class_names("cocostuff")
    raw = [label for label in range(182) if label not in NEVER]
    ids = [k + 1 if k < THINGS else 0 for k in range(len(classes))] if objects else list(range(len(classes)))
    by_id = label_table(dict(zip(raw, ids, strict=True)))
    by_train_id = label_table(dict(enumerate(ids)))

    def read(path: Path) -> NDArray[np.int16]:
        if path.name.endswith(TRAIN_IDS):
            return read_mask(path, by_train_id, "labels are 0 to 170, and 255.")
        return read_mask(path, by_id, f"labels are 0 to 181 but {', '.join(map(str, NEVER))}, and 255.")

    return build(spec, task, rows, read, ["background", *classes[:THINGS]] if objects else classes)


def _row(picture: Path, masks: Path) -> Row:
    made, published = (masks / f"{picture.stem}{suffix}" for suffix in (TRAIN_IDS, ".png"))
    return Row(picture.stem, picture, made if made.is_file() else published)
