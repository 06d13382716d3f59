"""Scenes rendered a second on one core: `python benchmarks/scenes_render.py [SCENES]`.

Prints, for 64, 128 and 224 pixels, the rate of everything (picture, captions, alt text, semantic map, instances,
depth) and of picture and captions alone, and what share of the time goes into the layout and the texts. The target is
300 a second and core at 64 pixels with everything. Time is CPU time of this process.
"""

import sys
import time
from collections.abc import Callable

from cutline.scenes import Scenes
from cutline.scenes.captions import captions
from cutline.scenes.layout import layout
from cutline.scenes.source import SceneConfig

ALL = ["key", "image", "alt", "captions", "semantic", "depth", "instances", "boxes"]
TARGET = 300.0


def rate(n: int, work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return n / (time.process_time() - begun)


def main(n: int) -> None:
    rows = range(n)
    for size in (64, 128, 224):
        scenes = Scenes(SceneConfig(n=10 * n, size=size, seed=1, mix="web"))
        scenes.read(range(min(400, n)), ["image"])  # decode the sprites first
        full = rate(n, lambda s=scenes: s.read(rows, ALL))  # type: ignore[misc]
        plain = rate(n, lambda s=scenes: s.read(rows, ["image", "captions"]))  # type: ignore[misc]
        print(f"{size:4} px: {full:7.1f} scenes/s with all labels, {plain:7.1f} with picture and captions only", end="")
        print(f" ({full / TARGET:.2f} of the target)" if size == 64 else "")
    planned = rate(n, lambda: [layout(1, i) for i in rows])
    written = rate(n, lambda: [captions(layout(1, i), 1, i) for i in rows])
    print(f"layout alone {planned:,.0f}/s, layout and captions {written:,.0f}/s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
