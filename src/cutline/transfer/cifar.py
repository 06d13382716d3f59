"""CIFAR-10 and CIFAR-100 in their binary version (Krizhevsky, 2009): PATH/{data_batch_1…5.bin,test_batch.bin,batches.meta.txt},
or PATH/{train.bin,test.bin,fine_label_names.txt}.

A record is the class id (for CIFAR-100 the coarse one, then the fine one, which is used) and 3 · 1,024 bytes, the red, green
and blue of 32 × 32 pixels. The Python version is a pickle, which can run any code when it is read, and is refused.
`val=0.1` holds a tenth of train out; the split to score is `test`.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError
from cutline.record import digest
from cutline.transfer.classes import Pictures, class_data, scored_parts, spec_options, val_share
from cutline.transfer.data import DenseData, Task

SIDE = 32


class Version(NamedTuple):
    """The files of a data set, and how many label bytes begin a record, of which the last counts."""

    names: str
    files: dict[str, list[str]]
    labels: int


VERSIONS = (
    Version("batches.meta.txt", {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}, 1),
    Version("fine_label_names.txt", {"train": ["train.bin"], "test": ["test.bin"]}, 2),
)


def open(rest: str, task: Task) -> DenseData:
    """Open `cifar:PATH[,val=0.1]`."""
    path, options = spec_options("cifar", rest, {"val": "0.1"})
    spec, share = f"cifar:{rest}", val_share(f"cifar:{rest}", options)
    if task == "zeroshot" and options:
        raise DataError(f"{spec}: nothing is trained here, so nothing is held out: leave val= out.")
    root, version = _version(spec, Path(path))
    names = (root / version.names).read_text(encoding="utf-8").split()
    files = {n: [root / f for f in found if (root / f).is_file()] for n, found in version.files.items()}
    there = scored_parts([n for n, found in files.items() if found], task)
    if not there or (task == "classify" and "train" not in there):
        raise DataError(
            f"{spec}: of the files {', '.join(f for found in version.files.values() for f in found)} {root} has too few."
        )
    parts = {name: _pictures(name, files[name], version.labels, len(names)) for name in there}
    return class_data(spec, task, parts, names, share, {})


def _version(spec: str, path: Path) -> tuple[Path, Version]:
    """The folder of the files and which data set they are."""
    for root in (path, path / "cifar-10-batches-bin", path / "cifar-100-binary"):
        for version in VERSIONS:
            if (root / version.names).is_file():
                return root, version
    if any((root / name).is_file() for root in (path, path / "cifar-10-batches-py", path / "cifar-100-python")
           for name in ("batches.meta", "data_batch_1", "test_batch", "meta")):  # fmt: skip
        raise DataError(
            f"{spec} is the Python version, whose files are pickles: reading them can run any code. Take the binary version "
            "of the same site (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz)."
        )
    raise DataError(f"{spec}: {path} has neither {VERSIONS[0].names} (CIFAR-10) nor {VERSIONS[1].names} (CIFAR-100).")


def _pictures(part: str, files: list[Path], labels: int, classes: int) -> Pictures:
    """The pictures of one part, mapped from its files."""
    size = labels + 3 * SIDE * SIDE
    batches: list[NDArray[np.uint8]] = []
    marks: list[str] = []
    for file in files:
        if file.stat().st_size % size or not file.stat().st_size:
            raise DataError(f"{file} is {file.stat().st_size} bytes long, no multiple of {size}: fetch it again.")
        batches.append(np.memmap(file, np.uint8, "r").reshape(-1, size))
        marks += [digest(file).hex()] * len(batches[-1])
    ids = np.concatenate([b[:, labels - 1] for b in batches]).astype(np.int64)
    if ids.max() >= classes:
        raise DataError(
            f"{files[0].parent}: a record of {part} is of class {ids.max()}, and there are {classes} names."
        )
    starts = np.cumsum([0, *map(len, batches)])

    def read(row: int) -> NDArray[np.uint8]:
        batch = int(np.searchsorted(starts, row, "right")) - 1
        return np.array(batches[batch][row - starts[batch], labels:]).reshape(3, SIDE, SIDE).transpose(1, 2, 0).copy()

    return Pictures([f"{part}/{i}" for i in range(len(ids))], ids, read, marks)
