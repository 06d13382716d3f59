"""CLIP Can Understand Depth (2402.03251): a learned matrix, the mirror, in place of a text, and a compact decoder.

    c = text tower([start] m_1 … m_T [end]),     m ~ N(0, 0.02) at first, 64 of them in the paper
    x = (1 + γ) · reduce(last map) + β,          (γ, β) = linear(c), one of each a channel (FiLM, 1709.07871)
    depth = decoder(x)

Both towers are frozen; what is learned is m, the 1x1 convolution `reduce`, the linear layer and the decoder, by the
scale-invariant loss. The paper's text gives neither widths nor the decoder's layers in full: here the decoder is the
deconvolution head of the transfer depth task, so that the same head on the same frozen encoder says what the text path adds.
c depends on no picture: once trained, γ and β are a scale and a shift of each channel, which `reduce` could have learned.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cutline.towers.encoder import Encoder
from cutline.transfer.depth import DepthModel, MetresConfig
from cutline.transfer.heads import DeconvHead
from cutline.transfer.options import default_channels
from cutline.transfer.pyramid import LastMap
from cutline.zeroshot.embedded import EmbeddedText


class MirrorConfig(MetresConfig):
    """Options of the mirror, beside those of depth.

    tokens: rows of the matrix, by default 64 or as many as the text tower's context has room for. deconvolutions, filters: of the
    decoder. channels: of the reduced map.
    """

    method: Literal["mirror"] = "mirror"
    frozen: Literal[True] = True
    lr: float = Field(5e-3, gt=0)  # ten times that of fine-tuning: the towers are frozen
    tokens: int | None = Field(None, ge=1)
    channels: int | None = Field(None, ge=1)
    deconvolutions: int = Field(3, ge=0, le=5)
    filters: int = Field(32, ge=1)

    @property
    def learned(self) -> int:
        """Vectors of the one text."""
        assert self.tokens is not None
        return self.tokens


class MirrorHead(nn.Module):
    """The last map (B, C, h, w) → depth (B, 1, H, W) in metres, in (0, max_depth)."""

    def __init__(self, text: EmbeddedText, width: int, joint: int, stride: int, config: MirrorConfig) -> None:
        super().__init__()
        channels = config.channels or default_channels(width)
        self.text = text
        self.mirror = nn.Parameter(0.02 * torch.randn(1, config.learned, text.width))
        self.reduce = nn.Conv2d(width, channels, 1)
        self.film = nn.Linear(joint, 2 * channels)
        self.decoder = DeconvHead(channels, channels, config.filters, config.deconvolutions, stride, config.top)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        scale, shift = self.film(self.text(self.mirror))[:, :, None, None].chunk(2, dim=1)
        out: Tensor = self.decoder([(1 + scale) * self.reduce(levels[-1]) + shift])
        return out


class Mirror(DepthModel):
    """The mirror and its decoder on a frozen encoder."""

    def __init__(self, encoder: Encoder, config: MirrorConfig, text: EmbeddedText) -> None:
        strides, widths = encoder.strides, encoder.channels
        head = MirrorHead(text, widths[-1], encoder.width, strides[-1], config)
        super().__init__(encoder, LastMap(strides, widths), head, config)
