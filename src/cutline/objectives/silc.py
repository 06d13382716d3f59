"""Local-to-global self-distillation of SILC (Naeem et al., 2310.13355, section 3.2), from DINO (2104.14294).

    L = −mean over global views g and local views l of  Σ_k softmax((z_t(g) − c) / τ_t)_k log softmax(z_s(l) / τ_s)_k

The student sees small crops of a picture and says what the EMA teacher says of the whole; z are the logits of the
pooled embedding (with a text tower the joint one). Teacher, head and centre are those of `teacher`, with its reason why
the teacher's momentum is fixed. It is trained alone, or beside `contrastive` or `sigmoid`, which make it SILC.

The first global view is "image", the recipe's own augmentation, which the text losses see as well: SILC computes its
text loss on every global view, since otherwise the two losses pull apart. So set `data.augment.scale` to [0.4, 1.0].
One global view is what SigLIP 2 (2502.14786) and TIPS (2410.16512) train with; SILC has two (`global_views`), and
`contrastive: {views: [image, silc/global]}` (or `sigmoid`) compares both with the text; otherwise further ones are seen by
the teacher alone.

TIPS is three objectives: `contrastive` (weight 1; half for web text, half for synthetic captions), `silc` (1), `masked` (2).
"""

import math

from pydantic import Field
from torch import Tensor, cat

from cutline.errors import ConfigError
from cutline.objectives import base, teacher
from cutline.towers.model import Model

GLOBAL, LOCAL = "silc/global", "silc/local"  # names of the views


class Config(teacher.Config):
    """global_views: of the teacher, with "image" for the first. local_views, local_size, local_scale: crops of the
    student, their pixels, and their share of the area. local_size None: 3/7 of the tower's size, rounded up to whole
    patches, which is DINO's 96 of 224 and TIPS's 98 with patches of 14. global_scale: of the further global views.
    """

    global_views: int = Field(1, ge=1)
    local_views: int = Field(8, ge=1)
    local_size: int | None = Field(None, ge=1)
    global_scale: base.Area = (0.4, 1.0)
    local_scale: base.Area = (0.05, 0.4)


class Objective(teacher.SelfDistillation):
    config: Config

    def __init__(self, config: Config, model: Model) -> None:
        super().__init__(config, model)
        self.prototypes = teacher.Prototypes(self.student.width, config)
        patch = self.student.multiple
        self.local_size = config.local_size or math.ceil(self.student.size * 3 / 7 / patch) * patch
        if self.local_size % patch:
            raise ConfigError(
                f"objectives.silc.local_size={self.local_size} is no whole number of patches of {self.student.name} ({patch} "
                f"pixels): take a multiple of it, or leave local_size out."
            )

    def views(self) -> dict[str, base.View]:
        config = self.config
        views = {LOCAL: base.View(size=self.local_size, count=config.local_views, scale=config.local_scale)}
        if config.global_views > 1:
            views[GLOBAL] = base.View(count=config.global_views - 1, scale=config.global_scale)
        return views

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        pictures = len(batch.views["image"])
        seen = [self.tower(batch.views[name])[0] for name in ("image", GLOBAL) if name in batch.views]
        whole = cat([x.view(pictures, -1, x.shape[-1]) for x in seen], dim=1)  # (B, G, D)
        said = self.student.pooled(batch.views[LOCAL])
        return {"local": self.distil(whole, said.view(pictures, -1, said.shape[-1]), whole[:, 0])}
