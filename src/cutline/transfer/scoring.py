"""What is scored and how it is recorded: the rows of a split, the protocol of a result, a few samples to look at."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar
from typing import Protocol as Structure

from cutline.errors import DataError
from cutline.objectives.gather import of_all, own_share, together, world
from cutline.progress import progress
from cutline.record import Protocol
from cutline.transfer.batches import THREADS, ahead
from cutline.transfer.data import DenseData, Sample, Skip, Split, sorted_out
from cutline.transfer.model import Transferred
from cutline.transfer.options import NO_NUMBER, SplitName, TransferConfig, precision

A = TypeVar("A")


class Scored(Structure):
    """A config that says what is scored."""

    split: SplitName
    pictures: int | None


def scored_rows(config: Scored, data: DenseData) -> tuple[Split, list[int], int]:
    """The split to score, the rows of it that can be read, and how many were skipped; each process reads its share."""
    split = data.split(config.split)
    wanted = range(min(config.pictures or data.default_pictures or len(split), len(split)))
    with together():
        mine = split.problems(own_share(len(wanted)))
    rows, skipped = sorted_out(split.name, wanted, [problem for part in of_all(mine) for problem in part])
    if not rows:
        raise DataError(f"{data.spec}: the split {config.split!r} has no picture to score.")
    return split, rows, sum(skipped.values())


def read_along(
    split: Split, rows: list[int], then: Callable[[Sample], Sample] = lambda s: s, each: int = 1
) -> Iterator[Sample]:
    """The samples of this process's share of the rows, and what `then` makes of them, read ahead by threads; with progress.

    Shares are consecutive, so that joined in order of the processes they are all rows in theirs; each: as in `own_share`.
    """
    mine = [rows[place] for place in own_share(len(rows), each)]
    with progress(f"scoring {split.name}", len(mine), "pictures", world()[0] == 0) as tick:
        for sample in ahead(lambda row: then(split.read(row)), mine, THREADS):
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
