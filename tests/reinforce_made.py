"""Small teachers with different sizes, means and widths, and a table of pictures of several kinds and shapes."""

from pathlib import Path
from typing import Any

import torch
from pairs_made import picture

from cutline import towers
from cutline.captions import engine
from cutline.captions.work import Work
from cutline.pairs import Pairs, create_from_rows

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"patch_size": 8, "width": 64, "layers": 1, "head_width": 32}


def teacher(folder: Path, size: int, width: int, mean: float) -> str:
    """A random CLIP in a folder, with `mean` and 1.5 times it as preprocessing."""
    torch.manual_seed(size)
    cfg = {"embed_dim": width, "vision_cfg": VISION | {"image_size": size}, "text_cfg": dict(TEXT)}
    model = towers.build(towers.TowerConfig(custom=cfg))
    model.visual.preprocess_cfg |= {"mean": (mean, mean + 0.1, mean), "std": (1.5 * mean, mean, mean)}  # type: ignore[operator]
    return str(towers.save(model, folder / f"teacher{size}"))


def rows(n: int = 12) -> list[dict[str, Any]]:
    """Landscape and portrait pictures, JPEG (large enough to be decoded at a fraction) and PNG."""
    out = []
    for i in range(n):
        size = (420 - 9 * i, 130 + 17 * i) if i % 3 else (70 + i, 50 + 3 * i)
        data = picture(i, "PNG" if i % 4 == 1 else "JPEG", size)
        captions = [f"caption {i} {c}" for c in "abc"[: i % 4]] + ([" "] if i == 5 else [])
        out.append({"key": f"k{i}", "image": data, "alt": None if i == 3 else f"alt {i}", "captions": captions})
    return out


def table(path: Path, n: int = 12) -> Pairs:
    create_from_rows(path, rows(n))
    return Pairs.open(path)


def run(pairs: Pairs, work: Work, **options: Any) -> Pairs:
    return engine.run(pairs, work, "dr", engine.RunConfig(**options), show=False, say=lambda _: None)[0]
