"""Crops of the objects of scenes as an image folder: pictures of a kind that a CLIP of scenes has not met, for `zeroshot adapt`.

    python benchmarks/scene_crops.py FOLDER [--train 6000] [--held-out 2000]
    cutline zeroshot adapt --recipe recipes/adapt/scene-crops.yaml --model RUN --data imagefolder:FOLDER

Scenes of 192 pixels and 48 kinds of objects; of every object that is large enough its square with 15 % around it, 64 × 64.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from cutline.transfer.data import open_data

SIZE, LEAST, AROUND = 64, 40, 1.3  # pixels of a crop; of the least square that is cut; its side by that of the box


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--held-out", type=int, default=2000)
    args = parser.parse_args()
    data = open_data("scenes:n=100000,size=192,seed=2,objects=48", "detect")
    for name, wanted in (("train", args.train), ("val", args.held_out), ("test", args.held_out)):
        split, made = data.split(name), 0
        for row in range(len(split)):
            sample = split.read(row, keep=False)
            picture = Image.fromarray(sample.image)
            for box, kind in zip(sample.target.boxes, sample.target.labels, strict=True):
                if made < wanted and (square := cut(box, *picture.size)) is not None:
                    folder = args.folder / name / data.classes[int(kind)]
                    folder.mkdir(parents=True, exist_ok=True)
                    picture.crop(square).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{made:06d}.png")
                    made += 1
            if made == wanted:
                break
        print(f"{name}: {made} crops of {row + 1} scenes")


def cut(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int] | None:
    """The square around a box (x0, y0, x1, y1), moved into the picture; None for one that is too small."""
    x0, y0, x1, y1 = (float(v) for v in box)
    side = int(min(AROUND * max(x1 - x0, y1 - y0), width, height))
    if side < LEAST:
        return None
    left = int(np.clip((x0 + x1 - side) / 2, 0, width - side))
    top = int(np.clip((y0 + y1 - side) / 2, 0, height - side))
    return left, top, left + side, top + side


if __name__ == "__main__":
    main()
