"""Pictures with a class map, a depth map, a class or objects, read from a SPEC `kind:path[,option=value…]`.

    ade20k:PATH, cityscapes:PATH, voc:PATH, context:PATH, cocostuff:PATH, camvid:PATH     class maps
    nyuv2:PATH, kitti:PATH                                                                depth
    folder:PATH[,ignore=0+255][,scale=0.001]      {train,val[,test]}/{images,masks|depth}, see `folder`
    imagefolder:PATH, webdataset:PATH, pairs:TABLE.lance,label=COLUMN, cifar:PATH    pictures with a class each, for
        "classify"; and for "zeroshot", which trains nothing: val and test, or train if it is all there is
    scenes:n=1000,size=64,seed=1    the embedded world; train, val and test are different worlds, see `scenes`
    coco:PATH, voc:PATH, folder:PATH    objects in COCO's JSON and VOC's XML for "detect", see `coco_boxes`, `voc_boxes`

A kind is one module with `open(rest, task) -> DenseData`. Pictures are decoded when first needed and kept while they
fit in `CACHE_BYTES`. One that cannot be used (broken, no mask, wrong size, labels out of range) raises `Skip`; `usable`
counts and reports those, and stops above `SKIP_SHARE`.
"""

import difflib
import importlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError
from cutline.objectives.gather import world
from cutline.progress import progress

Task = Literal["segment", "depth", "classify", "detect", "zeroshot"]
KINDS = ("ade20k", "camvid", "cityscapes", "cocostuff", "context", "folder", "kitti", "nyuv2", "scenes", "voc")
CLASS_KINDS = ("cifar", "imagefolder", "webdataset", "pairs", "scenes")  # of "classify" and "zeroshot"
OBJECTS = {"coco": "coco_boxes", "folder": "folder", "scenes": "scenes", "voc": "voc_boxes"}  # of "detect": modules
CACHE_BYTES = 1 << 30  # decoded pictures of one split kept in memory, however many there are
SKIP_SHARE = 0.1


class Skip(DataError):
    """A picture that cannot be used: `reason` to count by, and the whole message."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["Skip"], tuple[str, str]]:
        return Skip, (self.reason, str(self))  # to other processes


@dataclass
class Sample:
    """image (H, W, 3) uint8; target: (H, W) int16 class ids or `metrics.IGNORE`, (H, W) float32 metres, 0 = no reading,
    () int64, the picture's class, or its `objects.Objects`."""

    key: str
    image: NDArray[np.uint8]
    target: Any


class Split:
    """One part of a data set: a list of keys and a function that reads the i-th sample or raises `Skip`.

    labels: the class of each row, -1 where it has none; None where pictures have no class, or it is known when read.
    """

    def __init__(
        self,
        name: str,
        keys: Sequence[str],
        read: Callable[[int], Sample],
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        self.name, self.keys, self.labels = name, list(keys), labels
        self._read = read
        self.sizes: dict[int, tuple[int, int]] = {}  # (height, width) of the rows read so far
        self._cache: dict[int, Sample] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, rows: Sequence[int]) -> "Split":
        """Some of its rows, as a split of that name."""
        labels = None if self.labels is None else self.labels[list(rows)]
        return Split(self.name, [self.keys[r] for r in rows], lambda i: self.read(rows[i]), labels)

    def read(self, row: int, keep: bool = True) -> Sample:
        """The sample, from memory if it is there; raises `Skip`. Thread-safe. keep: for another time, if there is room."""
        if (cached := self._cache.get(row)) is not None:
            return cached
        sample = self._read(row)
        if not keep:
            return sample
        size = sample.image.nbytes + sample.target.nbytes
        self.sizes[row] = (sample.image.shape[0], sample.image.shape[1])
        with self._lock:
            if self._bytes + size <= CACHE_BYTES and row not in self._cache:
                self._cache[row] = sample
                self._bytes += size
        return sample

    def usable(self, rows: Sequence[int]) -> tuple[list[int], Counter[str]]:
        """Those of `rows` that can be read, in order, and the others counted by reason (and told on stderr).

        Raises `DataError` when more than `SKIP_SHARE` of them cannot be used.
        """
        return sorted_out(self.name, rows, self.problems(rows))

    def problems(self, rows: Sequence[int]) -> list[Skip | None]:
        """Of each row what is wrong with it, or None."""

        def attempt(row: int) -> Skip | None:
            try:
                self.read(row)
            except Skip as e:
                return e
            return None

        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            progress(f"reading {self.name}", len(rows), "pictures", world()[0] == 0) as tick,
        ):
            found: list[Skip | None] = []
            for problem in pool.map(attempt, rows):
                found.append(problem)
                tick()
        return found


