"""Training batches of pictures and their targets: random scale, crop and flip, the same for both; then colours.

Batch k is a pure function of (seed, k): which samples, and how they are cut. So batches can be made ahead in threads,
processes can share one, and a run can start again at any step. Pictures stay uint8 until they are on the device.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cutline.objectives.gather import world
from cutline.transfer.augment import COLOURS, CutDepth
from cutline.transfer.data import THREADS, Sample, Skip, Split

A = TypeVar("A")
B = TypeVar("B")


@dataclass
class Batch:
    """images (B, 3, H, W) uint8; targets (B, H, W), or (B,) classes; keys; rows: places in the training set; flips:
    mirrored or not.

    `rows` and `flips` say all there is to say about a batch of whole pictures (see `Batches.whole`).
    """

    images: Tensor
    targets: Tensor
    keys: list[str]
    rows: Tensor
    flips: Tensor


@dataclass(frozen=True)
class Cut:
    """How pictures are cut: crop (H, W); scale: range of random enlargement; short: first make the short side this.

    colour: "none" or a key of `augment.COLOURS`, after the crop; cutdepth: before it, of depth.
    """

    crop: tuple[int, int]
    scale: tuple[float, float]
    flip: bool
    short: int | None
    fill: tuple[int, int, int]  # colour around a picture smaller than the crop
    empty: int  # target there: no class, no reading
    colour: str = "none"
    cutdepth: CutDepth | None = None

    @property
    def plain(self) -> bool:
        """Whether pictures come at their own scale and in their own colours."""
        return self.scale == (1.0, 1.0) and self.short is None and self.colour == "none" and self.cutdepth is None


class Batches:
    """Batches of `size` from `rows` of `split`, for ever, by epochs without repetition."""

    def __init__(
        self, split: Split, rows: Sequence[int], size: int, seed: int, cut: Cut, threads: int | None = None
    ) -> None:
        self.split, self.rows, self.size, self.seed, self.flip = split, list(rows), size, seed, cut.flip
        self.threads = threads or THREADS
        self.how = cut
        self.targets_only = False  # whether pictures may be left out, as for features computed before
        self.check = split.check_skipped  # called when a picture cannot be used: raises where that is not to be borne

    @property
    def whole(self) -> bool:
        """Whether every batch is `pictures`, mirrored or not."""
        return self.how.plain and self.split.sizes() == {self.how.crop}

    def view(self, row: int, flip: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A picture (3, H, W) uint8 and its target as one batch shows them."""
        return cut(self.split.read(row), self.how, flip, rng)

    def picture(self, row: int) -> NDArray[np.uint8]:
        """A picture (H, W, 3) as it is when nothing is drawn."""
        return self.split.read(row).image

    def order(self, step: int) -> NDArray[np.int64]:
        """Places in the training set of batch `step`, (size,)."""
        n = len(self.rows)
        places = np.arange(step * self.size, (step + 1) * self.size)
        epochs = {e: np.random.default_rng([self.seed, 1, e]).permutation(n) for e in np.unique(places // n).tolist()}
        return np.array([epochs[p // n][p % n] for p in places.tolist()])

    def drawn(self, step: int) -> list[tuple[int, np.random.Generator]]:
        """This process's share of batch `step`: places in the training set, and each one's own random numbers."""
        rank, world_size = world()
        share = self.size // world_size
        mine = range(rank * share, (rank + 1) * share)
        order = self.order(step)
        return [(int(order[i]), np.random.default_rng([self.seed, 2, step, i])) for i in mine]

    def make(self, step: int) -> Batch:
        """This process's share of batch `step`."""
        drawn = self.drawn(step)
        flips = [self.flip and bool(rng.random() < 0.5) for _, rng in drawn]
        views = [
            self.shown(place, rng, partial(self.view, flip=flip, rng=rng))
            for (place, rng), flip in zip(drawn, flips, strict=True)
        ]
        images, targets = (torch.stack(part) for part in zip(*(view for _, view in views)))
        keys = [self.split.keys[self.rows[place]] for place, _ in views]
        return Batch(images, targets, keys, torch.tensor([place for place, _ in views]), torch.tensor(flips))

    def shown(self, place: int, rng: np.random.Generator, show: Callable[[int], A]) -> tuple[int, A]:
        """A place in the training set and what `show` makes of its row: of `place`, or where that cannot be used of one
        drawn by `rng` in its stead, so that the batch still is a function of (seed, step)."""
        while True:
            try:
                return place, show(self.rows[place])
            except Skip:
                self.check()
                place = int(rng.integers(len(self.rows)))

    def pictures(self, places: Sequence[int]) -> tuple[list[int], Tensor | None]:
        """Those of the places whose pictures can be used, and the pictures, (n, 3, H, W) uint8; None for none."""
        images = {}
        for place in places:
            try:
                images[place] = self.picture(self.rows[place])
            except Skip:
                self.check()
        return list(images), stack_images(list(images.values())) if images else None

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches `start` … `stop` - 1, a few made ahead by threads."""
        return ahead(self.make, range(start, stop), self.threads)


def ahead(make: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """`make` of every item, in order, up to `threads` + 1 of them made ahead by threads.

    Each of them computes on one core: with as many as there are it would take them from the model (1.8 times the step)."""
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        made: deque[Future[B]] = deque()
        for item in items:
            made.append(pool.submit(make, item))
            if len(made) > threads:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()


def cut(sample: Sample, how: Cut, flip: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One picture (3, h, w) uint8 and target (h, w) of `how.crop`, resized (pictures bilinear, targets nearest)."""
    if how.cutdepth is not None:
        sample = how.cutdepth(sample, rng)
    height, width = sample.image.shape[:2]
    factor = how.short / min(height, width) if how.short else 1.0
    if how.scale != (1.0, 1.0):
        factor *= rng.uniform(*how.scale)
    full = (max(1, round(height * factor)), max(1, round(width * factor)))
    out = (min(how.crop[0], full[0]), min(how.crop[1], full[1]))
    # The window of the source that becomes the crop; resizing it alone is much cheaper than resizing the picture.
    corner = [int(rng.integers(0, f - o + 1)) if f > o else 0 for f, o in zip(full, out)]
    (top, bottom), (left, right) = (
        (int(c / factor), min(n, max(int(c / factor) + 1, round((c + o) / factor))))
        for c, o, n in zip(corner, out, (height, width))
    )
    image = torch.from_numpy(sample.image[top:bottom, left:right]).permute(2, 0, 1)
    target = torch.from_numpy(sample.target[top:bottom, left:right])
    if image.shape[1:] != out:
        image = resize_image(image, out)
        target = F.interpolate(target[None, None].float(), out, mode="nearest-exact")[0, 0].to(target.dtype)
    if flip:
        image, target = image.flip(2), target.flip(1)
    if how.colour != "none":
        image = COLOURS[how.colour](image, rng)
    if out == how.crop:
        return image, target
    picture = torch.tensor(how.fill, dtype=torch.uint8)[:, None, None].repeat(1, *how.crop)
    labels = torch.full(how.crop, how.empty, dtype=target.dtype)
    picture[:, : out[0], : out[1]] = image
    labels[: out[0], : out[1]] = target
    return picture, labels


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W) to `size`."""
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True, align_corners=False)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def stack_images(images: Sequence[NDArray[Any]]) -> Tensor:
    """Equal-sized (H, W, 3) uint8 pictures to (B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
