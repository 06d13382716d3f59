"""A study as YAML: the arms (pretrainings), the tasks (transfers), the seeds. `quickstart` is three such files."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from cutline.captions.captioner import CaptionerConfig
from cutline.captions.coca import CocaWriter
from cutline.config import Config, apply, check, load
from cutline.errors import ConfigError
from cutline.record import slug
from cutline.scenes import parse_spec
from cutline.train.recipe import Recipe
from cutline.transfer.options import TransferConfig
from cutline.transfer.run import config_of
from cutline.zeroshot.retrieve import RetrieveConfig

OURS = "caption_ours"  # what the captioner of `Recaption` writes
SIZES = ("tiny", "small", "full")


def _or_value_error(where: str, build: Callable[[], object]) -> None:
    """A wrong key inside a plan is explained with the plan's line, which pydantic adds to a ValueError."""
    try:
        build()
    except ConfigError as e:
        raise ValueError(f"in {where}: {e}") from e


class Task(Config):
    """One transfer or zero-shot task: the kind, its data and its config. Every arm gets the same.

    data: a SPEC; for "retrieve" a table or `scenes:n=…`. An arm whose text tower was not trained retrieves by chance.
    sweep: learning rates, of which every arm and seed takes its own best by validation (`transfer.sweep`).
    """

    task: Literal["segment", "depth", "classify", "detect", "retrieve"]
    data: str
    config: dict[str, Any] = Field(default_factory=dict)
    sweep: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> "Task":
        _or_value_error("config", lambda: self.build(0))
        if self.sweep and self.task == "retrieve":
            raise ValueError("sweep: retrieval trains nothing; leave it out")
        return self

    def build(self, seed: int) -> TransferConfig | RetrieveConfig:
        """The task's config with a study's seed, where it draws anything."""
        if self.task == "retrieve":
            return check(RetrieveConfig, self.config)
        return check(config_of(self.task), {**self.config, "seed": seed})


class Recaption(Config):
    """A table that the study makes for its arms, `{out}/pairs.lance`: scenes with captions of our own.

    scenes: what is rendered; share: of the rows whose captions the captioner may learn from (column `caption_human`);
    captioner: its config (as `caption train` takes it); write: of the captions it writes for every row (column
    `caption_ours`, as `caption write`); fused: also the column `caption_fused`, the alt text and ours by rules.
    """

    scenes: str
    share: float = Field(0.05, gt=0, le=1)
    captioner: dict[str, Any] = Field(default_factory=dict)
    write: dict[str, Any] = Field(default_factory=dict)
    fused: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Recaption":
        _or_value_error("captioner", lambda: check(CaptionerConfig, self.captioner))
        _or_value_error("scenes", lambda: parse_spec(self.scenes))
        if own := {"model", "column"} & self.write.keys():
            raise ValueError(f"in write: {min(own)!r} is not to be chosen; the captioner writes {OURS}")
        _or_value_error("write", lambda: check(CocaWriter, {**self.write, "model": "captioner", "column": OURS}))
        return self


class Plan(Config):
    """A study. base: a recipe, in which `{out}` is the study's folder; recaption: a table made first; arms: name →
    overrides of the base (dotted keys), or null for an untrained encoder; compare: the arm to be judged against the arm
    it should beat; show: test pictures drawn in the report."""

    name: str
    title: str = ""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0], min_length=1)
    recaption: Recaption | None = None
    base: dict[str, Any]
    arms: dict[str, dict[str, Any] | None] = Field(min_length=1)
    tasks: dict[str, Task]
    compare: tuple[str, str] | None = None
    show: int = Field(4, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        for arm in self.compare or ():
            if arm not in self.arms:
                raise ValueError(f"compare names the arm {arm!r}; the arms are {', '.join(self.arms)}")
        _check_folders("arm", self.arms)
        _check_folders("task", self.tasks)
        for arm in self.arms:
            _or_value_error(f"base, with arm {arm!r}", partial(self.recipe, arm, self.seeds[0]))
        return self

    def recipe(self, arm: str, seed: int, out: Path = Path("{out}")) -> Recipe:
        """The arm's recipe in a study in the folder `out`. An arm without training uses the base's towers, at their
        random start."""
        dotted = [f"{key}={_inline(value)}" for key, value in (self.arms[arm] or {}).items()]
        recipe = check(Recipe, apply({**self.base, "name": slug(arm), "seed": seed}, dotted, Recipe))
        recipe.data.pairs = recipe.data.pairs.replace("{out}", str(out))
        return recipe


# Overrides of the base merge as those of a recipe do; the plan keeps it as it was written.
_Shape = create_model("_Shape", __base__=Plan, base=(Recipe, ...))


def load_plan(path: str | Path, overrides: list[str] | None = None) -> Plan:
    """Read a study. Raises `ConfigError` with the key and line of what is wrong."""
    return load(Plan, path, overrides or [], _Shape)


def quickstart_plan(size: str, overrides: list[str] | None = None) -> Plan:
    """The built-in study on the embedded scenes."""
    if size not in SIZES:
        raise ConfigError(f"--size {size!r} is not one of {', '.join(SIZES)}.")
    return load_plan(Path(__file__).parent / "sizes" / f"{size}.yaml", overrides)


def _check_folders(kind: str, names: Iterable[str]) -> None:
    """Two names must not share a folder, nor take one of a run's own."""
    taken = {"model": "a run's own", "checkpoints": "a run's own", "tensorboard": "a run's own", "": "no name"}
    for name in names:
        if slug(name) in taken:
            raise ValueError(
                f"{kind} {name!r} would be kept in the folder {slug(name)!r}: {taken[slug(name)]}; rename it"
            )
        taken[slug(name)] = f"that of {name!r}"


def _inline(value: Any) -> str:
    import json

    return json.dumps(value)
