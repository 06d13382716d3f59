"""`caption write --on ray` on one machine against `--on local`: `python benchmarks/caption_ray.py`.

A small CoCa of random weights describes scenes. Starting Ray and its worker takes seconds whatever the table's size, so
both are run over N and over 3 N rows, in turn, and the rate is that of the further rows: 2 N / (t(3 N) − t(N)); what is left
is what starting costs. Both columns must be equal. The goal is a ratio of 0.9.
"""

import argparse
import tempfile
import time
from pathlib import Path

import ray
import torch

from cutline import towers
from cutline.captions.coca import CocaWriter
from cutline.captions.engine import RunConfig, run
from cutline.pairs import Pairs
from cutline.scenes import parse_spec
from cutline.scenes.write import write_pairs
from cutline.towers import TowerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096, help="scenes, N")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        towers.save(towers.build(TowerConfig(model="coca-tiny-64")), Path(folder) / "coca")
        path = Path(folder) / "scenes.lance"
        write_pairs(parse_spec(f"scenes:n={3 * options.n},size=64"), path)
        few = f"key < 's0-{options.n:08d}'"
        assert len(Pairs.open(path, few)) == options.n
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        seconds: dict[tuple[str, bool], list[float]] = {}
        for turn in range(options.rounds):
            for on in ("local", "ray"):
                for whole in (False, True):
                    name = f"{on}_{turn}_{'whole' if whole else 'few'}"
                    work = CocaWriter(f"{folder}/coca", name, min_tokens=16, max_tokens=16)
                    begun = time.perf_counter()
                    config = RunConfig.model_validate({"on": on, "batch": options.batch, "max_bad": 1})
                    run(Pairs.open(path, None if whole else few), work, name, config, show=False, say=lambda _: None)
                    seconds.setdefault((on, whole), []).append(time.perf_counter() - begun)
        names = [f"{on}_0_whole" for on in ("local", "ray")]
        assert all(row[names[0]] == row[names[1]] for row in Pairs.open(path).read(range(3 * options.n), names))
        rates = {}
        for on in ("local", "ray"):
            short, long = min(seconds[on, False]), min(seconds[on, True])
            rates[on] = 2 * options.n / (long - short)
            start = short - options.n / rates[on]
            print(f"{on:6} {rates[on]:8.1f} rows/s, {start:.1f} s to start  {[round(s, 1) for s in seconds[on, True]]}")
        print(f"ratio  {rates['ray'] / rates['local']:8.3f}")


if __name__ == "__main__":
    main()
