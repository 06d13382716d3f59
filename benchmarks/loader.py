"""The loader against open_clip's own, and against decoding alone: `python benchmarks/loader.py [--tars GLOB]`.

All read the same tars with the same number of cores and make training batches of the same size: random resized crop
(scale 0.9 to 1), normalised, one tokenised caption a picture. open_clip's is `open_clip_train.data.get_wds_dataset`
(processes, tarfile, Pillow), ours is `Stream` over a table of the tars (threads, byte ranges, libjpeg-turbo). "bare" is
the least that anybody does: threads that decode and crop pictures that lie in memory, with our decoder, and throw them
away (no reading, tokens or batches); "normalised" does the same and writes the floats of a batch. Rates are pictures a
second, the best of `--rounds`, without the first batches, in which open_clip starts its processes and fills its shuffle
buffer. Each is measured in a fresh process.

Without --tars, 500 × 375 photos of smoothed noise are written (about 55 kB each, quality 90, 4:2:0).
"""

import argparse
import glob
import io
import multiprocessing
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import simplejpeg

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WORDS = "a the two dog red small boy on grass near water with jumping street blue man woman holding white sign car"


def photo(rng: np.random.Generator, height: int = 375, width: int = 500) -> bytes:
    """A JPEG whose size and spectrum are like a photo's: noise at several scales."""
    from PIL import Image

    pixels = rng.normal(0, 6, (height, width, 3))
    for cell, weight in ((120, 1.0), (40, 0.5), (12, 0.3), (4, 0.15)):
        noise = rng.integers(0, 256, (height // cell + 3, width // cell + 3, 3), dtype=np.uint8)
        pixels += weight / 1.95 * np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    return simplejpeg.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), quality=90, colorsubsampling="420")


def write_tars(folder: Path, n: int, shards: int) -> list[str]:
    rng, words = np.random.default_rng(0), random.Random(0)
    photos = [photo(rng) for _ in range(64)]
    print(f"{n} photos of {sum(map(len, photos)) / 64e3:.0f} kB on average")
    paths = [str(folder / f"{s:05}.tar") for s in range(shards)]
    for s, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(s, n, shards):
                text = " ".join(words.choices(WORDS.split(), k=12)).encode()
                for suffix, data in (("jpg", photos[i % 64]), ("txt", text)):
                    member = tarfile.TarInfo(f"{i:06}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def rate(batches: Iterable[Any], batch: int, skip: int = 6) -> float:
    """Pictures a second after the first `skip` batches."""
    count = 0
    begun = 0.0
    for count, _ in enumerate(batches, 1):
        if count == skip:
            begun = time.perf_counter()
    return (count - skip) * batch / (time.perf_counter() - begun)


def theirs(tars: list[str], n: int, batch: int, size: int, workers: int) -> float:
    import open_clip
    from open_clip_train.data import get_wds_dataset

    multiprocessing.set_start_method("fork", force=True)  # what it has on Linux
    args = SimpleNamespace(
        train_data="::".join(tars), train_num_samples=n, train_data_upsampling_factors=None, dataset_resampled=False,
        seed=0, batch_size=batch, workers=workers, world_size=1,
    )  # fmt: skip
    preprocess = open_clip.image_transform(size, is_train=True, mean=MEAN, std=STD)
    data = get_wds_dataset(args, preprocess, True, tokenizer=open_clip.get_tokenizer("ViT-B-32"), floor=True)
    data.set_epoch(0)
    return rate(data.dataloader, batch, skip=max(6, workers))


def ours(table: str, batch: int, size: int, threads: int) -> float:
    from cutline import towers
    from cutline.train.stream import Augment, Stream, TextConfig, open_source

    source = open_source(table)
    stream = Stream(
        source, batch=batch, size=size, mean=MEAN, std=STD, augment=Augment(scale=(0.9, 1.0)), threads=threads,
        text=TextConfig(columns={"alt": 1.0}), tokenizer=towers.Tokenizer(towers.load("scratch:ViT-B-32")),
    )  # fmt: skip
    return rate(stream.batches(len(source) // batch), batch)


def bare(table: str, batch: int, size: int, threads: int, normalised: bool = False) -> float:
    from cutline.pairs.decode import decode
    from cutline.train.stream import Augment, open_source
    from cutline.train.stream.transforms import Normalize, decode_size

    source = open_source(table)
    rows = random.Random(0).sample(range(len(source)), min(2048, len(source)))
    pictures = [row["image"] for row in source.read(rows, ["image"])]
    augment, normalize = Augment(scale=(0.9, 1.0)), Normalize(MEAN, STD)
    out = np.zeros((batch, 3, size, size), np.float32)

    def work(pictures: list[bytes], seed: int) -> None:
        draw = random.Random(seed).random
        for i, data in enumerate(pictures):
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            how = augment.draw(height, width, draw)
            view = augment.apply(decode(data, decode_size([(how, size)])), how, size)
            if normalised:
                normalize(view, out[(64 * seed + i) % batch])

    with ThreadPoolExecutor(threads) as pool:
        begun = time.perf_counter()
        list(pool.map(work, (pictures[i : i + 64] for i in range(0, len(pictures), 64)), range(len(pictures))))
        return len(pictures) / (time.perf_counter() - begun)


def index(table: str, tars: list[str]) -> float:
    from cutline.pairs import Pairs, create

    create(table, tars, alt="txt")
    return len(Pairs.open(table))


def isolated(measure: Callable[..., float], *args: Any) -> float:
    """In a process of its own: open_clip forks, and must find no threads of Lance."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tars", help="a glob of webdataset tars with jpg and txt, such as ../shared/data/flickr8k/*.tar"
    )
    parser.add_argument("--photos", type=int, default=8000, help="how many to write where there are no --tars")
    parser.add_argument("--size", type=int, default=224, help="pixels of a view")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="their processes, our threads"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tars = sorted(glob.glob(args.tars)) if args.tars else write_tars(Path(folder), args.photos, 2 * args.workers)
        table = str(Path(folder) / "table.lance")
        n = int(isolated(index, table, tars))
        rates: dict[str, list[float]] = {"open_clip": [], "cutline": [], "bare": [], "normalised": []}
        for _ in range(args.rounds):  # in turns, so that all meet the same weather
            rates["open_clip"].append(isolated(theirs, tars, n, args.batch, args.size, args.workers))
            rates["cutline"].append(isolated(ours, table, args.batch, args.size, args.workers))
            rates["bare"].append(isolated(bare, table, args.batch, args.size, args.workers))
            rates["normalised"].append(isolated(bare, table, args.batch, args.size, args.workers, True))
    print(f"{n} pictures, {args.size} px, batch {args.batch}, {args.workers} workers; pictures a second:")
    best = {name: max(found) for name, found in rates.items()}
    for name, found in rates.items():
        print(f"  {name:10} {best[name]:8.0f}   (rounds: {', '.join(f'{r:.0f}' for r in found)})")
    print(f"cutline / open_clip   {best['cutline'] / best['open_clip']:.2f}   (target 2)")
    print(f"cutline / bare        {best['cutline'] / best['bare']:.2f}   (target 0.9)")
    print(f"cutline / normalised  {best['cutline'] / best['normalised']:.2f}")


if __name__ == "__main__":
    main()
