"""What is scored and how it is recorded: the rows of a split, the protocol of a result, a few samples to look at."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar
from typing import Protocol as Structure

from cutline.errors import DataError
from cutline.objectives.gather import own_share, world
from cutline.progress import progress
from cutline.record import Protocol
from cutline.transfer.batches import ahead
from cutline.transfer.data import THREADS, DenseData, Sample, Skip, Split
from cutline.transfer.model import Transferred
from cutline.transfer.options import NO_NUMBER, SplitName, TransferConfig, precision

A = TypeVar("A")


class Scored(Structure):
    """A config that says what is scored."""

    split: SplitName
    pictures: int | None


def scored_part(config: Scored, data: DenseData) -> Split:
    """The part of the data to score. Its `counts` tell what was and what could not be, once it was read."""
    split = data.split(config.split)
    part = split.part(range(min(config.pictures or data.default_pictures or len(split), len(split))))
    if not len(part):
        raise DataError(f"{data.spec}: the split {config.split!r} has no picture to score.")
    return part


def read_along(part: Split, then: Callable[[Sample], Sample] = lambda s: s, each: int = 1) -> Iterator[Sample]:
    """What `then` makes of the samples of this process's share, without those that cannot be used; read ahead by threads,
    with progress.

    Shares are consecutive, so that joined in order of the processes they are all rows in theirs; each: as in `own_share`.
    """

    def read(row: int) -> Sample | None:
        try:
            return then(part.read(row))
        except Skip:
            part.check_skipped()
            return None

    mine = own_share(len(part), each)
    with progress(f"scoring {part.name}", len(mine), "pictures", world()[0] == 0) as tick:
        for sample in ahead(read, mine, THREADS):
            if sample is not None:
                yield sample
            tick()


def grouped(samples: Iterator[A], size: int) -> Iterator[list[A]]:
    """Consecutive samples (or whatever they were made into), `size` at a time and what is left."""
    while group := list(islice(samples, size)):
        yield group


def protocol(
    task: str, config: TransferConfig, data: DenseData, model: Transferred, scored: int, skipped: int, **settings: Any
) -> Protocol:
    """How a score of `task` was measured: everything in the config, the data and what of them could be read."""
    values = config.model_dump(mode="json", exclude={"seed", "split", *NO_NUMBER})
    values["precision"] = precision(config)
    counts = {"scored": scored, "skipped": skipped, "trained": model.labels, "trained_skipped": model.skipped}
    return Protocol(
        task=task,
        data=data.spec,
        data_fingerprint=data.fingerprint,
        split=config.split,
        settings={**values, **({"data": data.notes} if data.notes else {}), **counts, **settings},
        encoder=model.source,
        encoder_hash=model.source_hash,
        seed=config.seed,
    )


def shown(config: Scored, data: DenseData, count: int = 6) -> list[Sample]:
    """A few samples spread over the scored split, for a look at predictions."""
    split = data.split(config.split)
    total = min(config.pictures or data.default_pictures or len(split), len(split))
    samples = []
    for row in range(0, total, max(1, total // count)):
        try:
            samples.append(split.read(row))
        except Skip:
            continue
    return samples[:count]
