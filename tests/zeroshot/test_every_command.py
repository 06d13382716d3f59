"""Every zero-shot command on both kinds of towers, from folders that were saved with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from classes_made import THINGS, encoded

from cutline import towers
from cutline.record import Result
from cutline.zeroshot.dense import Method

SCENES = "scenes:n=8,size=48,objects=24"
SMALL = ("steps=2", "batch=4", "pictures=2")
HEAD = (*SMALL, "max_depth=80", "channels=16", "filters=16", "deconvolutions=1")
MASKS = (*SMALL, "channels=64", "pyramid_channels=32", "queries=4", "layers=1")
RUNS: dict[str, tuple[str, ...]] = {
    **{f"segment {m}": (f"method={m}", "prompts=photo", "pictures=2") for m in get_args(Method) if m != "proxyclip"},
    "segment proxyclip": ("method=proxyclip", "proxy=scratch:test_vit", "prompts=photo", "pictures=2"),
    "depth tokens": ("method=tokens", "count=3", *SMALL, "max_depth=80"),
    "depth mirror": ("method=mirror", "tokens=4", *HEAD),
    "proposals": ("prompts=photo", *MASKS),
    "proposals learned": ("learn.tokens=2", "learn.steps=2", *MASKS),
}
SUITE = """
name: all
tasks:
  classify: {{task: classify, data: "{data}", config: {{pictures: 4}}}}
  retrieve: {{task: retrieve, data: "{data}"}}
  segment: {{task: segment, data: "{data}", config: {{pictures: 2}}}}
  depth: {{task: depth, data: "{data}", config: {{pictures: 2}}}}
"""


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """ROOT/{train,val}/CLASS/*.jpg, 2 of each."""
    for part in ("train", "val"):
        for name in THINGS:
            (tmp_path / "things" / part / name).mkdir(parents=True)
            for i in range(2):
                (tmp_path / "things" / part / name / f"{i}.jpg").write_bytes(encoded(name, i))
    return tmp_path / "things"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_command_runs(
    kind: str, model_of: Callable[[str], towers.Model], things: Path, tmp_path: Path, here: Callable[..., Any]
) -> None:
    folder = towers.save(model_of(kind), tmp_path / "model")
    every_command(folder, things, tmp_path, here)


def every_command(model: Path, things: Path, root: Path, here: Callable[..., Any], *more: str) -> None:
    def run(name: str, *options: str, model: Path = model) -> Path:
        out = root / name.replace(" ", "-")
        done = here("zeroshot", name.split()[0], "--model", str(model), "--out", str(out), *options)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        return out

    for name, options in RUNS.items():
        out = run(name, "--data", SCENES, *options)
        assert (out / "samples.png").stat().st_size > 1000, name
        assert Result.read(out).metrics, name
    adapted = run("adapt", "--data", f"imagefolder:{things}", "prompts=photo", *SMALL)
    assert {"zeroshot_top1", "top1", "words_top1"} <= Result.read(adapted).metrics.keys()
    photo = str(next(things.rglob("*.jpg")))
    # What was trained is used again.
    run("classify photo", "--picture", photo, "--classes", "apple; leaf; sea", model=adapted)
    run("segment photo", "--picture", photo, "--classes", "apple; leaf; sea", model=adapted)
    for name in ("tokens", "mirror"):
        run(f"depth {name} photo", "--picture", photo, model=root / f"depth-{name}")
    run("proposals elsewhere", "--data", SCENES, "pictures=2", model=root / "proposals")
    (root / "suite.yaml").write_text(SUITE.format(data=SCENES))
    suite = here("zeroshot", "suite", str(root / "suite.yaml"), "--model", str(model), "--out", str(root / "suite"))
    assert suite.returncode == 0, suite.stderr
    scores = json.loads((root / "suite" / "table.json").read_text())["scores"]
    assert all(cell["value"] is not None for cell in scores)
