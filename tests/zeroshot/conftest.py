"""A small random model, and pictures of seven classes."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from words_made import KINDS, NAMES

from cutline import towers


@cache
def _model(kind: str) -> towers.Model:
    torch.manual_seed(0)
    return towers.build(towers.TowerConfig(custom=copy.deepcopy(KINDS[kind]))).eval()


@pytest.fixture
def model_of() -> Callable[[str], towers.Model]:
    """The model of a kind; shared, so it must not be changed."""
    return _model


@pytest.fixture
def model() -> towers.Model:
    return _model("clip")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """ROOT/test/CLASS/*.png, 3 of each, of several sizes."""
    for k, name in enumerate(NAMES):
        (tmp_path / "test" / name).mkdir(parents=True)
        for i in range(3):
            rng = np.random.default_rng([k, i])
            small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
            small.resize((40 + 8 * i, 36)).save(tmp_path / "test" / name / f"{i}.png")
    return tmp_path
