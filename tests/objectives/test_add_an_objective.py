"""The worked example of docs/objectives.md: its file, its test and its commands, as they stand there."""

import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from objectives_made import rows_of
from processes import run_cutline, start

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
SMALL = ["data.pairs=scenes:n=32,size=64,seed=1,objects=48", "data.threads=1", "train.batch=8", "train.log_every=1"]


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return found


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the package with the file of the page in it, and its test."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "src" / "cutline", folder / "cutline")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    file, test = blocks("python")
    (folder / "cutline" / "objectives" / "vse.py").write_text(file, encoding="utf-8")
    shutil.copy(Path(__file__).parent / "objectives_made.py", folder)
    (folder / "test_vse.py").write_text(test, encoding="utf-8")
    return folder


def test_its_test_passes(house):
    done = start("-m", "pytest", "-q", "test_vse.py", cwd=house).ended(120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 passed" in done.stdout


def test_its_commands_train_it_alone_and_beside_contrastive(house, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(house))
    for line in blocks("bash")[0].splitlines():
        command = shlex.split(line, comments=True)[1:]
        done = run_cutline(*command, *SMALL, "train.samples=32", cwd=house)
        assert done.returncode == 0, done.stderr
    alone, beside = (rows_of(house / "runs" / name) for name in ("vse", "clip-and-vse"))
    assert all(math.isfinite(r["vse/text"]) and 0 <= r["vse/violations/text"] <= 1 for r in alone)
    assert not any(k.startswith("contrastive") for k in alone[0])
    first = beside[0]
    assert first["loss"] == pytest.approx(first["contrastive/text"] + 0.5 * first["vse/text"], rel=1e-5)


def test_a_wrong_option_is_named(house, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(house))
    done = run_cutline(
        "train", "recipes/scenes/contrastive.yaml", "objectives={vse: {margins: 1}}", "--out", "x", cwd=house
    )
    assert done.returncode == 1
    assert "did you mean 'margin'" in done.stderr


@pytest.mark.slow
def test_two_processes_train_it_like_one(house, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(house))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = [
        "train",
        "recipes/scenes/contrastive.yaml",
        "objectives={contrastive: null, vse: {}}",
        "train.samples=24",
        *SMALL,
    ]
    assert run_cutline(*recipe, "--out", "one", cwd=house).returncode == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "cutline.cli",
    ]
    done = subprocess.run([*torchrun, *recipe, "--out", "two"], cwd=house, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(rows_of(house / "one"), rows_of(house / "two"), strict=True):
        assert two["vse/text"] == pytest.approx(one["vse/text"], abs=2e-3)
