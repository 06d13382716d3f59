"""Segmentation with words, without training: every pixel is of the class whose name its cell is nearest to. In Python:

    words = WordSegmenter(model, class_names("a red apple; grass; sky"), SegmentConfig())
    ids = words.predict([picture])[0]                          # uint8 (H, W, 3) → (H, W)

`segment` scores a data set. How a cell gets its vector is `dense`. The protocol is SCLIP's (2312.01597, section 4.1): the
picture is resized to a short side, cosines of all names are taken in sliding windows, enlarged to pixels, averaged where
windows overlap and resized to the picture; the best name of a class counts. Windows of a picture, and of pictures of one
size, pass the tower in one batch.

Shapes: B pictures, M names, K classes, D joint width.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from cutline import towers
from cutline.config import Config, check
from cutline.errors import ConfigError, DataError
from cutline.objectives.gather import together, world
from cutline.record import Protocol, Result, write_atomic
from cutline.towers.pictures import weights_hash
from cutline.train.device import device_of, process_group
from cutline.transfer.batches import resize_image
from cutline.transfer.data import DenseData, open_data
from cutline.transfer.metrics import Confusion
from cutline.transfer.model import by_shape, starts
from cutline.transfer.options import SplitName
from cutline.transfer.predict import write_classes
from cutline.transfer.scoring import grouped, read_along, scored_part, shown
from cutline.zeroshot.dense import DenseTower, Method
from cutline.zeroshot.encode import read_picture
from cutline.zeroshot.prompts import Names, class_names, described, prompts, several
from cutline.zeroshot.readable import BEHIND, readable
from cutline.zeroshot.refine import pamr
from cutline.zeroshot.texts import open_joint, text_classifier

LONGEST = 8  # times the short side: a picture that is longer is resized to less


class SegmentConfig(Config):
    """method: how cells get their vectors, see `dense`; proxy: the second encoder of method=proxyclip (a run, or a model
    of open_clip or timm). names: "data" (the data set's own, made readable, see `readable`), or a name or synonyms for each
    class in the data's order, in a file or as `a; b, c; d`. prompts: "openai", "simple", "photo", "name", a file or a list.

    short: side to resize to; window, stride: pixels. Defaults follow the tower's own size s: 1.5 s, s and s/2, which is
    SCLIP's 336, 224 and 112 for towers of 224 px. threshold: pixels whose best class has a lower probability (softmax over names
    of cosines times `scale`) are of the class "background" (prob_thd in SCLIP, 0.1 there); area: so are those of classes that
    take less than this share of what is not background (area_thd). refine: "pamr" lets scores follow the picture's edges. split,
    pictures: what is scored, and how many at most; batch: windows in one forward pass.
    """

    method: Method = "sclip"
    proxy: str | None = None
    names: str | list[str] = "data"
    prompts: str | list[str] = "openai"
    short: int | None = Field(None, ge=1)
    window: int | None = Field(None, ge=1)
    stride: int | None = Field(None, ge=1)
    scale: float = Field(40.0, gt=0)
    threshold: float = Field(0.0, ge=0, lt=1)
    area: float = Field(0.0, ge=0, lt=1)
    refine: Literal["none", "pamr"] = "none"
    split: SplitName = "val"
    pictures: int | None = Field(None, ge=1)
    batch: int = Field(16, ge=1)
    device: str = "auto"

    @field_validator("stride")
    @classmethod
    def _no_gaps(cls, value: int | None, info: Any) -> int | None:
        window = info.data.get("window")
        if value is not None and window is not None and value > window:
            raise ValueError(f"at most the window of {window} px, or pixels would be left out")
        return value

    @model_validator(mode="after")
    def _second_encoder(self) -> "SegmentConfig":
        if (self.method == "proxyclip") != (self.proxy is not None):
            raise ValueError("proxy=ENCODER belongs to method=proxyclip: give both, or neither")
        return self

    @model_validator(mode="after")
    def _scaled(self) -> "SegmentConfig":
        if not self.threshold and self.scale != type(self).model_fields["scale"].default:
            raise ValueError(
                "scale is of threshold, and without one the best name wins at every scale: leave scale out"
            )
        return self

    def fitted(self, size: int) -> "SegmentConfig":
        """With short, window and stride filled in for a tower of `size` px."""
        window = self.window or size
        stride = self.stride or max(1, window // 2)
        values = {"short": self.short or max(1, size * 3 // 2), "window": window, "stride": stride}
        return check(SegmentConfig, {**self.model_dump(), **values})


class WordSegmenter:
    """Class ids of pictures, by words. `config` has every open choice filled in.

    names: of each class its synonyms; classes: what the classes are called, by default their first names.
    """

    def __init__(
        self, model: towers.Model, names: Names, config: SegmentConfig, classes: Sequence[str] | None = None
    ) -> None:
        """Raises `CutlineError` for a model without a text tower, and for a tower that the method cannot read."""
        encoder = towers.load_encoder(open_joint(model).eval())
        self.device = next(model.parameters()).device
        self.config = config.fitted(encoder.size)
        self.names, self.classes = names, list(classes or [synonyms[0] for synonyms in names])
        self.background = self.classes.index(BEHIND) if BEHIND in self.classes else None
        if (config.threshold or config.area) and self.background is None:
            raise ConfigError(
                f"threshold and area give pixels to the class {BEHIND!r}, and there is none among "
                f"{', '.join(self.classes[:8])}. Leave them out, or name such a class."
            )
        proxy = None if config.proxy is None else towers.load_encoder(config.proxy).to(self.device).eval()
        self.tower = DenseTower(encoder, config.method, proxy)
        self.templates = prompts(config.prompts)
        self.words = text_classifier(model, names, self.templates).to(self.device)
        self.mean, self.std = (
            torch.tensor(v, device=self.device).view(3, 1, 1) * 255 for v in (encoder.mean, encoder.std)
        )

    @torch.inference_mode()
    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.int64]]:
        """Class ids (H, W) of each uint8 (H, W, 3) picture."""
        found = []
        for batch, _ in by_shape(((i, None) for i in images), self.config.batch):
            for image, cosines in zip(batch, self._each(batch), strict=True):
                found.append(self._decide(image, cosines).cpu().numpy())
        return found

    def _each(self, images: Tensor) -> Iterator[Tensor]:
        """`cosines` of uint8 pictures (B, 3, H, W) at their size, as many at once as their windows fill a batch."""
        small = torch.stack([resize_image(i, self._size(i)) for i in images.to(self.device)])
        x = (small.float() - self.mean) / self.std
        rows, columns = self._starts(x)
        each = max(1, self.config.batch // (len(rows) * len(columns)))
        size = (images.shape[2], images.shape[3])
        for part in torch.split(x, each):
            yield from self.cosines(part, size)

    def cosines(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Normalised pictures (B, 3, h, w) → the cosine of every name at every pixel of pictures of `size`: (B, M, H, W).

        Enlarging cells to pixels, placing windows, the mean where they overlap and resizing are linear along each side, so that
        one matrix a side does it all.
        """
        rows, columns = self._starts(x)
        wh, ww = min(self.config.window or 0, x.shape[2]), min(self.config.window or 0, x.shape[3])
        cut = torch.cat([x[..., top : top + wh, left : left + ww] for top in rows for left in columns])
        weights = self.words.weights[:, :, None, None]
        maps = torch.cat(
            [
                F.conv2d(F.normalize(self.tower(part).float(), dim=1), weights)
                for part in torch.split(cut, self.config.batch)
            ]
        )
        grid = maps.reshape(len(rows), len(columns), len(x), *maps.shape[1:])  # and M, cells, cells
        names = grid.permute(2, 3, 0, 4, 1, 5).reshape(len(x), maps.shape[1], len(rows) * maps.shape[2], -1)
        down = spread(rows, wh, self.tower.stride, x.shape[2], size[0], x)
        across = spread(columns, ww, self.tower.stride, x.shape[3], size[1], x)
        return down @ names @ across.T

    def _starts(self, x: Tensor) -> tuple[list[int], list[int]]:
        """Where the windows of a picture (…, h, w) begin, down and across."""
        window, stride = self.config.window or 0, self.config.stride or 0
        return starts(x.shape[-2], window, stride), starts(x.shape[-1], window, stride)

    def _size(self, image: Tensor) -> tuple[int, int]:
        """What (3, H, W) is resized to."""
        (height, width), short = image.shape[-2:], self.config.short or 0
        factor = min(short / min(height, width), LONGEST * short / max(height, width))
        return max(1, round(height * factor)), max(1, round(width * factor))

    def _decide(self, image: Tensor, scores: Tensor) -> Tensor:
        """Class ids (H, W) of a picture (3, H, W) from cosines (M, H, W)."""
        if self.config.refine == "pamr":
            scores = pamr(image[None].to(scores.device).float(), scores[None])[0]
        owners, config = self.words.owners, self.config
        if not config.threshold and not config.area:
            return owners[scores.argmax(0)]
        best = scores.new_full((len(self.classes), *scores.shape[1:]), -torch.inf)
        best.scatter_reduce_(0, owners[:, None, None].expand_as(scores), scores, "amax")
        if config.area:
            taken = best.argmax(0).flatten().bincount(minlength=len(best))
            taken[self.background] = 0
            small = taken <= config.area * taken.sum()
            small[self.background] = False
            best[small] = -torch.inf
        top, ids = best.max(0)
        if not config.threshold:
            return ids
        share = (config.scale * top - (config.scale * scores).logsumexp(0)).exp()
        return ids.masked_fill(share < config.threshold, self.background or 0)


