"""`pairs create` on local tars against its peers, and its memory: `python benchmarks/pairs_create.py [--n N]`.

Tars of N small pictures (144 × 144 JPEGs of about 12 kB, a caption in .txt, five in .json) are written to a temporary
folder. Each peer goes over them in a process of its own, once to warm the page cache and `--rounds` times more:

- tarfile: Python's own module, headers alone: the least that an index in Python costs;
- tarfile + texts: the same, with the .txt and .json read and parsed, which is what a table needs;
- webdataset: iteration over the samples, pictures as bytes, nothing decoded;
- cutline: `pairs create`, all of it: index, texts, sizes of pictures, checks, the Lance table on disk.

Printed: pairs a second (the best round, by processor time: pairs a second and core), and the peak memory of
`pairs create` at N and at 4 N pairs. 4 N pairs are the same tars four times with other keys.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import simplejpeg

SHARD = 10_000
WORDS = [
    "a",
    "the",
    "two",
    "dog",
    "red",
    "small",
    "boy",
    "on",
    "grass",
    "near",
    "water",
    "with",
    "jumping",
    "street",
    "blue",
    "man",
    "woman",
    "holding",
    "white",
    "sign",
]


def write_tars(folder: Path, n: int) -> list[str]:
    from PIL import Image

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (200, 18, 18, 3), dtype=np.uint8)
    pictures = [simplejpeg.encode_jpeg(np.asarray(Image.fromarray(s).resize((144, 144))), quality=92) for s in small]
    paths = []
    for first in range(0, n, SHARD):
        paths.append(str(folder / f"{first // SHARD:05d}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for i in range(first, min(first + SHARD, n)):
                texts = [" ".join(WORDS[j] for j in rng.integers(0, len(WORDS), 11)) for _ in range(5)]
                rest = json.dumps({"key": f"{i:09d}", "captions": texts}).encode()
                for suffix, data in (("jpg", pictures[i % 200]), ("txt", texts[0].encode()), ("json", rest)):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def by_tarfile(tars: list[str], texts: bool = False) -> int:
    n = 0
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    n += 1
                elif texts:
                    data = tar.extractfile(member).read()
                    _ = json.loads(data) if member.name.endswith(".json") else data.decode()
    return n


def by_tarfile_with_texts(tars: list[str]) -> int:
    return by_tarfile(tars, texts=True)


def by_webdataset(tars: list[str]) -> int:
    import webdataset

    return sum("jpg" in s for s in webdataset.WebDataset(tars, shardshuffle=False))


def by_cutline(tars: list[str]) -> int:
    from cutline.pairs import create

    with tempfile.TemporaryDirectory(dir=Path(tars[0]).parent) as folder:
        return create(f"{folder}/t.lance", tars, captions="json:captions", show=False).kept


def measure(work: Callable[[list[str]], int], tars: list[str], rounds: int) -> tuple[float, float, float]:
    """(pairs a second and core, pairs a second, peak memory in MB) of `work`, in this process."""
    work(tars[:1])
    best, wall = 0.0, 0.0
    for _ in range(rounds):
        cpu, begun = time.process_time(), time.perf_counter()
        n = work(tars)
        best, wall = max(best, n / (time.process_time() - cpu)), max(wall, n / (time.perf_counter() - begun))
    return best, wall, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(work: Callable[[list[str]], int], tars: list[str], rounds: int) -> tuple[float, float, float]:
    """`measure` in a fresh process, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, work, tars, rounds).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000, help="pairs")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tars = write_tars(Path(folder), options.n)
        size = sum(os.path.getsize(t) for t in tars)
        print(f"{options.n:,} pairs in {len(tars)} tars, {size / 1e6:,.0f} MB")
        print(f"{'':16} {'pairs/s/core':>14} {'pairs/s':>10} {'× cutline':>10} {'peak MB':>8}")
        peers = {"cutline": by_cutline, "tarfile": by_tarfile, "tarfile + texts": by_tarfile_with_texts}
        found = {
            name: apart(work, tars, options.rounds) for name, work in (peers | {"webdataset": by_webdataset}).items()
        }
        for name, (core, wall, peak) in found.items():
            print(f"{name:16} {core:14,.0f} {wall:10,.0f} {found['cutline'][0] / core:10.2f} {peak:8,.0f}")
        print(f"peak memory of create: {peak_of(tars):,.0f} MB at {options.n:,}, ", end="", flush=True)
        print(f"{peak_of(fourfold(tars)):,.0f} MB at {4 * options.n:,} pairs")


def fourfold(tars: list[str]) -> list[str]:
    """The tars under four names each; `prefix_keys` makes their keys differ."""
    copies = []
    for turn in range(4):
        for tar in tars:
            copies.append(tar.replace(".tar", f"-{turn}.tar"))
            os.link(tar, copies[-1])
    return copies


def by_cutline_prefixed(tars: list[str]) -> int:
    from cutline.pairs import create

    with tempfile.TemporaryDirectory(dir=Path(tars[0]).parent) as folder:
        return create(f"{folder}/t.lance", tars, captions="json:captions", prefix_keys=True, show=False).kept


def peak_of(tars: list[str]) -> float:
    return apart(by_cutline_prefixed, tars, 1)[2]


if __name__ == "__main__":
    main()
