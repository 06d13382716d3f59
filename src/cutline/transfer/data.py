"""Pictures with a class map, a depth map, a class or objects, read from a SPEC `kind:path[,option=value…]`.

    ade20k:PATH, cityscapes:PATH, voc:PATH, context:PATH, cocostuff:PATH, camvid:PATH     class maps
    nyuv2:PATH, kitti:PATH                                                                depth
    folder:PATH[,ignore=0+255][,scale=0.001]      {train,val[,test]}/{images,masks|depth}, see `folder`
    imagefolder:PATH, webdataset:PATH, pairs:TABLE.lance,label=COLUMN, cifar:PATH    pictures with a class each, for
        "classify"; and for "zeroshot", which trains nothing: val and test, or train if it is all there is
    scenes:n=1000,size=64,seed=1    the embedded world; train, val and test are different worlds, see `scenes`
    coco:PATH, voc:PATH, folder:PATH    objects in COCO's JSON and VOC's XML for "detect", see `coco_boxes`, `voc_boxes`

A kind is one module with `open(rest, task) -> DenseData`. Pictures are decoded when first needed and kept while they
fit in `CACHE_BYTES`. One that cannot be used (broken, no mask, wrong size, labels out of range) raises `Skip`; those are
left out, counted and told, and more than `SKIP_SHARE` of them stop what is done (see `Split`).
"""

import difflib
import importlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError
from cutline.objectives.gather import of_all, world
from cutline.progress import progress

Task = Literal["segment", "depth", "classify", "detect", "zeroshot"]
KINDS = ("ade20k", "camvid", "cityscapes", "cocostuff", "context", "folder", "kitti", "nyuv2", "scenes", "voc")
CLASS_KINDS = ("cifar", "imagefolder", "webdataset", "pairs", "scenes")  # of "classify" and "zeroshot"
OBJECTS = {"coco": "coco_boxes", "folder": "folder", "scenes": "scenes", "voc": "voc_boxes"}  # of "detect": modules
CACHE_BYTES = 1 << 30  # decoded pictures of one split kept in memory, however many there are
SKIP_SHARE = 0.1
THREADS = min(8, os.cpu_count() or 1)  # that read
A = TypeVar("A")
B = TypeVar("B")
Size = tuple[int, int]  # height, width


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
    size: (height, width) of a row's picture without decoding it, or None where that cannot be told; by default it is read.
    keep: what is read, in memory.

    Nothing is decoded before it is needed, and nothing is tried out before training: that would take minutes for ADE20K
    and half an hour for ImageNet. A training or a scoring is of a `part`, which keeps in `skipped` what turned out not to
    be usable: training shows another picture in its place (`Batches.shown`), a score leaves it out, and both stop once
    it is too much (`check_skipped`) and tell and record how much it was (`counts`).
    """

    def __init__(
        self,
        name: str,
        keys: Sequence[str],
        read: Callable[[int], Sample],
        labels: NDArray[np.int64] | None = None,
        size: Callable[[int], Size | None] | None = None,
        keep: bool = True,
    ) -> None:
        self.name, self.keys, self.labels = name, list(keys), labels
        self._read, self._size, self._room = read, size, CACHE_BYTES if keep else 0
        self.skipped: dict[int, Skip] = {}  # by row, of those read so far
        self._told = 0
        self._cache: dict[int, Sample] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, rows: Sequence[int]) -> "Split":
        """Some of its rows, as a split of that name which has skipped nothing yet. What is read is kept here alone."""
        labels = None if self.labels is None else self.labels[list(rows)]
        keys, size = [self.keys[r] for r in rows], lambda i: self.size(rows[i])
        return Split(self.name, keys, lambda i: self.read(rows[i]), labels, size, keep=False)

    def read(self, row: int, keep: bool = True) -> Sample:
        """The sample, from memory if it is there; raises `Skip`. Thread-safe. keep: for another time, if there is room."""
        if (cached := self._cache.get(row)) is not None:
            return cached
        if (problem := self.skipped.get(row)) is not None:
            raise problem.with_traceback(None)
        try:
            sample = self._read(row)
        except Skip as e:
            self.skipped[row] = e
            raise
        size = sample.image.nbytes + sample.target.nbytes
        with self._lock:
            if keep and size <= self._room and row not in self._cache:
                self._cache[row] = sample
                self._room -= size
        return sample

    def size(self, row: int) -> Size | None:
        """(height, width) of a picture, from its header where there is one; None if that cannot be read."""
        if self._size is not None:
            return self._size(row)
        try:
            return self.read(row).image.shape[:2]
        except Skip:
            return None

    def sizes(self) -> set[Size]:
        """(height, width) of all its pictures, without those that cannot be read."""
        found = by_threads(self.size, range(len(self)), f"sizes of {self.name}", "pictures")
        return {size for size in found if size is not None}

    def usable(self, wanted: Callable[[Sample], bool] = lambda sample: True) -> list[int]:
        """The rows that can be used and for which `wanted` holds: all of them are read."""

        def suits(row: int) -> bool:
            try:
                return wanted(self.read(row))
            except Skip:
                self.check_skipped()
                return False

        found = by_threads(suits, range(len(self)), f"reading {self.name}", "pictures")
        return [row for row, fits in enumerate(found) if fits]

    def samples(self) -> Iterator[Sample]:
        """Those that can be used, in order, read when asked for."""
        for row in range(len(self)):
            try:
                yield self.read(row)
            except Skip:
                self.check_skipped()

    def check_skipped(self) -> None:
        """Raise `DataError` once more than `SKIP_SHARE` of the rows turned out not to be usable."""
        if len(self.skipped) > SKIP_SHARE * len(self):
            tell_skipped(self.name, list(self.skipped.copy().values()), len(self))

    def counts(self) -> tuple[int, int]:
        """How many rows are usable as far as is known, and how many are not, on all processes together.

        Tells on stderr of the latter where they are more than when last told. Raises `DataError` as `check_skipped`.
        """
        own = [(row, e.reason, str(e)) for row, e in self.skipped.copy().items()]  # threads may be reading ahead
        for found in of_all(own):
            self.skipped |= {row: Skip(*said) for row, *said in found}
        bad = [self.skipped[row] for row in sorted(self.skipped)]
        if len(bad) > self._told:
            self._told = len(bad)
            tell_skipped(self.name, bad, len(self))
        return len(self) - len(bad), len(bad)


def by_threads(look: Callable[[A], B], items: Sequence[A], label: str, unit: str) -> Iterator[B]:
    """`look` of every item, in order, by threads, with progress."""
    with ThreadPoolExecutor(THREADS) as pool, progress(label, len(items), unit) as tick:
        for found in pool.map(look, items):
            yield found
            tick()


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
