"""How long mIoU takes beyond the model: 2,000 pictures of 512 × 512 with 150 classes, beside torchmetrics.

    python benchmarks/miou.py [--pictures 2000] [--size 512] [--classes 150]

Predictions and truth are made up (blocks of 16 pixels, a tenth of them wrong, a few not labelled) and given in batches of 8. Prints
the seconds of `Confusion` and of torchmetrics' `MulticlassJaccardIndex`, their ratio, and the largest difference of a class's
IoU.
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from cutline.transfer.metrics import IGNORE, Confusion

BATCH, BLOCK = 8, 16


def batches(pictures: int, size: int, classes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rng, cells = np.random.default_rng(0), -(-size // BLOCK)
    for _ in range(pictures // BATCH):
        blocks = rng.integers(IGNORE, classes, (BATCH, cells, cells))
        truth = torch.from_numpy(blocks.repeat(BLOCK, 1).repeat(BLOCK, 2)[:, :size, :size])
        wrong = torch.rand(truth.shape) < 0.1
        yield torch.where(wrong, torch.randint(0, classes, truth.shape), truth.clamp_min(0)), truth.to(torch.int16)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=150)
    args = parser.parse_args()
    torch.manual_seed(0)
    ours, theirs = Confusion(args.classes), MulticlassJaccardIndex(args.classes, average="none", ignore_index=IGNORE)
    seconds = [0.0, 0.0]
    for predicted, truth in batches(args.pictures, args.size, args.classes):
        begun = time.perf_counter()
        ours.update(predicted, truth)
        seconds[0] += time.perf_counter() - begun
        begun = time.perf_counter()
        theirs.update(predicted, truth.long())
        seconds[1] += time.perf_counter() - begun
    difference = (ours.iou() - theirs.compute().double()).abs().max().item()
    print(f"{args.pictures} pictures of {args.size} × {args.size}, {args.classes} classes")
    print(f"cutline {seconds[0]:.1f} s, torchmetrics {seconds[1]:.1f} s, ratio {seconds[0] / seconds[1]:.2f}")
    print(f"largest difference of an IoU {difference:.1e}")


if __name__ == "__main__":
    main()
