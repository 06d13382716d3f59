"""Text-only scores of many captions through the engine: `python benchmarks/caption_scores.py`.

A table of N synthetic captions is made (words drawn at random, a few file names and boilerplate among them; all pictures
are the same few bytes). All text scores are then made of it as columns by `captions.engine.run`, as `cutline caption
score` does, in a process of its own, whose rate and peak memory are told. Two sizes of table show whether memory is flat.
Beside it stands the scorer alone, without the table.
"""

import argparse
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = (
    "a the of with and on in two three red blue brown white dog cat car man woman child street field water grass table "
    "house tree running standing sitting playing small large near beside behind front looking holding wearing shirt hat "
    "ball bike horse beach snow mountain road crowd building window bright dark old young green yellow people group over"
).split()
ODD = ("IMG_4821.JPG", "click to enlarge", "photo by Anna", "DSC01234", "mail me at info@example.com", "page 3 of 40")
PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001e221bc330000"
    "000049454e44ae426082"
)  # one grey pixel as PNG


def captions(n: int) -> Iterator[str]:
    """Captions of 4 to 18 words, 55 characters on average, as Flickr8k's are."""
    draw = random.Random(0)
    for _ in range(n):
        yield draw.choice(ODD) if draw.random() < 0.05 else " ".join(draw.choices(WORDS, k=draw.randint(4, 18)))


def write(table: str, n: int) -> None:
    from cutline.pairs import create_from_rows

    create_from_rows(table, ({"key": f"{i:08d}", "image": PICTURE, "alt": c} for i, c in enumerate(captions(n))))


def alone(n: int, batch: int) -> float:
    """Seconds of the scorer for n captions, without reading and writing."""
    from cutline.captions.score.base import Asked
    from cutline.captions.score.text import KINDS, TextScores

    worker = TextScores(Asked("alt", "score", tuple(KINDS), False)).load()
    rows = [{"key": "", "alt": c} for c in captions(n)]
    begun = time.perf_counter()
    for start in range(0, n, batch):
        worker.make(worker.prepare(rows[start : start + batch]))
    return time.perf_counter() - begun


def through_the_engine(table: str, batch: int) -> tuple[float, float, float]:
    """Seconds, those of processors, and the process's peak memory in MiB."""
    from cutline.captions.engine import RunConfig
    from cutline.captions.score.plan import ScoreConfig, score
    from cutline.pairs import Pairs

    pairs = Pairs.open(table)
    begun, processors = time.perf_counter(), time.process_time()
    score(pairs, ScoreConfig(column="alt"), "score", RunConfig(batch=batch), show=False)
    used = (time.perf_counter() - begun, time.process_time() - processors)
    return *used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def elsewhere(work: Any, *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[250_000, 1_000_000], help="rows of the tables")
    parser.add_argument("--batch", type=int, default=1024)
    options = parser.parse_args()
    seconds = elsewhere(alone, 50_000, options.batch)
    print(f"the scorer alone: {50_000 / seconds:,.0f} captions/s, {seconds * 20:.0f} s for a million")
    with tempfile.TemporaryDirectory() as folder:
        for n in options.n:
            table = f"{folder}/{n}.lance"
            elsewhere(write, table, n)
            seconds, processors, memory = elsewhere(through_the_engine, table, options.batch)
            print(
                f"{n:,} rows through the engine: {n / seconds:,.0f} rows/s, {seconds:.0f} s ({processors:.0f} s of "
                f"processors), {seconds * 1e6 / n:.0f} s for a million; peak memory {memory:,.0f} MiB"
            )


if __name__ == "__main__":
    main()
