"""Semantic segmentation: fine-tune an encoder with UPerNet, Semantic FPN or a linear head, score by mIoU. In Python:

    model = fit("runs/mine", "folder:pictures", SegmentConfig(labels=200))
    masks = model.predict(images)                             # a list of (H, W) class ids
    result = score(model, "folder:pictures", split="test")

`segment` does it all in one call.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from cutline.errors import DataError
from cutline.record import Result, fingerprint
from cutline.transfer import heads, pyramid
from cutline.transfer.data import DenseData, open_data
from cutline.transfer.finetune import finetune
from cutline.transfer.metrics import IGNORE, Confusion
from cutline.transfer.model import Dense, Look, by_shape
from cutline.transfer.options import PyramidConfig, SplitName, default_channels, idle, look, seeded
from cutline.transfer.prepared import PreparedDense, encoder_of
from cutline.transfer.run import run
from cutline.transfer.scoring import protocol, read_along, scored_part, shown


class SegmentConfig(PyramidConfig):
    """Options of segmentation; the defaults suit a data set of hundreds of pictures.

    aux: weight of the loss of an auxiliary FCN head beside UPerNet (0.4 in mmsegmentation's recipes). test_scales: look
    at every picture at each of these scales of its (or of `short`'s) size; with them, or with test_flip, the class
    probabilities of all looks are averaged, as mmsegmentation does ([0.5, 0.75, 1, 1.25, 1.5, 1.75] and flip there).

    The papers' settings are recipes/transfer/ade20k-*.yaml.
    """

    head: Literal["upernet", "fpn", "linear"] = "upernet"
    scale: tuple[float, float] = (0.5, 2.0)
    aux: float = Field(0.0, ge=0)
    test_scales: tuple[float, ...] = Field((1.0,), min_length=1)

    @field_validator("test_scales")
    @classmethod
    def _enlargements(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) <= 0:
            raise ValueError("factors above 0, such as [0.5,1,1.5]")
        return value

    @model_validator(mode="after")
    def _used(self) -> "SegmentConfig":
        if self.head != "upernet":
            idle(self, f"head={self.head} has no auxiliary head, which is upernet's", "aux")
        if self.head == "linear":
            idle(self, "head=linear reads the last map alone", "pyramid", "channels", "pyramid_channels")
        return self


class Segmenter(Dense):
    """Logits (B, classes, H, W) of normalised pictures (B, 3, H, W)."""

    def __init__(self, encoder: Any, config: SegmentConfig, classes: Sequence[str]) -> None:
        widths = encoder.channels
        levels: pyramid.Pyramid
        head: torch.nn.Module
        if config.head == "linear":
            levels = pyramid.LastMap(encoder.strides, widths)
            head = heads.LinearHead(widths[-1], len(classes))
        else:
            channels = config.channels or default_channels(max(widths))
            between = config.pyramid_channels or min(256, channels)
            levels = pyramid.build(config.pyramid, encoder.patch, encoder.strides, widths, between)
            kind = heads.UPerHead if config.head == "upernet" else heads.FPNHead
            head = kind(levels.channels, channels, len(classes))
        super().__init__(encoder, levels, head, config.frozen)
        if config.aux:
            self.auxiliary = heads.FCNHead(levels.channels, len(classes)).to(memory_format=torch.channels_last)
            self.auxiliary_weight = config.aux
        self.config, self.classes = config, list(classes)

    def look(self) -> Look:
        """How the config says pictures are looked at in test."""
        return look(self.config, self.config.test_scales, probabilities=True)

    def predict(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[NDArray[np.int64]]:
        """Class ids (H, W) of each uint8 (H, W, 3) picture, looked at as the config says."""
        self.eval()
        view, found = self.look(), []
        for batch, _ in by_shape(((i, None) for i in images), self.config.batch):
            found += list(view(self, batch).argmax(1).cpu().numpy())
        return found


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over labelled pixels; 0 if there are none. logits (B, C, H, W), target (B, H, W) with `IGNORE`."""
    rows = logits.permute(0, 2, 3, 1).flatten(0, 2)  # classes last, as they lie in memory: faster than over dimension 1
    total = F.cross_entropy(rows, target.long().flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp_min(1)


def fit(
    encoder: Any, data: str | DenseData, config: SegmentConfig, out: Path | None = None, resume: bool = False
) -> Segmenter:
    """Train a segmenter on a copy of `encoder` (an `Encoder`, or what `load_encoder` takes).

    The model's `config` has every open choice filled in. resume: go on from the last checkpoint in `out`, if there is one.
    """
    start, opened = encoder_of(encoder, config), open_data(data, "segment")
    prepared = PreparedDense(config, opened, max(start.channels))
    with seeded(config):
        model = Segmenter(start, prepared.config, opened.classes)
        finetune(model, prepared, prepared.batches(start.mean, IGNORE), cross_entropy, out, resume)
    model.labels, model.skipped = prepared.split.counts()
    return model


def score(model: Segmenter, data: str | DenseData, split: SplitName | None = None) -> Result:
    """miou, macc and accuracy (of pixels), and iou by class, all shares of 1, on `split` or the config's own."""
    begun = time.monotonic()
    config = model.config.model_copy(update={"split": split or model.config.split})
    opened = open_data(data, "segment")
    if opened.classes != model.classes:
        raise DataError(f"{opened.spec} has other classes than the model was trained on ({', '.join(model.classes)}).")
    part = scored_part(config, opened)
    device, view, confusion = next(model.parameters()).device, model.look(), Confusion(len(model.classes))
    model.eval()
    for images, targets in by_shape(((s.image, s.target) for s in read_along(part)), config.batch):
        predicted = view(model, images).argmax(1)
        confusion.update(predicted, torch.from_numpy(np.stack(targets)).to(device))
    confusion.join()
    iou = dict(zip(model.classes, confusion.iou().tolist(), strict=True))
    return Result(
        metrics=confusion.scores(),
        per_class={"iou": {name: value for name, value in iou.items() if value == value}},  # absent classes are NaN
        protocol=protocol("segment", config, opened, model, *part.counts(), classes=fingerprint(model.classes)),
        seconds=time.monotonic() - begun,
    )


def segment(
    encoder: Any, data: str | DenseData, config: SegmentConfig, out: Path | None = None, resume: bool = False
) -> Result:
    """`fit`, then `score`, on all processes of torchrun; with `out`, write there result.json, the model, metrics.jsonl and a
    grid of predictions. resume: go on from the last checkpoint there."""
    opened = open_data(data, "segment")

    def draw(model: Segmenter, path: Path) -> None:
        from cutline.transfer.draw import class_grid

        samples = shown(model.config, opened)
        class_grid(path, samples, model.predict([s.image for s in samples]), model.classes)

    return run(fit, score, draw, encoder, opened, config, out, resume)
