"""Monocular depth in metres: fine-tune an encoder with the MIM deconvolution head, DPT, or a linear probe. In Python:

    model = fit("runs/mine", "folder:rooms", DepthConfig(max_depth=5))
    metres = model.predict(images)                            # a list of (H, W) float32
    result = score(model, "folder:rooms", split="test")

`depth` does it all in one call.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from cutline.errors import ConfigError, DataError
from cutline.objectives.gather import together
from cutline.record import Result
from cutline.transfer import heads, pyramid
from cutline.transfer.augment import CutDepth
from cutline.transfer.data import DenseData, open_data
from cutline.transfer.finetune import finetune
from cutline.transfer.metrics import DepthErrors
from cutline.transfer.model import Dense, by_shape
from cutline.transfer.options import DenseConfig, SplitName, default_channels, idle, look, seeded
from cutline.transfer.prepared import PreparedDense, encoder_of
from cutline.transfer.run import run
from cutline.transfer.scoring import protocol, read_along, scored_part, shown

# From a median that is no number of metres to a likely one: millimetres, KITTI's PNG, kilometres.
FACTORS = {"0.001": 0.001, "1/256": 1 / 256, "1000": 1000.0}
OF_HEADS = {
    "deconv": ("channels", "deconvolutions", "filters"),
    "dpt": ("channels", "class_token"),
    "linear": ("bins", "class_token", "layers", "upsample"),
}
SCALES, EPSILON = (1, 2, 4, 6), 1e-3  # of `gradient_loss`


class MetresConfig(DenseConfig):
    """What every model of depth is told, beside the options of dense tasks.

    max_depth, min_depth: metres; readings outside do not count in training or test, and predictions are kept inside;
    max_depth by default the data's (12 for scenes), else 10. eval_crop: part of the picture that counts: "eigen"
    (NYUv2, 480x640) or "garg" (KITTI). variance: λ of the loss. gradient: weight of `gradient_loss` beside it.
    cutdepth: share of the training pictures a strip of whose depth is pasted in (`CutDepth`).
    """

    max_depth: float | None = Field(None, gt=0)
    min_depth: float = Field(1e-3, gt=0)
    eval_crop: Literal["none", "eigen", "garg"] = "none"
    variance: float = Field(0.5, ge=0, le=1)
    gradient: float = Field(0.0, ge=0)
    cutdepth: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.min_depth >= self.top:
            raise ValueError(f"min_depth {self.min_depth} must be below max_depth {self.top}")
        return self

    @property
    def top(self) -> float:
        """max_depth as a number: NYUv2's 10 m if nothing else is known."""
        return self.max_depth or 10.0


class DepthConfig(MetresConfig):
    """Options of depth; the defaults suit a data set of hundreds of pictures.

    channels: width of the head, default by the encoder's width. deconvolutions, filters: of the deconv head. bins, layers,
    upsample: of the linear head; layers 1 or 4, the encoder's last map or four ("lin. 1" and "lin. 4" of DINOv2), upsample
    4 there. class_token: laid beside every cell that the linear head reads, or read by DPT's "project".

    The papers' settings are recipes/transfer/{nyuv2,kitti}-*.yaml.
    """

    head: Literal["deconv", "dpt", "linear"] = "deconv"
    layer_decay: float = Field(0.9, gt=0, le=1)
    channels: int | None = Field(None, ge=1)
    deconvolutions: int = Field(3, ge=0, le=5)
    filters: int = Field(32, ge=1)
    bins: int = Field(256, ge=2)
    layers: Literal[1, 4] = 1
    upsample: int = Field(1, ge=1, le=8)
    class_token: bool = False

    @model_validator(mode="after")
    def _used(self) -> "DepthConfig":
        others = sorted({n for names in OF_HEADS.values() for n in names} - {*OF_HEADS[self.head]})
        idle(self, f"head={self.head} has no such option", *others)
        return self


