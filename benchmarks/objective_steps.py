"""Seconds a step of every objective beside contrastive alone, and the ratio of their FLOPs: what a method costs, and what its
arithmetic makes it cost.

The methods are the arms of `recipes/studies/scenes-objectives.yaml`: equal towers and pictures, 64 a step. Each runs in a process
of its own that takes steps of it and of contrastive in turns, on batches made beforehand, so that both meet the same machine; a
further process takes steps of the method alone, and its peak memory is told (all of the process: torch and a small table of
pictures are 0.5 GiB of it). FLOPs are counted by torch (matrix products, convolutions, attention), forward and backward.

    python benchmarks/objective_steps.py --steps 6

Prints seconds and GiB, both ratios, and their quotient: 1.10 is 10 % slower than the arithmetic.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cutline import towers
from cutline.captions import engine
from cutline.captions.reinforce import ReinforceConfig, reinforce_work
from cutline.objectives.base import Batch
from cutline.pairs import Pairs
from cutline.scenes import parse_spec
from cutline.scenes.write import write_pairs
from cutline.study.plan import load_plan
from cutline.train import loop
from cutline.train.metrics import peak_memory

PLAN = Path(__file__).parents[1] / "recipes" / "studies" / "scenes-objectives.yaml"
SCENES = "scenes:n=256,size=64,seed=1,objects=48"
CACHED = "contrastive, micro-batches of 16"


class Steps:
    """A run of one arm in a temporary folder, with its batches at hand."""

    def __init__(self, arm: str, folder: Path, count: int, overrides: list[str]) -> None:
        plan = load_plan(PLAN, overrides)
        recipe = plan.recipe("contrastive" if arm == CACHED else arm, 0)
        recipe.data.pairs = str(folder / "scenes.lance") if recipe.data.replay else SCENES
        if arm == CACHED:
            recipe.train.micro_batch = 16
        if recipe.objectives.experts and recipe.objectives.experts.segment:  # true masks, as wide as those of an expert
            recipe.objectives.experts.segment.column = "semantic"
        self.run = loop.prepare(recipe, folder / f"{abs(hash(arm))}", resume=False)
        self.batches: list[Batch] = list(self.run.stream.batches(until=count))

    def step(self, i: int) -> float:
        began = time.perf_counter()
        loop.train_step(self.run, self.batches[i].to(self.run.device))
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.step(0)
        return counter.get_total_flops()


def child(arm: str, alone: bool, steps: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Seconds and FLOPs of `arm` and contrastive in turns; or the memory of `arm` alone."""
    ours = Steps(arm, folder, steps + 1, overrides)
    if alone:
        for i in range(3):
            ours.step(min(i, steps))
        return {"gib": peak_memory(ours.run.device)}
    base = Steps("contrastive", folder / "base", steps + 1, overrides)
    flops = [s.flops() for s in (ours, base)]  # the first step, which is not timed
    times = [[s.step(i) for s in (ours, base)] for i in range(1, steps + 1)]
    return {"flops": flops, "seconds": [statistics.median(t) for t in zip(*times, strict=True)]}


def table(folder: Path) -> None:
    """Scenes with stored augmentations and the embeddings of a teacher of the students' size."""
    write_pairs(parse_spec(SCENES), folder / "scenes.lance")
    towers.save(towers.build(towers.TowerConfig(model="vit-tiny-64")), folder / "teacher")
    pairs = Pairs.open(folder / "scenes.lance")
    work = reinforce_work(
        pairs, ReinforceConfig(teachers=[str(folder / "teacher")], texts=["captions"], augmentations=2)
    )
    engine.run(pairs, work, "dr", engine.RunConfig(), show=False, say=lambda _: None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--arm", nargs="*", help="only these")
    parser.add_argument(
        "--override", nargs="*", default=[], help="of the study, such as arms.mae.objectives.mae.width=128"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        arm, alone, folder = args.child
        print(json.dumps(child(arm, alone == "alone", args.steps, Path(folder), args.override)))
        return
    plan = load_plan(PLAN)
    arms = [a for a, o in plan.arms.items() if o is not None and "train.samples" not in o] + [CACHED]
    print(f"{'method':<40} {'s/step':>7} {'GiB':>5} {'time':>6} {'FLOPs':>6} {'time / FLOPs':>13}")
    with tempfile.TemporaryDirectory() as made:
        table(Path(made))
        for arm in args.arm or arms:
            found: dict[str, Any] = {}
            for how in ("turns", "alone"):
                with tempfile.TemporaryDirectory() as folder:
                    (Path(folder) / "scenes.lance").symlink_to(Path(made) / "scenes.lance")
                    command = [sys.executable, __file__, "--steps", str(args.steps), "--threads", str(args.threads)]
                    done = subprocess.run(
                        [*command, "--override", *args.override, "--child", arm, how, folder],
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                found |= json.loads(done.stdout.splitlines()[-1])
            seconds, flops = found["seconds"], found["flops"]
            slower, more = seconds[0] / seconds[1], flops[0] / flops[1]
            print(
                f"{arm:<40} {seconds[0]:7.3f} {found['gib']:5.2f} {slower:6.2f} {more:6.2f} {slower / more:13.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
