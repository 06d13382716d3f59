"""Object detection: fine-tune an encoder as Mask, Faster or Cascade R-CNN, score by COCO's AP. In Python:

    model = fit("runs/mine", "coco:coco2017", DetectConfig(steps=1000))
    found = model.predict(images)                             # a list of dicts: boxes, labels, scores, masks
    result = score(model, "coco:coco2017", split="val")

`detect` does it all in one call.
"""

import time
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from cutline.errors import DataError
from cutline.record import Result, fingerprint
from cutline.train.device import device_of
from cutline.transfer.average_precision import AveragePrecision, coco_library
from cutline.transfer.batches import Cut
from cutline.transfer.data import DenseData, open_data
from cutline.transfer.detector import Detector
from cutline.transfer.jitter import ObjectBatch, ObjectBatches
from cutline.transfer.loop import train
from cutline.transfer.options import SplitName, TransferConfig, default_channels, rising, seeded
from cutline.transfer.prepared import Prepared, encoder_of, mean_colour, readable_sizes
from cutline.transfer.run import run
from cutline.transfer.scoring import grouped, protocol, read_along, scored_part, shown

LARGEST = 1024  # long side when not given: ViTDet's
SMALLEST = 102  # pixels of a side below which default jitter makes no picture: ViTDet's tenth of 1024
WARMUP = 250  # steps at most when not given: ViTDet's
MULTIPLE = 32


