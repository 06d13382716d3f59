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
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from cutline.errors import CutlineError


class Model(nn.Module):
    """What every model here has: `visual`, `logit_scale`, `encode_image`, `encode_text`, and where it came from.

    name: as given to `load` or `build`; model_cfg: open_clip's model config, from which `save` writes and a tokeniser
    is made.
    """

    name: str = ""
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
    """open_clip's CLIP (text tower at the top level)."""

    context_length: int
    transformer: Any
    token_embedding: Any
    positional_embedding: Any
    attn_mask: Any
    ln_final: Any

    @property
    def trimmable(self) -> bool:
        return self.attn_mask is not None and self.text_pool_type in ("argmax", "eos", "first")

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        n = _length(text, self.context_length, self.trimmable)
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[:n].to(dtype)  # (M, n, width)
        x = self.transformer(x, attn_mask=None if self.attn_mask is None else self.attn_mask[:n, :n])
        x = text_global_pool(self.ln_final(x), text, self.text_pool_type, eos_token_id=self.text_eos_id)
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else cast(Tensor, x)


class TextTower(TextTransformer):  # type: ignore[misc]
    """open_clip's TextTransformer with its causal mask cut to the input."""

    @property
    def trimmable(self) -> bool:
        causal = self.attn_mask is not None and self.cls_emb is None and not self.use_pad_mask
        return causal and self.pool_type in ("argmax", "eos", "first")

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        n = _length(text, self.context_length, self.trimmable)
        x, mask = super()._embeds(text)
        return x, mask[:n, :n] if self.trimmable else mask


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


def fast(model: nn.Module, channels_last: bool | None = None) -> nn.Module:
    """Set what makes a step faster and changes no value: channels-last convolution weights; returns `model`.

    channels_last: None turns it on for towers that are mostly convolutions (a ViT has one).
    """
    if channels_last is None:
        channels_last = sum(isinstance(m, nn.Conv2d) for m in model.modules()) > 8
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _length(text: Tensor, context: int, trimmable: bool) -> int:
    n = text.shape[1]
    if n > context or (n < context and not trimmable):
        kind = "at most" if trimmable else "exactly (its padding is attended to, so it cannot be trimmed)"
        raise CutlineError(f"this text tower takes {kind} {context} tokens and was given {n}.")
    return n
