"""Sigmoid objective of SigLIP (Zhai et al., 2303.15343, equation 1 and algorithm 1), over all processes.

    L = −(1/B) Σ_i Σ_j w_j log σ(z_ij x_ij),    x_ij = t · <image_i, text_j> + b,    z_ij = 1 for the texts of i, else −1

i runs over the B pictures and j over the texts of all. Where each picture has one text, w_j = 1 and this is the paper's
loss. With several (rule `all`) every one of them is a positive, and w_j = 1 / (number of texts of j's picture), so that
a picture with many captions weighs no more than one with few. With rule `sum` there is one such loss per caption
column, times the column's weight. Every process compares its own pictures with all texts; the mean over processes is the
loss of the joined batch.

t = exp(logit_scale) and b = logit_bias are the model's own parameters, so they are saved with it, and open_clip reads
them. They start at t = 10 and b = −10 (section 3.2: at first nearly all pairs are negatives, and b makes that cost
nothing to learn): a tower that was never trained is set to them, whatever its architecture says, and one without a bias
gets one. A tower that was trained with a bias keeps both as they are. `contrastive` in the same recipe shares t.

The matrix of pairs is made `chunk` rows at a time (see `chunked`): beside the features, memory is chunk × texts.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cutline.objectives import base
from cutline.objectives.chunked import chunked
from cutline.objectives.contrastive import check_views, widen
from cutline.objectives.gather import pair, world
from cutline.towers.model import Model

CLIP_SCALE = math.log(1 / 0.07)  # where open_clip starts unless a model config says otherwise


class Config(base.ObjectiveConfig):
    """scale, bias: t and b at the start, of a tower that is untrained or has no bias; views: as in `contrastive`, for SILC with
    this loss; chunk: rows of the matrix of pairs made at a time (None: all)."""

    scale: float = Field(10.0, ge=1)
    bias: float = -10.0
    views: list[str] = Field(default_factory=lambda: ["image"], min_length=1)
    chunk: int | None = Field(512, ge=1)


class Objective(base.Objective):
    config: Config

    def __init__(self, config: Config, model: Model) -> None:
        super().__init__(config, model)
        start(model, config.scale, config.bias)

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        """One term per text source; b and `accuracy` (share of pictures whose best text is their own) are logged."""
        check_views(self.config.views, batch, "objectives.sigmoid")
        images = [widen(features.image(view)) for view in self.config.views]
        scale, bias, chunk = features.logit_scale(), features.model.logit_bias, self.config.chunk
        terms = {}
        for source, texts in batch.texts.items():
            text = widen(features.text(source))
            # bf16 would round x near −10 to sixteenths.
            with torch.autocast(text.device.type, enabled=False):
                found = [sigmoid_loss(x, text, texts.owners, scale, bias, texts.paired, chunk) for x in images]
            loss, hits = (torch.stack(values).mean() for values in zip(*found, strict=True))
            terms[source] = texts.weight * loss
            self.logged[f"accuracy/{source}"] = hits
        self.logged["bias"] = bias.detach()
        return terms


def start(model: Model, scale: float, bias: float) -> None:
    """Give `model` a logit bias if it has none, and set scale and bias unless both were trained."""
    config = model.model_cfg
    if model.logit_bias is not None:
        first = {"scale": config.get("init_logit_scale", CLIP_SCALE), "bias": config.get("init_logit_bias", 0.0)}
        now = {"scale": float(model.logit_scale.detach()), "bias": float(model.logit_bias.detach())}
        if any(not math.isclose(now[k], first[k], rel_tol=1e-6) for k in first):
            return
    with torch.no_grad():
        model.logit_scale.fill_(math.log(scale))
        model.logit_bias = nn.Parameter(torch.full_like(model.logit_scale, bias))
    config |= {"init_logit_scale": math.log(scale), "init_logit_bias": bias}  # open_clip makes the parameter from this


def sigmoid_loss(
    image: Tensor, text: Tensor, owners: Tensor, scale: Tensor, bias: Tensor, paired: bool, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """image (b, D), text (m, D), owners (m,) of this process → (its loss, the share of its pictures that find their text).

    scale, bias: t and b; paired, as in `Texts`; chunk, as in `Config`.
    """
    rank, size = world()
    pairing = pair(owners, len(image), paired)
    places = torch.arange(len(image), device=image.device) + rank * len(image)
    columns = (pairing.gather(text), pairing.owners, pairing.share.to(image.dtype) * size, scale, bias)
    loss, hits = chunked(_rows, chunk, (image, places), columns)
    return loss, hits / len(image)


def _rows(
    image: Tensor, places: Tensor, text: Tensor, owners: Tensor, share: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Some pictures against all texts → their part of the loss, and how many of them find their own text."""
    x = scale * image @ text.T + bias  # (chunk, M)
    positive = places[:, None] == owners
    hits = positive.gather(1, x.detach().argmax(1, keepdim=True)).sum()
    x = torch.where(positive, -x, x)
    # −log σ(−x); softplus keeps less for the backward pass than logsigmoid, and is exact with a threshold of 40.
    return (F.softplus(x, threshold=40) @ share).sum(), hits
