"""An encoder with a head, with a pyramid between them for dense tasks; and how such a model looks at whole pictures.

Shapes: B pictures, C outputs a pixel (classes, or 1 for depth), H and W of any size.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cutline.transfer.batches import resize_image, stack_images
from cutline.transfer.pyramid import Pyramid


class Transferred(nn.Module):
    """An encoder and what is trained on it; the base of every task's model.

    The encoder is copied, so the one given keeps its weights. A frozen one never leaves eval mode and gets no gradient.
    """

    def __init__(self, encoder: Any, frozen: bool) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.encoder.requires_grad_(not frozen)
        self.frozen = frozen
        self.num_layers: int = encoder.num_layers
        self.source: str = encoder.name
        self.source_hash: str = encoder.hash  # of the encoder it began with
        self.labels = self.skipped = 0  # training pictures used, and those that could not be
        self.logged: dict[str, Tensor | float] = {}  # of the last step, beside its loss

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def after_step(self) -> None:
        """Called after each step of the optimiser; none where the loss or its gradient was not finite."""

    def layer_of(self, name: str) -> int:
        """The encoder's own layer of a parameter, or `num_layers` + 1 for what follows the encoder."""
        prefix = "encoder."
        return self.encoder.layer_of(name[len(prefix) :]) if name.startswith(prefix) else self.num_layers + 1

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to what `forward` takes."""
        mean, std = (
            torch.tensor(v, device=images.device).view(1, 3, 1, 1) * 255 for v in (self.encoder.mean, self.encoder.std)
        )
        return (images.float() - mean) / std


class Headed(Transferred):
    """encoder → features → head → output: what is trained by a loss of outputs and targets.

    A task says what the features are (`features`, what can be kept of a frozen encoder) and what follows (`decode`).
    """

    def features(self, images: Tensor) -> list[Tensor]:
        """What is read of the encoder, each (B, …), of normalised pictures (B, 3, H, W)."""
        raise NotImplementedError(type(self).__name__)

    def decode(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """The output from `features` of pictures of that size."""
        raise NotImplementedError(type(self).__name__)

    def outputs(self, maps: Sequence[Tensor], size: tuple[int, int]) -> list[tuple[float, Tensor]]:
        """What training learns from, each with its weight in the loss."""
        return [(1.0, self.decode(maps, size))]

    def forward(self, images: Tensor) -> Tensor:
        """The float32 output for normalised pictures (B, 3, H, W)."""
        return self.decode(self.features(images), (images.shape[2], images.shape[3]))


class Pyramidal(Transferred):
    """encoder → pyramid; the base of all models of dense maps."""

    def __init__(self, encoder: Any, pyramid: Pyramid, frozen: bool) -> None:
        super().__init__(encoder, frozen)
        # Channels-last makes bilinear resizing and its gradient some ten times faster on CPUs, and changes no value.
        self.pyramid: Pyramid = pyramid.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps that the pyramid reads, of normalised pictures padded (right, bottom) to its multiple."""
        h, w = self._padded(images.shape[2], images.shape[3])
        right, bottom = w - images.shape[3], h - images.shape[2]
        padded = F.pad(images, (0, right, 0, bottom)) if right or bottom else images
        with torch.no_grad() if self.frozen else nullcontext():
            maps = self.read(padded)
        return [m.contiguous(memory_format=torch.channels_last) for m in maps]

    def read(self, padded: Tensor) -> list[Tensor]:
        """The encoder's maps that the pyramid reads, and then their class tokens (B, C, 1, 1) if it reads them."""
        if not self.pyramid.class_token:
            maps = self.encoder(padded)
            return [maps[i] for i in self.pyramid.uses]
        maps, tokens = self.encoder.maps_and_classes(padded)
        return [maps[i] for i in self.pyramid.uses] + [tokens[i][..., None, None] for i in self.pyramid.uses]

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        m = self.pyramid.multiple
        return -(-height // m) * m, -(-width // m) * m


class Dense(Pyramidal, Headed):
    """encoder → pyramid → head → output at the picture's resolution; the base of `Segmenter` and `DepthEstimator`.

    Output (B, C, H, W): logits, or depth in metres.
    """

    def __init__(self, encoder: Any, pyramid: Pyramid, head: nn.Module, frozen: bool) -> None:
        super().__init__(encoder, pyramid, frozen)
        self.head: nn.Module = head.to(memory_format=torch.channels_last)
        self.auxiliary: nn.Module | None = None  # a second head that only training sees, and the weight of its loss
        self.auxiliary_weight = 0.0
        self.train()

    def decode(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Output (B, C, *size) from `features` of pictures of that size."""
        return self._enlarge(self.head(self.pyramid(maps)), size)

    def outputs(self, maps: Sequence[Tensor], size: tuple[int, int]) -> list[tuple[float, Tensor]]:
        """What training learns from, each with its weight in the loss: `decode`'s output and the auxiliary head's."""
        levels = self.pyramid(maps)
        found = [(1.0, self._enlarge(self.head(levels), size))]
        if self.auxiliary is not None:
            found.append((self.auxiliary_weight, self._enlarge(self.auxiliary(levels), size)))
        return found

    def _enlarge(self, out: Tensor, size: tuple[int, int]) -> Tensor:
        out = out.float().contiguous(memory_format=torch.channels_last)
        padded = self._padded(*size)
        out = F.interpolate(out, padded, mode="bilinear", align_corners=False)
        return out if padded == size else out[:, :, : size[0], : size[1]]  # a cut costs a copy in the backward pass


class Look:
    """How a model looks at pictures when scored or used: whole or in sliding windows, resized, and mirrored too.

    short: first resize to this short side; window and stride: of test="slide", in pixels; scales: look at the picture
    enlarged by each; probabilities: several looks are averaged as softmax(logits), as in mmsegmentation, and not as
    they are; autocast: a context for the model's arithmetic. Calling it with a model and equal-sized pictures gives
    outputs at their own resolution: the model's own from one look, the mean from several.
    """

    def __init__(
        self,
        test: Literal["whole", "slide"] = "whole",
        window: tuple[int, int] = (512, 512),
        stride: tuple[int, int] = (256, 256),
        short: int | None = None,
        flip: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scales: Sequence[float] = (1.0,),
        probabilities: bool = False,
    ) -> None:
        self.test, self.window, self.stride, self.short, self.flip = test, window, stride, short, flip
        self.autocast, self.scales, self.probabilities = autocast, scales, probabilities

    @torch.inference_mode()
    def __call__(self, model: Dense, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) on any device to float32 (B, C, H, W) on the model's; the model must be in eval mode."""
        size = (images.shape[2], images.shape[3])
        looks = [(scale, mirrored) for scale in self.scales for mirrored in ((False, True) if self.flip else (False,))]
        total: Tensor | None = None
        for scale, mirrored in looks:
            x = model.normalise(self._resized(images, scale).to(next(model.parameters()).device))
            with self.autocast():
                out = self._once(model, x.flip(3)).flip(3) if mirrored else self._once(model, x)
            if out.shape[2:] != size:
                out = F.interpolate(out, size, mode="bilinear", align_corners=False)
            if self.probabilities and len(looks) > 1:
                out = out.softmax(1)
            total = out if total is None else total + out
        assert total is not None
        return total / len(looks) if len(looks) > 1 else total

    def _resized(self, images: Tensor, scale: float) -> Tensor:
        height, width = images.shape[2:]
        factor = scale * (self.short / min(height, width) if self.short else 1.0)
        smaller = (max(1, round(height * factor)), max(1, round(width * factor)))
        return images if smaller == (height, width) else torch.stack([resize_image(i, smaller) for i in images])

    def _once(self, model: Dense, x: Tensor) -> Tensor:
        if self.test == "whole":
            out: Tensor = model(x)
            return out
        (h, w), (wh, ww) = x.shape[2:], self.window
        total: Tensor | None = None
        seen = torch.zeros(h, w, device=x.device)
        for top in starts(h, wh, self.stride[0]):
            for left in starts(w, ww, self.stride[1]):
                part = model(x[:, :, top : top + wh, left : left + ww])
                if total is None:
                    total = part.new_zeros(*part.shape[:2], h, w)
                total[:, :, top : top + wh, left : left + ww] += part
                seen[top : top + wh, left : left + ww] += 1
        assert total is not None
        return total / seen


def starts(length: int, window: int, stride: int) -> list[int]:
    """Window positions that cover the length; the last is shifted back to end at the edge, as in mmsegmentation."""
    if length <= window:
        return [0]
    return [min(k * stride, length - window) for k in range(-(-(length - window) // stride) + 1)]


def by_shape(items: Iterable[tuple[NDArray[np.uint8], Any]], size: int) -> Iterator[tuple[Tensor, list[Any]]]:
    """Group consecutive (picture, thing) of equal shape into batches of at most `size`, in order."""
    group: list[tuple[NDArray[np.uint8], Any]] = []
    for item in items:
        if group and (len(group) == size or group[0][0].shape != item[0].shape):
            yield stack_images([i for i, _ in group]), [t for _, t in group]
            group = []
        group.append(item)
    if group:
        yield stack_images([i for i, _ in group]), [t for _, t in group]
