"""The embedded world as labelled data. Train, val and test are scenes of different seeds, so that none meets another.

`scenes:n=1000,size=64,seed=1` trains on the first scenes of seed 1 and scores on as many of seed 1 + 1,000,003 (val) or
seed 1 + 2,000,003 (test) as the task's config says, 500 unless told otherwise.

For "classify" a picture is a scene whose objects are all of one kind (a fifth of all scenes: one car, three pears), and
its class is that kind, one of 96, or of `objects=24`, 32, …; n counts these pictures. Nothing is cropped: they are
scenes like those an encoder was trained on. "zeroshot" is the same without train. For "detect" the objects have boxes and masks, and their kinds are classes.
"""

import functools
import threading

import numpy as np
from numpy.typing import NDArray

from cutline.errors import DataError
from cutline.progress import progress
from cutline.record import fingerprint
from cutline.scenes import CLASSES, Scenes, parse_spec
from cutline.scenes.layout import intended, kinds_of
from cutline.scenes.objects import OBJECTS
from cutline.transfer.data import DenseData, Sample, Split, Task
from cutline.transfer.objects import Objects

SEEDS = {"train": 0, "val": 1_000_003, "test": 2_000_003}
HELD_OUT = 10_000  # scenes there are to score on
PICTURES = 500  # scenes scored when the config does not say
LEAST = 4  # pixels; an object of which fewer are seen is left out
FARTHEST = 12.0  # metres; nothing beyond has a reading


@functools.lru_cache(maxsize=2)  # a study opens the same scenes for every arm; rendering them once is enough
def open(rest: str, task: Task) -> DenseData:
    """Open `scenes:n=…,size=…,seed=…`; scenes are rendered when read."""
    config = parse_spec(f"scenes:{rest}")
    counts = {"train": config.n, "val": HELD_OUT, "test": HELD_OUT}
    most = 2**40 - 1 if task in ("classify", "zeroshot") else 0  # scenes to choose from
    worlds = {
        name: Scenes(config.model_copy(update={"seed": config.seed + shift, "n": most or counts[name]}))
        for name, shift in SEEDS.items()
    }
    if task == "classify":
        return _classes(rest, worlds, counts)
    if task == "zeroshot":
        return _untrained(rest, worlds, counts)
    column = {"segment": "semantic", "depth": "depth", "detect": "instances"}[task]
    contents = fingerprint({name: world.fingerprint for name, world in worlds.items()}, column)
    if task == "detect":
        classes = [OBJECTS[kind].name for kind in kinds_of(config.objects)]
        splits = {name: _objects_split(name, world, classes) for name, world in worlds.items()}
        notes = {"masks": True}
    else:
        classes = list(CLASSES) if task == "segment" else []
        splits, notes = {name: _split(name, world, column) for name, world in worlds.items()}, {}
    return DenseData(task, f"scenes:{rest}", splits, classes, contents, PICTURES, FARTHEST, notes)


def _split(name: str, world: Scenes, column: str) -> Split:
    def read(row: int) -> Sample:
        found = world.read([row], ["key", "image", column])[0]
        target = found[column].astype(np.int16 if column == "semantic" else np.float32)
        return Sample(found["key"], found["image"], target)

    return Split(name, [f"{name}/{i}" for i in range(len(world))], read, size=lambda _: (world.config.size,) * 2)


def _objects_split(name: str, world: Scenes, classes: list[str]) -> Split:
    def read(row: int) -> Sample:
        found = world.read([row], ["key", "image", "instances", "boxes", "objects"])[0]
        masks = found["instances"] == np.arange(1, len(found["objects"]) + 1)[:, None, None]
        areas = masks.sum((1, 2)).astype(np.float32)
        seen = areas >= LEAST
        labels = np.array([classes.index(item["name"]) for item in found["objects"]], np.int64)
        crowd = np.zeros(seen.sum(), np.bool_)
        return Sample(
            found["key"], found["image"], Objects(found["boxes"][seen], labels[seen], crowd, areas[seen], masks[seen])
        )

    return Split(name, [f"{name}/{i}" for i in range(len(world))], read, size=lambda _: (world.config.size,) * 2)


class _Singles:
    """The scenes of a world that are to show objects of one kind only, found one after the other when asked for."""

    def __init__(self, world: Scenes) -> None:
        self.world, self.found, self.next = world, list[tuple[int, int]](), 0
        self.lock = threading.Lock()

    def at(self, place: int) -> tuple[int, int]:
        """Index and kind of the scene at this place among them."""
        config = self.world.config
        with self.lock:
            while len(self.found) <= place:
                kinds = set(intended(config.seed, self.next, config.objects))
                if len(kinds) == 1:
                    self.found.append((self.next, kinds.pop()))
                self.next += 1
            return self.found[place]


def _classes(rest: str, worlds: dict[str, Scenes], counts: dict[str, int]) -> DenseData:
    kinds = kinds_of(worlds["train"].config.objects)
    singles = {name: _Singles(world) for name, world in worlds.items()}
    with progress("scenes of one kind", counts["train"], "scenes") as tick:
        labels = []
        for place in range(counts["train"]):
            labels.append(kinds.index(singles["train"].at(place)[1]))
            tick()
    missing = [OBJECTS[k].name for i, k in enumerate(kinds) if i not in set(labels)]
    if missing:
        raise DataError(
            f"scenes:{rest} has no picture of {len(missing)} of its {len(kinds)} classes ({', '.join(missing[:3])}) "
            f"in train: take n={10 * len(kinds)} or more, or fewer classes with objects=24."
        )
    splits = {
        name: _class_split(name, found, counts[name], kinds, np.array(labels) if name == "train" else None)
        for name, found in singles.items()
    }
    contents = fingerprint({n: w.fingerprint for n, w in worlds.items()}, counts, "classify")
    names = [OBJECTS[k].name for k in kinds]
    return DenseData("classify", f"scenes:{rest}", splits, names, contents, default_pictures=PICTURES)


def _untrained(rest: str, worlds: dict[str, Scenes], counts: dict[str, int]) -> DenseData:
    """val and test of `_classes`."""
    kinds = kinds_of(worlds["val"].config.objects)
    splits = {n: _class_split(n, _Singles(worlds[n]), counts[n], kinds, None) for n in ("val", "test")}
    contents = fingerprint({n: worlds[n].fingerprint for n in splits}, "zeroshot")
    names = [OBJECTS[k].name for k in kinds]
    return DenseData("zeroshot", f"scenes:{rest}", splits, names, contents, default_pictures=PICTURES)


def _class_split(
    name: str,
    singles: _Singles,
    count: int,
    kinds: tuple[int, ...],
    labels: NDArray[np.int64] | None,
) -> Split:
    def read(row: int) -> Sample:
        index, kind = singles.at(row)
        found = singles.world.read([index], ["key", "image"])[0]
        return Sample(found["key"], found["image"], np.array(kinds.index(kind)))

    return Split(name, [f"{name}/{i}" for i in range(count)], read, labels)
