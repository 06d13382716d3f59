"""Encoded pictures in global random order against webdataset one after the other: `python benchmarks/random_read.py`.

Tars of N small pictures are written as in `pairs_create.py`. Ours reads them in one random permutation of all rows,
`--batch` rows a call, with `--threads` threads; webdataset iterates over the same tars in their order, in one process, and a second time
through its own approximate shuffle. Nobody decodes. Each is measured in a process of its own on a warm page cache; rates are the best
of `--rounds`. Lance's own `read_blobs` is shown beside, because it is what ours uses where pictures are not in local files.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from pairs_create import write_tars


def batches(n: int, batch: int) -> list[list[int]]:
    order = np.random.default_rng(0).permutation(n)
    return [order[i : i + batch].tolist() for i in range(0, n, batch)]


def cutline(table: str, tars: list[str], batch: int, threads: int) -> int:
    from cutline.pairs import Pairs

    pairs = Pairs.open(table)

    def size(rows: list[int]) -> int:
        return sum(len(r["image"]) for r in pairs.read(rows, ["image"]))

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(size, batches(len(pairs), batch)))


def lance(table: str, tars: list[str], batch: int, threads: int) -> int:
    import lance

    dataset = lance.dataset(table)
    read = 0
    for rows in batches(dataset.count_rows(), batch):
        read += sum(len(data) for _, data in dataset.read_blobs("image", indices=rows, preserve_order=True))
    return read


def webdataset(table: str, tars: list[str], batch: int, threads: int) -> int:
    import webdataset

    return sum(len(s["jpg"]) for s in webdataset.WebDataset(tars, shardshuffle=False))


def webdataset_shuffled(table: str, tars: list[str], batch: int, threads: int) -> int:
    import webdataset

    return sum(len(s["jpg"]) for s in webdataset.WebDataset(tars, shardshuffle=100).shuffle(1000))


def measure(work: Callable[..., int], n: int, rounds: int, *args: Any) -> float:
    best, total = 0.0, set()
    for _ in range(rounds):
        begun = time.perf_counter()
        total.add(work(*args))
        best = max(best, n / (time.perf_counter() - begun))
    assert len(total) == 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000, help="pairs")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        from cutline.pairs import create

        tars = write_tars(Path(folder), options.n)
        table = f"{folder}/t.lance"
        create(table, tars, captions="json:captions", show=False)
        rates = {}
        for name, work, threads in [
            ("webdataset, in order", webdataset, 1), ("webdataset, shuffled", webdataset_shuffled, 1),
            ("Lance read_blobs, random", lance, 1), ("cutline, random, 1 thread", cutline, 1),
            (f"cutline, random, {options.threads} threads", cutline, options.threads),
        ]:  # fmt: skip
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                args = (work, options.n, options.rounds, table, tars, options.batch, threads)
                rates[name] = pool.submit(measure, *args).result()
            first = rates["webdataset, in order"]
            print(f"{name:28} {rates[name]:10,.0f} pictures/s {rates[name] / first:6.2f} ×")


if __name__ == "__main__":
    main()
