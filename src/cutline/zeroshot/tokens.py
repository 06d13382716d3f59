"""Learned words for distance (Auty & Mikolajczyk, "Learning to Prompt CLIP for Monocular Depth Estimation", ICCVW 2023).

DepthCLIP's sum over bins, with vectors learned in place of the words' token embeddings: the text of bin k is `context`
vectors that all bins share (of the sentence and of "object") and one of its own,

    text_k = text tower([start] c_1 … c_n t_k [end]),     c, t ~ N(0, 0.02) at first

Both towers are frozen; the loss is the scale-invariant one. The published settings are seven to 256 bins, even or
even in logarithms over the data's range (256 from 1 mm on), lr 3.57e-4, 25 epochs of batches of 16, clip 0.1. Here bins are even
by default, and twenty, since each costs a text at every step.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from cutline.towers.encoder import Encoder
from cutline.transfer.depth import MetresConfig
from cutline.zeroshot.depthclip import JointDepth, expected, rising
from cutline.zeroshot.embedded import EmbeddedText


class TokensConfig(MetresConfig):
    """Options of learned words, beside those of depth.

    bins: metres of each, rising, or "even" or "log" for the middles of `count` even parts of the range or of its logarithm.
    context: vectors that the bins share; 3 are two of the sentence and one of the object. temperature: as DepthCLIP's.
    """

    method: Literal["tokens"] = "tokens"
    frozen: Literal[True] = True
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    lr: float = Field(5e-3, gt=0)
    bins: list[float] | Literal["even", "log"] = "even"
    count: int = Field(20, ge=2)
    context: int = Field(3, ge=0)
    temperature: float = Field(0.1, gt=0)

    @field_validator("bins")
    @classmethod
    def _rising(cls, value: Any) -> Any:
        return value if isinstance(value, str) else rising(value)

    @property
    def learned(self) -> int:
        """Vectors of one text."""
        return self.context + 1

    @model_validator(mode="after")
    def _counted(self) -> "TokensConfig":
        if isinstance(self.bins, list) and self.count != type(self).model_fields["count"].default:
            raise ValueError("bins in metres are counted already: leave count out")
        return self

    def metres(self) -> list[float]:
        """The bins in metres."""
        if isinstance(self.bins, list):
            return self.bins
        low, high = self.min_depth, self.top
        middles = [(k + 0.5) / self.count for k in range(self.count)]
        if self.bins == "even":
            return [low + (high - low) * m for m in middles]
        return [low * math.exp(math.log(high / low) * m) for m in middles]


class LearnedWords(nn.Module):
    """`expected` of the last level and learned texts."""

    bins: Tensor

    def __init__(self, text: EmbeddedText, config: TokensConfig) -> None:
        super().__init__()
        metres = config.metres()
        self.register_buffer("bins", torch.tensor(metres))
        self.text, self.temperature = text, config.temperature
        self.context = nn.Parameter(0.02 * torch.randn(1, config.context, text.width))
        self.words = nn.Parameter(0.02 * torch.randn(len(metres), 1, text.width))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        vectors = torch.cat([self.context.expand(len(self.words), -1, -1), self.words], 1)
        return expected(levels[-1], self.text(vectors), self.bins, self.temperature)


class DepthTokens(JointDepth):
    """Learned words for distance on a frozen encoder."""

    def __init__(self, encoder: Encoder, config: TokensConfig, text: EmbeddedText) -> None:
        super().__init__(encoder, LearnedWords(text, config), config)
