"""Masked patch prediction of iBOT (Zhou et al., 2111.07832, its L_MIM) as TIPS (2410.16512, section 3.2) trains it.

    L = −mean over patches i of  Σ_k softmax((z_t(i) − c) / τ_t)_k log softmax(z_s(i) / τ_s)_k

The EMA teacher sees the whole picture, the student the same one with most of its patches replaced by a learned token,
and says at every replaced patch what the teacher says there. z are the logits of a patch's features after the tower's
last norm. Patches are drawn at random, the same number in each picture (TIPS: 75 %; iBOT's block masks are left out).

`all_patches` is iBOT++ of TIPSv2 (2604.12012): the mean runs over the patches that the student sees, too. (TIPSv2's
EMA of the head alone, with the student's tower for a teacher, is left out.) Teacher, head and centre are those of
`teacher`. iBOT's term on the class token between crops is `silc`; TIPS is `contrastive` 1 + `silc` 1 + `masked` 2, and in
such a recipe one teacher tower serves both.

Only a plain transformer with a patch embedding can be shown a token in place of a patch: open_clip's own, and timm's (SigLIP,
DINOv2, EVA-02, …). The token takes the patch's place before positions are added.

Shapes: B pictures, N patches, C width of the tower.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from cutline.objectives import base, teacher
from cutline.towers.model import Model
from cutline.towers.vit import NativeViT, TimmViT, check_hides, picked


class Config(teacher.Config):
    """ratio: share of a picture's patches that the student does not see. all_patches: see above."""

    ratio: float = Field(0.75, gt=0, lt=1)
    all_patches: bool = False


class Objective(teacher.SelfDistillation):
    config: Config
    reads_pooled = False

    def __init__(self, config: Config, model: Model) -> None:
        super().__init__(config, model)
        encoder = self.student
        check_hides(encoder, "masked", "shows the tower a token in place of patches")
        self.patches = (encoder.size // encoder.multiple) ** 2
        self.masked = min(max(round(config.ratio * self.patches), 1), self.patches - 1)
        self.prototypes = teacher.Prototypes(encoder.channels[-1], config)
        self.token = nn.Parameter(nn.init.normal_(torch.empty(encoder.channels[-1]), std=0.02))

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        images = batch.views["image"]
        target = self.tower(images)[1]
        assert target is not None  # of a plain ViT
        hidden = random_patches(len(images), self.patches, self.masked, images.device)
        said = self.fill(images, hidden)
        pictures = target.mean(1)  # of all places, as one differs from another in any case
        if not self.config.all_patches:
            target, said = (picked(x, hidden) for x in (target, said))
        return {"patches": self.distil(target.flatten(0, 1)[:, None], said.flatten(0, 1)[:, None], pictures)}

    def fill(self, images: Tensor, hidden: Tensor) -> Tensor:
        """The student's patch features (B, N, C) where the patches `hidden` (B, n) are replaced by the token."""
        encoder = self.student
        assert isinstance(encoder, NativeViT | TimmViT)

        def replace(x: Tensor) -> Tensor:
            mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, hidden, True)
            return torch.where(mask[..., None], self.token.to(x.dtype), x)

        return encoder.last_norm(encoder.replaced(images, replace)[1])


def random_patches(pictures: int, patches: int, hidden: int, device: torch.device) -> Tensor:
    """Which patches are masked: (pictures, hidden) different ones for each, from torch's generator of the device."""
    return torch.rand(pictures, patches, device=device).argsort(1)[:, :hidden]
