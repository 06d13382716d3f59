"""Feature pyramids: from the maps of an encoder to four levels of strides near 4, 8, 16 and 32.

`SimplePyramid` makes them from the last map of a plain ViT (ViTDet, 2203.16527, and detectron2's SimpleFeaturePyramid),
`TapPyramid` from four taps of it (MAE's and BEiT's UPerNet, mmsegmentation's Feature2Pyramid), `Reassemble` from four
taps as DPT does, and `NativePyramid` hands on the maps that a hierarchical tower has anyway; the decoders' own 1x1
laterals follow.

Every level halves the one before exactly, so a picture has to be padded to a multiple of `multiple` pixels.
"""

import math
from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from cutline.errors import ConfigError

LEVELS = 4


def exponents(stride: int) -> tuple[int, ...]:
    """Powers of two by which to enlarge a map of `stride` so that the levels come nearest to strides 4, 8, 16, 32.

    16 → (2, 1, 0, -1), the published pyramid; 14 the same; 8 → (1, 0, -1, -2); 32 → (3, 2, 1, 0).
    """
    first = round(math.log2(stride / 4))
    return tuple(first - k for k in range(LEVELS))


class Pyramid(nn.Module):
    """Maps of an encoder in, `LEVELS` maps out, finest first.

    channels: of each level; multiple: what height and width of a picture must divide by; uses: indices of the encoder's
    maps that are read; class_token: whether the class token at each of them is read, too.
    """

    channels: tuple[int, ...]
    multiple: int
    uses: tuple[int, ...]
    class_token = False

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps named by `uses`, each (B, C, H, W), and then their class tokens (B, C, 1, 1) if read, to levels."""
        raise NotImplementedError(type(self).__name__)


def beside(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, C, H, W) and then their class tokens (B, C, 1, 1): each token laid beside every cell, (B, 2C, H, W)."""
    half = len(maps) // 2
    return [torch.cat([m, token.expand_as(m)], 1) for m, token in zip(maps[:half], maps[half:], strict=True)]


class LastMap(Pyramid):
    """No pyramid: the last map alone, or the last few as they are, for linear heads and the deconvolution head.

    class_token: beside every cell, as DINOv2's depth probes have it.
    """

    def __init__(
        self, strides: Sequence[int], channels: Sequence[int], layers: int = 1, class_token: bool = False
    ) -> None:
        super().__init__()
        if len(strides) < layers:
            raise ConfigError(f"layers={layers} needs as many maps and the encoder gives {len(strides)}. Use layers=1.")
        self.uses = tuple(range(len(strides) - layers, len(strides)))
        self.class_token = class_token
        self.channels = tuple((1 + class_token) * channels[i] for i in self.uses)
        self.multiple = max(strides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return beside(maps) if self.class_token else list(maps)


class SimplePyramid(Pyramid):
    """Last map → rescaled x4, x2, x1, x0.5 (for stride 16) → 1x1 → LN → 3x3 → LN, all of `channels` channels."""

    def __init__(self, strides: Sequence[int], widths: Sequence[int], channels: int) -> None:
        super().__init__()
        powers = exponents(strides[-1])
        self.levels = nn.ModuleList(_level(widths[-1], k, channels) for k in powers)
        self.channels = (channels,) * LEVELS
        self.multiple = strides[-1] * 2 ** max(0, -powers[-1])
        self.uses = (len(strides) - 1,)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(maps[0]) for level in self.levels]


class TapPyramid(Pyramid):
    """Four taps of a ViT, the k-th rescaled to the k-th level; channels stay those of the encoder."""

    def __init__(self, strides: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        if len(strides) < LEVELS:
            raise ConfigError(
                f"pyramid=taps needs {LEVELS} maps and the encoder gives {len(strides)}. Use pyramid=vitdet."
            )
        powers = exponents(strides[-1])
        self.uses = tuple(range(len(strides) - LEVELS, len(strides)))
        self.channels = tuple(widths[i] for i in self.uses)
        self.levels = nn.ModuleList(_rescale(c, k, narrow=False) for c, k in zip(self.channels, powers))
        self.multiple = strides[-1] * 2 ** max(0, -powers[-1])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(m) for level, m in zip(self.levels, maps)]


