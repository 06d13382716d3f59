"""From a decoded picture to a training view: random resized crop, flip, RandAugment.

Drawing and applying are apart: `Augment.draw` gives an `Augmentation` of plain numbers in the original picture's
pixels, and `apply` is a pure function of it, so that an augmentation can be stored and replayed later, or applied to a
label map beside its picture. The crop's distribution is torchvision's `RandomResizedCrop`; pixels are resized with
antialiasing by torch's uint8 kernel, which equals Pillow's within one grey level and is several times faster.
"""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from cutline.config import Config
from cutline.train.stream.randaugment import BINS, Operation, carry_out, draw_operations

Picture = NDArray[np.uint8]  # (H, W, 3) when decoded, (3, S, S) as a view
Draw = Callable[[], float]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Augmentation(NamedTuple):
    """What is done to one picture: crop, resize, flip, operations of RandAugment.

    top, left, height, width: the crop, in pixels of a picture of `size` (H, W).
    """

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]
    flip: bool
    operations: tuple[Operation, ...] = ()


class Augment(Config):
    """scale: range of the area kept; ratio: range of the crop's aspect; flip: probability; operations, magnitude: of
    RandAugment (0 operations: none; it is 2 and 9 of 30 in most recipes).
    """

    scale: tuple[Share, Share] = (0.9, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.0, ge=0, le=1)
    operations: int = Field(default=0, ge=0)
    magnitude: int = Field(default=9, ge=0, le=BINS)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def draw(self, height: int, width: int, draw: Draw) -> Augmentation:
        """Draw an augmentation for a picture of height × width pixels."""
        top, left, h, w = self._crop(height, width, draw)
        flip = draw() < self.flip
        return Augmentation(
            top, left, h, w, (height, width), flip, draw_operations(self.operations, self.magnitude, draw)
        )

    def _crop(self, height: int, width: int, draw: Draw) -> tuple[int, int, int, int]:
        """torchvision's RandomResizedCrop.get_params: ten attempts, then the largest central crop of a valid ratio."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = height * width * (self.scale[0] + draw() * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + draw() * (high - low))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(draw() * (height - h + 1)), int(draw() * (width - w + 1)), h, w
        w, h = width, height
        if width / height < self.ratio[0]:
            h = min(height, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = min(width, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w

    def apply(self, picture: Picture, how: Augmentation, size: int) -> Picture:
        """The view, (3, size, size) uint8, of a picture (H, W, 3) uint8.

        `picture` may be smaller than `how.size` (a JPEG decoded at a fraction): the crop is then rounded to its pixels.
        """
        top, left, bottom, right = box(how, picture.shape[0], picture.shape[1])
        view = resize(picture[top:bottom, left:right], size, self.interpolation)
        if how.flip:
            view = view[:, :, ::-1]
        if how.operations:
            image = Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))
            view = np.asarray(carry_out(image, how.operations)).transpose(2, 0, 1)
        return view


def box(how: Augmentation, height: int, width: int) -> tuple[int, int, int, int]:
    """The crop as (top, left, bottom, right) in a picture decoded at height × width."""
    fy, fx = height / how.size[0], width / how.size[1]
    top, left = min(round(how.top * fy), height - 1), min(round(how.left * fx), width - 1)
    return (
        top,
        left,
        max(top + 1, round((how.top + how.height) * fy)),
        max(left + 1, round((how.left + how.width) * fx)),
    )


def decode_size(views: Iterable[tuple[Augmentation, int]]) -> int | None:
    """The shorter side at which to decode a JPEG for views of given sizes: a half, quarter or eighth; None: all of it.

    No pixel of a view is then made from less than one pixel. libjpeg's other fractions take longer than the whole.
    """
    needed, shorter = 0.0, 0
    for how, size in views:
        shorter = min(how.size)
        needed = max(needed, shorter * size / min(how.height, how.width))
    for fraction in (8, 4, 2):
        if shorter / fraction >= needed:
            return -(-shorter // fraction)
    return None


def resize(picture: Picture, size: int, interpolation: str) -> Picture:
    """(H, W, 3) uint8 → (3, size, size) uint8, antialiased."""
    if picture.shape[:2] == (size, size):
        return picture.transpose(2, 0, 1)
    # A copy is needed only where the array is read-only (torch would warn) or reversed.
    tensor = torch.from_numpy(picture if picture.flags.writeable else picture.copy()).permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(tensor, size=(size, size), mode=interpolation, antialias=True)
    array: Picture = out[0].numpy()
    return array


class Normalize:
    """uint8 (3, S, S) → float32 (x/255 − mean)/std, written into a given array; NumPy, so it starts no threads."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        self.factor = np.float32(1 / 255) / np.array(std, np.float32)
        self.shift = -np.array(mean, np.float32) / np.array(std, np.float32)

    def __call__(self, view: Picture, out: NDArray[np.float32]) -> None:
        # A channel at a time stays in the processor's cache, so that memory is written once.
        for i in range(3):
            np.add(np.multiply(view[i], self.factor[i]), self.shift[i], out=out[i])
