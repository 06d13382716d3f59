"""The model: open_clip's own classes, with text towers that also take captions shorter than the context.

open_clip pads every caption to the context (77) and its encoders accept no other length. Under a causal mask nothing
after the end-of-text token reaches it, so cutting the padding off leaves the embedding as it is and saves most of the
text tower's time. Where padding is attended to (no causal mask: MobileCLIP's S towers, SigLIP) or a class token follows
it (CoCa), cutting would change the embedding; those towers refuse short input, and `Model.trimmable` says so.

Shapes: B pictures, M texts, T tokens, D joint width.
"""

from typing import Any, cast

import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from cutline.errors import CutlineError
from cutline.towers.pooling import finishes_one, one_token


class Model(nn.Module):
    """What every model here has: `visual`, `logit_scale`, `encode_image`, `encode_text`, and where it came from.

    name: as given to `load` or `build`; model_cfg: open_clip's model config, from which `save` writes and a tokeniser
    is made; tokenizer_folder: where the files of its Hugging Face tokeniser are, if it came with them.
    """

    name: str = ""
    tokenizer_folder: str = ""
    model_cfg: dict[str, Any]
    visual: nn.Module
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(B, 3, H, W) normalised pictures → (B, D)."""
        raise NotImplementedError

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(M, T) token ids → (M, D)."""
        raise NotImplementedError

    @property
    def trimmable(self) -> bool:
        """Whether captions may be cut after their end-of-text token without changing an embedding."""
        return False


class ClipModel(CLIP, Model):  # type: ignore[misc]
    """open_clip's CLIP (text tower at the top level). In eval mode its image embeddings are open_clip's to the bit; in
    training the last blocks are finished for the pooled token alone (`towers.pooling`)."""

    visual: Any
    context_length: int
    transformer: Any
    token_embedding: Any
    positional_embedding: Any
    attn_mask: Any
    ln_final: Any

    @property
    def trimmable(self) -> bool:
        return self.attn_mask is not None and self.text_pool_type in ("argmax", "eos", "first")

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        v = self.visual
        if self.training and _pools_class_token(v) and finishes_one(v.transformer):
            x = v._embeds(image)
            x = v.ln_post(one_token(v.transformer, x, torch.zeros(len(x), dtype=torch.long, device=x.device)))
            x = _project(x, v.proj)
        else:
            x = v(image)
        return F.normalize(x, dim=-1) if normalize else x

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        n = _length(text, self.context_length, self.trimmable)
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[:n].to(dtype)  # (M, n, width)
        mask = None if self.attn_mask is None else self.attn_mask[:n, :n]
        if self.training and self.text_pool_type == "argmax" and finishes_one(self.transformer):
            x = self.ln_final(one_token(self.transformer, x, text.argmax(dim=-1), mask))
        else:
            x = self.ln_final(self.transformer(x, attn_mask=mask))
            x = text_global_pool(x, text, self.text_pool_type, eos_token_id=self.text_eos_id)
        x = _project(x, self.text_projection)
        return F.normalize(x, dim=-1) if normalize else x


class TextTower(TextTransformer):  # type: ignore[misc]
    """open_clip's TextTransformer with its causal mask cut to the input, and its last block as in `ClipModel`."""

    @property
    def trimmable(self) -> bool:
        causal = self.attn_mask is not None and self.cls_emb is None and not self.use_pad_mask
        return causal and self.pool_type in ("argmax", "eos", "first")

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        n = _length(text, self.context_length, self.trimmable)
        x, mask = super()._embeds(text)
        return x, mask[:n, :n] if self.trimmable else mask

    def forward(self, text: Tensor) -> Any:
        plain = self.pool_type == "argmax" and self.cls_emb is None and not self.use_pad_mask and not self.output_tokens
        if not (self.training and plain and finishes_one(self.transformer)):
            return super().forward(text)
        x, mask = self._embeds(text)
        return _project(self.ln_final(one_token(self.transformer, x, text.argmax(dim=-1), mask)), self.text_projection)


class CustomTextModel(CustomTextCLIP, Model):  # type: ignore[misc]
    """open_clip's CustomTextCLIP (text tower under `text`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.text) is TextTransformer:
            self.text.__class__ = TextTower  # same parameters and state; only `_embeds` differs

    @property
    def trimmable(self) -> bool:
        return isinstance(self.text, TextTower) and self.text.trimmable


class CoCaModel(CoCa, Model):  # type: ignore[misc]
    """open_clip's CoCa."""


class ImageTower(nn.Module):
    """A timm model without a classifier, laid out like open_clip's TimmModel (`trunk`)."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.trunk(image))


class ImageModel(Model):
    """A timm image tower alone: no text, no joint space; `encode_image` gives timm's pooled feature."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.visual = ImageTower(trunk)
        self.logit_bias = None
        self.model_cfg = {}

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        x = cast(Tensor, self.visual(image))
        return F.normalize(x, dim=-1) if normalize else x

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        raise CutlineError(f"{self.name} is an image tower without a text tower: use an open_clip model for texts.")


def fast(model: nn.Module) -> nn.Module:
    """Lay `model` out for speed on the device it is on; values stay. Returns `model`.

    Towers that are mostly convolutions get channels-last weights on a GPU. Not on the CPU: there it gains nothing, and
    the weight gradient of a strided 1×1 convolution on three channels, which MobileCLIP's towers begin with, corrupts
    memory in channels-last (torch 2.15).
    """
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    if convolutions > 8 and all(p.is_cuda for p in model.parameters()):
        model.to(memory_format=torch.channels_last)
    return model


def _project(x: Tensor, projection: Any) -> Tensor:
    if projection is None:
        return x
    return cast(Tensor, projection(x) if isinstance(projection, nn.Linear) else x @ projection)


def _pools_class_token(visual: Any) -> bool:
    plain = isinstance(visual, VisionTransformer) and visual.attn_pool is None and not visual.output_tokens
    return plain and visual.pool_type == "tok"


def _length(text: Tensor, context: int, trimmable: bool) -> int:
    n = text.shape[1]
    if n > context or (n < context and not trimmable):
        kind = "at most" if trimmable else "exactly (its padding is attended to, so it cannot be trimmed)"
        raise CutlineError(f"this text tower takes {kind} {context} tokens and was given {n}.")
    return n