class Reassemble(Pyramid):
    """DPT's four taps (2103.13413, section 3.1, transformers' layers): 1x1, then one deconvolution or a strided 3x3.

    Channels are an eighth, a quarter, a half and all of a ViT's, DPT's 96, 192, 384, 768 for ViT-B. class_token: read by
    the paper's "project", a linear layer and GELU on every cell with the token beside it, in place of its "ignore". Maps of a hierarchical tower (`patch` None) get the 1x1 alone and keep their widths.
    """

    def __init__(
        self, patch: int | None, strides: Sequence[int], widths: Sequence[int], class_token: bool = False
    ) -> None:
        from transformers import DPTConfig
        from transformers.models.dpt.modeling_dpt import DPTReassembleLayer

        super().__init__()
        if len(strides) < LEVELS:
            raise ConfigError(f"head=dpt needs {LEVELS} maps and the encoder gives {len(strides)}. Use another head.")
        self.uses = tuple(range(len(strides) - LEVELS, len(strides)))
        powers = exponents(strides[-1]) if patch else (0,) * LEVELS
        own = tuple(widths[i] for i in self.uses)
        self.channels = tuple(max(1, w * 2**k // 2 ** (LEVELS - 1)) for k, w in enumerate(own)) if patch else own
        self.class_token = class_token
        self.readouts = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * w, w, 1), nn.GELU()) for w in own if class_token)
        self.levels = nn.ModuleList(
            DPTReassembleLayer(DPTConfig(hidden_size=w), channels=c, factor=2**k)
            for w, c, k in zip(own, self.channels, powers)
        )
        self.multiple = max(strides) * 2 ** max(0, -powers[-1])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if self.class_token:
            maps = [readout(m) for readout, m in zip(self.readouts, beside(maps), strict=True)]
        return [level(m) for level, m in zip(self.levels, maps)]


class NativePyramid(Pyramid):
    """The last four maps of a hierarchical tower as they are."""

    def __init__(self, strides: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        if len(strides) < LEVELS:
            raise ConfigError(
                f"a head on a pyramid needs {LEVELS} maps and the encoder gives {len(strides)}: use linear."
            )
        self.uses = tuple(range(len(strides) - LEVELS, len(strides)))
        self.channels = tuple(channels[i] for i in self.uses)
        self.multiple = max(strides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return list(maps)


def build(kind: str, patch: int | None, strides: Sequence[int], widths: Sequence[int], channels: int) -> Pyramid:
    """The pyramid of an encoder: native for hierarchical towers (`patch` None), else `kind` "vitdet" or "taps"."""
    if patch is None:
        return NativePyramid(strides, widths)
    return TapPyramid(strides, widths) if kind == "taps" else SimplePyramid(strides, widths, channels)


def _level(width: int, power: int, channels: int) -> nn.Sequential:
    narrowed = width // 2 ** max(power, 0)
    return nn.Sequential(
        _rescale(width, power, narrow=True),
        nn.Conv2d(narrowed, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


def _rescale(width: int, power: int, narrow: bool) -> nn.Module:
    """Enlarge by 2^power with deconvolutions (LN, GELU between; `narrow` halves channels), or shrink by max-pooling."""
    if power <= 0:
        return nn.Sequential(*(nn.MaxPool2d(2) for _ in range(-power)))
    layers: list[nn.Module] = []
    for k in range(power):
        after = width // 2 if narrow else width
        layers.append(nn.ConvTranspose2d(width, after, 2, stride=2))
        if k < power - 1:
            layers += [LayerNorm2d(after), nn.GELU()]
        width = after
    return nn.Sequential(*layers)