def sorted_out(name: str, rows: Sequence[int], problems: Sequence[Skip | None]) -> tuple[list[int], Counter[str]]:
    """Those of `rows` that can be used, and the others counted by reason, as `tell_skipped` does."""
    counts = tell_skipped(name, [p for p in problems if p is not None], len(rows))
    return [row for row, problem in zip(rows, problems, strict=True) if problem is None], counts


def tell_skipped(name: str, bad: Sequence[Skip], total: int) -> Counter[str]:
    """Count by reason, and tell on stderr, what cannot be used of `total` pictures; `DataError` above `SKIP_SHARE`."""
    counts = Counter(p.reason for p in bad)
    if bad:
        reasons = ", ".join(f"{n} × {reason}" for reason, n in counts.most_common())
        examples = "\n  ".join(str(p) for p in bad[:3])
        message = f"{name}: {len(bad)} of {total} pictures skipped ({reasons}). For example:\n  {examples}"
        if len(bad) > SKIP_SHARE * total:
            raise DataError(f"{message}\nMore than {SKIP_SHARE:.0%} is too many: put the data right.")
        if world()[0] == 0:
            print(message, file=sys.stderr)
    return counts


@dataclass
class DenseData:
    """A data set of one task.

    splits: "train", "val" and perhaps "test" (for "zeroshot" those there are, "all" where they are not told apart); classes: names by id, empty for depth; fingerprint: of the contents of
    all splits; default_pictures: how many are scored when the config does not say (None: all of them); max_depth: the
    farthest reading there can be, if known.
    """

    task: Task
    spec: str
    splits: dict[str, Split]
    classes: list[str]
    fingerprint: str
    default_pictures: int | None = None
    max_depth: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)  # options that change targets, for the protocol
    prompts: list[str] = field(default_factory=list)  # templates of a class's name that come with the data

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise DataError(
                f"{self.spec} has no split {name!r}; it has {', '.join(self.splits)}. Say which one to score with split=."
            )
        return self.splits[name]


def open_data(spec: str | DenseData, task: Task) -> DenseData:
    """Open a SPEC; raises `DataError` for an unknown kind or data that are not laid out as the kind wants."""
    if isinstance(spec, DenseData):
        if spec.task != task:
            raise DataError(f"{spec.spec} was opened for {spec.task}: open it with open_data(spec, {task!r}).")
        return spec
    kind, colon, rest = spec.partition(":")
    names = CLASS_KINDS if task in ("classify", "zeroshot") else KINDS
    kinds = OBJECTS if task == "detect" else dict(zip(names, names))
    if not colon or kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f"did you mean '{near[0]}:{rest or '…'}'?" if near else f"known kinds: {', '.join(kinds)}."
        raise DataError(f"data {spec!r} is not of the form kind:path with a kind known to {task}: {hint}")
    data: DenseData = importlib.import_module(f"cutline.transfer.{kinds[kind]}").open(rest, task)
    return data


def labelled(count: int, labels: int | float | None, seed: int, classes: NDArray[np.int64] | None = None) -> list[int]:
    """The rows whose labels are used: the first of a permutation of `count` by `seed`, so that subsets are nested.

    labels: a number of pictures, a share below 1, or None for all. Every arm with the same seed gets the same rows.
    classes: of each row (-1: none, never chosen); the permutation then begins with one row of each class and goes on
    with every class in proportion. Raises `DataError` for fewer pictures than classes, and for more than there are.
    """
    if labels is None:
        return list(range(count))
    order = np.random.default_rng([seed, 0x1ABE15]).permutation(count)
    if classes is not None:
        order = _by_class(order[classes[order] >= 0], classes)
    wanted = max(1, round(labels * count)) if isinstance(labels, float) else labels
    if wanted > len(order):
        raise DataError(f"labels={labels} asks for more pictures than the {len(order)} there are. Ask for fewer.")
    if classes is not None and wanted < (kinds := len(np.unique(classes[order]))):
        raise DataError(
            f"labels={labels} is {wanted} of {count} pictures, less than one for each of the {kinds} classes. "
            f"Ask for labels={kinds} or more."
        )
    return sorted(order[:wanted].tolist())


def _by_class(order: NDArray[np.int64], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """`order` rearranged: first the first row of every class, then the k-th of n rows of a class at (k + ½) / n."""
    own = classes[order]
    sizes = np.bincount(own)
    rank = np.empty(len(order), np.int64)
    grouped = np.argsort(own, kind="stable")
    rank[grouped] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[np.argsort(np.where(rank == 0, -1, (rank + 0.5) / sizes[own]), kind="stable")]
