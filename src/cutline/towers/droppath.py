"""Stochastic depth for every tower: drop a residual branch of a sample with a rate that grows linearly with depth.

timm's blocks have a place for it (`drop_path`, `drop_path1`, `drop_path2`); open_clip's own blocks have none, but pass
each branch through `ls_1` / `ls_2` (a layer scale, or nothing). Neither way adds or renames a parameter.
"""

from open_clip.transformer import LayerScale
from timm.layers import DropPath, drop_path
from torch import Tensor, nn

from cutline.errors import ConfigError

_PLACES = ("drop_path", "drop_path1", "drop_path2", "ls_1", "ls_2")


class DropPathScale(LayerScale):  # type: ignore[misc]
    """open_clip's LayerScale followed by stochastic depth; shares `gamma` with the one it replaces."""

    def __init__(self, scale: LayerScale, rate: float) -> None:
        nn.Module.__init__(self)
        self.inplace, self.gamma, self.rate = scale.inplace, scale.gamma, rate

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = drop_path(super().forward(x), self.rate, self.training)
        return dropped


def set_drop_path(tower: nn.Module, rate: float) -> None:
    """Block i of n (in the order of the forward pass) gets `rate`·i/(n−1); 0 turns it off (timm's and ViT's rule)."""
    if not 0 <= rate < 1:
        raise ConfigError(f"drop path must be in [0, 1), not {rate}.")
    blocks = [m for m in tower.modules() if any(isinstance(getattr(m, p, None), nn.Module) for p in _PLACES)]
    if not blocks and rate:
        raise ConfigError(f"{type(tower).__name__} has no residual blocks for drop path; set it to 0.")
    for i, block in enumerate(blocks):
        own = rate * i / max(len(blocks) - 1, 1)
        for place in _PLACES:
            module = getattr(block, place, None)
            if isinstance(module, LayerScale):
                setattr(block, place, DropPathScale(module, own).train(module.training))
            elif isinstance(module, nn.Module):
                setattr(block, place, (DropPath(own) if own else nn.Identity()).train(module.training))
