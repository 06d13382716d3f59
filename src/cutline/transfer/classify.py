"""Image classification: fine-tune an encoder, probe it frozen (linear, cosine, attentive), or ask its neighbours. In Python:

    model = fit("runs/mine", "imagefolder:pictures", ClassifyConfig(frozen=True))
    names = model.predict([picture])                          # uint8 (H, W, 3) → ["tabby cat"]
    result = score(model, "imagefolder:pictures", split="test")

`classify` does it all in one call.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from cutline.errors import ConfigError, DataError
from cutline.record import Result, fingerprint
from cutline.train.device import device_of
from cutline.transfer.batches import stack_images
from cutline.transfer.data import DenseData, Sample, Split, open_data
from cutline.transfer.finetune import finetune, still_features
from cutline.transfer.metrics import Hits
from cutline.transfer.model import Headed
from cutline.transfer.options import SplitName, TransferConfig, autocast, idle, seeded
from cutline.transfer.prepared import Prepared, encoder_of
from cutline.transfer.probes import AttentiveProbe, CosineProbe, LinearProbe, NeighbourProbe
from cutline.transfer.run import run
from cutline.transfer.scoring import grouped, protocol, read_along, scored_part, shown
from cutline.transfer.views import WHOLE, Square, Views, stack_views

CUT = (0.35, 1.0)  # share of the area that a random crop keeps, when fine-tuning and not given
LR, LR_FROZEN = 6e-4, 3e-3
SHOWN = 12  # pictures in samples.png
TRAINING = (
    "steps", "lr", "weight_decay", "layer_decay", "drop_path", "warmup", "schedule", "power", "clip", "ema", "flip", "scale",
    "operations", "magnitude", "erase", "smoothing", "grad_checkpointing", "save_every",
)  # fmt: skip
VOTING = ("k", "temperature")


class ClassifyConfig(TransferConfig):
    """Options of classification, beside those of all tasks; the defaults suit a data set of thousands of pictures.

    head: "linear" on the pooled feature, "cosine" on its direction, "attentive" on the dense map, with frozen=true or
    fine-tuning the whole encoder; or "knn", which trains nothing (`probes`). size: side of the pictures, default the encoder's own; short:
    short side before the central cut in test, default `size`. scale: range of the area that random crops keep in
    training, default [0.35, 1], and [1, 1] (the test view, mirrored or not) when frozen, whose features are then
    computed once. lr: default 6e-4, and 3e-3 when frozen. operations, magnitude: of RandAugment. erase: share of the
    training views a part of which is noise. smoothing: of labels. k, temperature: of knn.

    The papers' settings (FT-CLIP, MAE's linear probe, DINO's k-NN) are recipes/transfer/imagenet-*.yaml.
    """

    head: Literal["linear", "cosine", "attentive", "knn"] = "linear"
    batch: int = Field(64, ge=2)
    layer_decay: float = Field(0.6, gt=0, le=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    schedule: Literal["poly", "cosine", "constant", "drops"] = "cosine"
    size: int | None = Field(None, ge=16)
    short: int | None = Field(None, ge=16)
    scale: tuple[float, float] | None = None
    operations: int = Field(0, ge=0)
    magnitude: int = Field(9, ge=0, le=30)
    erase: float = Field(0.0, ge=0, le=1)
    smoothing: float = Field(0.1, ge=0, lt=1)
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)

    @field_validator("scale")
    @classmethod
    def _rising(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1] <= 1:
            raise ValueError("a range of shares of the area, from small to large, at most 1")
        return value

    @model_validator(mode="after")
    def _used(self) -> "ClassifyConfig":
        if self.head == "knn":
            idle(self, "head=knn trains nothing", *TRAINING)
        else:
            idle(self, f"head={self.head} has no neighbours", *VOTING)
        if not self.operations:
            idle(self, "without operations there is no RandAugment", "magnitude")
        return self

    @property
    def peak(self) -> float | None:
        if self.head == "knn":
            return None
        return self.lr or (LR_FROZEN if self.frozen else LR)


class Classifier(Headed):
    """Logits (B, K) of normalised test or training views (B, 3, size, size); for knn the logs of the votes.

    The config has its size filled in. pictures: training pictures that knn keeps.
    """

    def __init__(self, encoder: Any, config: ClassifyConfig, classes: Sequence[str], pictures: int = 0) -> None:
        head: nn.Module
        if config.head == "attentive":
            head = AttentiveProbe(encoder.channels[-1], len(classes))
        elif config.head == "linear":
            head = LinearProbe(encoder.width, len(classes), scaled=config.frozen)
        elif config.head == "cosine":
            head = CosineProbe(encoder.width, len(classes))
        else:
            head = NeighbourProbe(encoder.width, len(classes), pictures, config.k, config.temperature)
        super().__init__(encoder, config.frozen)
        self.head = head
        self.config, self.classes = config, list(classes)
        assert config.size is not None
        assert config.short is not None
        self.square = Square(config.size, config.short)
        self.train()

    def features(self, images: Tensor) -> list[Tensor]:
        """The pooled feature (B, D), or for the attentive head the dense map (B, C, h, w)."""
        read = self.encoder.last if self.config.head == "attentive" else self.encoder.pooled
        with torch.no_grad() if self.frozen else nullcontext():
            return [read(images)]

    def decode(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        out: Tensor = self.head(maps)
        return out.float()

    @torch.inference_mode()
    def logits(self, views: Tensor) -> Tensor:
        """Test views (B, 3, size, size) uint8 on any device to (B, K) on the model's; it must be in eval mode."""
        x = self.normalise(views.to(next(self.parameters()).device, non_blocking=True))
        with autocast(self.config)():
            out: Tensor = self(x)
        return out

    def probabilities(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, K) for uint8 (H, W, 3) pictures of any sizes; for knn the shares of the votes."""
        self.eval()
        parts = [images[i : i + self.config.batch] for i in range(0, len(images), self.config.batch)]
        found = [self.logits(stack_views(part, self.square)).softmax(1).cpu() for part in parts]
        shares: NDArray[np.float32] = (
            torch.cat(found).numpy() if found else np.zeros((0, len(self.classes)), np.float32)
        )
        return shares

    def predict(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[str]:
        """The class name of each uint8 (H, W, 3) picture (its id as text where the data name none)."""
        return [self.classes[i] for i in self.probabilities(images).argmax(1)]


def fit(
    encoder: Any, data: str | DenseData, config: ClassifyConfig, out: Path | None = None, resume: bool = False
) -> Classifier:
    """Train a classifier on a copy of `encoder` (an `Encoder`, or what `load_encoder` takes).

    The model's `config` has every open choice filled in. resume: go on from the last checkpoint in `out`, if there is one.
    """
    start, opened = encoder_of(encoder, config), open_data(data, "classify")
    config = _filled(config, start.size)
    prepared = Prepared(config, opened)
    # The neighbours' config keeps its open steps: nothing is trained, and nothing of it is in the protocol.
    config = config if config.head == "knn" else prepared.config
    with seeded(config):
        model = Classifier(start, config, opened.classes, len(prepared.rows))
        scale = config.scale or WHOLE
        views = Views(
            prepared.split, prepared.rows, config.batch, config.seed, model.square, scale, config.flip,
            config.operations, config.magnitude, config.erase, (start.mean, start.std),
        )  # fmt: skip
        views.check = partial(_check_skipped, prepared.split, opened)
        if config.head == "knn":
            _remember(model, views)
        else:
            finetune(model, prepared, views, _loss(config.smoothing), out, resume)
    model.labels, model.skipped = prepared.split.counts()
    return model


def _filled(config: ClassifyConfig, size: int) -> ClassifyConfig:
    """The config with its views chosen; raises `ConfigError` where they cannot be cut."""
    size = config.size or size
    short = config.short or size
    if short < size:
        raise ConfigError(f"short={short} is less than size={size}: there would be nothing to cut from. Raise short.")
    known: dict[str, Any] = {"size": size, "short": short, "frozen": config.frozen or config.head == "knn"}
    if config.head != "knn":
        known["scale"] = config.scale or (WHOLE if config.frozen else CUT)
        known["lr"] = config.peak
    return config.model_copy(update=known)


def _check_skipped(split: Split, data: DenseData) -> None:
    """`Split.check_skipped`; and raise `DataError` once a class has lost all its training pictures."""
    split.check_skipped()
    labels = split.labels
    assert labels is not None
    of_class = [
        np.bincount(part[part >= 0], minlength=len(data.classes))
        for part in (labels, labels[list(split.skipped.copy())])
    ]
    lost = np.flatnonzero((of_class[0] > 0) & (of_class[0] == of_class[1]))
    if len(lost):
        names = ", ".join(repr(data.classes[i]) for i in lost[:5])
        raise DataError(
            f"{data.spec}: of the {len(split)} training pictures none that can be read is of {names}. "
            "Put the broken ones right, or raise labels."
        )


def _loss(smoothing: float) -> Any:
    return lambda logits, target: F.cross_entropy(logits, target, label_smoothing=smoothing)


def _remember(model: Classifier, views: Views) -> None:
    """Fill the neighbours' bank with the features of the training pictures."""
    config = model.config
    model.to(device_of(config.device)).eval()
    features = still_features(model, views, config, mirrored=False, limit=float("inf"))
    labels, head = views.split.labels, model.head
    assert features is not None
    assert labels is not None
    assert isinstance(head, NeighbourProbe)
    known = [row for row in views.rows if row not in views.split.skipped]
    head.fill(features[0][0][known], torch.from_numpy(labels[known]))


