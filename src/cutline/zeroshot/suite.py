"""Suites: many data sets, each with its task and config, for one model or several, as one table with averages; the way
CLIP_benchmark and DataComp's 38 tasks are used.

A score that is there is not measured again, so that a suite which was stopped, or of which a data set failed, goes on with the
same command; unless its pictures, texts or labels have changed since. Each score lies in OUT/MODEL/NAME, with what it is of in
`entry.json`. Under torchrun all processes share each data set.
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
from cutline.objectives.gather import same_on_all, together, world
from cutline.record import Result, digest, slug, write_atomic
from cutline.towers.pictures import weights_hash
from cutline.train.device import device_of, process_group
from cutline.train.stream import open_source
from cutline.transfer.data import Task, open_data
from cutline.zeroshot.retrieve import held_out
from cutline.zeroshot.texts import open_joint

# Of each task, in modules of this package, its config and its function (model, data, config, out=folder) → Result, and what
# its data are opened for; None: they are a source of pairs.
TASKS: dict[str, tuple[str, str, Task | None]] = {
    "classify": ("classify.ClassifyConfig", "classify.classify", "zeroshot"),
    "retrieve": ("retrieve.RetrieveConfig", "retrieve.retrieve", None),
    "segment": ("segment.SegmentConfig", "segment.segment", "segment"),
    "depth": ("depthclip.DepthClipConfig", "depth.depth", "depth"),
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
    known: dict[str, str] = {}  # fingerprints of the data that have been opened
    with process_group(suite.device):
        tell = say if world()[0] == 0 else lambda _: None
        for model in models:
            loaded = open_joint(model, device_of(suite.device))
            with together():
                records = _records(suite, loaded)
                there = [name for name, record in records.items() if _finished(folder_of(out, model, name), record)]
            there = same_on_all(there)
            tell(f"{model}: {len(records) - len(there)} of {len(records)} data sets to score")
            for name, record in records.items():
                folder = folder_of(out, model, name)
                try:
                    if name in there and not _changed(suite, name, folder, known, tell):
                        continue
                    result = _score(suite, name, model, loaded, folder, record, tell)
                except Exception as e:  # whatever it is, the others go on, and the table says which is missing
                    failed[model, name] = str(e) if isinstance(e, CutlineError) else f"{type(e).__name__}: {e}"
                    tell(f"  {name} FAILED: {failed[model, name]}")
                    continue
                tell(f"  {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in list(result.metrics.items())[:3]))
            del loaded
    return failed


def _changed(suite: Suite, name: str, folder: Path, known: dict[str, str], tell: Callable[[str], None]) -> bool:
    """Whether the data are not those of the score that is there. Where they cannot be opened the score stays."""
    try:
        with together():
            now = known[name] = known.get(name) or _open(suite, name).fingerprint
            before = Result.read(folder).protocol.data_fingerprint if world()[0] == 0 else ""
    except CutlineError as e:
        tell(f"  {name}: its score stays, and cannot be compared with its data: {e}")
        return False
    changed = same_on_all(before) != now
    if changed:
        tell(f"  {name}: its data have changed since it was scored")
    return changed


def _score(
    suite: Suite,
    name: str,
    model: str,
    loaded: towers.Model,
    folder: Path,
    record: dict[str, Any],
    tell: Callable[[str], None],
) -> Result:
    entry = suite.tasks[name]
    if world()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)  # of other data
        write_atomic(folder / "entry.json", json.dumps(record, indent=2).encode())
    if entry.task == "retrieve" and entry.config.get("where") is None and held_out(model, suite.data(name))[0]:
        tell(f"  {name}: the model was trained on pairs of this table; config: {{where: …}} would leave them out")
    score = _named(TASKS[entry.task][1])
    result: Result = score(loaded, suite.data(name), entry.build(suite.device), out=folder)
    return result


def _open(suite: Suite, name: str) -> Any:
    """The data of an entry, which have a `fingerprint`."""
    entry = suite.tasks[name]
    task = TASKS[entry.task][2]
    if task is None:
        return open_source(suite.data(name), entry.config.get("where"))
    return open_data(suite.data(name), task)


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


def _records(suite: Suite, model: towers.Model) -> dict[str, dict[str, Any]]:
    """All that the score of each entry is of, but for what is in the data."""
    weights, records = weights_hash(model), {}
    for name, entry in suite.tasks.items():
        config = entry.build().model_dump(mode="json", exclude={"device"})
        for key in ("names", "prompts"):  # words count by what is in their file
            if isinstance(config.get(key), str) and Path(config[key]).is_file():
                config[key] += f" {digest(config[key]).hex()[:16]}"
        records[name] = {"task": entry.task, "data": suite.data(name), "config": config, "weights": weights}
    return records


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
