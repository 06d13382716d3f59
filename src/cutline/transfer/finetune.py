"""The training loop that all tasks share.

AdamW with layer-wise decay, linear warm-up, polynomial (or cosine) decay. When the encoder is frozen and batches are
whole pictures, its features are computed once for every picture and its mirror image, which gives the same numbers as
computing them at every step.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from cutline.errors import TrainingError
from cutline.progress import progress
from cutline.towers.encoder import Encoder
from cutline.towers.store import load_encoder
from cutline.train.device import device_of
from cutline.train.optim import param_groups, schedule, set_lr
from cutline.transfer.augment import CutDepth
from cutline.transfer.batches import Batch, Batches, Cut, ahead
from cutline.transfer.data import DenseData, labelled
from cutline.transfer.model import Transferred
from cutline.transfer.options import DenseConfig, TransferConfig, autocast, default_channels, look, seeded

NONFINITE = 5  # losses in a row that are not finite before a run stops
CACHE_BYTES = 2 << 30  # frozen features kept at most
LOG_EVERY = 10
EPOCHS, LEAST, MOST = 20, 400, 160_000  # of `steps` when not given
CROP = 512  # largest side of a crop when not given

C = TypeVar("C", bound=TransferConfig)
D = TypeVar("D", bound=DenseConfig)
B = TypeVar("B", bound="Keyed")
Loss = Callable[[Tensor, Tensor], Tensor]  # (output float32, targets of the batch) → scalar


class Keyed(Protocol):
    """A batch that can name its pictures."""

    keys: list[str]


class Prepared(Generic[C]):
    """A config with its training open no more, the training rows that can be read, and how many could not."""

    def __init__(self, config: C, data: DenseData) -> None:
        data.split(config.split)  # told before training, not after
        self.split = data.split("train")
        chosen = labelled(len(self.split), config.labels, config.seed, self.split.labels)
        self.rows, skipped = self.split.usable(chosen)
        self.skipped = sum(skipped.values())
        self.steps = config.steps or min(max(LEAST, EPOCHS * len(self.rows) // config.batch), MOST)
        self.warmup = min(1500, self.steps // 20) if config.warmup is None else config.warmup
        self.config: C = config.model_copy(update={"steps": self.steps, "warmup": self.warmup})


class PreparedDense(Prepared[D]):
    """`Prepared` with the crop and the widths of the head chosen as well."""

    def __init__(self, config: D, data: DenseData, width: int) -> None:
        super().__init__(config, data)
        self.crop = config.crop or self._crop(config.short)
        channels = config.channels or default_channels(width)
        between = config.pyramid_channels or min(256, channels)
        self.config = self.config.model_copy(
            update={"crop": self.crop, "channels": channels, "pyramid_channels": between}
        )
        look(self.config)  # a stride that leaves pixels out is told before training, too

    def batches(self, mean: tuple[float, float, float], empty: int, cutdepth: CutDepth | None = None) -> Batches:
        """Training batches. mean: the encoder's mean colour, around pictures smaller than the crop; empty: the target
        there; cutdepth: of depth."""
        c = self.config
        cut = Cut(self.crop, c.scale, c.flip, c.short, mean_colour(mean), empty, c.colour, cutdepth)
        return Batches(self.split, self.rows, c.batch, c.seed, cut)

    def _crop(self, short: int | None) -> tuple[int, int]:
        sizes = {self.split.sizes[r] for r in self.rows}
        smallest = min(min(s) for s in sizes)
        if len(sizes) == 1:
            height, width = (round(side * (short or smallest) / smallest) for side in sizes.pop())
            if max(height, width) <= CROP:
                return height, width
        side = min(CROP, short or smallest)
        return side, side


def mean_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The colour that an encoder's normalisation makes zero, 0 … 255, of its mean in 0 … 1."""
    red, green, blue = (round(255 * m) for m in mean)
    return red, green, blue


def encoder_of(source: Any, config: TransferConfig) -> Encoder:
    """An `Encoder` as it is; a model, a run directory or any name that `towers.load` takes, wrapped as one.

    The random weights of "scratch:NAME" follow from the config's seed.
    """
    with seeded(config):
        return source if isinstance(source, Encoder) else load_encoder(source)


def finetune(model: Transferred, prepared: Prepared[Any], batches: Batches, loss: Loss, out: Path | None) -> None:
    """`train` by a loss of outputs and targets, with the features of a frozen encoder computed once where they can be."""
    config: TransferConfig = prepared.config
    device, cast = device_of(config.device), autocast(config)
    model.to(device).train()
    kept = config.frozen and batches.whole
    cache = still_features(model, batches, config, config.flip, CACHE_BYTES) if kept else None
    batches.targets_only = cache is not None

    def value(batch: Batch) -> Tensor:
        with cast():
            outputs = _outputs(model, batch, cache, batches.how.crop)
        targets = batch.targets.to(device, non_blocking=True)
        return torch.stack([weight * loss(output.float(), targets) for weight, output in outputs]).sum()

    train(model, prepared, batches.iterate(0, prepared.steps), value, out)