class DetectConfig(TransferConfig):
    """Options of detection; what is left open suits the size of the pictures.

    head: "rcnn" (Mask R-CNN, or Faster R-CNN without masks) or "cascade". masks: predict them, default where the data
    have them. size: the long side of pictures in test and the side of the training canvas, default that of the largest
    training picture, at most 1024. scale: large-scale jitter, how large a picture lies on its canvas; default from 0.1
    (or as little as leaves 102 pixels) to 2. channels: of pyramid and heads, by the encoder's width, 256 for ViT-B;
    hidden: of the box head's fully connected layer, four times as many. anchors: their size in strides, 8 at 1024
    pixels and less for smaller pictures, but at least 2. rois: proposals of a picture that the heads learn from, half
    the size, from 64 to 512; test looks at four times as many, at most 1,000. window: cells a side of window attention, 14 in ViTDet, for plain ViTs at large sizes.
    relative: ViTDet's relative positions, too (see `windows`).
    min_score, detections: predictions kept. The steps between 8/9 and 26/27 of all learn at a tenth, the last at a
    hundredth ("drops").

    ViTDet's settings (2203.16527) are recipes/transfer/coco-*.yaml.
    """

    head: Literal["rcnn", "cascade"] = "rcnn"
    masks: bool | None = None
    batch: int = Field(8, ge=1)
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    layer_decay: float = Field(0.7, gt=0, le=1)
    schedule: Literal["poly", "cosine", "constant", "drops"] = "drops"
    size: int | None = Field(None, ge=32)
    scale: tuple[float, float] | None = None
    channels: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=1)
    anchors: float | None = Field(None, gt=0)
    rois: int | None = Field(None, ge=1)
    window: int | None = Field(None, ge=2)
    relative: bool = False
    min_score: float = Field(0.05, ge=0, lt=1)
    detections: int = Field(100, ge=1)

    @model_validator(mode="after")
    def _learns(self) -> "DetectConfig":
        if self.relative and self.frozen:
            raise ValueError("relative positions are learnt inside the encoder: leave relative or frozen out")
        return self

    @field_validator("scale")
    @classmethod
    def _rising(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        return value and rising(value)


class PreparedDetect(Prepared[DetectConfig]):
    """`Prepared` with the size of pictures, the heads and masks or not chosen as well."""

    def __init__(self, config: DetectConfig, data: DenseData, width: int) -> None:
        super().__init__(config, data)
        if config.masks and not data.notes["masks"]:
            raise DataError(f"masks=true, and {data.spec} has no masks of its objects. Leave masks out.")
        if not any(len(sample.target) for sample in self.split.samples()):
            raise DataError(f"{data.spec}: none of the {len(self.rows)} training pictures has an object.")
        size = config.size or min(LARGEST, -(-max(map(max, readable_sizes(self.split))) // MULTIPLE) * MULTIPLE)
        channels = config.channels or min(256, default_channels(width))
        self.warmup = min(WARMUP, self.steps // 20) if config.warmup is None else config.warmup
        self.config = self.config.model_copy(
            update={
                "warmup": self.warmup,
                "masks": data.notes["masks"] if config.masks is None else config.masks,
                "size": size,
                "scale": config.scale or (min(1.0, max(0.1, SMALLEST / size)), 2.0),
                "channels": channels,
                "hidden": config.hidden or 4 * channels,
                "anchors": config.anchors or min(8.0, max(2.0, 8 * size / LARGEST)),
                "rois": config.rois or min(512, max(64, size // 2)),
            }
        )


def fit(
    encoder: Any, data: str | DenseData, config: DetectConfig, out: Path | None = None, resume: bool = False
) -> Detector:
    """Train a detector on a copy of `encoder` (an `Encoder`, or what `load_encoder` takes).

    The model's `config` has every open choice filled in. resume: go on from the last checkpoint in `out`, if there is one.
    """
    start, opened = encoder_of(encoder, config), open_data(data, "detect")
    prepared = PreparedDetect(config, opened, max(start.channels))
    config, device = prepared.config, device_of(config.device)
    assert config.size is not None
    assert config.scale is not None
    with seeded(config):
        model = Detector(start, config, opened.classes, bool(config.masks)).to(device)
        cut = Cut((config.size, config.size), config.scale, config.flip, None, mean_colour(start.mean), 0)
        batches = ObjectBatches(prepared.split, prepared.rows, config.batch, config.seed, cut)

        def loss(batch: ObjectBatch) -> Tensor:
            pictures = list(batch.images.to(device, non_blocking=True).float() / 255)
            kept = [{k: v.to(device) for k, v in t.items() if k != "masks" or model.masks} for t in batch.targets]
            total: Tensor = sum(model(pictures, kept).values())
            return total

        train(model, prepared, cast(Any, batches.iterate), loss, out, resume)
    model.labels, model.skipped = prepared.split.counts()
    return model


def score(model: Detector, data: str | DenseData, split: SplitName | None = None) -> Result:
    """COCO's AP, shares of 1, on `split` or the config's own; see `average_precision`."""
    begun = time.monotonic()
    config = model.config.model_copy(update={"split": split or model.config.split})
    opened = open_data(data, "detect")
    if opened.classes != model.classes:
        raise DataError(f"{opened.spec} has other classes than the model was trained on ({', '.join(model.classes)}).")
    part = scored_part(config, opened)
    scores = AveragePrecision(model.classes, model.masks and opened.notes["masks"])
    for samples in grouped(read_along(part), config.batch):
        for sample, found in zip(samples, model.predict([s.image for s in samples]), strict=True):
            scores.update(sample.target, found)
    scores.join()
    return Result(
        metrics=scores.scores(),
        per_class=scores.by_class(),
        protocol=protocol("detect", config, opened, model, *part.counts(), classes=fingerprint(model.classes)),
        seconds=time.monotonic() - begun,
    )


def detect(
    encoder: Any, data: str | DenseData, config: DetectConfig, out: Path | None = None, resume: bool = False
) -> Result:
    """`fit`, then `score`, on all processes of torchrun; with `out`, write there result.json, the model, metrics.jsonl and a
    grid of predictions. resume: go on from the last checkpoint there."""
    coco_library()  # told before training, not after
    opened = open_data(data, "detect")

    def draw(model: Detector, path: Path) -> None:
        from cutline.transfer.draw import object_grid

        samples = shown(model.config, opened)
        object_grid(path, samples, model.predict([s.image for s in samples]), model.classes)

    return run(fit, score, draw, encoder, opened, config, out, resume)
