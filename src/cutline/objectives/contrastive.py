"""Contrastive objective (InfoNCE) of CLIP (Radford et al., 2103.00020, figure 3), symmetric, over all processes.

    s_ij = scale · <image_i, text_j>,    scale = exp(logit_scale), clamped by the loop to at most 100
    L = ½ [ mean_i −log softmax_j(s_i·)_[texts of i] + mean_j −log softmax_i(s_·j)_[owner of j] ]

With several texts of one picture (rule `all`) the image-to-text term is the mean over a picture's texts of the
cross-entropy against them, so that a picture with many captions weighs no more than one with few, and another caption
of the same picture is never a negative (GBC, 2407.06723, multi-positive). With rule `sum` there is one such loss per
caption column, times the column's weight (MobileCLIP, 2311.17049, section 3: a sum, not an average).

With `weights`, each picture's two cross-entropies are multiplied by its value in a column of the table before the
mean, which still divides by the number of pictures (ALIP, 2308.08428, whose w_sample · w_pair for either text are
written by `cutline caption select --rule alip`; its loss is the rule `sum` over both. ALIP weighs by the model in training;
these are of a frozen one, and stay).

Each process compares its own rows with the gathered columns; the mean over processes is the loss of the joined batch.
With `chunk` the logits are made that many rows at a time (see `chunked`), and memory is linear in the batch.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cutline.errors import ConfigError
from cutline.objectives import base
from cutline.objectives.chunked import chunked
from cutline.objectives.gather import gather, pair, world


class Config(base.ObjectiveConfig):
    """weights: text source → the column with its weight for each picture. A source is a caption column under the rule
    `sum`, and "text" under `sample` and `all`. Rows without a weight count 1. second: text sources that are compared with the
    second class token of towers with `class_tokens: 2` (TIPS: the synthetic captions). views: of the pictures, each of which is
    compared with the texts, and the loss is their mean (SILC, 2310.13355: both global crops, `["image", "silc/global"]`).
    chunk: rows compared at a time (None: all)."""

    weights: dict[str, str] = Field(default_factory=dict)
    second: list[str] = Field(default_factory=list)
    views: list[str] = Field(default_factory=lambda: ["image"], min_length=1)
    chunk: int | None = Field(None, ge=1)


class Objective(base.Objective):
    config: Config

    def __init__(self, config: Config, model: Any) -> None:
        super().__init__(config, model)
        if config.second and getattr(model, "class_tokens", 1) < 2:
            raise ConfigError(
                f"objectives.contrastive.second={config.second} needs towers with a second class token: set "
                "towers.class_tokens=2, or leave it out."
            )

    def columns(self) -> list[str]:
        return list(dict.fromkeys(self.config.weights.values()))

    def made_by(self, column: str) -> str:
        return "Weights are made with: cutline caption select PAIRS --rule alip (see docs/captions.md)"

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        """One term per text source; `accuracy` (share of pictures whose own text is the best of the batch) is logged."""
        scale = features.logit_scale()
        for key, named in (("weights", self.config.weights), ("second", self.config.second)):
            if unknown := set(named) - batch.texts.keys():
                raise ConfigError(
                    f"objectives.contrastive.{key} names {min(unknown)!r}, and the text sources are "
                    f"{', '.join(batch.texts)}: with data.text.rule sum they are the columns, else there is one, text."
                )
        check_views(self.config.views, batch, "objectives.contrastive")
        if set(self.config.second) == set(batch.texts):
            raise ConfigError(
                f"objectives.contrastive.second={self.config.second} names every text source, and the first class token, which "
                "is what the encoder gives, would learn from none: leave one out."
            )
        terms = {}
        for source, texts in batch.texts.items():
            text, column = widen(features.text(source)), self.config.weights.get(source)
            weight = None if column is None else weights(batch.columns[column], column, text.device)
            if weight is not None:
                self.logged[f"weight/{source}"] = weight.mean()
            found = []
            for view in self.config.views:
                image = widen(features.image(view, second=source in self.config.second))
                # bf16 would round logits near 100 to halves; the product is a small part of a step.
                with torch.autocast(image.device.type, enabled=False):
                    if texts.paired:
                        found.append(paired_loss(image, text, scale, weight, self.config.chunk))
                    else:
                        found.append(multi_positive_loss(image, text, texts.owners, scale, weight, self.config.chunk))
            loss, hits = (torch.stack(values).mean() for values in zip(*found, strict=True))
            terms[source] = texts.weight * loss
            self.logged[f"accuracy/{source}"] = hits.detach()
        return terms

    def after_step(self, model: nn.Module, step: int) -> None:
        nothing = [s for s in self.config.weights if float(self.logged[f"weight/{s}"]) == 0]
        self.collapse = ""
        if nothing:
            column = self.config.weights[nothing[0]]
            self.collapse = (
                f"all weights in the column {column!r} are 0, and nothing is learnt from the text source {nothing[0]!r}: make them "
                f"anew (cutline caption select --rule alip), or leave objectives.contrastive.weights out."
            )


def check_views(views: list[str], batch: base.Batch, by: str) -> None:
    """Raise `ConfigError` for a view that is not there, or not once for each picture; by: the key of the recipe."""
    for view in views:
        if len(batch.views.get(view, ())) != len(batch.views["image"]):
            raise ConfigError(
                f"{by}.views names {view!r}, which is no view with one crop of each picture; there are: "
                f"{', '.join(batch.views)}."
            )


def widen(x: Tensor) -> Tensor:
    """Half precision to float32; anything wider as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def weights(values: Any, column: str, device: torch.device) -> Tensor:
    """A collated column as weights (b,): what is null counts 1. Raises `ConfigError` for anything but numbers ≥ 0."""
    wrong = ConfigError(f"the column {column!r} cannot weigh pictures: weights are one number a row, 0 or more.")
    if not isinstance(values, Tensor):
        numbers = [1.0 if v is None else v for v in values]
        if not all(isinstance(v, int | float) for v in numbers):
            raise wrong
        values = torch.tensor(numbers)
    weight: Tensor = values.to(device)
    weight = weight if weight.is_floating_point() else weight.float()
    if weight.dim() != 1 or not (torch.isfinite(weight) & (weight >= 0)).all():
        raise wrong
    return weight