def train(
    model: Transferred, prepared: Prepared[Any], batches: Iterator[B], loss: Callable[[B], Tensor], out: Path | None
) -> None:
    """Train `model` in place on `batches` by `prepared.config` and leave it in eval mode. loss: of a batch, a scalar.

    Writes `metrics.jsonl` into `out`. Raises `TrainingError` after `NONFINITE` losses in a row that are not finite;
    single ones are skipped and logged.
    """
    config: TransferConfig = prepared.config
    assert config.lr is not None
    model.to(device_of(config.device)).train()
    regular = config.drop_path > 0 and not config.frozen
    if regular:
        model.encoder.set_drop_path(config.drop_path)
    groups = param_groups(model, config.lr, config.weight_decay, config.layer_decay, model.layer_of, model.num_layers)
    optimiser, guard = torch.optim.AdamW(groups, fused=True), _Guard(config)
    label = "training the head" if config.frozen else "fine-tuning"
    with progress(label, prepared.steps, "steps") as tick, _Log(out) as log:
        for step, batch in enumerate(batches):
            lr = config.lr * schedule(step, prepared.steps, prepared.warmup, config.schedule, config.power)
            set_lr(optimiser, lr)
            value = loss(batch)
            number = value.item()
            if guard.refuses(number, step, batch.keys):
                log(step, skipped="the loss is not finite")
                continue
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            if config.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimiser.step()
            if step % LOG_EVERY == 0 or step == prepared.steps - 1:
                log(step, loss=number, lr=lr)
            tick(1, f"loss {number:.3f}")
    if regular:
        model.encoder.set_drop_path(0.0)
    model.eval()


def _outputs(
    model: Transferred, batch: Batch, cache: list[Tensor] | None, size: tuple[int, int]
) -> list[tuple[float, Tensor]]:
    device = next(model.parameters()).device
    if cache is None:
        maps = model.features(model.normalise(batch.images.to(device, non_blocking=True)))
    else:
        maps = [m[batch.flips.long().to(device), batch.rows.to(device)] for m in cache]
    return model.outputs(maps, size)


@torch.no_grad()
def still_features(
    model: Transferred, batches: Batches, config: TransferConfig, mirrored: bool, limit: float
) -> list[Tensor] | None:
    """Features of every training picture as it is, and mirrored if asked for, (1 or 2, N, …) each.

    None if they would take more than `limit` bytes.
    """
    device, cast = device_of(config.device), autocast(config)
    sides, rows = 2 if mirrored else 1, batches.rows
    parts = [rows[first : first + config.batch] for first in range(0, len(rows), config.batch)]
    store: list[Tensor] = []
    with progress("features of the frozen encoder", len(rows), "pictures") as tick:
        done = 0
        for images in ahead(batches.pictures, parts, batches.threads):
            x = model.normalise(images.to(device, non_blocking=True))
            for flip in range(sides):
                with cast():
                    maps = model.features(x.flip(3) if flip else x)
                if not store:
                    if sides * len(rows) * sum(m[0].nbytes for m in maps) > limit:
                        return None
                    store = [m.new_empty((sides, len(rows), *m.shape[1:])) for m in maps]
                for kept, m in zip(store, maps, strict=True):
                    kept[flip, done : done + len(m)] = m
            done += len(images)
            tick(len(images))
    return store


class _Guard:
    """Lets single losses that are not finite pass unused, and stops a run of them."""

    def __init__(self, config: TransferConfig) -> None:
        self.lr, self.bad = config.lr, 0

    def refuses(self, loss: float, step: int, keys: list[str]) -> bool:
        if math.isfinite(loss):
            self.bad = 0
            return False
        self.bad += 1
        if self.bad >= NONFINITE:
            raise TrainingError(
                f"the loss was not finite {self.bad} times in a row, at step {step} with the pictures "
                f"{', '.join(keys)}. Lower lr={self.lr} or set clip=1.0."
            )
        return True


class _Log:
    """Lines of `metrics.jsonl` in a folder, or nothing at all."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.begun = folder, time.monotonic()

    def __enter__(self) -> "_Log":
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self.folder / "metrics.jsonl", "w") if self.folder is not None else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def __call__(self, step: int, **values: Any) -> None:
        if self.file is not None:
            seconds = round(time.monotonic() - self.begun, 3)
            self.file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
            self.file.flush()
