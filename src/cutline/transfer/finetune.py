"""What segmentation and depth share: the config, the training loop, the record of how a score was measured.

The loop is AdamW with layer-wise decay, linear warm-up and polynomial (or cosine) decay. When the encoder is frozen and
batches are whole pictures, its features are computed once for every picture and its mirror image, which gives the same
numbers as computing them at every step.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from cutline.config import Config
from cutline.errors import ConfigError, DataError, TrainingError
from cutline.progress import progress
from cutline.record import Protocol
from cutline.towers.encoder import Encoder
from cutline.towers.store import load_encoder
from cutline.train.optim import param_groups, schedule, set_lr
from cutline.transfer.batches import Batches, Cut
from cutline.transfer.data import DenseData, Sample, Skip, Split, labelled
from cutline.transfer.model import Dense, Look

NONFINITE = 5  # losses in a row that are not finite before a run stops
CACHE_BYTES = 2 << 30  # frozen features kept at most
LOG_EVERY = 10
EPOCHS, LEAST, MOST = 40, 400, 160_000  # of `steps` when not given


class DenseConfig(Config):
    """Options of every dense task. `None` means: chosen from the data and the encoder, and written in the protocol.

    frozen: train the head alone. labels: how many training pictures to use, or which share (nested subsets by `seed`).
    steps: default 40 passes over them, at least 400 and at most 160,000 (mmsegmentation's ADE20K). lr: peak, of the head;
    layer k of the encoder gets lr · layer_decay^(layers + 1 - k). warmup: steps. crop: default the whole picture when all have one
    size of at most 512 px, else a square of the smallest short side, at most 512. short: first resize the short side to this many pixels, in
    training and in test. test: "whole" pictures, or "slide" with windows of `crop` every `stride` pixels (default half the crop).
    test_flip: average with the mirror image. split, pictures: what is scored, and how many at most. channels: width of
    the head, default by the encoder's width; pyramid_channels: of the ViTDet pyramid (256 in the paper).
    precision: "auto" is bf16 autocast on CUDA and float32 elsewhere.
    """

    pyramid: Literal["vitdet", "taps"] = "vitdet"
    channels: int | None = Field(None, ge=1)
    pyramid_channels: int | None = Field(None, ge=1)
    frozen: bool = False
    labels: int | float | None = None
    steps: int | None = Field(None, ge=1)
    batch: int = Field(16, ge=2)
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float = Field(0.65, gt=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    warmup: int | None = Field(None, ge=0)
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    power: float = Field(1.0, gt=0)
    clip: float | None = Field(None, gt=0)
    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    short: int | None = Field(None, ge=16)
    flip: bool = True
    test: Literal["whole", "slide"] = "whole"
    stride: int | None = Field(None, ge=1)
    test_flip: bool = False
    split: Literal["val", "test", "train"] = "val"
    pictures: int | None = Field(None, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    seed: int = 0

    @field_validator("crop", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("labels")
    @classmethod
    def _labels(cls, value: int | float | None) -> int | float | None:
        if value is not None and (value <= 0 or (isinstance(value, float) and value >= 1)):
            raise ValueError("a number of pictures (at least 1) or a share between 0 and 1")
        return value


C = TypeVar("C", bound=DenseConfig)


class Prepared(Generic[C]):
    """A config with nothing left open, the training rows that can be read, and how many could not."""

    def __init__(self, config: C, data: DenseData, width: int) -> None:
        train = data.split("train")
        chosen = labelled(len(train), config.labels, config.seed)
        self.rows, self.skipped = train.usable(chosen)
        self.train, self.data = train, data
        steps = config.steps or min(max(LEAST, EPOCHS * len(self.rows) // config.batch), MOST)
        channels = config.channels or default_channels(width)
        self.config: C = config.model_copy(
            update={
                "steps": steps,
                "warmup": min(1500, steps // 20) if config.warmup is None else config.warmup,
                "channels": channels,
                "pyramid_channels": config.pyramid_channels or min(256, channels),
                "crop": config.crop or self._crop(config.short),
            }
        )

    def _crop(self, short: int | None) -> tuple[int, int]:
        sizes = {self.train.read(r).image.shape[:2] for r in self.rows}
        factor = short / min(min(s) for s in sizes) if short else 1.0
        if len(sizes) == 1:
            height, width = (round(side * factor) for side in sizes.pop())
            if max(height, width) <= 512:
                return height, width
        side = min(512, short or min(min(s) for s in sizes))
        return side, side


def default_channels(width: int) -> int:
    """Width of a head for an encoder of this width: 512 for ViT-B's 768, in proportion below, in multiples of 64."""
    return max(64, min(512, width * 2 // 3 // 64 * 64))


def encoder_of(source: Any) -> Encoder:
    """An `Encoder` as it is; a model, a run directory or any name that `towers.load` takes, wrapped as one."""
    return source if isinstance(source, Encoder) else load_encoder(source)


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"device={name!r} is not a device: use auto, cpu, cuda or cuda:1.") from e


def autocast(config: DenseConfig) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of contexts of the config's precision."""
    device = device_of(config.device)
    half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)


@contextmanager
def seeded(config: DenseConfig) -> Iterator[None]:
    """The body's random numbers depend on the seed alone, and the caller's generators are left as they were."""
    device = device_of(config.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        yield


def finetune(
    model: Dense, prepared: Prepared[Any], loss: Callable[[Tensor, Tensor], Tensor], empty: int, out: Path | None
) -> None:
    """Train `model` in place by `prepared.config` and leave it in eval mode.

    loss: (output (B, C, H, W), target (B, H, W)) → scalar. empty: target outside of a picture. Writes `metrics.jsonl` into `out`. Raises
    `TrainingError` after `NONFINITE` losses in a row that are not finite; single ones are skipped and counted.
    """
    config: DenseConfig = prepared.config
    assert config.steps and config.crop and config.warmup is not None
    device, cast = device_of(config.device), autocast(config)
    model.to(device).train()
    regular = config.drop_path > 0 and not config.frozen
    if regular:
        model.encoder.set_drop_path(config.drop_path)
    fill = tuple(round(255 * float(m)) for m in model.encoder.mean)
    cut = Cut(config.crop, config.scale, config.flip, config.short, (fill[0], fill[1], fill[2]), empty)
    batches = Batches(prepared.train, prepared.rows, config.batch, config.seed, cut)
    cache = _frozen_features(model, batches, config) if config.frozen and batches.whole else None
    optimiser = torch.optim.AdamW(
        param_groups(model, config.lr, config.weight_decay, config.layer_decay, model.layer_of, model.num_layers),
        fused=True,
    )
    bad, log = 0, _Log(out)
    with progress("fine-tuning" if not config.frozen else "training the head", config.steps, "steps") as tick, log:
        for step, batch in enumerate(batches.iterate(0, config.steps)):
            share = schedule(step, config.steps, config.warmup, config.schedule, config.power)
            set_lr(optimiser, config.lr * share)
            target = batch.targets.to(device, non_blocking=True)
            with cast():
                if cache is None:
                    output = model(model.normalise(batch.images.to(device, non_blocking=True)))
                else:
                    maps = [m[batch.flips.long(), batch.rows].to(device) for m in cache]
                    output = model.decode(maps, (target.shape[1], target.shape[2]))
            value = loss(output.float(), target)
            number = value.item()
            if number - number != 0:  # NaN or infinite
                bad += 1
                if bad >= NONFINITE:
                    keys = ", ".join(batch.keys)
                    raise TrainingError(
                        f"the loss was not finite {bad} times in a row, at step {step} with the pictures {keys}. "
                        f"Lower lr={config.lr} or set clip=1.0."
                    )
                log(step, skipped="loss not finite")
                continue
            bad = 0
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            if config.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimiser.step()
            if step % LOG_EVERY == 0 or step == config.steps - 1:
                log(step, loss=number, lr=config.lr * share)
            tick(1, f"loss {number:.3f}")
    if regular:
        model.encoder.set_drop_path(0.0)
    model.eval()


class _Log:
    """Lines of `metrics.jsonl` in a folder, or nothing at all."""

    def __init__(self, folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl" if folder is not None else None
        self.begun = time.monotonic()

    def __enter__(self) -> "_Log":
        self.file = open(self.path, "w") if self.path is not None else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def __call__(self, step: int, **values: Any) -> None:
        if self.file is not None:
            seconds = round(time.monotonic() - self.begun, 3)
            self.file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
            self.file.flush()


@torch.no_grad()
def _frozen_features(model: Dense, batches: Batches, config: DenseConfig) -> list[Tensor] | None:
    """Maps of every training picture as it is and mirrored, (2, N, C, h, w) each; None if they would not fit."""
    device, cast = device_of(config.device), autocast(config)
    images = torch.stack([torch.from_numpy(batches.split.read(r).image).permute(2, 0, 1) for r in batches.rows])
    store: list[Tensor] = []
    sides = 2 if config.flip else 1
    for flip in range(sides):
        for first in range(0, len(images), config.batch):
            x = model.normalise(images[first : first + config.batch].to(device))
            with cast():
                maps = model.features(x.flip(3) if flip else x)
            if not store:
                if sides * len(images) * sum(m[0].nbytes for m in maps) > CACHE_BYTES:
                    return None
                store = [m.new_empty((sides, len(images), *m.shape[1:])) for m in maps]
            for kept, m in zip(store, maps):
                kept[flip, first : first + len(m)] = m
    return store


def scored_rows(config: DenseConfig, data: DenseData) -> tuple[Split, list[int], int]:
    """The split to score, the rows of it that can be read, and how many were skipped."""
    split = data.split(config.split)
    wanted = config.pictures or data.default_pictures or len(split)
    rows, skipped = split.usable(range(min(wanted, len(split))))
    if not rows:
        raise DataError(f"{data.spec}: the split {config.split!r} has no picture to score.")
    return split, rows, sum(skipped.values())


def look(config: DenseConfig) -> Look:
    """How the config says pictures are looked at in test."""
    window = config.crop or (512, 512)
    stride = (config.stride, config.stride) if config.stride else (window[0] // 2, window[1] // 2)
    return Look(config.test, window, stride, config.short, config.test_flip, autocast(config))


def protocol(
    task: str, config: DenseConfig, data: DenseData, model: Dense, counts: dict[str, int], **settings: Any
) -> Protocol:
    """How a score of `task` was measured: everything in the config, the data and what could be read of them."""
    values = config.model_dump(mode="json", exclude={"seed", "split", "device"})
    return Protocol(
        task=task,
        data=data.spec,
        data_fingerprint=data.fingerprint,
        split=config.split,
        settings={**values, **data.notes, **counts, **settings},
        encoder=model.source,
        encoder_hash=model.source_hash,
        seed=config.seed,
    )


def shown(config: DenseConfig, data: DenseData, count: int = 6) -> list[Sample]:
    """A few samples spread over the scored split, for a look at predictions."""
    split = data.split(config.split)
    total = min(config.pictures or data.default_pictures or len(split), len(split))
    samples = []
    for row in range(0, total, max(1, total // count)):
        try:
            samples.append(split.read(row))
        except Skip:
            continue
    return samples[:count]
