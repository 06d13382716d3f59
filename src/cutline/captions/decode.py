"""Writing text with a CoCa of open_clip: batched, every key and value computed once, repetition controlled.

open_clip's own `generate` runs both text towers over the whole prefix for each new token and encodes a picture once for
every caption of it. Here the self-attention of the text tower and of the decoder keeps its keys and values, those of the
picture's tokens are computed once, and the captions of one picture are the queries of one cross-attention over them.

What is drawn for a caption is a pure function of (seed, row key, number of the caption, step), so it does not depend on
the batch that the row is in, but for the rounding of a matrix product.

Shapes: B pictures, K captions each, R = B·K, N tokens of a picture, t tokens so far, W width, V ids that may be written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from open_clip.transformer import ResidualAttentionBlock
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from cutline.config import Config
from cutline.errors import ConfigError
from cutline.towers import Model, Tokenizer
from cutline.train.stream.order import draws, key

PADDING = 0
Draw = Callable[[], float]


class Decoding(Config):
    """How text is written.

    temperature: divides the logits; 0 writes the likeliest token each time (greedy). top_p: nucleus sampling (Holtzman et
    al., 1904.09751), from the likeliest tokens that hold this share of the probability (0.9 in DataCompDR). min_tokens, max_tokens: without start and end. no_repeat_ngram: no sequence of so many tokens twice in a caption (0:
    allowed). repetition_penalty: divides the positive logits of tokens that were written before, and multiplies the
    negative ones (CTRL, 1909.05858; 1: none).
    """

    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(0.9, gt=0, le=1)
    min_tokens: int = Field(3, ge=0)
    max_tokens: int = Field(64, ge=1)
    no_repeat_ngram: int = Field(4, ge=0)
    repetition_penalty: float = Field(1.0, ge=1)

    def processors(self, end: int) -> LogitsProcessorList:
        """transformers' own, in the order that its `generate` has; `end`: the place of the end token among the logits."""
        steps: list[Any] = []
        if self.repetition_penalty > 1:
            steps.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram:
            steps.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram))
        if self.min_tokens:
            steps.append(MinLengthLogitsProcessor(self.min_tokens, end))
        if self.temperature not in (0, 1):
            steps.append(TemperatureLogitsWarper(self.temperature))
        if self.temperature and self.top_p < 1:
            steps.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList(steps)


@dataclass
class _Cache:
    """Keys and values of one self-attention: (R, heads, room, W / heads) each, filled up to the present step."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, like: Tensor, room: int) -> "_Cache":
        return cls(*(like.new_empty(*like.shape[:2], room, like.shape[-1]) for _ in range(2)))


class CocaDecoder:
    """Writes captions with `model`, a CoCa in eval mode, on the device that it is on.

    vocabulary: the token ids it was trained to write (None: all). Padding and start are never written. Raises
    `ConfigError` for a model that is no CoCa or has layers that cannot be run token by token.
    """

    def __init__(self, model: Model, how: Decoding, vocabulary: Sequence[int] | None = None) -> None:
        if not model.gives_tokens:
            raise ConfigError(
                f"{model.name!r} is no captioner: it is a {type(model).__name__} without a decoder that writes text. "
                "Take a CoCa (coca_ViT-L-14:mscoco_finetuned_laion2b_s13b_b90k, or what `cutline caption train` made)."
            )
        self.model = cast(Any, model)
        text, decoder = self.model.text, self.model.text_decoder
        if not all(type(b) is ResidualAttentionBlock for b in (*text.transformer.resblocks, *decoder.resblocks)):
            raise ConfigError(f"{model.name!r} has text layers of a kind that cannot be run token by token.")
        tokenizer = Tokenizer(model).tokenizer
        self.start: Any = getattr(tokenizer, "sot_token_id", None)
        self.end: Any = getattr(tokenizer, "eot_token_id", None)
        if self.start is None or self.end is None:
            raise ConfigError(f"{model.name!r} has a tokeniser of its own, and captions are written with CLIP's only.")
        every = range(decoder.text_projection.shape[1]) if vocabulary is None else {*vocabulary, self.end}
        device = decoder.text_projection.device
        self.ids = torch.tensor(sorted(set(every) - {PADDING, self.start}), device=device)
        self.projection = decoder.text_projection.detach()[:, self.ids]  # (W, V)
        self.stop = int((self.ids == self.end).nonzero())
        self.how, self.processors = how, how.processors(self.stop)
        # A text of the context's length, start and end included, is the longest it can have learnt.
        self.room: int = min(how.max_tokens, min(text.context_length, decoder.context_length) - 2)

    @torch.inference_mode()
    def __call__(self, images: Tensor, keys: Sequence[str], num: int = 1, seed: int = 0) -> list[list[list[int]]]:
        """(B, 3, H, W) normalised pictures and the keys of their rows → `num` lists of token ids for each picture."""
        if num > 1 and not self.how.temperature:
            raise ConfigError(
                f"num={num} captions with temperature=0 are the same one again. Set it above 0, or num=1."
            )
        draw = [draws(seed, i, key(k), "caption") for k in keys for i in range(num)]
        state = _State(self, images, num)
        rows = len(draw)
        written = torch.empty(rows, 0, dtype=torch.long, device=images.device)  # places in `ids`
        token = torch.full((rows,), self.start, device=images.device)
        ended = torch.zeros(rows, dtype=torch.bool, device=images.device)
        for step in range(self.room):
            scores = self.processors(
                cast(torch.LongTensor, written), cast(torch.FloatTensor, state.logits(token, step))
            )
            # A row that may write nothing at all (all tokens banned) ends.
            scores[:, self.stop].masked_fill_(scores.isneginf().all(1), 0.0)
            place = self._choose(scores, draw).masked_fill(ended, self.stop)
            ended = ended | (place == self.stop)
            if bool(ended.all()):
                break
            written = torch.cat([written, place[:, None]], dim=1)
            token = self.ids[place]
        return self._lists(written, num)

    def _choose(self, scores: Tensor, draw: list[Draw]) -> Tensor:
        """Places (R,) of the next tokens: the best, or by the inverse of the distribution function at each row's draw."""
        if not self.how.temperature:
            return scores.argmax(1)
        below = scores.double().softmax(1).cumsum(1)
        at = torch.tensor([d() for d in draw], dtype=torch.float64, device=scores.device) * below[:, -1]
        return torch.searchsorted(below, at[:, None], right=True)[:, 0].clamp(max=below.shape[1] - 1)

    def _lists(self, written: Tensor, num: int) -> list[list[list[int]]]:
        captions = []
        for places, ids in zip(written.tolist(), self.ids[written].tolist(), strict=True):
            captions.append(ids[: places.index(self.stop)] if self.stop in places else ids)
        return [captions[i : i + num] for i in range(0, len(captions), num)]


