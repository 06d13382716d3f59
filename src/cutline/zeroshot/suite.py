"""Suites: many data sets, each with its task and config, for one model or several, as one table with averages; the way
CLIP_benchmark and DataComp's 38 tasks are used.

A score that is there is not measured again, so that a suite which was stopped, or of which a data set failed, goes on with the
same command. Each score lies in OUT/MODEL/NAME, with what it is of in `entry.json`.
"""

import difflib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from cutline import towers
from cutline.config import Config, check, load
from cutline.errors import ConfigError, CutlineError
from cutline.record import Result, digest, slug, write_atomic
from cutline.towers.pictures import weights_hash
from cutline.train.device import device_of
from cutline.zeroshot.retrieve import held_out
from cutline.zeroshot.texts import open_joint

# Of each task, in modules of this package, its config and its function (model, data, config, out=folder) → Result.
TASKS = {
    "classify": ("classify.ClassifyConfig", "classify.classify"),
    "retrieve": ("retrieve.RetrieveConfig", "retrieve.retrieve"),
    "segment": ("segment.SegmentConfig", "segment.segment"),
    "depth": ("depthclip.DepthClipConfig", "depth.depth"),
}


class Entry(Config):
    """One data set: the task, the data (a SPEC, or for "retrieve" a table; `{root}` is the suite's), the task's config, the
    group it is averaged in, and the metric, or metrics of which the mean counts (None: the task's own)."""

    task: str
    data: str
    config: dict[str, Any] = Field(default_factory=dict)
    group: str = ""
    metric: str | list[str] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Entry":
        if self.task not in TASKS:
            near = difflib.get_close_matches(self.task, TASKS, n=1)
            raise ValueError(f"task {self.task!r}: {f'did you mean {near[0]!r}?' if near else ', '.join(TASKS) + '.'}")
        if "device" in self.config:
            raise ValueError("device: the models are loaded once; give it to the whole suite")
        try:
            self.build()
        except ConfigError as e:
            raise ValueError(f"in config: {e}") from e
        return self

    def build(self, device: str = "auto") -> Config:
        """The task's config."""
        kind: type[Config] = _named(TASKS[self.task][0])
        return check(kind, {**self.config, "device": device})


class Suite(Config):
    """root: what `{root}` is in the data; tasks: name → entry; device: where the models run."""

    name: str
    root: str = "."
    device: str = "auto"
    tasks: dict[str, Entry] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "Suite":
        _apart("task", self.tasks)
        return self

    def data(self, name: str) -> str:
        return self.tasks[name].data.replace("{root}", self.root)


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite. Raises `ConfigError` with the key and line of what is wrong."""
    return load(Suite, path, overrides)


def folder_of(out: Path, model: str, name: str) -> Path:
    """Where the score of a model on an entry lies."""
    return out / slug(model) / slug(name)


def run(
    suite: Suite, models: Sequence[str], out: Path, say: Callable[[str], None] = print
) -> dict[tuple[str, str], str]:
    """Measure what is not there yet in `out`, each model loaded once; what failed, (model, name) → why.

    Raises `ConfigError` for two models of one name, and if a score there is of another config, data or weights.
    """
    _apart("model", models)
    failed: dict[tuple[str, str], str] = {}
    for model in models:
        loaded = open_joint(model, device_of(suite.device))
        wanted = {name: _record(suite, name, loaded) for name in suite.tasks}
        todo = [name for name, record in wanted.items() if not _finished(folder_of(out, model, name), record)]
        say(f"{model}: {len(todo)} of {len(wanted)} data sets to score")
        for name in todo:
            folder = folder_of(out, model, name)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "entry.json", json.dumps(wanted[name], indent=2).encode())
            entry = suite.tasks[name]
            if entry.task == "retrieve" and entry.config.get("where") is None and held_out(model, suite.data(name))[0]:
                say(
                    f"  {name}: the model was trained on pairs of this table; config: {{where: …}} would leave them out"
                )
            try:
                score = _named(TASKS[entry.task][1])
                result: Result = score(loaded, suite.data(name), entry.build(suite.device), out=folder)
            except Exception as e:  # whatever it is, the others go on, and the table says which is missing
                failed[model, name] = str(e) if isinstance(e, CutlineError) else f"{type(e).__name__}: {e}"
                say(f"  {name} FAILED: {failed[model, name]}")
                continue
            say(f"  {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in list(result.metrics.items())[:3]))
        del loaded
    return failed


def _named(name: str) -> Any:
    module, member = name.split(".")
    return getattr(importlib.import_module(f"cutline.zeroshot.{module}"), member)


def _apart(kind: str, names: Any) -> None:
    """Raise where two names would share a folder."""
    taken: dict[str, str] = {}
    for name in names:
        if not slug(name) or (first := taken.setdefault(slug(name), name)) is not name:
            why = "has no letter or digit" if not slug(name) else f"and {first!r} would share the folder {slug(name)!r}"
            raise ConfigError(f"the {kind} {name!r} {why}: give it another name.")


def _record(suite: Suite, name: str, model: towers.Model) -> dict[str, Any]:
    """All that the score of an entry is of."""
    entry = suite.tasks[name]
    config = entry.build().model_dump(mode="json", exclude={"device"})
    for key in ("names", "prompts"):  # words count by what is in their file
        if isinstance(config.get(key), str) and Path(config[key]).is_file():
            config[key] += f" {digest(config[key]).hex()[:16]}"
    return {"task": entry.task, "data": suite.data(name), "config": config, "weights": weights_hash(model)}


def _finished(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the score is there; raises `ConfigError` if one of something else is."""
    if not (folder / "result.json").exists():
        return False
    try:
        found = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if found != wanted:
        other = ", ".join(key for key, value in wanted.items() if found.get(key) != value)
        raise ConfigError(
            f"{folder} holds a score of another {other}. Choose another --out, or remove that folder to measure it anew."
        )
    return True
