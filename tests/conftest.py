"""Fixtures shared by all rooms."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # small tensors: threads cost more than they give

REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def real_data() -> Path:
    """The folder with small real data sets, where there is one."""
    if not REAL.is_dir():
        pytest.skip("the real data sets are not here")
    return REAL


@pytest.fixture
def vectors() -> dict[str, torch.Tensor]:
    """Features of the reference values: x[i, j] = sin(0.7 (i D + j) + phase), rows normalised, float64, B = 4, D = 6."""

    def make(phase: float) -> torch.Tensor:
        x = np.sin(0.7 * np.arange(24).reshape(4, 6) + phase)
        return torch.tensor(x / np.linalg.norm(x, axis=1, keepdims=True))

    return {"image": make(0.0), "text": make(1.3), "teacher_image": make(0.4), "teacher_text": make(0.9)}


def on_two_processes(code: str, *args: str, folder: Path) -> list[str]:
    """Run `code` on two gloo processes; it finds RANK and WORLD_SIZE in the environment. Returns their outputs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = folder / "two.py"
    script.write_text(code)
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                        "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    children = [
        subprocess.Popen([sys.executable, str(script), *args], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]  # fmt: skip
    done = [child.communicate(timeout=120) for child in children]
    for child, (_, error) in zip(children, done, strict=True):
        assert child.returncode == 0, error[-3000:]
    return [out for out, _ in done]


def run_cutline(*args: str, cwd: Path | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cutline.cli", *args], capture_output=True, text=True, timeout=timeout, cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
