"""The model: open_clip's own classes, with text towers that also take captions shorter than the context.

open_clip pads every caption to the context (77) and its encoders accept no other length. Under a causal mask nothing
after the end-of-text token reaches it, so cutting the padding off leaves the embedding as it is and saves most of the
text tower's time. CoCa's class token comes after the padding, which is masked, so it needs only to keep its place.
Where padding is attended to (no causal mask: MobileCLIP's S towers, SigLIP), cutting would change the embedding; those
towers refuse short input, and `Model.trimmable` says so.

Shapes: B pictures, M texts, T tokens, N tokens of a picture, W width of the text tower, D joint width.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from cutline.errors import ConfigError, CutlineError
from cutline.towers.patches import add_second_class, class_tokens
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

    @property
    def gives_tokens(self) -> bool:
        """Whether it has a decoder that writes text, and the methods of `CoCaModel` for it."""
        return False

    @property
    def class_tokens(self) -> int:
        """2 where the image tower has a second class token, and `encode_classes` of `ClipModel` for it."""
        return 1


class ClipModel(CLIP, Model):  # type: ignore[misc]
    """open_clip's CLIP (text tower at the top level). In eval mode its image embeddings are open_clip's to the bit; in
    training the last blocks are finished for the pooled token alone (`towers.pooling`).

    class_tokens: 2 for TIPS's second one (`towers.patches`). Ours alone: open_clip refuses it.
    """

    visual: Any
    context_length: int
    transformer: Any
    token_embedding: Any
    positional_embedding: Any
    attn_mask: Any
    ln_final: Any

    def __init__(self, *args: Any, class_tokens: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if class_tokens > 1:
            add_second_class(self.visual)

    @property
    def class_tokens(self) -> int:
        return class_tokens(self.visual)

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

    def encode_classes(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Both class tokens of a tower that has two: (B, 3, H, W) → (B, 2, D)."""
        x: Tensor = self.visual.both(image)
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
        causal = self.attn_mask is not None and not self.use_pad_mask
        return causal and (self.cls_emb is not None or self.pool_type in ("argmax", "eos", "first"))

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        n = _length(text, self.context_length, self.trimmable)
        if self.cls_emb is not None and n < self.context_length:
            return self._embeds_before_class(text, n)
        x, mask = super()._embeds(text)
        return x, mask[:n, :n] if self.trimmable and self.cls_emb is None else mask

    def _embeds_before_class(self, text: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """CoCa's class token behind a trimmed text: at the position, and behind the mask, that it has untrimmed."""
        x = torch.cat([self.token_embedding(text), self.cls_emb.expand(len(text), 1, -1)], dim=1)
        positions = torch.cat([self.positional_embedding[:n], self.positional_embedding[-1:]])
        mask = self.attn_mask[: n + 1, : n + 1] + self._build_additive_mask(text, n + 1, x.dtype)
        dtype = self.transformer.get_cast_dtype()
        return x.to(dtype) + positions.to(dtype), mask

    def forward(self, text: Tensor) -> Any:
        n = text.shape[1]
        if self.cls_emb is not None and n < self.context_length:
            # Padding must follow every text: by it the mask of released CoCa weights hides the class token from itself.
            output = super().forward(F.pad(text, (0, 1), value=self.pad_id))
            return (output[0], output[1][:, :n]) if self.output_tokens else output
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
    """open_clip's CoCa: a text tower without cross-attention, and a decoder behind it that looks at the picture.

    open_clip leaves the decoder's output layer as the memory was; here it starts as its own `init_parameters` means to.

    conv_stem: widths of convolutions instead of the patch embedding, see `conv_stem`. Ours alone: open_clip refuses it.
    """

    visual: Any
    text: Any
    text_decoder: Any
    _encode_image: Any
    _encode_text: Any

    def __init__(self, *args: Any, conv_stem: Sequence[int] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if conv_stem:
            self.visual.conv1 = stem(conv_stem, self.visual.conv1)
        if type(self.text) is TextTransformer:
            self.text.__class__ = TextTower
        decoder = self.text_decoder
        depth = (2 * decoder.layers) ** -0.5
        for block in (*decoder.resblocks, *decoder.cross_attn):
            nn.init.normal_(block.attn.in_proj_weight, std=decoder.width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=decoder.width**-0.5 * depth)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * decoder.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=decoder.width**-0.5 * depth)
        nn.init.normal_(decoder.text_projection, std=decoder.width**-0.5)

    @property
    def trimmable(self) -> bool:
        return isinstance(self.text, TextTower) and self.text.trimmable

    @property
    def gives_tokens(self) -> bool:
        """A text tower that sees what comes after a token (RoBERTa) cannot be taught to write it."""
        return isinstance(self.text, TextTower) and self.text.attn_mask is not None

    def image_and_tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised pictures → the embedding, L2-normalised, (B, D), and what the decoder sees, (B, N, W)."""
        return cast(tuple[Tensor, Tensor], self._encode_image(image))

    def text_and_tokens(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(M, T) token ids → the embedding, L2-normalised, (M, D), and a vector for each token, (M, T, W)."""
        return cast(tuple[Tensor, Tensor], self._encode_text(text))

    def decode(self, image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
        """States (M, T, W) from which `text_decoder.text_projection` gives the logits of each next token.

        image_tokens: (M, N, W), of the picture of each text; text_tokens: (M, T, W).
        """
        decoder, n = self.text_decoder, text_tokens.shape[1]
        x, mask = text_tokens, self.text_decoder.attn_mask[:n, :n]
        for block, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
            x = cross(block(x, attn_mask=mask), k_x=image_tokens, v_x=image_tokens)
        return cast(Tensor, decoder.ln_final(x))


def stem(widths: Sequence[int], patches: nn.Conv2d) -> nn.Sequential:
    """Convolutions that halve the picture once for each width, to the grid and the channels of `patches`.

    A transformer learns from few pictures what is near what only slowly; a convolutional stem knows it from the start
    (Xiao et al., 2106.14881, section 4). Each stage is 3 × 3 of stride 2 and 3 × 3, with batch norm and ReLU.
    """
    if patches.stride != (2 ** len(widths),) * 2:
        raise ConfigError(f"conv_stem has {len(widths)} widths, so the patch size must be {2 ** len(widths)}.")
    layers: list[nn.Module] = []
    before = patches.in_channels
    for width in widths:
        for stride in (2, 1):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
    return nn.Sequential(*layers, nn.Conv2d(before, patches.out_channels, 1))


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
