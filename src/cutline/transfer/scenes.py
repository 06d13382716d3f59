"""The embedded world as dense data. Train, val and test are scenes of different seeds, so that none meets another.

`scenes:n=1000,size=64,seed=1` trains on the first scenes of seed 1 and scores on as many of seed 1 + 1,000,003 (val) or
seed 1 + 2,000,003 (test) as the task's config says, 500 unless told otherwise.
"""

import functools

import numpy as np

from cutline.record import fingerprint
from cutline.scenes import CLASSES, Scenes, parse_spec
from cutline.transfer.data import DenseData, Sample, Split, Task

SEEDS = {"train": 0, "val": 1_000_003, "test": 2_000_003}
HELD_OUT = 10_000  # scenes there are to score on
PICTURES = 500  # scenes scored when the config does not say
FARTHEST = 12.0  # metres; nothing beyond has a reading


@functools.lru_cache(maxsize=2)  # a study opens the same scenes for every arm; rendering them once is enough
def open(rest: str, task: Task) -> DenseData:
    """Open `scenes:n=…,size=…,seed=…`; scenes are rendered when read."""
    config = parse_spec(f"scenes:{rest}")
    counts = {"train": config.n, "val": HELD_OUT, "test": HELD_OUT}
    worlds = {
        name: Scenes(config.model_copy(update={"seed": config.seed + shift, "n": counts[name]}))
        for name, shift in SEEDS.items()
    }
    column = "semantic" if task == "segment" else "depth"
    splits = {name: _split(name, world, column) for name, world in worlds.items()}
    contents = fingerprint({name: world.fingerprint for name, world in worlds.items()}, column)
    classes = list(CLASSES) if task == "segment" else []
    return DenseData(task, f"scenes:{rest}", splits, classes, contents, default_pictures=PICTURES, max_depth=FARTHEST)


def _split(name: str, world: Scenes, column: str) -> Split:
    def read(row: int) -> Sample:
        found = world.read([row], ["key", "image", column])[0]
        target = found[column].astype(np.int16 if column == "semantic" else np.float32)
        return Sample(found["key"], found["image"], target)

    return Split(name, [f"{name}/{i}" for i in range(len(world))], read)
