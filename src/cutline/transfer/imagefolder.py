"""A folder for each class, as torchvision's ImageFolder reads it: PATH/{train,val[,test]}/CLASS/**/*.jpg.

The classes are the folders in train, sorted by name; hidden ones do not count. Without val, `val=0.1` holds a tenth of
train out. For "zeroshot" train need not be there (the classes are the folders of all parts), and PATH may hold the
folders of the classes itself, of which one may be called train: a part holds folders, a class pictures.
"""

import os
import sys
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import make_dataset

from cutline.errors import DataError
from cutline.pairs.content import TAIL
from cutline.pairs.headers import PICTURES
from cutline.transfer.classes import PARTS, Pictures, class_data, scored_parts, spec_options, val_share
from cutline.transfer.data import DenseData, Skip, Task

EXTENSIONS = tuple(f".{e}" for e in sorted(PICTURES))


def open(rest: str, task: Task) -> DenseData:
    """Open `imagefolder:PATH[,val=0.1]`."""
    path, options = spec_options("imagefolder", rest, {"val": "0.1"})
    spec, root = f"imagefolder:{rest}", Path(path)
    share = val_share(spec, options)
    found = {name: _folders(root / name) for name in PARTS if (root / name).is_dir()}
    if task == "zeroshot":
        if found and _are_classes(spec, root, found):
            found = {}
        return _untrained(spec, root, found or {"all": _folders(root)} if root.is_dir() else {}, options)
    if "train" not in found:
        raise DataError(f"{spec}: there is no folder {root / 'train'}. The layout is {{train,val}}/CLASS/*.jpg.")
    if not found["train"] and _has_pictures(root / "train"):
        raise DataError(
            f"{spec}: {root / 'train'} holds pictures, and should hold a folder of them for each class. The layout is "
            "{train,val}/CLASS/*.jpg, also where a class is called train."
        )
    classes = found["train"]
    parts = {name: _pictures(root / name, name, classes, folders) for name, folders in found.items()}
    return class_data(spec, task, parts, classes, share, {})


def _untrained(spec: str, root: Path, found: dict[str, list[str]], options: dict[str, str]) -> DenseData:
    """What is scored where nothing is trained: val and test, train alone, or the folder's classes as "all"."""
    if options:
        raise DataError(f"{spec}: nothing is trained here, so nothing is held out: leave val= out.")
    if not found:
        raise DataError(f"{spec}: there is no folder {root}. The layout is {{val,test}}/CLASS/*.jpg, or CLASS/*.jpg.")
    classes = sorted({name for folders in found.values() for name in folders})
    places = {"all": root} if "all" in found else {name: root / name for name in scored_parts(found, "zeroshot")}
    parts = {name: _pictures(place, name, classes, found[name]) for name, place in places.items()}
    return class_data(spec, "zeroshot", parts, classes, None, {})


def _are_classes(spec: str, root: Path, parts: dict[str, list[str]]) -> bool:
    """Whether the folders of `root` that are called as parts, and what is in them, are classes. Raises `DataError` where they
    can be either."""
    others = [name for name in _folders(root) if name not in parts]
    flat = [name for name, folders in parts.items() if not folders and _has_pictures(root / name)]
    if others and len(flat) == len(parts):
        return True
    loose = [name for name in others if _has_pictures(root / name)]
    if loose:
        names = ", ".join(name for name in parts if name not in flat)
        raise DataError(
            f"{spec}: {names} holds folders, as a part of the data does, and {', '.join(loose[:3])} pictures, as a class does. "
            "Name the part (imagefolder:PATH/test), or put the classes into a folder of their own."
        )
    return False


def _has_pictures(folder: Path) -> bool:
    """Whether there are some in it, and not only in folders of it."""
    return any(e.name.lower().endswith(EXTENSIONS) and e.is_file() for e in os.scandir(folder))


def _folders(root: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def _pictures(root: Path, part: str, classes: list[str], folders: list[str]) -> Pictures:
    """The pictures of a part, in `root`. Raises `DataError` for classes without a picture in train or unknown to it."""
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
        if part == "train":
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
