"""The configs that tasks share, and what follows from them: device, precision, seeds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from cutline.config import Config
from cutline.errors import ConfigError
from cutline.train.device import device_of
from cutline.transfer.model import Look

SplitName = Literal["train", "val", "test"]
NO_NUMBER = {"device", "grad_checkpointing", "save_every"}  # options that no score depends on


class TransferConfig(Config):
    """Options of every task. `None` means: chosen from the data and the encoder, and written in the protocol.

    frozen: train the head alone. labels: how many training pictures to use, or which share (nested subsets by `seed`).
    steps: default 20 passes over them, at least 400 and at most 160,000 (mmsegmentation's ADE20K). lr: peak, of the
    head; layer k of the encoder gets lr · layer_decay^(layers + 1 - k). warmup: steps. ema: decay of an average of the
    weights that is kept in their place (FT-CLIP: 0.9998). split, pictures: what is scored, and how many at most.
    precision: "auto" is bf16 autocast on CUDA and float32 elsewhere. batch: of all processes together.
    grad_checkpointing: compute the encoder's activations twice and keep less of them. save_every: steps between
    checkpoints, default 500 but five in a run.
    """

    frozen: bool = False
    labels: int | float | None = None
    steps: int | None = Field(None, ge=1)
    batch: int = Field(16, ge=2)
    lr: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float = Field(0.65, gt=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    warmup: int | None = Field(None, ge=0)
    schedule: Literal["poly", "cosine", "constant", "drops"] = "poly"
    power: float = Field(1.0, gt=0)
    clip: float | None = Field(None, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    flip: bool = True
    split: SplitName = "val"
    pictures: int | None = Field(None, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    grad_checkpointing: bool = False
    save_every: int | None = Field(None, ge=1)
    seed: int = 0

    @property
    def peak(self) -> float | None:
        """The learning rate, also where it is not given; None where nothing is trained."""
        return self.lr

    @field_validator("labels")
    @classmethod
    def _labels(cls, value: int | float | None) -> int | float | None:
        if value is not None and (value <= 0 or (isinstance(value, float) and value >= 1)):
            raise ValueError("a number of pictures (at least 1) or a share between 0 and 1")
        return value

    @model_validator(mode="after")
    def _trained(self) -> "TransferConfig":
        if self.frozen:
            said = [name for name, none in (("layer_decay", 1), ("drop_path", 0)) if getattr(self, name) != none]
            idle(self, "a frozen encoder is not trained", *said, "grad_checkpointing")
        if self.schedule != "poly":
            idle(self, f"schedule={self.schedule} has no power", "power")
        return self


class DenseConfig(TransferConfig):
    """Options of every dense task, beside those of all tasks.

    crop: default the whole picture when all have one size of at most 512 px, else a square of the smallest short side,
    at most 512. short: first resize the short side to this many pixels, in training and in test. colour: "photometric"
    (mmsegmentation's) or "jitter" (of the MIM depth protocol), see `augment`. test: "whole"
    pictures, or "slide" with windows of `crop` every `stride` pixels (default half the crop). test_flip: average with
    the mirror image.
    """

    lr: float = Field(5e-4, gt=0)
    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    short: int | None = Field(None, ge=16)
    colour: Literal["none", "photometric", "jitter"] = "none"
    test: Literal["whole", "slide"] = "whole"
    stride: int | None = Field(None, ge=1)
    test_flip: bool = False

    @model_validator(mode="after")
    def _slides(self) -> "DenseConfig":
        if self.test != "slide":
            idle(self, f"test={self.test} has no windows", "stride")
        return self

    @field_validator("crop", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("crop")
    @classmethod
    def _positive(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and min(value) < 1:
            raise ValueError("a side in pixels, or height and width")
        return value

    @field_validator("scale")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        return rising(value)


class PyramidConfig(DenseConfig):
    """Options of dense tasks whose head reads a pyramid.

    channels: width of the head, default by the encoder's width; pyramid_channels: of the ViTDet pyramid (256 in the paper).
    """

    pyramid: Literal["vitdet", "taps"] = "vitdet"
    channels: int | None = Field(None, ge=1)
    pyramid_channels: int | None = Field(None, ge=1)


def idle(config: Config, why: str, *names: str) -> None:
    """Raise `ValueError` where one of these options, which `config` would ignore for this reason, is not at its default."""
    for name in names:
        if getattr(config, name) != type(config).model_fields[name].default:
            raise ValueError(f"{why}: leave {name} out")


def rising(value: tuple[float, float]) -> tuple[float, float]:
    """A range of factors as it is; `ValueError` for one that does not rise from above 0."""
    if not 0 < value[0] <= value[1]:
        raise ValueError("a range of factors, from small to large")
    return value


def default_channels(width: int) -> int:
    """Width of a head for an encoder of this width: a third of it in multiples of 64, so 256 for ViT-B's 768."""
    return max(64, min(512, width // 3 // 64 * 64))


def autocast(config: TransferConfig) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of contexts of the config's precision."""
    device, half = device_of(config.device), precision(config) == "bf16"
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)


def precision(config: TransferConfig) -> str:
    """What "auto" comes to on the config's device: "bf16" or "fp32"."""
    auto = "bf16" if device_of(config.device).type == "cuda" else "fp32"
    return auto if config.precision == "auto" else config.precision


@contextmanager
def seeded(config: TransferConfig) -> Iterator[None]:
    """The body's random numbers depend on the seed alone, and the caller's generators are left as they were."""
    device = device_of(config.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        yield


def look(config: DenseConfig, scales: Sequence[float] = (1.0,), probabilities: bool = False) -> Look:
    """How the config says pictures are looked at in test; scales and probabilities as in `Look`."""
    window = config.crop or (512, 512)
    stride = (config.stride, config.stride) if config.stride else (window[0] // 2, window[1] // 2)
    if min(window[k] - stride[k] for k in (0, 1)) < 0:
        raise ConfigError(f"stride={config.stride} is larger than the window of {window}: pixels would be left out.")
    return Look(config.test, window, stride, config.short, config.test_flip, autocast(config), scales, probabilities)
