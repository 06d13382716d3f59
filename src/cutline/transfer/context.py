"""PASCAL Context (Mottaghi et al., CVPR 2014) with its 59 most frequent classes: 4,998 pictures to train on, 5,105 to score.

As mmsegmentation's tools/dataset_converters/pascal_context.py writes it. In those masks 0 is the background and the
59 classes follow by alphabet. With classes=59, the default, the background does not count; with classes=60 it is a class.
"""

from functools import partial

from cutline.transfer.data import DenseData, Task
from cutline.transfer.files import Row, build, choice, ids, missing, parse, root_of, serves
from cutline.transfer.targets import class_names, label_table, read_mask

LAYOUT = "VOCdevkit/VOC2010/{JPEGImages,SegmentationClassContext,ImageSets/SegmentationContext/{train,val}.txt}"


def open(rest: str, task: Task) -> DenseData:
    """Open `context:PATH[,classes=59|60]`: VOC2010, or VOCdevkit, or the folder they lie in."""
    spec = f"context:{rest}"
    serves("context", task, "segment")
    path, options = parse("context", rest, classes="60")
    background = choice(spec, options, "classes", "59", "60") == "60"
    root = root_of(spec, path, "SegmentationClassContext", LAYOUT, "VOC2010", "VOCdevkit/VOC2010")
    rows, masks = {}, root / "SegmentationClassContext"
    for split in ("train", "val"):
        names = root / "ImageSets" / "SegmentationContext" / f"{split}.txt"
        if not names.is_file():
            raise missing(spec, root, str(names.relative_to(root)), LAYOUT)
        rows[split] = [Row(n, root / "JPEGImages" / f"{n}.jpg", masks / f"{n}.png") for n in ids(names)]
    names60 = class_names("context")
    classes = names60 if background else names60[1:]
    first = 0 if background else 1
    table = label_table({k + first: k for k in range(len(classes))}, (255,) if background else (0, 255))
    read = partial(read_mask, table=table, advice="labels are 0 (the background) to 59, and 255.")
    return build(spec, task, rows, read, classes, {"classes": len(classes)})
