"""Contrastive objective (InfoNCE) of CLIP (Radford et al., 2103.00020, figure 3), symmetric, over all processes.

    s_ij = scale · <image_i, text_j>,    scale = exp(logit_scale), clamped by the loop to at most 100
    L = ½ [ mean_i −log softmax_j(s_i·)_[texts of i] + mean_j −log softmax_i(s_·j)_[owner of j] ]

With several texts of one picture (rule `all`) the image-to-text term is the mean over a picture's texts of the
cross-entropy against them, so that a picture with many captions weighs no more than one with few, and another caption
of the same picture is never a negative (GBC, 2407.06723, multi-positive). With rule `sum` there is one such loss per
caption column, times the column's weight (MobileCLIP, 2311.17049, section 3: a sum, not an average).

Each process compares its own rows with the gathered columns; the mean over processes is the loss of the joined batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cutline.objectives import base
from cutline.objectives.gather import gather, gather_plain, world


class Config(base.ObjectiveConfig):
    """Nothing but the weight."""


class Objective(base.Objective):
    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        """One term per text source; `accuracy` (share of pictures whose own text is the best of the batch) is logged."""
        image, scale = features.image(), features.logit_scale()
        terms = {}
        for source, texts in batch.texts.items():
            text = features.text(source)
            # bf16 would round logits near 100 to halves; the product is a small part of a step.
            with torch.autocast(image.device.type, enabled=False):
                pair = (widen(image), widen(text))
                if texts.paired:
                    loss, hits = paired_loss(*pair, scale)
                else:
                    loss, hits = multi_positive_loss(*pair, texts.owners, scale)
            terms[source] = texts.weight * loss
            self.logged[f"accuracy/{source}"] = hits.detach()
        return terms


def widen(x: Tensor) -> Tensor:
    """Half precision to float32; anything wider as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def paired_loss(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE for rows that pair up: image, text (b, D) of this process → (loss, top-1 accuracy image → text)."""
    rank, _ = world()
    labels = torch.arange(len(image), device=image.device) + rank * len(image)
    by_image = scale * image @ gather(text).T  # (b, B)
    by_text = scale * text @ gather(image).T
    loss = (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2
    return loss, (by_image.argmax(1) == labels).float().mean()


def multi_positive_loss(image: Tensor, text: Tensor, owners: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE with several texts a picture: image (b, D), text (m, D), owners (m,) → (loss, top-1 accuracy).

    A picture without a text counts in the negatives of the texts only. Processes may hold different m: the texts are
    padded to the largest before they are gathered, and the padding is masked out.
    """
    rank, size = world()
    b, m = len(image), len(text)
    most = m
    if size > 1:
        count = torch.tensor([m], device=image.device)
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
        most = int(count)
    all_text = gather(F.pad(text, (0, 0, 0, most - m)))  # (M, D)
    all_owners = gather_plain(F.pad(owners + rank * b, (0, most - m), value=-1))  # (M,), −1: padding
    rows = torch.arange(b, device=image.device) + rank * b
    positive = all_owners[None, :] == rows[:, None]  # (b, M)
    by_image = (scale * image @ all_text.T).masked_fill(all_owners[None, :] < 0, float("-inf"))
    # A positive competes with the negatives, not with its siblings: log(e^s + Σ negatives e^s) − s.
    negatives = by_image.masked_fill(positive, float("-inf")).logsumexp(1, keepdim=True)
    each = torch.logaddexp(by_image, negatives) - by_image
    count_of = positive.sum(1)
    per_image = torch.where(positive, each, 0.0).sum(1) / count_of.clamp(min=1)
    has_text = count_of > 0
    # Sums over this process, divided by global counts times the world size: the mean over processes is then exact.
    image_loss = per_image.sum() * size / _total(has_text.sum())
    by_text = scale * text @ gather(image).T  # (m, B)
    each_text = F.cross_entropy(by_text, owners + rank * b, reduction="none")
    share = 1.0 / count_of.clamp(min=1).to(each_text.dtype)[owners]  # a picture's captions together weigh one
    text_loss = (each_text * share).sum() * size / _total(has_text.sum())
    best = by_image.argmax(1)
    hits = positive.gather(1, best[:, None]).squeeze(1).float().mean()
    return (image_loss + text_loss) / 2, hits


def _total(n: Tensor) -> Tensor:
    """Sum of a count over processes, at least 1."""
    n = n.clone()
    if world()[1] > 1:
        torch.distributed.all_reduce(n)
    return n.clamp(min=1)