def spread(begins: Sequence[int], window: int, stride: int, length: int, size: int, like: Tensor) -> Tensor:
    """The matrix (size, windows · cells) from the cells of all windows along a side to pixels.

    Cells of `stride` pixels are enlarged linearly and cut to the window, windows are placed at `begins` on `length` pixels and
    averaged where they overlap, and that is resized to `size`.
    """
    cells = -(-window // stride)
    one = _linear(cells, cells * stride, like)[:window]
    placed, seen = like.new_zeros(length, len(begins) * cells), like.new_zeros(length, 1)
    for i, begin in enumerate(begins):
        placed[begin : begin + window, i * cells : (i + 1) * cells] = one
        seen[begin : begin + window] += 1
    return _linear(length, size, like) @ (placed / seen)


def _linear(before: int, after: int, like: Tensor) -> Tensor:
    """The matrix (after, before) of linear interpolation, as F.interpolate has it."""
    unit = torch.eye(before, dtype=like.dtype, device=like.device)
    return F.interpolate(unit[None], after, mode="linear", align_corners=False)[0].T


def names_of(config: SegmentConfig, classes: Sequence[str]) -> Names:
    """Names of the data's `classes`, as the config says. Raises `ConfigError` if there are not as many."""
    if config.names == "data":
        return readable(classes)
    names = class_names(config.names)
    if len(names) != len(classes):
        raise ConfigError(
            f"names={config.names!r} has {len(names)} classes and the data {len(classes)} ({', '.join(classes[:5])}, …): give "
            "one for each, in this order."
        )
    return names


def segment(model: towers.Model | str, data: str | DenseData, config: SegmentConfig, out: Path | None = None) -> Result:
    """Score a model (or a run or tag) on a data set of class maps, without training; on all processes of torchrun.

    metrics: miou, macc and accuracy, what knowing nothing gives (see `chance`), iou by class; all shares of 1. With `out`,
    writes result.json and samples.png.
    """
    begun = time.monotonic()
    name = model if isinstance(model, str) else model.name or "model"
    with process_group(config.device):
        opened = open_data(data, "segment")
        loaded = open_joint(model, device_of(config.device))
        words = WordSegmenter(loaded, names_of(config, opened.classes), config, opened.classes)
        part = scored_part(config, opened)
        confusion = Confusion(len(opened.classes))
        with together():
            for samples in grouped(read_along(part, each=config.batch), config.batch):
                for sample, ids in zip(samples, words.predict([s.image for s in samples]), strict=True):
                    confusion.update(torch.from_numpy(ids), torch.from_numpy(sample.target))
        confusion.join()
        scored, skipped = part.counts()
        iou = dict(zip(opened.classes, confusion.iou().tolist(), strict=True))
        idle = {"split", "device", "batch", "pictures", "names", "prompts", *([] if config.threshold else ["scale"])}
        settings = words.config.model_dump(mode="json", exclude=idle)
        settings |= {**described(words.names, words.templates), "scored": scored, "skipped": skipped}
        settings |= {"data": opened.notes} if opened.notes else {}
        settings |= {"proxy_hash": words.tower.proxy.hash} if words.tower.proxy is not None else {}
        result = Result(
            metrics={**confusion.scores(), **chance(confusion), "pictures": scored, "truncated": words.words.truncated},
            per_class={"iou": {c: value for c, value in iou.items() if value == value}},  # absent classes are NaN
            protocol=Protocol(
                task="zeroshot-segment", data=opened.spec, data_fingerprint=opened.fingerprint, split=config.split,
                settings=settings, encoder=name, encoder_hash=weights_hash(loaded),
            ),
            seconds=time.monotonic() - begun,
        )  # fmt: skip
        if out is not None and world()[0] == 0:
            from cutline.transfer.draw import class_grid

            looked = shown(config, opened)
            class_grid(out / "samples.png", looked, words.predict([s.image for s in looked]), opened.classes)
            result.write(out)
    return result


def draw_picture(model: str, picture: Path, config: SegmentConfig, out: Path) -> Path:
    """The map of a picture for the classes `config.names`: NAME.png with a legend, NAME.ids.png, and classes.txt.
    Returns the drawing. Raises `DataError` for a file that is no picture."""
    image = read_picture(picture)
    words = WordSegmenter(open_joint(model, device_of(config.device)), several(config.names), config)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "classes.txt", "\n".join(words.classes).encode())
    write_classes(words, image, out, picture.stem)
    return out / f"{picture.stem}.png"


def chance(confusion: Confusion) -> dict[str, float]:
    """What knowing nothing gives, from the truth counted: chance_miou, chance_macc and chance_accuracy of ids drawn evenly, and
    majority_miou of the commonest class everywhere."""
    truth = confusion.matrix.sum(1).double()
    if not truth.sum():
        raise DataError("no pixel has a label, so there is nothing to score.")
    share, k = truth / truth.sum(), len(truth)
    uniform = (share / k) / (share + 1 / k - share / k)
    return {
        "chance_miou": uniform.mean().item(),
        "chance_macc": 1 / k,
        "chance_accuracy": 1 / k,
        "majority_miou": (share.max() / (share > 0).sum()).item(),
    }
