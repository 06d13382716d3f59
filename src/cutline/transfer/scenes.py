"""The embedded world as dense data and as objects with boxes and masks. Train, val and test are scenes of different seeds, so that none meets another.

`scenes:n=1000,size=64,seed=1` trains on the first scenes of seed 1 and scores on as many of seed 1 + 1,000,003 (val) or
seed 1 + 2,000,003 (test) as the task's config says, 500 unless told otherwise.
"""

import functools

import numpy as np

from cutline.record import fingerprint
from cutline.scenes import CLASSES, Scenes, parse_spec
from cutline.scenes.layout import kinds_of
from cutline.scenes.objects import OBJECTS
from cutline.transfer.data import DenseData, Sample, Split, Task
from cutline.transfer.objects import Objects

SEEDS = {"train": 0, "val": 1_000_003, "test": 2_000_003}
HELD_OUT = 10_000  # scenes there are to score on
PICTURES = 500  # scenes scored when the config does not say
FARTHEST = 12.0  # metres; nothing beyond has a reading
LEAST = 4  # pixels; an object of which fewer are seen is left out


@functools.lru_cache(maxsize=2)  # a study opens the same scenes for every arm; rendering them once is enough
def open(rest: str, task: Task) -> DenseData:
    """Open `scenes:n=…,size=…,seed=…`; scenes are rendered when read."""
    config = parse_spec(f"scenes:{rest}")
    counts = {"train": config.n, "val": HELD_OUT, "test": HELD_OUT}
    worlds = {
        name: Scenes(config.model_copy(update={"seed": config.seed + shift, "n": counts[name]}))
        for name, shift in SEEDS.items()
    }
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

    return Split(name, [f"{name}/{i}" for i in range(len(world))], read)


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

    return Split(name, [f"{name}/{i}" for i in range(len(world))], read)
