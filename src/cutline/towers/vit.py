"""Encoders of plain vision transformers: open_clip's own, and timm's (ViT, DeiT, EVA, SigLIP, MobileCLIP-B, …).

Positional embeddings are interpolated to the grid of the input (bicubic, antialiased, in float32), the class and
register tokens' own entries left alone. open_clip's tower takes one size only, so its embedding step is redone here;
timm's towers can take any size once told to, and keep their values at their own size.

Shapes: B pictures, h × w patches, N = h·w, P prefix tokens (class, registers), C width, D joint width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from timm.layers import Format, PatchEmbed, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cutline.errors import ConfigError, CutlineError
from cutline.towers.encoder import TAPS, Encoder, joint_width, trunk_layers
from cutline.towers.model import Model
from cutline.towers.patches import class_tokens, with_second

Grid = tuple[int, int]
Replace = Callable[[Tensor], Tensor]


def even_taps(depth: int, taps: tuple[int, ...] | None) -> list[int]:
    """Block numbers of the maps: as given, or `TAPS` evenly spaced ones that end with the last block."""
    if taps is None:
        return [-(-depth * (i + 1) // TAPS) - 1 for i in range(TAPS)]
    if not taps or list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= depth:
        raise ConfigError(f"taps {taps} must be rising block numbers from 0 to {depth - 1}.")
    return list(taps)


def is_plain_vit(trunk: Any) -> bool:
    """Whether a timm model keeps one resolution through a list of blocks."""
    info = getattr(trunk, "feature_info", None) or []
    return hasattr(trunk, "patch_embed") and hasattr(trunk, "blocks") and len({f["reduction"] for f in info}) == 1


class NativeViT(Encoder):
    """open_clip's VisionTransformer, with any pooling it has (class token, average, attention)."""

    class_token = True

    def __init__(self, model: Model, taps: tuple[int, ...] | None = None) -> None:
        super().__init__(model)
        height, width = self.visual.patch_size
        if height != width:
            raise ConfigError(f"patches must be square for an Encoder, not {height}×{width}.")
        self.patch = self.multiple = int(height)
        self.num_layers = len(self.visual.transformer.resblocks)
        self.taps = even_taps(self.num_layers, taps)
        self.strides = (self.patch,) * len(self.taps)
        self.channels = (int(self.visual.transformer.width),) * len(self.taps)
        self.width = joint_width(self.visual)
        self.prefix = class_tokens(self.visual)

    def embed(self, x: Tensor, dropout: bool, replace: Replace | None = None) -> tuple[Tensor, Grid]:
        """Tokens that enter the first block, (B, P + N, C), and the grid; patch dropout only where asked for.

        replace: changes the patches (B, N, C) before they get their positions.
        """
        v = self.visual
        x = v.conv1(x)
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        x = x if replace is None else replace(x)
        x = torch.cat([v.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        positions = resample_abs_pos_embed(v.positional_embedding[None], grid, v.grid_size, num_prefix_tokens=1)
        x = with_second(v, x + positions.to(x.dtype))
        return cast(Tensor, v.ln_pre(v.patch_dropout(x) if dropout else x)), grid

    def _maps(self, x: Tensor) -> list[Tensor]:
        return self._maps_and_classes(x)[0]

    def _maps_and_classes(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x, grid = self.embed(x, dropout=False)
        tokens = [x] * len(self.taps)  # of a stem of convolutions alone
        if self.num_layers:
            _, found = self.visual.transformer.forward_intermediates(x, indices=sorted(set(self.taps)), stop_early=True)
            at = dict(zip(sorted(set(self.taps)), found, strict=True))  # towers of fewer than 4 blocks repeat a tap
            tokens = [at[t] for t in self.taps]
        return [_to_map(t[:, self.prefix :], grid) for t in tokens], [t[:, 0] for t in tokens]

    def _last(self, x: Tensor) -> Tensor:
        x, grid = self.embed(x, dropout=False)
        return _to_map(self.last_norm(self.visual.transformer(x)[:, self.prefix :]), grid)

    def last_norm(self, tokens: Tensor) -> Tensor:
        """What comes out of the last block (B, N, C), normed as the pooling has it."""
        pool = self.visual.attn_pool
        normed: Tensor = (self.visual.ln_post if pool is None else pool.ln_k)(tokens)
        return normed

    def _pooled(self, x: Tensor) -> Tensor:
        x, _ = self.embed(x, dropout=True)
        x, _ = self.visual._pool(self.visual.transformer(x))
        return cast(Tensor, x if self.visual.proj is None else x @ self.visual.proj)

    def pooled_and_last(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self._parts_ways(images):
            return super().pooled_and_last(images)
        pooled, x = self.replaced(images)
        return pooled, _to_map(self.last_norm(x), _grid(images, self.multiple))

    def replaced(self, images: Tensor, replace: Replace | None = None) -> tuple[Tensor, Tensor]:
        """`pooled` of normalised pictures that need no padding, of all patches and those changed by `replace` as `embed` does
        it; and the patches after the last block, before the last norm, (B, N, C)."""
        v = self.visual
        x = v.transformer(self.embed(images, dropout=False, replace=replace)[0])
        pooled, _ = v._pool(x)
        return pooled if v.proj is None else pooled @ v.proj, x[:, self.prefix :]

    def shown(self, images: Tensor, places: Tensor) -> Tensor:
        """Prefix tokens and the patches `places` (B, V), which alone enter the blocks, after the last norm: (B, P + V, C). Of
        normalised pictures that need no padding; all their patches are embedded, which costs next to nothing."""
        x, _ = self.embed(images, dropout=False)
        return self.last_norm(self.visual.transformer(_kept(x, places, self.prefix)))

    def classes_and_last(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `pooled_and_last`, of a tower with two class tokens: (B, 2, D) and the map."""
        v = self.visual
        if self._parts_ways(images):
            return v.both(images), self.last(images)
        x, grid = self.embed(images, dropout=False)
        x = v.transformer(x)
        return v.project(x[:, :2]), _to_map(v.ln_post(x[:, 2:]), grid)

    def _parts_ways(self, images: Tensor) -> bool:
        """Whether the embedding and the map are of different tokens: with dropped patches, or of a padded picture."""
        dropping = self.visual.training and not isinstance(self.visual.patch_dropout, nn.Identity)
        return dropping or self._pad(images) is not images

    def project(self, last: Tensor) -> Tensor:
        v, x = self.visual, last.movedim(1, -1)
        if getattr(v, "attn_pool_contrastive", None) is not None:
            raise CutlineError(f"{self.name} pools by attention twice: its cells have no projection of their own.")
        if v.attn_pool is not None:
            attention = v.attn_pool.attn
            joint = attention.in_proj_weight
            weight = attention.v_proj_weight if joint is None else joint.chunk(3)[2]
            x = v.ln_post(attention.out_proj(F.linear(x, weight, attention.in_proj_bias.chunk(3)[2])))
        return cast(Tensor, x if v.proj is None else x @ v.proj).movedim(-1, 1)

    def layer_of(self, parameter_name: str) -> int:
        name = parameter_name.removeprefix("visual.")
        if name.startswith("transformer.resblocks."):
            return int(name.split(".")[2]) + 1
        stem = ("conv1", "class_embedding", "second_class", "positional_embedding", "ln_pre")
        return 0 if name.startswith(stem) else self.num_layers


def sees_patches_alone(encoder: "NativeViT | TimmViT") -> bool:
    """Whether the embedding of a patch tells of no other (behind a convolutional stem, the visible tell of the hidden)."""
    if isinstance(encoder, NativeViT):
        return isinstance(encoder.visual.conv1, nn.Conv2d)
    return type(encoder.visual.trunk.patch_embed) is PatchEmbed


def check_hides(encoder: Encoder, objective: str, does: str, apart: bool = False) -> None:
    """Raise `ConfigError` for an encoder that is no plain transformer, sees more than a patch at a time, or has one patch: an
    objective that hides patches cannot take it. apart: it must take some patches without the others, too."""
    takes = isinstance(encoder, NativeViT | TimmViT) and sees_patches_alone(encoder)
    if takes and apart and isinstance(encoder, TimmViT):  # others (BEiT, SAM) have biases or windows for the whole grid
        takes = isinstance(encoder.visual.trunk, VisionTransformer | Eva)
    if not takes:
        raise ConfigError(
            f"objectives.{objective} {does}, which only vision transformers of open_clip and timm with a patch embedding can "
            f"take, and {encoder.name} is another: train ViT-B-16 or a preset such as vit-tiny-64, or take objectives.silc, which "
            "works with every tower."
        )
    if encoder.size < 2 * encoder.multiple:
        raise ConfigError(
            f"objectives.{objective}: {encoder.name} makes one patch of a picture, so none can be masked."
        )


class TimmViT(Encoder):
    """A timm vision transformer, inside open_clip's TimmModel or alone."""

    def __init__(self, model: Model, taps: tuple[int, ...] | None = None) -> None:
        super().__init__(model)
        trunk = self.visual.trunk
        self.any_size = _allow_any_size(trunk)
        self.class_token = getattr(trunk, "cls_token", None) is not None
        self.patch = self.multiple = int(trunk.feature_info[-1]["reduction"])
        self.depth = len(trunk.blocks)
        self.taps = even_taps(self.depth, taps)
        self.strides = (self.patch,) * len(self.taps)
        self.channels = (int(trunk.embed_dim),) * len(self.taps)
        self.width = joint_width(self.visual)
        self._layers, self.num_layers = trunk_layers(trunk, [n for n, _ in trunk.named_parameters()])

    @contextmanager
    def _fitted(self, x: Tensor, dense: bool) -> Iterator[Any]:
        """The trunk, made ready for pictures of `x`'s size; a dense map also needs every patch (no patch dropout)."""
        trunk = self.visual.trunk
        embed, rope = trunk.patch_embed, getattr(trunk, "rope", None)
        dropout = getattr(trunk, "patch_drop", None) or nn.Identity()
        if not self.any_size and tuple(x.shape[-2:]) != tuple(embed.img_size):
            size = "×".join(str(s) for s in embed.img_size)
            raise CutlineError(f"{self.name} ({type(trunk).__name__}) takes pictures of {size} only: resize them.")
        cached = getattr(rope, "feat_shape", None) is not None  # rotary embeddings kept for one grid
        was = dropout.training
        try:
            if cached and rope is not None:
                rope.update_feat_shape(tuple(embed.dynamic_feat_size(tuple(x.shape[-2:]))))
            if was and dense:
                dropout.eval()
            yield trunk
        finally:
            if cached and rope is not None:
                rope.update_feat_shape(tuple(embed.grid_size))
            if was:
                dropout.train()

    def _tokens(self, x: Tensor, taps: list[int], norm: bool, prefix: bool = False) -> dict[int, Any]:
        """The maps of these blocks; prefix: each with the tokens before its patches, (B, P, C)."""
        with self._fitted(x, dense=True) as trunk:
            maps = trunk.forward_intermediates(
                x, indices=taps, return_prefix_tokens=prefix, norm=norm, stop_early=True, intermediates_only=True
            )
        return dict(zip(taps, maps, strict=True))

    def _maps(self, x: Tensor) -> list[Tensor]:
        at = self._tokens(x, sorted(set(self.taps)), norm=False)
        return [at[t] for t in self.taps]

    def _maps_and_classes(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        if not self.class_token:
            return super()._maps_and_classes(x)
        at = self._tokens(x, sorted(set(self.taps)), norm=False, prefix=True)
        return [at[t][0] for t in self.taps], [at[t][1][:, 0] for t in self.taps]

    def _last(self, x: Tensor) -> Tensor:
        x = cast(Tensor, self._tokens(x, [self.depth - 1], norm=True)[self.depth - 1])
        fc_norm: Any = getattr(self.visual.trunk, "fc_norm", None)
        if isinstance(fc_norm, nn.Module):  # the last norm of towers that pool by averaging
            x = fc_norm(x.movedim(1, -1)).movedim(-1, 1)
        return x

    def _pooled(self, x: Tensor) -> Tensor:
        with self._fitted(x, dense=False):
            pooled: Tensor = self.visual(x)
        return pooled

    def pooled_and_last(self, images: Tensor) -> tuple[Tensor, Tensor]:
        trunk: Any = self.visual.trunk
        dropping = trunk.training and not isinstance(getattr(trunk, "patch_drop", None) or nn.Identity(), nn.Identity)
        if dropping or self._pad(images) is not images:
            return super().pooled_and_last(images)
        with self._fitted(images, dense=True):
            x = trunk.forward_features(images)
            pooled = getattr(self.visual, "head", nn.Identity())(trunk.forward_head(x))
        grid = _grid(images, self.multiple)
        norm = getattr(trunk, "fc_norm", None) or nn.Identity()
        return pooled, _to_map(norm(x[:, -math.prod(grid) :]), grid)

    def last_norm(self, tokens: Tensor) -> Tensor:
        """As `NativeViT.last_norm`; of towers that pool by averaging with the norm that comes after."""
        trunk = self.visual.trunk
        after: Any = getattr(trunk, "fc_norm", None) or nn.Identity()
        normed: Tensor = after(trunk.norm(tokens))
        return normed

    def replaced(self, images: Tensor, replace: Replace | None = None) -> tuple[Tensor, Tensor]:
        """As `NativeViT.replaced`."""

        def put(module: nn.Module, inputs: Any, found: Tensor) -> Tensor:  # found: (B, N, C), or (B, h, w, C)
            assert replace is not None
            return replace(found.flatten(1, -2)).view(found.shape)

        with self._fitted(images, dense=True) as trunk:
            handle = None if replace is None else trunk.patch_embed.register_forward_hook(put)
            try:
                x, (patches,) = trunk.forward_intermediates(images, indices=1, output_fmt="NLC")
            finally:
                if handle is not None:
                    handle.remove()
            return getattr(self.visual, "head", nn.Identity())(trunk.forward_head(x)), patches

    def shown(self, images: Tensor, places: Tensor) -> Tensor:
        """As `NativeViT.shown`: the trunk's patch dropout, which also picks rotary positions, keeps these places meanwhile."""
        with self._fitted(images, dense=True) as trunk:
            own = trunk.patch_drop
            trunk.patch_drop = _Keep(places, trunk.num_prefix_tokens, indices=isinstance(trunk, Eva))
            try:
                x = trunk.forward_features(images)
            finally:
                trunk.patch_drop = own
        return cast(Tensor, (getattr(trunk, "fc_norm", None) or nn.Identity())(x))

    def project(self, last: Tensor) -> Tensor:
        trunk, x = self.visual.trunk, last.movedim(1, -1)
        pool = getattr(trunk, "attn_pool", None)
        if getattr(pool, "pos_embed", None) is not None:
            raise CutlineError(
                f"{self.name} pools by attention with positions: its cells have no projection of their own."
            )
        if pool is not None:
            x = pool(x.flatten(0, 2)[:, None]).unflatten(0, x.shape[:3])
        x = trunk.head(trunk.head_drop(x))
        return cast(Tensor, getattr(self.visual, "head", nn.Identity())(x).movedim(-1, 1))

    def layer_of(self, parameter_name: str) -> int:
        return self._layers.get(parameter_name.removeprefix("visual.trunk."), self.num_layers)


class _Keep(nn.Module):
    """Stands in for timm's `PatchDropout`, or `PatchDropoutWithIndices`: keeps the patches at `places` (B, V)."""

    def __init__(self, places: Tensor, prefix: int, indices: bool) -> None:
        super().__init__()
        self.places, self.prefix, self.indices = places, prefix, indices

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        kept = _kept(x, self.places, self.prefix)
        return (kept, self.places) if self.indices else kept


def picked(x: Tensor, places: Tensor) -> Tensor:
    """Of (B, N, C) the rows `places` (B, V): (B, V, C). (`take_along_dim` would write its index out, of the result's size.)"""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def _kept(x: Tensor, places: Tensor, prefix: int) -> Tensor:
    """The first `prefix` tokens (B, P + N, C), and of the others those at `places` (B, V): (B, P + V, C)."""
    return torch.cat([x[:, :prefix], picked(x[:, prefix:], places)], dim=1)


def _allow_any_size(trunk: Any) -> bool:
    """Switch a timm ViT to interpolate its positions to the input; False if it cannot (relative position biases)."""
    if not hasattr(trunk, "dynamic_img_size"):
        return False
    if not trunk.dynamic_img_size:
        trunk.dynamic_img_size = True
        trunk.patch_embed.strict_img_size = False
        trunk.patch_embed.flatten = False
        trunk.patch_embed.output_fmt = Format.NHWC
        if any(s % p for s, p in zip(trunk.patch_embed.img_size, trunk.patch_embed.feat_ratio(as_scalar=False))):
            trunk.patch_embed.img_size = None  # else it would refuse its own size, 384 in patches of 14 say
    return True


def _grid(images: Tensor, patch: int) -> Grid:
    return images.shape[-2] // patch, images.shape[-1] // patch


def _to_map(tokens: Tensor, grid: Grid) -> Tensor:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)  # (B, N, C) → (B, C, h, w)
