"""ADE20K, the SceneParsing benchmark: 150 classes, 20,210 pictures to train on and 2,000 to score (1608.05442).

The archive ADEChallengeData2016.zip as it is. In its masks 0 is what none of the 150 classes covers and does not count,
and label k is class k - 1. Names are the first of each class in the data set's objectInfo150.txt, as mmsegmentation
has them. The full ADE20K with its masks in colours is another data set and is refused.
"""

from functools import partial

from cutline.transfer.data import DenseData, Task
from cutline.transfer.files import build, missing, paired, parse, root_of, serves
from cutline.transfer.targets import class_names, label_table, read_mask

LAYOUT = "ADEChallengeData2016/{images,annotations}/{training,validation}"
FOLDERS = {"train": "training", "val": "validation"}


def open(rest: str, task: Task) -> DenseData:
    """Open `ade20k:PATH`, the folder ADEChallengeData2016 or the one it lies in."""
    spec = f"ade20k:{rest}"
    serves("ade20k", task, "segment")
    path, _ = parse("ade20k", rest)
    root = root_of(spec, path, "images", LAYOUT, "ADEChallengeData2016")
    rows = {}
    for split, name in FOLDERS.items():
        images, masks = root / "images" / name, root / "annotations" / name
        for folder in (images, masks):
            if not folder.is_dir():
                raise missing(spec, root, str(folder.relative_to(root)), LAYOUT)
        rows[split] = paired(images, masks)
    classes = class_names("ade20k")
    table = label_table({k + 1: k for k in range(len(classes))}, (0, 255))
    advice = "labels are 0 (none) to 150."
    return build(spec, task, rows, partial(read_mask, table=table, advice=advice), classes)
