"""Vectors of the cells of a picture in the space of texts, without training: the last block of a ViT computed again.

CLIP trains the pooled token only. The cells' own tokens pass the same norm and projection, but the last block's attention
mixes them over the whole picture. Each method puts other attention there. With x the tokens that enter the last block, its
q, k and v of one head of width d, from ln_1(x), and out and mlp the block's projections (with its layer scale):

    plain      softmax(q kᵀ/√d) v                              kept     CLIP
    maskclip   v                                               kept     MaskCLIP (2112.01071), as its repository's ViT
    sclip      (softmax(q qᵀ/√d) + softmax(k kᵀ/√d)) v         kept     SCLIP (2312.01597), equation 4
    clearclip  softmax(q qᵀ/√d) v                              alone    ClearCLIP (2407.12442)
    naclip     softmax(k kᵀ/√d + exp(−|p − p'|²/(2·5²))) v     alone    NACLIP (2404.08181); p: cells' places
    proxyclip  softmax((S − 1.2 mean S)·3, < 0 → −∞) v         alone    ProxyCLIP (2408.04883)

    kept:  y = x + out(…), y + mlp(ln_2(y))         alone: out(…)

S: the cosines of the last map of a second encoder (DINO in the paper), whose grid the result has; the mean is each
picture's own, and a cell always sees itself. NACLIP's prefix tokens have no neighbours, so a bias of 0.

surgery is CLIP Surgery's (2304.05653) second path through the last half of the blocks, 6 of 12: it starts as the tokens
that enter them and adds out(softmax(v vᵀ/√d) v) of each, without MLPs, where v is of the unchanged first path. Its
subtraction of redundant features is the same for all classes of a cell and changes no choice, so it is left out.

The tokens then pass the tower's last norm, pooling and projection, each cell as if it were the only one: of attention
pooling (SigLIP, CoCa) remain the value and output projections and what follows, as in MaskCLIP.

Shapes: B pictures, T tokens of which P are no cells, h × w cells, C width, D joint width.
"""

import math
from typing import Any, Literal, get_args

import torch
from open_clip.transformer import ResidualAttentionBlock
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from cutline.errors import ConfigError, CutlineError
from cutline.towers.encoder import Encoder
from cutline.towers.hierarchical import ResNetEncoder
from cutline.towers.vit import NativeViT, TimmViT

Method = Literal["plain", "maskclip", "sclip", "surgery", "naclip", "clearclip", "proxyclip"]
KEPT = ("maskclip", "sclip")  # methods that leave the block's residuals and MLP
STD = 5.0  # of NACLIP's neighbours, in cells
BETA, GAMMA = 1.2, 3.0  # of ProxyCLIP


