"""A tiny encoder and a tiny folder of dense data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cutline.towers.config import TowerConfig
from cutline.towers.store import build, load_encoder

CLASSES = ("ground", "red", "blue")
COLOURS = np.array([(60, 160, 60), (220, 40, 40), (40, 40, 220)])


def _make(patch: int = 8, size: int = 32, layers: int = 2) -> Any:
    torch.manual_seed(0)
    vision = {"image_size": size, "patch_size": patch, "width": 64, "layers": layers, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "layers": 1, "heads": 1}
    return load_encoder(build(TowerConfig(custom={"embed_dim": 32, "vision_cfg": vision, "text_cfg": text})))


@pytest.fixture(scope="session")
def encoder() -> Any:
    """A random ViT of patch 8, width 64, two blocks. Shared: fine-tuning must not change it."""
    return _make()


@pytest.fixture
def make_encoder() -> Callable[..., Any]:
    """Makes random ViTs of other patch sizes and native sizes."""
    return _make


def scene(i: int, size: tuple[int, int] = (32, 32)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture, mask and depth in millimetres of a ground with a red and a blue box; the boxes are nearer."""
    rng = np.random.default_rng(i)
    mask = np.zeros(size, np.uint8)
    depth = np.linspace(6000, 2000, size[0])[:, None].repeat(size[1], 1).astype(np.uint16)
    for k in (1, 2):
        top, left = rng.integers(0, size[0] - 12), rng.integers(0, size[1] - 12)
        mask[top : top + 12, left : left + 12] = k
        depth[mask == k] = 1000 * k
    image = (COLOURS[mask] + rng.integers(-15, 15, (*size, 3))).clip(0, 255).astype(np.uint8)
    return image, mask, depth


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes {train,val}/{images,masks,depth} and classes.txt; returns the root."""

    def write(train: int = 8, val: int = 4, size: tuple[int, int] = (32, 32), names: bool = True) -> Path:
        for split, count, first in (("train", train, 0), ("val", val, 100)):
            for kind in ("images", "masks", "depth"):
                (tmp_path / split / kind).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                for kind, values in zip(("images", "masks", "depth"), scene(first + i, size), strict=True):
                    Image.fromarray(values).save(tmp_path / split / kind / f"{i:03d}.png")
        if names:
            (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
        return tmp_path

    return write
