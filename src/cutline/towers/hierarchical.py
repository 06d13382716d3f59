"""Encoders of towers with stages: FastViT (MobileCLIP's MCi0–2), ConvNeXt, Swin and others of timm, OpenAI's ResNet.

Maps are the stages' outputs at strides 4, 8, 16, 32. Swin's attention masks are made for the input at hand; ResNet's
attention pooling gets its positions interpolated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.func import functional_call

from cutline.errors import ConfigError, CutlineError
from cutline.towers.encoder import Encoder, joint_width, trunk_layers
from cutline.towers.model import Model

STRIDES = (4, 8, 16, 32)


class Hierarchical(Encoder):
    """A timm model with stages, inside open_clip's TimmModel or alone."""

    def __init__(self, model: Model, taps: tuple[int, ...] | None = None) -> None:
        super().__init__(model)
        trunk = self.visual.trunk
        _allow_any_size(trunk)
        info = [(i, int(f["reduction"]), int(f["num_chs"])) for i, f in enumerate(trunk.feature_info)]
        at = {stride: (i, channels) for i, stride, channels in info}  # the last stage of each stride
        self.strides = _choose(tuple(s for s in STRIDES if s in at), taps)
        self.indices = [at[s][0] for s in self.strides]
        self.channels = tuple(at[s][1] for s in self.strides)
        self.multiple = info[-1][1]
        self.width = joint_width(self.visual)
        self._layers, self.num_layers = trunk_layers(trunk, [n for n, _ in trunk.named_parameters()])
        self._channels_last = getattr(trunk, "output_fmt", None) == "NHWC"

    @contextmanager
    def _explained(self, x: Tensor) -> Iterator[None]:
        """Say it in our words when a tower with tables for one size (LeViT, MaxViT, …) is given another."""
        try:
            yield
        except (RuntimeError, AssertionError, IndexError) as e:
            if x.shape[-2] == x.shape[-1] == self.size:
                raise
            size, kind = f"{x.shape[-2]}×{x.shape[-1]}", type(self.visual.trunk).__name__
            raise CutlineError(
                f"{self.name} ({kind}) cannot take {size} px: {e}. It is made for {self.size} px."
            ) from e

    def _maps(self, x: Tensor) -> list[Tensor]:
        with self._explained(x):
            maps: list[Tensor] = self.visual.trunk.forward_intermediates(
                x, indices=self.indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
        return maps

    def _last(self, x: Tensor) -> Tensor:
        with self._explained(x):
            x = self.visual.trunk.forward_features(x)
        return x.movedim(-1, 1) if self._channels_last else x

    def _pooled(self, x: Tensor) -> Tensor:
        with self._explained(x):
            pooled: Tensor = self.visual(x)
        return pooled

    def pooled_and_last(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self._pad(images) is not images:
            return super().pooled_and_last(images)
        with self._explained(images):
            x = self.visual.trunk.forward_features(images)
            pooled = getattr(self.visual, "head", nn.Identity())(self.visual.trunk.forward_head(x))
        return pooled, x.movedim(-1, 1) if self._channels_last else x

    def project(self, last: Tensor) -> Tensor:
        # Each cell as a picture of one cell: average pooling then does nothing; norms and projections are the tower's.
        cells = last.movedim(1, -1).flatten(0, 2)
        x = self.visual.trunk.forward_head(cells[:, None, None, :] if self._channels_last else cells[:, :, None, None])
        x = getattr(self.visual, "head", nn.Identity())(x) if x.ndim == 2 else x
        if x.ndim != 2:
            raise CutlineError(f"{self.name} pools by attention: its cells have no projection of their own.")
        return cast(Tensor, x.unflatten(0, (last.shape[0], *last.shape[-2:])).movedim(-1, 1))

    def layer_of(self, parameter_name: str) -> int:
        return self._layers.get(parameter_name.removeprefix("visual.trunk."), self.num_layers)


class ResNetEncoder(Encoder):
    """open_clip's ModifiedResNet (OpenAI's RN50 and relatives)."""

    multiple = 32

    def __init__(self, model: Model, taps: tuple[int, ...] | None = None) -> None:
        super().__init__(model)
        v = self.visual
        self.stages = [v.layer1, v.layer2, v.layer3, v.layer4]
        self.strides = _choose(STRIDES, taps)
        self.channels = tuple(self.stages[STRIDES.index(s)][-1].conv3.out_channels for s in self.strides)
        self.width = joint_width(v)
        self._first = {f"layer{i + 1}": 1 + sum(len(s) for s in self.stages[:i]) for i in range(4)}
        self.num_layers = sum(len(s) for s in self.stages)

    def set_grad_checkpointing(self, on: bool) -> None:
        if on:  # open_clip's method of that name does nothing
            raise CutlineError(f"{self.name} has no gradient checkpointing; leave grad_checkpointing out.")

    def _maps(self, x: Tensor) -> list[Tensor]:
        maps = self.visual.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)[
            "image_intermediates"
        ]
        return [maps[STRIDES.index(s)] for s in self.strides]

    def _last(self, x: Tensor) -> Tensor:
        output = self.visual.forward_intermediates(x, indices=[4], intermediates_only=True)
        return cast(Tensor, output["image_intermediates"][0])

    def _pooled(self, x: Tensor) -> Tensor:
        x, pool = self._last(x), self.visual.attnpool
        side = round((pool.positional_embedding.shape[0] - 1) ** 0.5)
        grid = [x.shape[-2], x.shape[-1]]
        positions = resample_abs_pos_embed(pool.positional_embedding[None], grid, [side, side], num_prefix_tokens=1)
        return cast(Tensor, functional_call(pool, {"positional_embedding": positions[0]}, (x,)))

    def project(self, last: Tensor) -> Tensor:
        """MaskCLIP's (arXiv 2112.01071): the value and output projections of the attention pooling, cell by cell."""
        pool = self.visual.attnpool
        return cast(Tensor, pool.c_proj(pool.v_proj(last.movedim(1, -1))).movedim(-1, 1))

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.removeprefix("visual.").split(".")
        if parts[0] in self._first:
            return self._first[parts[0]] + int(parts[1])
        return self.num_layers if parts[0] == "attnpool" else 0


def _choose(there: tuple[int, ...], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    if wanted is None:
        return there
    if not wanted or list(wanted) != sorted(set(wanted)) or not set(wanted) <= set(there):
        raise ConfigError(f"taps {wanted} must be rising strides of {there}.")
    return tuple(wanted)


def _allow_any_size(trunk: Any) -> None:
    """Swin's masks are built for one size; let it build them for the input. Convolutional trunks need nothing."""
    if hasattr(trunk, "patch_embed") and hasattr(trunk.patch_embed, "strict_img_size"):
        trunk.patch_embed.strict_img_size = False
    for module in trunk.modules():
        if hasattr(module, "dynamic_mask"):
            module.dynamic_mask = True
