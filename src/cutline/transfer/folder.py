"""A folder of your own: {train,val[,test]}/{images,masks|depth}, a picture and its target sharing their stem.

Class maps: single-channel index pictures (PNG, also with a palette). `classes.txt` names the classes, one a line (a blank
one would move the ids, and is refused); without it there are as many as the largest label in train says. Label 255,
labels given as `ignore=0+255` and classes named unlabelled, void or ignore do not count. Depth maps: integer PNG or TIFF
times `scale` (default 0.001: millimetres), or float TIFF, npy and EXR (with the OpenEXR package) in metres, times `scale`
if given. Zero, negative, NaN and infinite values are pixels without a reading.
"""

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError
from cutline.transfer.data import DenseData, Task, by_threads
from cutline.transfer.files import Row, build, names_in, paired, parse, scale_of
from cutline.transfer.targets import DEPTHS, MASKS, label_table, read_depth, read_index, read_mask

FOLDERS = {"segment": "masks", "depth": "depth"}
KINDS = {"segment": MASKS, "depth": DEPTHS}
NO_CLASS = {"unlabelled", "unlabeled", "void", "ignore"}
ADVICE = "name them in classes.txt or leave them out with ignore={labels}."


def open(rest: str, task: Task) -> DenseData:
    """Open `folder:PATH[,ignore=0+255][,scale=0.001]`."""
    if task == "detect":
        from cutline.transfer.coco_boxes import open_folder

        return open_folder(rest)
    spec = f"folder:{rest}"
    root, options = parse("folder", rest, ignore="0+255", scale="0.001")
    scale, ignored = scale_of(spec, options), _ignored(spec, options.get("ignore", "255"))
    rows = {name: _rows(root / name, task) for name in ("train", "val", "test") if (root / name).is_dir()}
    for needed in ("train", "val"):
        if not rows.get(needed):
            layout = f"{{train,val}}/{{images,{FOLDERS[task]}}}"
            raise DataError(f"{spec} has no pictures in {root / needed / 'images'}. The layout is {layout}.")
    if task == "segment":
        classes, table = _classes(root, ignored, [r.target for r in rows["train"]])
        read = partial(read_mask, table=table, advice=ADVICE)
        return build(spec, task, rows, read, classes, {"ignore": sorted(ignored)})
    notes = {"scale": "0.001 for integers" if scale is None else scale}
    return build(spec, task, rows, partial(read_depth, scale=scale), notes=notes)


def _ignored(spec: str, given: str) -> set[int]:
    try:
        return {255, *(int(v) for v in given.split("+"))}
    except ValueError as e:
        raise DataError(f"{spec}: {e}. Write for example ignore=0+255.") from e


def _rows(folder: Path, task: Task) -> list[Row]:
    images, targets = folder / "images", folder / FOLDERS[task]
    if not images.is_dir() or not targets.is_dir():
        raise DataError(f"{folder} has no {'images' if not images.is_dir() else FOLDERS[task]} folder in it.")
    return paired(images, targets, KINDS[task])


def _classes(root: Path, ignored: set[int], masks: list[Path | None]) -> tuple[list[str], NDArray[np.int16]]:
    """Names of the classes, and the table of their labels."""
    names = names_in(root / "classes.txt")
    if names is None:
        names = [str(k) for k in range(_largest([m for m in masks if m is not None], ignored) + 1)]
    labels = [k for k, name in enumerate(names) if name.lower() not in NO_CLASS and k not in ignored]
    if not labels:
        raise DataError(f"{root} has no classes: classes.txt is empty, or no mask has a label that counts.")
    unnamed = [k for k in range(len(names)) if k not in labels]
    table = label_table({label: k for k, label in enumerate(labels)}, [*unnamed, *ignored])
    return [names[k] for k in labels], table


def _largest(masks: list[Path], ignored: set[int]) -> int:
    """The largest label of all masks, which have to be read for it."""

    def largest(path: Path) -> int:
        try:
            return int(max({-1, *np.unique(read_index(path)).tolist()} - ignored))
        except Exception:
            return -1  # counted when the sample is read

    return max(by_threads(largest, masks, "labels of train", "masks"), default=-1)
