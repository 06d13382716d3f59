"""The recipe of a pretraining run: data, towers, objectives, training. See `recipes/` for whole ones."""

from typing import Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from cutline import objectives
from cutline.config import Config
from cutline.objectives.base import ObjectiveConfig
from cutline.towers.config import TowerConfig
from cutline.train.stream.text import TextConfig
from cutline.train.stream.transforms import Augment


class DataConfig(Config):
    """What is read.

    pairs: a table or `scenes:n=…`; where: a filter of the table (SQL); text: columns and rule; augment: of the view
    "image"; replay: prefix of the columns that `cutline reinforce` made, whose stored augmentations are then that view,
    instead of `augment`; threads: that read and decode (None: one a core); block: rows of a block for the block shuffle
    of object stores (None: a permutation of all rows); cache: keep pictures read once in memory (small sources only);
    max_bad: share of broken pictures above which the run stops.
    """

    pairs: str
    where: str | None = None
    text: TextConfig = Field(default_factory=lambda: TextConfig(columns={"alt": 1.0}))
    augment: Augment = Field(default_factory=Augment)
    replay: str | None = None
    threads: int | None = Field(None, ge=0)
    block: int | None = Field(None, ge=1)
    cache: bool = False
    max_bad: float = Field(0.01, ge=0, le=1)


Share = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Config):
    """How it is trained.

    batch: pictures a step over all processes; micro_batch: how many pictures or texts of a process pass the towers at a
    time (None: all), for batches that memory does not hold (see `train.gradcache`; not with compile); samples: pictures seen in all; warmup: steps; floor: share of the peak
    learning rate at the end; clip: gradient norm (None: no clipping); precision: "auto" is bf16 autocast on a GPU that
    has it and fp32 elsewhere; ema: decay of the weights' average (None: none; MobileCLIP uses 0.9995), which is then
    what `model/` holds; save_every, log_every: steps; keep: checkpoints kept; bad_steps: how many steps in a row may
    have a loss or gradient that is not finite (they are skipped and counted) before the run stops.
    """

    batch: int = Field(256, ge=2)
    micro_batch: int | None = Field(None, ge=1)
    samples: int = Field(1_000_000, ge=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.2, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(1e-6, gt=0)
    warmup: int = Field(100, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    floor: float = Field(0.0, ge=0, le=1)
    clip: float | None = Field(1.0, gt=0)
    max_logit_scale: float = Field(100.0, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    ema: float | None = Field(None, gt=0, lt=1)
    save_every: int = Field(1000, ge=1)
    log_every: int = Field(20, ge=1)
    keep: int = Field(2, ge=1)
    bad_steps: int = Field(3, ge=1)
    device: str = "auto"

    @model_validator(mode="after")
    def _one_way(self) -> "TrainConfig":
        if self.compile and self.micro_batch is not None:
            raise ValueError("micro_batch and compile do not go together: leave one of them out")
        return self


# One optional key per file in `cutline/objectives`, so that a method's options are checked like every other key.
_methods: dict[str, Any] = {name: (objectives.config_class(name) | None, None) for name in objectives.names()}
Objectives = create_model("Objectives", __base__=Config, **_methods)


class Recipe(Config):
    """A whole run. objectives: method → its options (its file in `cutline/objectives`); the loss is their weighted sum."""

    name: str = Field(pattern=r"^[\w.\-]+$")
    seed: int = Field(0, ge=0)
    data: DataConfig
    towers: TowerConfig
    objectives: Objectives  # no default, which an override would replace and not add to
    train: TrainConfig = Field(default_factory=TrainConfig)

    @model_validator(mode="after")
    def _check_weights(self) -> "Recipe":
        if not any(config.weight for config in self.objective_configs().values()):
            raise ValueError(
                "no objective has a weight above 0: name one under objectives, for example contrastive: {}"
            )
        return self

    def objective_configs(self) -> dict[str, ObjectiveConfig]:
        """The methods this recipe uses."""
        values = {name: getattr(self.objectives, name) for name in objectives.names()}
        return {name: value for name, value in values.items() if value is not None}