def score(model: Classifier, data: str | DenseData, split: SplitName | None = None) -> Result:
    """top1, top5 and mean_class (see `metrics.Hits`), and accuracy by class, on `split` or the config's own."""
    begun = time.monotonic()
    config = model.config.model_copy(update={"split": split or model.config.split})
    opened = open_data(data, "classify")
    if opened.classes != model.classes:
        raise DataError(f"{opened.spec} has other classes than the model was trained on ({', '.join(model.classes)}).")
    part = scored_part(config, opened)
    device, hits = next(model.parameters()).device, Hits(len(model.classes))
    model.eval()

    def view(sample: Sample) -> Sample:
        return replace(sample, image=model.square(sample.image))

    for samples in grouped(read_along(part, view), config.batch):
        truth = torch.tensor([int(s.target) for s in samples], device=device)
        hits.update(model.logits(stack_images([s.image for s in samples])), truth)
    hits.join()
    accuracy = dict(zip(model.classes, hits.accuracy().tolist(), strict=True))
    return Result(
        metrics=hits.scores(),
        per_class={"accuracy": {name: value for name, value in accuracy.items() if value == value}},  # NaN: none there
        protocol=protocol("classify", config, opened, model, *part.counts(), classes=fingerprint(model.classes)),
        seconds=time.monotonic() - begun,
    )


def classify(
    encoder: Any, data: str | DenseData, config: ClassifyConfig, out: Path | None = None, resume: bool = False
) -> Result:
    """`fit`, then `score`, on all processes of torchrun; with `out`, write there result.json, the model, metrics.jsonl and a
    grid of predictions. resume: go on from the last checkpoint there."""
    opened = open_data(data, "classify")

    def draw(model: Classifier, path: Path) -> None:
        from cutline.transfer.draw import name_grid

        samples = shown(model.config, opened, SHOWN)
        shares = model.probabilities([s.image for s in samples])
        guesses = [model.classes[i] for i in shares.argmax(1)]
        name_grid(
            path,
            [s.image for s in samples],
            [model.classes[int(s.target)] for s in samples],
            guesses,
            shares.max(1).tolist(),
        )

    return run(fit, score, draw, encoder, opened, config, out, resume)
