"""Run a plan: pretrain every arm for every seed, transfer each to every task. What is finished is never done again."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cutline import towers
from cutline.config import dump
from cutline.errors import ConfigError
from cutline.record import Result, slug, write_atomic
from cutline.study.plan import Plan, load_plan
from cutline.study.recaption import recaption
from cutline.train.loop import read_from, train
from cutline.train.stream import Source, open_source
from cutline.transfer.data import open_data
from cutline.transfer.run import transfer
from cutline.transfer.sweep import sweep
from cutline.zeroshot.retrieve import RetrieveConfig, retrieve


@dataclass(frozen=True)
class Cell:
    """One score to be had: an arm, a seed and a task (None: the pretraining itself)."""

    arm: str
    seed: int
    task: str | None = None

    def folder(self, out: Path) -> Path:
        run = out / slug(self.arm) / f"seed-{self.seed}"
        return run if self.task is None else run / slug(self.task)


def run(plan: Plan, out: Path, only: str | None = None, say: Callable[[str], None] = print) -> None:
    """Run every cell of `plan` that has no result yet, into `out`; `only` is ARM or ARM/TASK.

    A killed study goes on where it stopped: pretraining from its last checkpoint, transfers from the next unscored one.
    """
    out = out.resolve()  # runs keep paths in it, and go on wherever the study is called from
    arms, tasks = _chosen(plan, only)
    check_folder(plan, out)
    if not (out / "study.yaml").exists():
        _check_data(plan, arms, out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "study.yaml", dump(plan).encode())
    if plan.recaption is not None:
        recaption(plan.recaption, out, say)
    sources: dict[str, Source] = {}
    for seed in plan.seeds:
        for arm in arms:
            began = time.monotonic()
            encoder = _pretrain(plan, Cell(arm, seed), out, sources)
            say(f"{arm}, seed {seed}: encoder ready after {time.monotonic() - began:.0f} s")
            for task in tasks:
                result = _transfer(plan, Cell(arm, seed, task), out, encoder)
                say(f"  {task}: " + ", ".join(f"{k} {v:.3f}" for k, v in list(result.metrics.items())[:3]))


def check_folder(plan: Plan, out: Path) -> None:
    """Raise `ConfigError` if `out` holds a study whose scores are not this one's; seeds and looks may differ."""
    previous = out / "study.yaml"
    looks = {"seeds": [0], "title": "", "compare": None, "show": 0}
    if previous.exists() and dump(load_plan(previous).model_copy(update=looks)) != dump(plan.model_copy(update=looks)):
        raise ConfigError(f"{out} holds another study (see {previous}); choose another --out, or delete it.")


def _check_data(plan: Plan, arms: list[str], out: Path) -> None:
    """Open what the arms and every task read, before a folder is bound to the plan; but the table the study makes."""
    recipes = [plan.recipe(a, plan.seeds[0], out) for a in arms if plan.arms[a] is not None]
    tables = {(r.data.pairs, r.data.where) for r in recipes}
    for task in plan.tasks.values():
        config = task.build(0)
        if isinstance(config, RetrieveConfig):
            tables.add((task.data, config.where))
        else:
            assert task.task != "retrieve"
            open_data(task.data, task.task)
    for pairs, where in tables:
        if plan.recaption is None or Path(pairs).resolve() != out / "pairs.lance":
            open_source(pairs, where)


def results(plan: Plan, out: Path) -> dict[Cell, Result]:
    """The finished cells."""
    cells = [Cell(a, s, t) for a in plan.arms for s in plan.seeds for t in plan.tasks]
    return {c: Result.read(c.folder(out)) for c in cells if (c.folder(out) / "result.json").exists()}


def _chosen(plan: Plan, only: str | None) -> tuple[list[str], list[str]]:
    every = list(plan.tasks)
    cells = {None: (list(plan.arms), every)} | {f"{a}/{t}": ([a], [t]) for a in plan.arms for t in every}
    cells |= {arm: ([arm], every) for arm in plan.arms}
    if only not in cells:
        raise ConfigError(f"--only {only!r} names no cell; arms: {', '.join(plan.arms)}; tasks: {', '.join(every)}.")
    return cells[only]


def _pretrain(plan: Plan, cell: Cell, out: Path, sources: dict[str, Source]) -> str:
    """The folder of the arm's model, trained if it is not there yet."""
    folder = cell.folder(out)
    if (folder / "model").is_dir():
        return str(folder)
    recipe = plan.recipe(cell.arm, cell.seed, out)
    if plan.arms[cell.arm] is None:
        torch.manual_seed(cell.seed)
        towers.save(towers.build(recipe.towers), folder / ".model")
        os.replace(folder / ".model", folder / "model")  # there is a model when, and only when, it is whole
        return str(folder)
    key = f"{recipe.data.pairs} {recipe.data.where}"
    if key not in sources:
        sources.clear()  # the arms of a seed share one; two big ones would not fit
        sources[key] = read_from(recipe.data)
    train(recipe, folder, resume=True, source=sources[key])
    return str(folder)


def _transfer(plan: Plan, cell: Cell, out: Path, encoder: str) -> Result:
    assert cell.task is not None
    folder = cell.folder(out)
    if (folder / "result.json").exists():
        return Result.read(folder)
    task = plan.tasks[cell.task]
    config = task.build(cell.seed)
    if isinstance(config, RetrieveConfig):
        return retrieve(encoder, open_source(task.data, config.where), config, task.data, folder)
    assert task.task != "retrieve"
    if task.sweep:
        return sweep(task.task, encoder, task.data, config, folder, task.sweep, resume=True)
    return transfer(task.task, encoder, task.data, config, folder, resume=True)
