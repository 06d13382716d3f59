"""The Encoder contract: a pooled embedding and dense maps of known strides from any image tower, at any input size.

An Encoder wraps a model's image tower and shares its weights; training one trains the other. Pictures whose sides are
no multiple of the largest stride are padded on the right and the bottom with zeros (the mean colour, as pictures come
normalised), and maps are cut to ceil(side / stride): cell (i, j) of a map of stride s sees pixels [i·s, (i+1)·s) ×
[j·s, (j+1)·s). At the tower's own size nothing is padded, cut or interpolated.

Shapes: B pictures, H × W pixels, C channels, D width of the pooled embedding.
"""

import hashlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutline.errors import ConfigError, CutlineError
from cutline.towers.droppath import set_drop_path
from cutline.towers.model import Model

TAPS = 4  # maps of a plain ViT, as UPerNet and the pyramids want
# Layers of a timm trunk that groups none itself (MetaFormer: PoolFormer, CAFormer, …), as timm groups ConvNeXt's.
STAGES = {
    "stem": r"^stem",
    "blocks": [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
}


class Encoder(nn.Module):
    """Base of the encoders; `wrap` and `towers.load_encoder` choose the right one.

    strides, channels: one per map of `forward`; width: of `pooled`; patch: patch size of a plain ViT, None for a
    hierarchical tower; class_token: whether it has one (`maps_and_classes`); mean, std: of the pictures it expects;
    size: pixels it was trained at; num_layers: for layer-wise learning-rate decay. Parameter names start with "visual.".
    """

    strides: tuple[int, ...]
    channels: tuple[int, ...]
    width: int
    patch: int | None = None
    class_token = False
    num_layers: int

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.visual: Any = model.visual
        self.name = model.name or type(self.visual).__name__
        self.model_cfg: dict[str, Any] = model.model_cfg  # open_clip's, to build the tower again; {} for a timm tower
        preprocess: dict[str, Any] = model.visual.preprocess_cfg  # type: ignore[assignment]
        size = preprocess["size"]
        self.size = int(size if isinstance(size, int) else max(size))
        self.mean, self.std = _rgb(preprocess["mean"]), _rgb(preprocess["std"])

    # What a tower kind implements; `x` is already padded to a multiple of `self.multiple`.

    multiple: int

    def _maps(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def _maps_and_classes(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        raise ConfigError(f"{self.name} has no class token.")

    def _last(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _pooled(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def project(self, last: Tensor) -> Tensor:
        """Each cell of a map of `last` into the joint space, not normalised: (B, C, h, w) → (B, D, h, w).

        As if it were the only one that is pooled: of attention pooling (SigLIP, CoCa) remain the value and output projections
        and what follows, as in MaskCLIP (2112.01071). Raises `CutlineError` where a single cell cannot be pooled.
        """
        raise NotImplementedError

    def layer_of(self, parameter_name: str) -> int:
        """0 for the stem and the embeddings … `num_layers` for the last block and what follows it."""
        raise NotImplementedError

    # What all share.

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised (B, 3, H, W) → maps (B, C_i, ceil(H / stride_i), ceil(W / stride_i)).

        Before the tower's last norm, as UPerNet and FPN heads take them.
        """
        maps = self._maps(self._pad(images))
        return [_cut(m, images, s) for m, s in zip(maps, self.strides, strict=True)]

    def maps_and_classes(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of `forward`, and what the class token is where each of them is read, (B, C_i).

        Of a tower with two class tokens it is the first. Raises `ConfigError` for a tower without one.
        """
        maps, classes = self._maps_and_classes(self._pad(images))
        return [_cut(m, images, s) for m, s in zip(maps, self.strides, strict=True)], classes

    def last(self, images: Tensor) -> Tensor:
        """The map that the tower pools, after its last norm: (B, C, ceil(H / s), ceil(W / s)), s the largest
        stride of the tower, whatever the taps."""
        return _cut(self._last(self._pad(images)), images, self.multiple)

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, D): the joint embedding, not normalised (timm's pooled feature where there is no text)."""
        return self._pooled(self._pad(images, dense=False))

    def pooled_and_last(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`pooled` and `last` of the same pictures: of one pass where the tower's pooling reads just that map, and no
        patches are dropped from it."""
        return self.pooled(images), self.last(images)

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth, from 0 at the first block to `rate` at the last; replaces what was set before."""
        set_drop_path(self.visual, rate)

    def set_grad_checkpointing(self, on: bool) -> None:
        """Whether activations are computed again for the backward pass in place of kept. Gradients are the same; the averages
        of batch norms move twice a step. Raises `CutlineError` for a tower that cannot."""
        try:
            getattr(self.visual, "trunk", self.visual).set_grad_checkpointing(on)
        except (AttributeError, AssertionError, NotImplementedError) as e:
            raise CutlineError(f"{self.name} has no gradient checkpointing; leave grad_checkpointing out.") from e

    @property
    def hash(self) -> str:
        """Fingerprint of the image tower's weights as they are now."""
        h = hashlib.sha256()
        for key, value in self.visual.state_dict().items():
            h.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()[:16]

    def _pad(self, images: Tensor, dense: bool = True) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise CutlineError(
                f"an encoder takes normalised float pictures (B, 3, H, W), not {images.dtype} {tuple(images.shape)}."
            )
        height, width = images.shape[-2:]
        if height == width == self.size and not (dense and self.patch):
            return images  # as in training; a ViT whose patch does not divide its size drops pixels, which no map may
        right, bottom = -width % self.multiple, -height % self.multiple
        return F.pad(images, (0, right, 0, bottom)) if right or bottom else images


def wrap(model: Model, taps: tuple[int, ...] | None = None) -> Encoder:
    """The Encoder for `model.visual`.

    taps: for a ViT the blocks whose outputs are the maps (default: 4 evenly spaced; MAE's UPerNet takes 3, 5, 7, 11 of
    12); for a hierarchical tower the strides wanted, of 4, 8, 16, 32 (default: all it has).
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    from cutline.towers.hierarchical import Hierarchical, ResNetEncoder
    from cutline.towers.vit import NativeViT, TimmViT, is_plain_vit

    visual = model.visual
    if isinstance(visual, VisionTransformer):
        return NativeViT(model, taps)
    if isinstance(visual, ModifiedResNet):
        return ResNetEncoder(model, taps)
    trunk = getattr(visual, "trunk", None)
    if trunk is None or not hasattr(trunk, "forward_intermediates"):
        raise CutlineError(f"{type(trunk or visual).__name__} gives no intermediate maps, so it cannot be an encoder.")
    return TimmViT(model, taps) if is_plain_vit(trunk) else Hierarchical(model, taps)


def joint_width(visual: Any) -> int:
    """Channels of the tower's pooled output, read from its last projection."""
    if hasattr(visual, "output_dim"):
        return int(visual.output_dim)
    head = [m for m in getattr(visual, "head", nn.Identity()).modules() if isinstance(m, nn.Linear)]
    if head:
        return head[-1].out_features
    trunk = visual.trunk
    return int(trunk.num_classes or getattr(trunk, "head_hidden_size", None) or trunk.num_features)


def trunk_layers(trunk: Any, names: list[str]) -> tuple[dict[str, int], int]:
    """timm's own grouping of a trunk's parameters: name → layer, and the number of the last layer of blocks.

    Parameters that timm leaves out (pooling, final convolution, head) come after the last block.
    """
    from timm.models._manipulate import group_with_matcher

    matcher = trunk.group_matcher(coarse=False) if hasattr(trunk, "group_matcher") else STAGES
    # The added name matches nothing, so its group is the one behind the last block.
    objects = [(n, None) for n in [*names, "\0after"]]
    layers = group_with_matcher(iter(objects), matcher, reverse=True)
    last = layers.pop("\0after") - 1
    return {n: min(layer, last) for n, layer in layers.items()}, last


def _cut(x: Tensor, images: Tensor, stride: int) -> Tensor:
    return x[..., : -(-images.shape[-2] // stride), : -(-images.shape[-1] // stride)]


def _rgb(values: Any) -> tuple[float, float, float]:
    if isinstance(values, int | float):
        values = (values,) * 3
    return cast(tuple[float, float, float], tuple(float(v) for v in values))
