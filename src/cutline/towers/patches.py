"""What a plain ViT sees of its patches in training: patch dropout (FLIP, Li et al., 2212.00794), and two class tokens
(TIPS, Maninis et al., 2410.16512, section 3.1)."""

from typing import Any

import torch
from open_clip.transformer import PatchDropout as OpenClipDropout
from open_clip.transformer import VisionTransformer
from timm.layers import PatchDropout
from torch import Tensor, nn

from cutline.errors import ConfigError
from cutline.towers.pooling import finishes_one, some_tokens


def set_patch_dropout(visual: Any, rate: float) -> None:
    """In training every picture passes the tower with a random 1 − rate of its patches; 0 turns it off.

    Raises `ConfigError` for a tower that cannot leave patches out.
    """
    tower = getattr(visual, "trunk", visual)
    place = "patch_dropout" if isinstance(tower, VisionTransformer) else "patch_drop"
    now = getattr(tower, place, None)
    if not isinstance(now, nn.Identity) and not hasattr(now, "prob"):
        raise ConfigError(
            f"towers.patch_dropout={rate}: {type(tower).__name__} cannot leave patches out; set it to 0, or train a plain "
            "ViT (open_clip's own, such as ViT-B-16)."
        )
    prefix = getattr(tower, "num_prefix_tokens", class_tokens(tower))
    if (getattr(now, "prob", 0.0), getattr(now, "num_prefix_tokens", prefix)) == (rate, prefix):
        return  # in place already: the loop asks at every step
    setattr(tower, place, PatchDropout(rate, prefix).train(tower.training) if rate else nn.Identity())


class TwoClassViT(VisionTransformer):  # type: ignore[misc]
    """open_clip's ViT with a second class token, which has no position (as register tokens have none).

    The first is what the tower pools; `both` gives the two of them, by the same norm and projection.
    """

    second_class: nn.Parameter

    def _embeds(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = with_second(self, x + self.positional_embedding.to(x.dtype))
        embedded: Tensor = self.ln_pre(self.patch_dropout(x))
        return embedded

    def _global_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 0], x[:, 2:]

    def both(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 2, D), not normalised."""
        x = self._embeds(images)
        if self.training and finishes_one(self.transformer):
            x = some_tokens(self.transformer, x, torch.arange(2, device=x.device).expand(len(x), 2))
        else:
            x = self.transformer(x)[:, :2]
        return self.project(x)

    def project(self, tokens: Tensor) -> Tensor:
        """Class tokens of the last block (B, 2, C) → (B, 2, D)."""
        x: Tensor = self.ln_post(tokens)
        return x if self.proj is None else x @ self.proj


def add_second_class(visual: Any) -> None:
    """Give a tower its second class token, which starts as the first with its position. Raises `ConfigError` for towers
    that pool otherwise."""
    if type(visual) is not VisionTransformer or visual.pool_type != "tok" or visual.attn_pool is not None:
        raise ConfigError(
            "towers.class_tokens=2 needs a plain ViT of open_clip that pools its class token, such as ViT-B-16, and this tower "
            "is another: leave class_tokens out."
        )
    first = visual.class_embedding + visual.positional_embedding[0]
    visual.second_class = nn.Parameter(first.detach().clone())
    visual.__class__ = TwoClassViT
    if isinstance(visual.patch_dropout, OpenClipDropout):  # an architecture's own, which would spare the first alone
        visual.patch_dropout = PatchDropout(visual.patch_dropout.prob, 2)


def class_tokens(visual: Any) -> int:
    """How many tokens stand before the patches of open_clip's ViT."""
    return 2 if isinstance(visual, TwoClassViT) else 1


def with_second(visual: Any, x: Tensor) -> Tensor:
    """Tokens (B, 1 + N, C) with the second class token behind the first, where the tower has one."""
    if not isinstance(visual, TwoClassViT):
        return x
    return torch.cat([x[:, :1], visual.second_class.to(x.dtype).expand(len(x), 1, -1), x[:, 1:]], dim=1)
