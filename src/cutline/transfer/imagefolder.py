"""A folder for each class, as torchvision's ImageFolder reads it: PATH/{train,val[,test]}/CLASS/**/*.jpg.

The classes are the folders in train, sorted by name; hidden ones do not count. Without val, `val=0.1` holds a tenth of
train out.
"""

import os
import sys
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import make_dataset

from cutline.errors import DataError
from cutline.pairs.content import TAIL
from cutline.pairs.headers import PICTURES
from cutline.transfer.classes import PARTS, Pictures, class_data, spec_options, val_share
from cutline.transfer.data import DenseData, Skip, Task

EXTENSIONS = tuple(f".{e}" for e in sorted(PICTURES))


def open(rest: str, task: Task) -> DenseData:
    """Open `imagefolder:PATH[,val=0.1]`."""
    path, options = spec_options("imagefolder", rest, {"val": "0.1"})
    spec, root = f"imagefolder:{rest}", Path(path)
    share = val_share(spec, options)
    if not (root / "train").is_dir():
        raise DataError(f"{spec}: there is no folder {root / 'train'}. The layout is {{train,val}}/CLASS/*.jpg.")
    found = {name: _folders(root / name) for name in PARTS if (root / name).is_dir()}
    classes = found["train"]
    parts = {name: _pictures(root / name, classes, folders) for name, folders in found.items()}
    return class_data(spec, parts, classes, share, {})


def _folders(root: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def _pictures(root: Path, classes: list[str], folders: list[str]) -> Pictures:
    """The pictures of one part. Raises `DataError` for classes without a picture in train or unknown to it."""
    unknown = sorted(set(folders) - set(classes))
    if unknown:
        raise DataError(
            f"{root} has {len(unknown)} classes that train has not: {', '.join(unknown[:5])}. "
            "Put pictures of them into train, or take their folders away."
        )
    index = {name: classes.index(name) for name in folders}
    found = make_dataset(str(root), index, EXTENSIONS, allow_empty=True) if index else []
    empty = sorted(set(folders) - {Path(p).relative_to(root).parts[0] for p, _ in found})
    if empty:
        message = f"{root} has no picture (.jpg, .png, .webp, …) in the class folder {', '.join(map(repr, empty[:5]))}"
        if root.name == "train":
            raise DataError(f"{message}: put pictures there, or take the folder away.")
        print(f"{message}: how well that class is told is not measured.", file=sys.stderr)
    paths = [Path(p) for p, _ in found]
    keys = [p.relative_to(root).as_posix() for p in paths]
    return Pictures(keys, np.array([c for _, c in found], np.int64), lambda row: _read(paths[row]), _marks(paths))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise Skip("picture unreadable", f"{path}: {e.strerror}") from e


def _marks(paths: list[Path]) -> list[str]:
    """Length and last bytes of each file."""
    marks = []
    for path in paths:
        try:
            with path.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                marks.append(f"{size} {os.pread(f.fileno(), TAIL, max(size - TAIL, 0)).hex()}")
        except OSError:
            marks.append("unreadable")  # counted when it is read
    return marks
