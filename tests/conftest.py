"""Fixtures shared by all rooms."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Done

from cutline.cli import main

torch.set_num_threads(1)  # small tensors: threads cost more than they give


REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def real_data() -> Path:
    """The folder with small real data sets, where there is one."""
    if not REAL.is_dir():
        pytest.skip("the real data sets are not here")
    return REAL


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text embeddings that one test keeps are not what another finds."""
    monkeypatch.setenv("CUTLINE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs the command line in this process, without the seconds that its imports take in one of its own."""

    def run(*args: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["cutline", *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def vectors() -> dict[str, torch.Tensor]:
    """Features of the reference values: x[i, j] = sin(0.7 (i D + j) + phase), rows normalised, float64, B = 4, D = 6."""

    def make(phase: float) -> torch.Tensor:
        x = np.sin(0.7 * np.arange(24).reshape(4, 6) + phase)
        return torch.tensor(x / np.linalg.norm(x, axis=1, keepdims=True))

    return {"image": make(0.0), "text": make(1.3), "teacher_image": make(0.4), "teacher_text": make(0.9)}
