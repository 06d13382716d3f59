"""Pictures with one class each: what the kinds of data have in common, and what is refused in all of them.

A kind finds `Pictures` for each part and a list of class names; `class_data` makes a data set of them, for "classify"
or, of any one part and more, for "zeroshot". Its fingerprint
is of keys, classes, lengths and last bytes of all pictures (as a table of pairs', see `pairs.content`), so that a
million of them are not read through.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError
from cutline.pairs.decode import BadPicture, decode
from cutline.record import fingerprint
from cutline.transfer.data import DenseData, Sample, Skip, Split, Task

PARTS = ("train", "val", "test")


@dataclass
class Pictures:
    """One part. labels (N,): class ids, -1 where `problems` has the row; read: a row's encoded bytes or its pixels, or
    raises `Skip`; marks: what tells the contents of each picture from another's."""

    keys: list[str]
    labels: NDArray[np.int64]
    read: Callable[[int], bytes | NDArray[np.uint8]]
    marks: Sequence[Any]
    problems: dict[int, Skip] = field(default_factory=dict)

    def take(self, rows: Sequence[int]) -> "Pictures":
        """These rows alone."""
        return Pictures(
            [self.keys[r] for r in rows], self.labels[list(rows)], lambda i: self.read(rows[i]),
            [self.marks[r] for r in rows], {i: self.problems[r] for i, r in enumerate(rows) if r in self.problems},
        )  # fmt: skip


def scored_parts(parts: Iterable[str], task: Task) -> list[str]:
    """The parts that a task needs of those there are: for "zeroshot" train only where it is the only one."""
    found = [name for name in PARTS if name in set(parts)]
    return [name for name in found if name != "train"] or found if task == "zeroshot" else found


def class_data(
    spec: str,
    task: Task,
    parts: dict[str, Pictures],
    classes: Sequence[str],
    val: float | None,
    notes: dict[str, Any],
    prompts: Sequence[str] = (),
) -> DenseData:
    """A data set for "classify" of parts "train" and "val", "test" or both; or for "zeroshot", as they are.

    val: the share of train that is held out as "val" by its keys. Raises `DataError` for a part without a picture, a
    class that train has no picture of and another part has, and a train with fewer than two classes.
    """
    if val is not None:
        if "val" in parts:
            raise DataError(f"{spec} has a val part of its own: leave val={val:g} out.")
        parts = {**hold_out(parts["train"], val), **{k: v for k, v in parts.items() if k != "train"}}
        notes = {**notes, "held_out": val}
    for name, part in parts.items():
        if not (part.labels >= 0).any():
            raise DataError(f"{spec} has no picture with a class in {name}.")
    if task == "zeroshot":
        contents = fingerprint(
            list(classes), notes, {n: [p.keys, p.labels.tolist(), p.marks] for n, p in parts.items()}
        )
        splits = {name: _split(name, part) for name, part in parts.items()}
        return DenseData(task, spec, splits, list(classes), contents, notes=notes, prompts=list(prompts))
    if len(parts) == 1:
        raise DataError(
            f"{spec} has nothing to score on: beside train it needs val or test. Or hold a tenth of train out by adding "
            "',val=0.1' to the data."
        )
    classes = apart(classes)
    _check_classes(spec, parts, classes)
    contents = fingerprint(classes, notes, {n: [p.keys, p.labels.tolist(), p.marks] for n, p in parts.items()})
    splits = {name: _split(name, parts[name]) for name in PARTS if name in parts}
    return DenseData("classify", spec, splits, list(classes), contents, notes=notes)


def hold_out(train: Pictures, share: float) -> dict[str, Pictures]:
    """train and val: those of whose key the hash falls below `share` are val.

    So a picture is in val or not whatever else is in the data, and a smaller share's val is part of a larger one's.
    """
    place = [int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12 for key in train.keys]
    inside = np.array(place) < share
    return {"train": train.take(np.flatnonzero(~inside).tolist()), "val": train.take(np.flatnonzero(inside).tolist())}


def spec_options(kind: str, rest: str, known: dict[str, str]) -> tuple[str, dict[str, str]]:
    """`PATH[,name=value…]` as path and options; known: name → an example of its value. Raises `DataError`."""
    path, *items = rest.split(",")
    options = dict(item.partition("=")[::2] for item in items)
    for name, value in options.items():
        if name not in known or not value:
            examples = ", ".join(f"{k}={v}" for k, v in known.items())
            wrong = f"unknown option {name!r}" if name not in known else f"the option {name!r} has no value"
            raise DataError(f"{kind}:{rest}: {wrong}; there are {examples}.")
    return path, options


def val_share(spec: str, options: dict[str, str]) -> float | None:
    """The option val= as a number, None where it is not given. Raises `DataError`."""
    try:
        share = float(options["val"]) if "val" in options else None
    except ValueError:
        share = -1.0
    if share is not None and not 0 < share < 1:
        raise DataError(f"{spec}: val={options['val']} is no share of train between 0 and 1, such as val=0.1.")
    return share


def apart(names: Sequence[str]) -> list[str]:
    """Names that occur twice (ImageNet's two cranes) get their class id."""
    count = Counter(names)
    return [f"{name} ({i})" if count[name] > 1 else name for i, name in enumerate(names)]


def _check_classes(spec: str, parts: dict[str, Pictures], classes: Sequence[str]) -> None:
    trained = set(np.unique(parts["train"].labels).tolist()) - {-1}
    if len(trained) < 2:
        raise DataError(f"{spec} has pictures of {len(trained)} class in train; classification needs two or more.")
    for name, part in parts.items():
        lacking = sorted(set(np.unique(part.labels).tolist()) - trained - {-1})
        if lacking:
            shown = ", ".join(repr(classes[i]) for i in lacking[:5]) + (", …" if len(lacking) > 5 else "")
            raise DataError(
                f"{spec}: {name} has pictures of {len(lacking)} classes that train has none of: {shown}. "
                f"Put some into train, or take them out of {name}."
            )


def _split(name: str, part: Pictures) -> Split:
    def read(row: int) -> Sample:
        if row in part.problems:
            raise part.problems[row]
        try:
            found = part.read(row)
            image = decode(found) if isinstance(found, bytes) else found
        except BadPicture as e:
            raise Skip("picture broken", f"{part.keys[row]}: {e}") from e
        return Sample(part.keys[row], image, np.array(part.labels[row]))

    return Split(name, part.keys, read, part.labels)
