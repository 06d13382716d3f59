"""Masked autoencoder (MAE, He et al., 2111.06377, section 3): what is left of a picture must tell the pixels of the rest.

    L = mean over masked patches i of  |decoder(encoder(visible patches))_i − (x_i − μ_i) / √(σ²_i + 10⁻⁶)|² / n

x_i are a patch's n pixel values (all three channels together), μ_i and σ²_i their mean and variance; the variance is the
unbiased one (divided by n − 1), as in the reference (facebookresearch/mae, models_mae.py, norm_pix_loss). Who knows
nothing of a patch says 0 and has L = 1 − 1/n; who knows its place says the mean over pictures, and has their variance V
there. Logged as `explained` is 1 − L/V: at 0 the encoder tells the decoder nothing. The spread of its features does not
show that alone: of every picture it sees other places.

Masked patches (75 %, drawn at random, as many in each picture) do not enter the encoder, so it does a quarter of its work
(`masked` puts a token in their place). What comes out after its last norm, the class token with it, goes through a linear
layer to the decoder, where a learned token stands for every masked patch; there positions are fixed sines and cosines.
The decoder is thrown away. Pixels are predicted where they are masked, and only there.

The reference's encoder has fixed positions as well and no norm before its first block; ours is the tower as it is, with
its learned ones (`pos_embed_type: sin_cos_2d` in a custom vision_cfg fixes them). Neither the projection to the joint
space nor a text tower takes part. Plain transformers can be shown a part of their patches: open_clip's own, timm's ViTs
(SigLIP, DINOv2, …) and EVA-02. With a patch embedding that sees beyond its patch (the convolutional stem of our CoCas)
the visible would tell of the masked, so it is refused.

Shapes: B pictures, N patches, V visible ones, M masked ones (N = V + M), C width of the tower, W of the decoder, n = 3·p².
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cutline.objectives import base
from cutline.objectives.collapse import spread
from cutline.objectives.contrastive import widen
from cutline.towers import load_encoder
from cutline.towers.model import Model
from cutline.towers.vit import NativeViT, TimmViT, check_hides, picked

LEAST = 0.01  # share of the pixels that is explained: below it training has collapsed, or not begun
EPS = 1e-6  # of the norms and of the pixels' variance


class Config(base.ObjectiveConfig):
    """ratio: share of a picture's patches that the encoder does not see. width, depth, heads: of the decoder (the
    paper's, table 1)."""

    ratio: float = Field(0.75, gt=0, lt=1)
    width: int = Field(512, ge=4, multiple_of=4)
    depth: int = Field(8, ge=1)
    heads: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> "Config":
        if self.width % self.heads:
            raise ValueError(f"a decoder of width {self.width} does not divide over {self.heads} heads")
        return self


class Decoder(nn.Module):
    """A light transformer from what the encoder says of the visible patches to the pixels of the masked ones."""

    positions: Tensor  # (N, W)

    def __init__(self, channels: int, grid: tuple[int, int], pixels: int, config: Config) -> None:
        super().__init__()
        width = config.width

        def norm(dim: int, **kwargs: object) -> nn.LayerNorm:
            return nn.LayerNorm(dim, eps=EPS, **kwargs)  # type: ignore[arg-type]

        self.enter = nn.Linear(channels, width)
        self.token = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        self.blocks = nn.ModuleList(
            Block(width, config.heads, qkv_bias=True, norm_layer=norm) for _ in range(config.depth)
        )
        self.norm = norm(width)
        self.pixels = nn.Linear(width, pixels)
        self.register_buffer("positions", build_sincos2d_pos_embed(list(grid), width), persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, seen: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """seen (B, P + V, C), places of the patches (B, V) and (B, M) → (B, M, n). The P class tokens have position 0."""
        x = self.enter(seen)
        prefix = x.shape[1] - visible.shape[1]
        patches = self.token.to(x.dtype).expand(len(x), len(self.positions), -1)
        places = visible[..., None].expand(-1, -1, x.shape[2])
        patches = patches.scatter(1, places, x[:, prefix:]) + self.positions.to(x.dtype)
        x = torch.cat([x[:, :prefix], patches], dim=1)
        for block in self.blocks:
            x = block(x)
        said: Tensor = self.pixels(self.norm(picked(x[:, prefix:], masked)))
        return said


class Objective(base.Objective):
    needs_text = False
    own_passes = True
    reads_pooled = False
    config: Config

    def __init__(self, config: Config, model: Model) -> None:
        super().__init__(config, model)
        encoder = load_encoder(model)
        check_hides(encoder, "mae", "shows the tower some of the patches and no others", apart=True)
        assert isinstance(encoder, NativeViT | TimmViT)
        self._encoder: tuple[NativeViT | TimmViT] = (encoder,)  # in a tuple: not a part of this module
        self.patch = encoder.multiple
        side = encoder.size // self.patch
        self.grid, patches = (side, side), side**2
        self.masked = min(max(round(config.ratio * patches), 1), patches - 1)
        self.decoder = Decoder(encoder.channels[-1], self.grid, 3 * self.patch**2, config)

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        """The loss. Logged: `explained`, and how different the means of the pictures' visible features are (`spread`)."""
        images = batch.views["image"]
        order = self.order(len(images), images.device)
        masked, visible = order[:, : self.masked], order[:, self.masked :]
        seen = self._encoder[0].shown(images, visible)
        said = widen(self.decoder(seen, visible, masked))
        with torch.autocast(images.device.type, enabled=False):
            told = normalised(patchify(images, self.grid, self.patch))
            loss = (said - picked(told, masked)).square().mean()
            self.logged = spread(seen[:, -visible.shape[1] :].mean(1))
            if len(images) > 1:
                self.logged["explained"] = 1 - loss.detach() / _variance(told).clamp(min=EPS)
        return {"pixels": loss}

    def order(self, pictures: int, device: torch.device) -> Tensor:
        """The patches of each picture in random order (B, N), of which the first `masked` are masked; drawn from torch's
        generator of this process, which a checkpoint keeps."""
        return torch.rand(pictures, self.grid[0] * self.grid[1], device=device).argsort(1)

    def after_step(self, model: nn.Module, step: int) -> None:
        explained = float(self.logged.get("explained", 1.0))
        self.collapse = ""
        if explained < LEAST:
            self.collapse = (
                f"the masked autoencoder tells nothing of what it sees: its pixels are no better than those of any picture at the "
                f"same places (explained {explained:.3f}). Where train.warmup is over, training has collapsed or not begun: lower "
                f"train.lr, lengthen train.warmup or set train.clip."
            )


def patchify(images: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, 3, H, W) → (B, N, n): a patch's pixels by row, column and channel. What no whole patch covers is left out, as
    the tower leaves it out."""
    (h, w), p = grid, patch
    x = images[..., : h * p, : w * p].reshape(-1, 3, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, h * w, 3 * p * p)


def normalised(patches: Tensor) -> Tensor:
    """(B, N, n): each patch with mean 0 and (unbiased) variance 1; an even one is 0."""
    n = patches.shape[-1]
    biased = (n - 1) / n  # `layer_norm` divides by the root of the biased variance
    return F.layer_norm(widen(patches), (n,), eps=EPS * biased) * math.sqrt(biased)


def _variance(x: Tensor) -> Tensor:
    """The unbiased variance over pictures, mean over places and pixels; `Tensor.var` takes ten times as long on a CPU."""
    return (x.square().mean() - x.mean(0).square().mean()) * len(x) / (len(x) - 1)