class DepthModel(Dense):
    """Depth (B, 1, H, W) in metres of normalised pictures (B, 3, H, W): an encoder, a pyramid and a head that gives metres.

    notes: what a score's protocol says of the model beside its config.
    """

    def __init__(self, encoder: Any, levels: pyramid.Pyramid, head: torch.nn.Module, config: MetresConfig) -> None:
        super().__init__(encoder, levels, head, config.frozen)
        self.config = config
        self.notes: dict[str, Any] = {}

    def predict(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Metres (H, W) of each uint8 (H, W, 3) picture, looked at as the config says."""
        self.eval()
        view, found = look(self.config), []
        for batch, _ in by_shape(((i, None) for i in images), self.config.batch):
            found += list(self.clamp(view(self, batch))[:, 0].cpu().numpy())
        return found

    def clamp(self, depth: Tensor) -> Tensor:
        return depth.clamp(self.config.min_depth, self.config.top)


class DepthEstimator(DepthModel):
    """A model of depth with the head that its config names."""

    def __init__(self, encoder: Any, config: DepthConfig) -> None:
        strides, widths = encoder.strides, encoder.channels
        channels = config.channels or default_channels(widths[-1])
        if config.class_token and not encoder.class_token:
            raise ConfigError(f"class_token=true, and {encoder.name} has no class token. Leave class_token out.")
        levels: pyramid.Pyramid = pyramid.LastMap(strides, widths, config.layers, config.class_token)
        head: torch.nn.Module
        if config.head == "linear":
            head = heads.BinsHead(sum(levels.channels), config.bins, config.min_depth, config.top, config.upsample)
        elif config.head == "dpt":
            levels = pyramid.Reassemble(encoder.patch, strides, widths, config.class_token)
            head = heads.DPTHead(levels.channels, channels, config.top)
        else:
            head = heads.DeconvHead(
                widths[-1], channels, config.filters, config.deconvolutions, strides[-1], config.top
            )
        super().__init__(encoder, levels, head, config)


def silog(predicted: Tensor, truth: Tensor, valid: Tensor, variance: float = 0.5) -> Tensor:
    """sqrt(mean d² - variance · (mean d)²), d = log predicted - log truth over valid pixels (1406.2283); 0 if none."""
    if not valid.any():
        return predicted.sum() * 0
    d = predicted[valid].log() - truth[valid].log()
    # The floor keeps the root's gradient finite at a perfect fit.
    return (d.square().mean() - variance * d.mean().square()).clamp_min(1e-12).sqrt()


def gradient_loss(predicted: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Σ_s (Σ |d[i + 2, j] - d[i, j]| + Σ |d[i, j + 2] - d[i, j]|) / N_s of depth maps (B, H, W), valid (B, H, W) bool.

    d = log(predicted + 1e-3) - log(truth + 1e-3) at every s-th pixel, s = 1, 2, 4, 6; differences of two valid pixels
    count, and N_s are the valid pixels. MegaDepth's (1804.00607) as DINOv2 and DINOv3 have it. DINOv3's code takes
    differences along rows and columns, as here; DINOv2's (losses/gradientloss.py) along pictures and channels, which is 0
    for batches of two.
    """
    d = (predicted + EPSILON).log() - (truth + EPSILON).log()
    total = predicted.new_zeros(())
    for s in SCALES:
        part, kept = d[:, ::s, ::s], valid[:, ::s, ::s]
        rows = (part[:, 2:] - part[:, :-2]).abs() * (kept[:, 2:] & kept[:, :-2])
        columns = (part[:, :, 2:] - part[:, :, :-2]).abs() * (kept[:, :, 2:] & kept[:, :, :-2])
        total = total + (rows.sum() + columns.sum()) / kept.sum().clamp_min(1)
    return total


def fit(
    encoder: Any,
    data: str | DenseData,
    config: MetresConfig,
    out: Path | None = None,
    resume: bool = False,
    build: Callable[[Any, Any], DepthModel] = DepthEstimator,
) -> DepthModel:
    """Train a model of depth on a copy of `encoder` (an `Encoder`, or what `load_encoder` takes).

    The model's `config` has every open choice filled in. resume: go on from the last checkpoint in `out`, if there is one.
    build: makes the model of the encoder and the config.
    """
    start, opened = encoder_of(encoder, config), open_data(data, "depth")
    config = config.model_copy(update={"max_depth": config.max_depth or opened.max_depth or config.top})
    prepared = PreparedDense(config, opened, max(start.channels))
    check_readings(prepared, opened.spec)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        valid, metres = (target > config.min_depth) & (target <= config.top), output[:, 0].clamp_min(1e-6)
        value = silog(metres, target, valid, config.variance)
        return value + config.gradient * gradient_loss(metres, target, valid) if config.gradient else value

    with seeded(config):
        model = build(start, prepared.config)
        paste = CutDepth(config.cutdepth, config.top) if config.cutdepth else None
        finetune(model, prepared, prepared.batches(start.mean, 0, paste), loss, out, resume)
    model.labels, model.skipped = prepared.split.counts()
    return model


def check_readings(prepared: PreparedDense[Any], spec: str) -> None:
    """Raise `DataError` if none of the first training pictures has a reading in the range of the config.

    A median so far from metres that the unit is likely wrong is told on stderr.
    """
    readings = np.concatenate([s.target[s.target > 0] for s in islice(prepared.split.samples(), 16)])
    low, high, median = prepared.config.min_depth, prepared.config.top, float(np.median(readings))
    hint = f"The median is {median:.4g} m."
    likely = [name for name, f in FACTORS.items() if 0.3 <= median * f <= 50]
    if likely and not 0.1 <= median <= 100:
        would = ", ".join(f"by {name} it would be {median * FACTORS[name]:.3g} m" for name in likely)
        hint += f" With the scale multiplied {would}."
    if not ((readings > low) & (readings <= high)).any():
        raise DataError(f"{spec} has no reading between {low} and {high} m. {hint} Set max_depth or the data's scale.")
    if not 0.1 <= median <= 100:
        print(f"{spec}: are these metres? {hint}", file=sys.stderr)


def counted(truth: Tensor, config: MetresConfig) -> Tensor:
    """Pixels (H, W) that count: with a reading between min_depth and max_depth, inside the crop."""
    valid = (truth > config.min_depth) & (truth <= config.top)
    if config.eval_crop == "none":
        return valid
    h, w = truth.shape
    if config.eval_crop == "eigen":
        if (h, w) != (480, 640):
            raise DataError(f"eval_crop=eigen is for NYUv2's 480x640 pictures, and these are {h}x{w}. Use none.")
        box = (45, 471, 41, 601)
    else:
        box = (int(0.40810811 * h), int(0.99189189 * h), int(0.03594771 * w), int(0.96405229 * w))
    inside = torch.zeros_like(valid)
    inside[box[0] : box[1], box[2] : box[3]] = True
    return valid & inside


def score(model: DepthModel, data: str | DenseData, split: SplitName | None = None) -> Result:
    """The errors of `metrics.depth_errors` on `split` or the config's own: each picture's, then their mean."""
    begun = time.monotonic()
    config = model.config.model_copy(update={"split": split or model.config.split})
    opened = open_data(data, "depth")
    part = scored_part(config, opened)
    device, view, errors = next(model.parameters()).device, look(config), DepthErrors()
    model.eval()
    with together():
        for images, targets in by_shape(((s.image, s.target) for s in read_along(part)), config.batch):
            for predicted, target in zip(model.clamp(view(model, images))[:, 0], targets, strict=True):
                truth = torch.from_numpy(target).to(device)
                errors.update(predicted, truth, counted(truth, config))
    errors.join()
    if not errors.pictures:
        raise DataError(
            f"no picture of {opened.spec} has a reading between {config.min_depth} and {config.top} m: "
            "set max_depth, or the data's scale."
        )
    settings = {"average": "pictures", "alignment": "none", **model.notes}
    return Result(
        metrics=errors.scores(),
        protocol=protocol("depth", config, opened, model, errors.pictures, part.counts()[1], **settings),
        seconds=time.monotonic() - begun,
    )


def depth(
    encoder: Any,
    data: str | DenseData,
    config: MetresConfig,
    out: Path | None = None,
    resume: bool = False,
    build: Callable[[Any, Any], DepthModel] = DepthEstimator,
) -> Result:
    """`fit`, then `score`, on all processes of torchrun; with `out`, write there result.json, the model, metrics.jsonl and a
    grid of predictions. resume: go on from the last checkpoint there."""
    opened = open_data(data, "depth")

    return run(partial(fit, build=build), score, partial(draw, data=opened), encoder, opened, config, out, resume)


def draw(model: DepthModel, path: Path, data: DenseData) -> None:
    """Write a grid of predictions, and of what is true there, of a few pictures of the config's split."""
    from cutline.transfer.draw import depth_grid

    samples = shown(model.config, data)
    depth_grid(path, samples, model.predict([s.image for s in samples]), model.config.top)
