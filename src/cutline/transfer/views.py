"""Square views of pictures for classification: the test view, and training views cut and changed at random.

The test view is the usual one: the short side resized to `short`, then the central square of `size` pixels (bicubic,
antialiased, torchvision's). A training view is torchvision's RandomResizedCrop, flip, and RandAugment and random erasing if
asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from cutline.train.stream.randaugment import draw_operations
from cutline.train.stream.transforms import Augment, Augmentation
from cutline.transfer.batches import Batches, Cut, stack_images
from cutline.transfer.data import Split

WHOLE = (1.0, 1.0)  # a scale that cuts nothing
Colour = tuple[float, float, float]
AREA, ASPECT = (0.02, 1 / 3), 0.3  # of an erased rectangle: its share of the view, and the least of its sides' ratio


@dataclass(frozen=True)
class Square:
    """size: side of a view in pixels; short: short side of the picture before the central cut, at least `size`."""

    size: int
    short: int

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The test view (size, size, 3) of a picture (H, W, 3), both uint8."""
        if image.shape[:2] == (self.size, self.size) and self.short == self.size:
            return image
        x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        x = v2.functional.resize(x, [self.short], v2.InterpolationMode.BICUBIC, antialias=True)
        view: NDArray[np.uint8] = v2.functional.center_crop(x, [self.size]).permute(1, 2, 0).numpy()
        return view


class Views(Batches):
    """Batches of square views with their classes.

    scale: range of the area that a random crop keeps; `WHOLE` for the test view without a random crop. operations,
    magnitude: of RandAugment. erase: share of the views a part of which is noise (`erased`) of this mean and deviation, both
    in 0 … 1.
    """

    def __init__(
        self,
        split: Split,
        rows: Sequence[int],
        batch: int,
        seed: int,
        square: Square,
        scale: tuple[float, float] = WHOLE,
        flip: bool = False,
        operations: int = 0,
        magnitude: int = 9,
        erase: float = 0.0,
        noise: tuple[Colour, Colour] = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    ) -> None:
        size = (square.size, square.size)
        super().__init__(split, rows, batch, seed, Cut(size, scale, flip, None, (0, 0, 0), 0))
        self.square = square
        self.augment = Augment(scale=scale, operations=operations, magnitude=magnitude)
        self.erase, self.noise = erase, noise

    @property
    def whole(self) -> bool:
        return self.augment.scale == WHOLE and not self.augment.operations and not self.erase

    def view(self, row: int, flip: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        if self.targets_only and self.split.labels is not None and row not in self.split.skipped:
            return torch.empty(0, dtype=torch.uint8), torch.tensor(self.split.labels[row])
        sample = self.split.read(row)
        size, image, augment = self.square.size, sample.image, self.augment
        if augment.scale == WHOLE:
            image = self.square(image)
            operations = draw_operations(augment.operations, augment.magnitude, rng.random)
            how = Augmentation(0, 0, size, size, (size, size), flip, operations)
        else:
            how = augment.draw(image.shape[0], image.shape[1], rng.random)._replace(flip=flip)
        view = np.ascontiguousarray(augment.apply(image, how, size))
        if self.erase and rng.random() < self.erase:
            view = erased(view, *self.noise, rng)
        return torch.from_numpy(view), torch.from_numpy(sample.target)

    def picture(self, row: int) -> NDArray[np.uint8]:
        return self.square(self.split.read(row).image)


def erased(view: NDArray[np.uint8], mean: Colour, deviation: Colour, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A view (3, S, S) with a random rectangle of normal noise of this mean and deviation (both in 0 … 1).

    Random erasing (1708.04896, algorithm 1) with timm's ranges and its noise a pixel: normal once normalised. After ten
    rectangles that do not fit, the view as it is.
    """
    side = view.shape[-1]
    for _ in range(10):
        area = side**2 * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < side and 0 < w < side:
            top, left = rng.integers(side - h + 1), rng.integers(side - w + 1)
            centre, spread = (np.array(v)[:, None, None] * 255 for v in (mean, deviation))
            view = view.copy()
            view[:, top : top + h, left : left + w] = (centre + spread * rng.standard_normal((3, h, w))).clip(0, 255)
            break
    return view


def stack_views(images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], square: Square) -> Tensor:
    """The test views of pictures, (B, 3, size, size) uint8."""
    return stack_images([square(image) for image in images])