class DenseTower:
    """The image tower of `encoder`, read by `method`; proxy: the second encoder of "proxyclip".

    stride: pixels of a cell. Raises `CutlineError` for a tower in which the method has nothing to change.
    """

    def __init__(self, encoder: Encoder, method: Method, proxy: Encoder | None = None) -> None:
        if (method == "proxyclip") != (proxy is not None):
            raise ConfigError("proxy names the second encoder of method=proxyclip: give both, or neither.")
        self.encoder, self.method, self.proxy = encoder, method, proxy
        self.view = _view(encoder)
        own = "maskclip" if isinstance(encoder, ResNetEncoder) else "plain"
        if self.view is None and method != own:
            raise CutlineError(
                f"{encoder.name} is no plain ViT of open_clip's or timm's own blocks, so method={method} finds no last block "
                f"to compute again. Use method={own}, or one of {', '.join(get_args(Method))} with a ViT such as ViT-B-16."
            )
        self.stride = encoder.multiple if proxy is None else proxy.multiple
        self.multiple = math.lcm(encoder.multiple, self.stride)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) → (B, D, ceil(H / stride), ceil(W / stride)), not normalised."""
        height, width = images.shape[-2:]
        if self.view is None:
            return self.encoder.project(self.encoder.last(images))
        images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        grid = (images.shape[-2] // self.encoder.multiple, images.shape[-1] // self.encoder.multiple)
        x = self._tokens(self.view, images, grid)
        cells = self.view.cells(x)
        grid = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        out = cells.transpose(1, 2).reshape(len(cells), -1, *grid)
        return out[..., : -(-height // self.stride), : -(-width // self.stride)]

    def _tokens(self, view: "_Native | _Timm", images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The cells' tokens after the last block, (B, h·w, C)."""
        x = view.embed(images)
        if self.method == "surgery":
            return _surgery(view, x)[:, view.prefix :]
        *before, block = view.blocks
        for b in before:
            x = b(x)
        if self.method == "plain":
            x = block(x)
        else:
            y = view.out(block, self._attend(view, block, x, images, grid))
            if self.method in KEPT:
                y = x + y
                y = y + view.mlp(block, y)
            if self.method == "proxyclip":
                return y
            x = y
        return x[:, view.prefix :]

    def _attend(self, view: "_Native | _Timm", block: Any, x: Tensor, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The heads' outputs (B, heads, T, d), of "proxyclip" of its cells alone."""
        x = view.norm(block, x)
        v = view.project(block, x, "v")
        if self.method == "maskclip":
            return v
        if self.proxy is not None:
            return self._proxied(self.proxy, v[:, :, view.prefix :], images, grid)
        if self.method == "naclip":
            bias = F.pad(neighbours(grid, STD, x), (view.prefix, 0, view.prefix, 0))
            k = view.project(block, x, "k")
            return F.scaled_dot_product_attention(k, k, v, attn_mask=bias)
        of = [view.project(block, x, part) for part in {"sclip": "qk", "clearclip": "q"}[self.method]]
        return torch.stack([F.scaled_dot_product_attention(s, s, v) for s in of]).sum(0)

    def _proxied(self, proxy: Encoder, v: Tensor, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention by what the second encoder holds for alike, on its own grid; values (B, heads, h·w, d) are resized to it."""
        mean, std, own_mean, own_std = (
            images.new_tensor(c).view(3, 1, 1) for c in (self.encoder.mean, self.encoder.std, proxy.mean, proxy.std)
        )
        seen = proxy.last((images * std + mean - own_mean) / own_std)
        own = (seen.shape[-2], seen.shape[-1])
        unit = F.normalize(seen.flatten(2), dim=1)
        s = unit.transpose(1, 2) @ unit
        s = (s - BETA * s.mean((1, 2), keepdim=True)) * GAMMA
        hidden = (s < 0) & ~torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
        attention = s.masked_fill(hidden, -torch.inf).softmax(-1)
        maps = v.transpose(2, 3).reshape(len(v), -1, *grid)
        maps = F.interpolate(maps, own, mode="bilinear", align_corners=False)
        values = maps.reshape(len(v), v.shape[1], v.shape[3], -1).transpose(2, 3)
        return attention[:, None] @ values


def neighbours(grid: tuple[int, int], std: float, like: Tensor) -> Tensor:
    """exp(−|p − p'|² / (2 std²)) of every pair of cells: (h·w, h·w), of `like`'s kind."""
    h, w = grid
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (h, w))
    places = torch.cartesian_prod(rows, columns).view(h * w, 2)
    return (-(places[:, None] - places).square().sum(-1) / (2 * std**2)).exp()


def _surgery(view: "_Native | _Timm", x: Tensor) -> Tensor:
    blocks = list(view.blocks)
    first = len(blocks) // 2
    for block in blocks[:first]:
        x = block(x)
    second = x
    for block in blocks[first:]:
        v = view.project(block, view.norm(block, x), "v")
        second = second + view.out(block, F.scaled_dot_product_attention(v, v, v))
        x = block(x) if block is not blocks[-1] else x  # nobody reads the first path's end
    return second


def _view(encoder: Encoder) -> "_Native | _Timm | None":
    """What takes the encoder's blocks apart; None for a tower without blocks that could be."""
    if isinstance(encoder, NativeViT):
        blocks, transformer = encoder.visual.transformer.resblocks, encoder.visual.transformer
        fits = transformer.batch_first and len(blocks) > 0 and all(type(b) is ResidualAttentionBlock for b in blocks)
        return _Native(encoder) if fits and getattr(encoder.visual, "attn_pool_contrastive", None) is None else None
    if isinstance(encoder, TimmViT) and isinstance(encoder.visual.trunk, VisionTransformer):
        trunk = encoder.visual.trunk
        fits = all(type(b) is Block and type(b.attn) is Attention and b.attn.gate is None for b in trunk.blocks)
        return _Timm(encoder) if fits and getattr(trunk.attn_pool, "pos_embed", None) is None else None
    return None


class _Native:
    """The parts of open_clip's VisionTransformer."""

    def __init__(self, encoder: NativeViT) -> None:
        self.encoder, self.visual, self.prefix = encoder, encoder.visual, encoder.prefix
        self.blocks = self.visual.transformer.resblocks

    def embed(self, images: Tensor) -> Tensor:
        return self.encoder.embed(images, dropout=False)[0]

    def norm(self, block: Any, x: Tensor) -> Tensor:
        out: Tensor = block.ln_1(x)
        return out

    def project(self, block: Any, x: Tensor, part: str) -> Tensor:
        """Queries, keys or values ("q", "k", "v") of normalised tokens: (B, heads, T, d)."""
        return _heads(x, block.attn.in_proj_weight, block.attn.in_proj_bias, part, block.attn.num_heads)

    def out(self, block: Any, heads: Tensor) -> Tensor:
        out: Tensor = block.ls_1(block.attn.out_proj(heads.transpose(1, 2).flatten(2)))
        return out

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        out: Tensor = block.ls_2(block.mlp(block.ln_2(x)))
        return out

    def cells(self, x: Tensor) -> Tensor:
        """Tokens after the last block (B, N, C) → (B, N, D)."""
        pool = self.visual.attn_pool
        return _projected(self.encoder, self.visual.ln_post(x) if pool is None else pool.ln_k(x))


class _Timm:
    """The parts of timm's VisionTransformer."""

    def __init__(self, encoder: TimmViT) -> None:
        self.encoder, self.trunk = encoder, encoder.visual.trunk
        self.blocks, self.prefix = self.trunk.blocks, int(self.trunk.num_prefix_tokens)

    def embed(self, images: Tensor) -> Tensor:
        out: Tensor = self.trunk.norm_pre(self.trunk._pos_embed(self.trunk.patch_embed(images)))
        return out

    def norm(self, block: Any, x: Tensor) -> Tensor:
        out: Tensor = block.norm1(x)
        return out

    def project(self, block: Any, x: Tensor, part: str) -> Tensor:
        attention = block.attn
        y = _heads(x, attention.qkv.weight, attention.qkv.bias, part, attention.num_heads)
        norm = {"q": attention.q_norm, "k": attention.k_norm}.get(part)
        return y if norm is None else norm(y)

    def out(self, block: Any, heads: Tensor) -> Tensor:
        out: Tensor = block.ls1(block.attn.proj(block.attn.norm(heads.transpose(1, 2).flatten(2))))
        return out

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        out: Tensor = block.ls2(block.mlp(block.norm2(x)))
        return out

    def cells(self, x: Tensor) -> Tensor:
        return _projected(self.encoder, self.trunk.fc_norm(self.trunk.norm(x)))


def _projected(encoder: Encoder, x: Tensor) -> Tensor:
    """`Encoder.project` of a list of cells, (B, N, C) → (B, N, D)."""
    return encoder.project(x.mT[..., None])[..., 0].mT


def _heads(x: Tensor, weight: Tensor, bias: Tensor | None, part: str, heads: int) -> Tensor:
    which = "qkv".index(part)
    y = F.linear(x, weight.chunk(3)[which], None if bias is None else bias.chunk(3)[which])
    return y.reshape(*y.shape[:2], heads, -1).transpose(1, 2)
