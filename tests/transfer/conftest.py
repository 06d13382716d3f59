"""A tiny encoder, a tiny folder of dense data, and tiny data of classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classes_made import THINGS, encoded
from pairs_made import write_tar
from PIL import Image

from cutline.pairs import create_from_rows
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


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Path]:
    """Writes {train,val}/CLASS/*.jpg of three classes; returns the root."""

    def write(train: int = 4, val: int = 2, parts: tuple[str, ...] = ("train", "val")) -> Path:
        for part in parts:
            for name in THINGS:
                (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
                for i in range(train if part == "train" else val):
                    number = i + 100 * (part != "train")
                    (tmp_path / part / name / f"{number}.jpg").write_bytes(encoded(name, number))
        return tmp_path

    return write


@pytest.fixture
def tars(tmp_path: Path) -> Callable[..., Path]:
    """Writes CLIP_benchmark's layout; `change(i, members)` changes a train sample's members."""

    def write(change: Callable[[int, dict[str, bytes]], None] = lambda i, m: None, names: bool = True) -> Path:
        for part, count in (("train", 24), ("test", 6)):
            members = []
            for i in range(count):
                one = {"webp" if i % 2 else "jpg": encoded(list(THINGS)[i % 3], i, "WEBP" if i % 2 else "JPEG")}
                one["cls"] = str(i % 3).encode()
                if part == "train":
                    change(i, one)
                members += [(f"s{i:07d}.{extension}", data) for extension, data in one.items()]
            (tmp_path / part).mkdir(exist_ok=True)
            half = 2 * (count // 4)
            split = next(j for j, (name, _) in enumerate(members) if name.startswith(f"s{half:07d}"))
            write_tar(tmp_path / part / "0.tar", members[:split])
            write_tar(tmp_path / part / "1.tar", members[split:])
            (tmp_path / part / "nshards.txt").write_text("2")
        if names:
            (tmp_path / "classnames.txt").write_text("\n".join(THINGS))
        return tmp_path

    return write


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of pairs with classes as text and as numbers, a split, and a row without a class."""
    rows = []
    for i in range(60):
        name = list(THINGS)[i % 3]
        part = "validation" if i % 5 == 4 else "train"
        rows.append({"key": f"k{i}", "image": encoded(name, i), "alt": "x", "what": None if i == 7 else f" {name} ",
                     "number": i % 3 * 10, "part": part, "score": i / 3})  # fmt: skip
    create_from_rows(tmp_path / "t.lance", rows)
    return tmp_path / "t.lance"