class _State:
    """A batch of pictures half written about."""

    def __init__(self, decoder: CocaDecoder, images: Tensor, num: int) -> None:
        self.decoder, self.model, self.num = decoder, decoder.model, num
        _, tokens = self.model.image_and_tokens(images)  # (B, N, W)
        self.pictures = [self._picture(block, tokens) for block in self.model.text_decoder.cross_attn]
        self.caches: dict[nn.Module, _Cache] = {}

    def logits(self, token: Tensor, step: int) -> Tensor:
        """Of the token behind `token` (R,), which stands at place `step`: (R, V) float32."""
        text, decoder = self.model.text, self.model.text_decoder
        x = text.token_embedding(token) + text.positional_embedding[step]  # (R, W)
        for block in text.transformer.resblocks:
            x = self._finish(block, x, self._own(block, x, step))
        for block, cross, picture in zip(decoder.resblocks, decoder.cross_attn, self.pictures, strict=True):
            x = self._finish(block, x, self._own(block, x, step))
            x = self._finish(cross, x, self._look(cross, x, picture))
        return cast(Tensor, (decoder.ln_final(x) @ self.decoder.projection).float())

    def _finish(self, block: Any, x: Tensor, attended: Tensor) -> Tensor:
        x = x + block.ls_1(block.attn.out_proj(attended.reshape(len(x), -1)))
        return x + block.ls_2(block.mlp(block.ln_2(x)))  # type: ignore[no-any-return]

    def _own(self, block: Any, x: Tensor, step: int) -> Tensor:
        """Self-attention of the newest token to all so far: (R, heads, 1, W / heads)."""
        attn = block.attn
        mixed = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = mixed.view(len(x), 3, attn.num_heads, 1, -1).unbind(1)
        cache = self.caches.setdefault(block, _Cache.of(k, self.decoder.room)) if step == 0 else self.caches[block]
        cache.keys[:, :, step], cache.values[:, :, step] = k[:, :, 0], v[:, :, 0]
        return F.scaled_dot_product_attention(q, cache.keys[:, :, : step + 1], cache.values[:, :, : step + 1])

    def _picture(self, cross: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the pictures' tokens for one cross-attention: (B, heads, N, W / heads) each."""
        attn, width = cross.attn, tokens.shape[-1]
        mixed = F.linear(cross.ln_1_kv(tokens), attn.in_proj_weight[width:], attn.in_proj_bias[width:])
        k, v = mixed.view(*tokens.shape[:2], 2, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        return k, v

    def _look(self, cross: Any, x: Tensor, picture: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-attention of each caption's newest token to its picture: (B, K, heads, W / heads)."""
        attn, width = cross.attn, x.shape[-1]
        q = F.linear(cross.ln_1(x), attn.in_proj_weight[:width], attn.in_proj_bias[:width])
        q = q.view(-1, self.num, attn.num_heads, width // attn.num_heads).transpose(1, 2)
        return F.scaled_dot_product_attention(q, *picture).transpose(1, 2)
