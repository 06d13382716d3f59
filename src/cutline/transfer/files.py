"""What the kinds of data that lie in files share: their SPEC, finding the rows of a split, making a `DenseData` of them.

A row is a picture and its target. Nothing is decoded here before it is read; the contents of all files are hashed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError
from cutline.record import combine, digest, fingerprint
from cutline.transfer.data import DenseData, Sample, Size, Skip, Split, Task, by_threads
from cutline.transfer.metrics import IGNORE
from cutline.transfer.targets import MASKS, PICTURES, header_size, read_image

Read = Callable[[Path], NDArray[Any]]
Cut = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """A picture and its target, or None where there is none; either may turn out not to be there."""

    key: str
    picture: Path
    target: Path | None


def parse(kind: str, rest: str, **examples: str) -> tuple[Path, dict[str, str]]:
    """Path and options of `PATH[,name=value…]`; `examples` names the options there are. Raises `DataError`."""
    path, *items = rest.split(",")
    options = dict(item.partition("=")[::2] for item in items)
    for name in options:
        if name not in examples:
            known = " and ".join(f"{k}={v}" for k, v in examples.items())
            raise DataError(
                f"{kind}:{rest}: unknown option {name!r}; {f'there are {known}' if known else 'it has none'}."
            )
    return Path(path), options


def choice(spec: str, options: Mapping[str, str], name: str, *values: str) -> str:
    """The option `name`, one of `values`, by default the first."""
    value = options.get(name, values[0])
    if value not in values:
        raise DataError(f"{spec}: {name}={value} is none of {', '.join(values)}.")
    return value


def scale_of(spec: str, options: Mapping[str, str]) -> float | None:
    """The option `scale`, metres per stored unit, None if it is not given."""
    try:
        scale = float(options["scale"]) if "scale" in options else None
    except ValueError as e:
        raise DataError(f"{spec}: {e}. Write for example scale=0.001.") from e
    if scale is not None and not 0 < scale < float("inf"):
        raise DataError(f"{spec}: scale={scale} must be above 0: metres per stored unit, for example 0.001.")
    return scale


def serves(kind: str, task: Task, served: Literal["segment", "depth"]) -> None:
    """Raise `DataError` for a task that the kind has no targets of."""
    if task != served:
        has = "class maps and no depth" if served == "segment" else "depth and no class maps"
        raise DataError(f"{kind}: has {has}; it cannot serve {task}.")


def missing(spec: str, root: Path, what: str, layout: str) -> DataError:
    """The error for data that are not laid out as they must be: what is missing, what is expected, what was found."""
    if root.is_dir():
        names = sorted(p.name + "/" * p.is_dir() for p in root.iterdir())
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        found = f"{root} holds {shown or 'nothing'}."
    else:
        found = f"{root} {'is a file' if root.exists() else 'does not exist'}."
    return DataError(f"{spec}: there is no {what}. The layout is {layout}. {found}")


def root_of(spec: str, path: Path, holds: str, layout: str, *inside: str) -> Path:
    """`path`, or the first of the folders `inside` it, that holds the folder `holds`; raises `missing`."""
    for root in (path, *(path / name for name in inside)):
        if (root / holds).is_dir():
            return root
    raise missing(spec, path, holds, layout)


def paired(images: Path, targets: Path, kinds: Sequence[str] = MASKS) -> list[Row]:
    """The pictures of a folder by name, each with the target of the same stem in another."""
    by_stem = {p.stem: p for p in sorted(targets.iterdir()) if p.suffix.lower() in kinds}
    pictures = sorted(p for p in images.iterdir() if p.suffix.lower() in PICTURES)
    return [Row(p.stem, p, by_stem.get(p.stem)) for p in pictures]


def lines(path: Path) -> list[list[str]]:
    """The words of every line of a list that is not empty."""
    return [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def names_in(path: Path) -> list[str] | None:
    """The lines of a file, whose places are ids, without a byte-order mark; blank ones can only be the last, or it is a
    `DataError`. None where there is no such file."""
    if not path.is_file():
        return None
    found = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    if "" in found:
        raise DataError(
            f"{path} is blank in line {found.index('') + 1}, whose place is an id: write what belongs there."
        )
    return found


def ids(path: Path) -> list[str]:
    """The names in a list, one a line, without folders and suffixes."""
    return [Path(words[0]).stem for words in lines(path)]


def listed(path: Path, pictures: Sequence[Path], targets: Sequence[Path]) -> list[Row]:
    """The rows of a list of `picture depth [focal length]`, each in the first of the folders that has it.

    A line whose depth is "None" (KITTI frames without ground truth) is left out.
    """

    def place(word: str, folders: Sequence[Path]) -> Path:
        name = word.lstrip("/")
        return next((f / name for f in folders if (f / name).is_file()), folders[0] / name)

    rows = []
    for words in lines(path):
        if len(words) < 2:
            raise DataError(f"{path}: {' '.join(words)!r} is no line of `picture depth [focal length]`.")
        if words[1] != "None":
            key = str(Path(words[0].lstrip("/")).with_suffix(""))
            rows.append(Row(key, place(words[0], pictures), place(words[1], targets)))
    return rows


def build(
    spec: str,
    task: Task,
    rows: Mapping[str, list[Row]],
    read: Read,
    classes: Sequence[str] = (),
    notes: Mapping[str, Any] | None = None,
    max_depth: float | None = None,
    cut: Cut | None = None,
) -> DenseData:
    """The data set of `rows` by split. read: a target's values; cut: what to keep of picture and target.

    Raises `DataError` for a split without pictures.
    """
    for name, found in rows.items():
        if not found:
            raise DataError(f"{spec}: the split {name} has no pictures.")
    files = [p for found in rows.values() for r in found for p in (r.picture, r.target) if p is not None]
    keys, kept = {name: [r.key for r in found] for name, found in rows.items()}, dict(notes or {})
    contents = fingerprint(_contents(files), keys, list(classes), kept)
    splits = {name: split(name, found, read, cut) for name, found in rows.items()}
    return DenseData(task, spec, splits, list(classes), contents, max_depth=max_depth, notes=kept)


def split(name: str, rows: Sequence[Row], read_target: Read, cut: Cut | None = None) -> Split:
    """A `Split` of files, which says what is wrong with those that cannot be used."""

    def read(index: int) -> Sample:
        row = rows[index]
        if row.target is None or not row.target.is_file():
            expected = "" if row.target is None else f": {row.target} is not there"
            raise Skip("no target", f"{row.picture} has no mask or depth map of its own{expected}.")
        image = read_image(row.picture)
        try:
            values = read_target(row.target)
        except DataError:  # a package is missing, and the file is not to blame
            raise
        except Exception as e:  # broken bytes make Pillow's plug-ins and NumPy raise errors of many kinds
            raise Skip("target broken", f"{row.target} cannot be read: {e}") from e
        if values.shape != image.shape[:2]:
            (h, w), (th, tw) = image.shape[:2], values.shape
            raise Skip("size differs", f"{row.target} is {tw}x{th} and its picture {w}x{h}: they must be equal.")
        if cut is not None:
            image, values = cut(image), cut(values)
        if not (values != IGNORE).any() if values.dtype == np.int16 else not values.any():
            raise Skip("target empty", f"{row.target} has no labelled pixel.")
        return Sample(row.key, image, values)

    def size(index: int) -> Size | None:
        found = header_size(rows[index].picture)
        return found if cut is None or found is None else cut(np.broadcast_to(np.uint8(0), found)).shape[:2]

    return Split(name, [r.key for r in rows], read, size=size)


def _contents(files: Sequence[Path]) -> str:
    """Hash of names and contents, as `record.hash_files` gives it; a file that is not there counts by its name."""
    digests = by_threads(lambda p: digest(p) if p.is_file() else b"", files, "hashing the data", "files")
    return combine(zip(files, digests, strict=True))