def paired_loss(
    image: Tensor, text: Tensor, scale: Tensor, weight: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """InfoNCE for rows that pair up: image, text (b, D) of this process → (loss, top-1 accuracy image → text).

    weight (b,): of each row's two terms (None: 1); chunk: as in `Config`.
    """
    b = len(image)
    labels = torch.arange(b, device=image.device) + world()[0] * b
    share = torch.full_like(image[:, 0], 1 / b) if weight is None else weight.to(image.dtype) / b
    by_image, hits = chunked(partial(_cross_entropy, True), chunk, (image, labels, share), (gather(text), scale))
    by_text, _ = chunked(partial(_cross_entropy, False), chunk, (text, labels, share), (gather(image), scale))
    return (by_image + by_text) / 2, hits / b


def multi_positive_loss(
    image: Tensor,
    text: Tensor,
    owners: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """InfoNCE with several texts a picture: image (b, D), text (m, D), owners (m,) → (loss, top-1 accuracy).

    A picture without a text counts in the negatives of the texts only. Processes may hold different m.
    weight (b,): of each picture's terms and of its texts' (None: 1); chunk: as in `Config`.
    """
    (rank, size), b = world(), len(image)
    pairing = pair(owners, b, paired=False)
    rows = torch.arange(b, device=image.device) + rank * b
    told = pairing.texts > 0
    # Shares are of the joined batch, times the processes: the mean over processes is then exact.
    of_image = (told[rows].double() / told.sum()).to(image.dtype) * size
    of_text = pairing.share[pairing.own].to(image.dtype) * size
    if weight is not None:
        weight = weight.to(image.dtype)
        of_image, of_text = of_image * weight, of_text * weight[owners]
    columns = (pairing.gather(text), pairing.owners, scale)
    by_image, hits = chunked(_positives, chunk, (image, rows, of_image), columns)
    labels = owners + rank * b
    by_text, _ = chunked(partial(_cross_entropy, False), chunk, (text, labels, of_text), (gather(image), scale))
    return (by_image + by_text) / 2, hits / b


def _cross_entropy(
    count: bool, query: Tensor, labels: Tensor, share: Tensor, keys: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over rows of share · cross-entropy against all keys, and how many rows find their label, if `count`."""
    logits = scale * query @ keys.T
    loss = share @ F.cross_entropy(logits, labels, reduction="none")
    return loss, (logits.detach().argmax(1) == labels).sum() if count else labels.new_zeros(())


def _positives(
    image: Tensor, rows: Tensor, share: Tensor, text: Tensor, owners: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over pictures of share · mean cross-entropy of their texts, and how many pictures find one of them."""
    positive = owners[None, :] == rows[:, None]  # (chunk, M)
    by_image = scale * image @ text.T
    # A positive competes with the negatives, not with its siblings: log(e^s + Σ negatives e^s) − s.
    negatives = by_image.masked_fill(positive, float("-inf")).logsumexp(1, keepdim=True)
    each = torch.logaddexp(by_image, negatives) - by_image
    per_image = torch.where(positive, each, 0.0).sum(1) / positive.sum(1).clamp(min=1)
    return share @ per_image, positive.gather(1, by_image.detach().argmax(1, keepdim=True)).sum()
