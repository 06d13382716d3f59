"""KITTI depth with the split of Eigen et al. (1406.2283): lists of `picture depth focal length`, 16-bit PNG / 256.

Pictures are KITTI raw, depth the annotated maps of the depth benchmark (1708.06500). Frames whose depth is "None" in a
list (45 of the 697 to test on) have no ground truth and are left out. cut=kb, the default, keeps the 1216x352 pixels at
the middle of the bottom of picture and depth, in training and test, as BTS, GLPDepth and the MIM protocol do; scores with
eval_crop=garg are then on that part, as MIM's are.
"""

from functools import partial
from typing import Any

from numpy.typing import NDArray

from cutline.transfer.data import DenseData, Task
from cutline.transfer.files import build, choice, listed, missing, parse, scale_of, serves
from cutline.transfer.targets import read_depth

LAYOUT = (
    "kitti_eigen_{train,test}.txt (or eigen_{train,test}_files_with_gt.txt) with lines `picture depth focal`, "
    "pictures under {.,input,raw}, depth under {.,gt_depth,data_depth_annotated[/train|/val]}"
)
LISTS = ("kitti_eigen_{}.txt", "eigen_{}_files_with_gt.txt")
PICTURES = (".", "input", "raw")
DEPTHS = (".", "gt_depth", "gt", "data_depth_annotated", "data_depth_annotated/train", "data_depth_annotated/val")
KB = (352, 1216)  # height, width


def open(rest: str, task: Task) -> DenseData:
    """Open `kitti:PATH[,cut=kb|none][,scale=0.00390625]`; a list of val is opened too if there is one."""
    spec = f"kitti:{rest}"
    serves("kitti", task, "depth")
    root, options = parse("kitti", rest, cut="none", scale="0.00390625")
    scale = scale_of(spec, options) or 1 / 256
    cut = choice(spec, options, "cut", "kb", "none")
    rows = {}
    for split in ("train", "val", "test"):
        path = next((p for name in LISTS if (p := root / name.format(split)).is_file()), None)
        if path is not None:
            rows[split] = listed(path, [root / p for p in PICTURES], [root / p for p in DEPTHS])
        elif split != "val":
            raise missing(spec, root, LISTS[0].format(split), LAYOUT)
    notes = {"scale": scale, "cut": cut}
    read = partial(read_depth, scale=scale)
    return build(spec, task, rows, read, notes=notes, max_depth=80.0, cut=_kb if cut == "kb" else None)


def _kb(values: NDArray[Any]) -> NDArray[Any]:
    top, left = max(0, values.shape[0] - KB[0]), max(0, (values.shape[1] - KB[1]) // 2)
    return values[top:, left : left + KB[1]]
