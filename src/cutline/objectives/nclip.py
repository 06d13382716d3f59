"""Non-contrastive objective of nCLIP (Zhou et al., 2210.09304, section 3): each modality predicts the other's assignment.

Two heads, one a modality, map the joint embedding to K logits; with p_i and q_j the softmaxes of a picture's and a text's

    L = mean over pairs of ½ [ H(q_j, p_i) + H(p_i, q_j) ]       cross-entropies, H(a, b) = −Σ_k a_k log b_k
        + l1 · ½ [ mean_i H(p_i) + mean_j H(q_j) ]               each sample confident
        − l2 · ½ [ H(mean_i p_i) + H(mean_j q_j) ]               all samples together spread over the prototypes

There are no negatives; the means run over all processes, and both sides of a cross-entropy have a gradient. Where a
picture has several texts (rule `all`) they together weigh as much as another picture's. With rule `sum` there is one such
loss per caption column, times the column's weight. xCLIP is `nclip: {weight: 0.7}` beside `contrastive: {weight: 0.3}`:
nCLIP alone learns features but hardly a zero-shot classifier.

The heads are DINO's (`teacher.Head`): three layers to a unit vector, and its cosines with K unit vectors. Over all samples
of a batch each prototype's cosines are standardised to mean 0 and variance 1, and divided by the temperature; their softmax
is the assignment. Without the standardisation the common part of all embeddings, which is nearly all of them at first, decides
alone: on scenes every sample was at the uniform distribution within 75 steps and stayed there, where the gradient is 0.
At half the deviation (temperature 0.5) scenes learn faster than at the whole or a quarter of it.

The paper's heads, l1 and l2 are not known to us (there is no code); ours follow from the formula. Near the uniform
distribution, p = 1/K + δ changes L by K/2 times

    −(1 + l1) |δ|²  for a δ that a pair has in common and other pairs lack,
    ½ (1 − l1) |δ|²  for one that its partner lacks,
    (l2 − 1 − l1) |δ|²  for one that all samples have in common.

The last is the way into collapse, and closed if l2 > 1 + l1. The second must cost something, or samples grow confident
without agreeing: l1 < 1. Hence l1 = 0.5 and l2 = 2. At the other end a batch of B samples then does best when each has
K/B prototypes of its own, with L = (1 + l1) log(K/B) − l2 log K: K should not be far above the batch over all processes
(the paper has 32,768 for 4,096). Its heads read the feature before CLIP's projection; these read the joint embedding,
which every tower has.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from cutline.objectives import base, teacher
from cutline.objectives.collapse import LEAST_INFORMATION
from cutline.objectives.contrastive import widen
from cutline.objectives.gather import gather, pair, world
from cutline.towers.model import Model


class Config(base.ObjectiveConfig):
    """prototypes: K; hidden, bottleneck: widths in the heads; temperature: of the assignments; confident, spread: l1 and l2."""

    prototypes: int = Field(32768, ge=2)
    hidden: int = Field(2048, ge=1)
    bottleneck: int = Field(256, ge=1)
    temperature: float = Field(0.5, gt=0)
    confident: float = Field(0.5, ge=0)
    spread: float = Field(2.0, ge=0)


class Objective(base.Objective):
    config: Config

    def __init__(self, config: Config, model: Model) -> None:
        super().__init__(config, model)
        width = int(model.model_cfg["embed_dim"])
        sizes = teacher.Config(prototypes=config.prototypes, hidden=config.hidden, bottleneck=config.bottleneck)
        self.image, self.text = teacher.Head(width, sizes), teacher.Head(width, sizes)

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        """Three terms per text source: `cross`, `confident` (l1 included) and `spread` (l2 included).

        Logged of the pictures and of each source, in nats: `entropy/mean`, of the mean assignment, and `entropy/each`, the
        mean over single ones. Their difference is what an assignment tells of its sample; at 0 training has collapsed.
        `agreement` is the share of texts whose first prototype is their picture's.
        """
        config, (_, size) = self.config, world()
        image = widen(features.image())
        equal = image.new_full((len(image),), 1 / len(image))
        log_p = self._assign(self.image, image, equal)  # (b, K)
        each_p, mean_p = entropies(log_p, equal)
        terms, self.logged = {}, {"entropy/mean/image": mean_p.detach(), "entropy/each/image": each_p.detach()}
        for source, texts in batch.texts.items():
            pairing = pair(texts.owners, len(image), texts.paired)
            share = pairing.share.to(image.dtype)[pairing.own] * size
            log_q = self._assign(self.text, widen(features.text(source)), share)  # (m, K)
            each_q, mean_q = entropies(log_q, share)
            partner = log_p if texts.paired else log_p[texts.owners]
            cross = -share @ (log_q.exp() * partner + partner.exp() * log_q).sum(1) / 2
            terms[f"cross/{source}"] = texts.weight * cross
            terms[f"confident/{source}"] = texts.weight * config.confident * (each_p + each_q) / 2
            terms[f"spread/{source}"] = -texts.weight * config.spread * (mean_p + mean_q) / 2
            self.logged |= {
                f"entropy/mean/{source}": mean_q.detach(),
                f"entropy/each/{source}": each_q.detach(),
                f"agreement/{source}": (log_q.argmax(1) == partner.argmax(1)).float().mean(),
            }
        return terms

    def after_step(self, model: nn.Module, step: int) -> None:
        mean, each = (float(self.logged[f"entropy/{e}/image"]) for e in ("mean", "each"))
        self.collapse = ""
        if mean - each < LEAST_INFORMATION:
            self.collapse = (
                f"nclip has collapsed: the assignments of pictures say nothing of them (entropy of their mean {mean:.3f} nats, of a "
                f"single one {each:.3f}). Raise objectives.nclip.spread, take fewer prototypes, a larger batch or a lower train.lr."
            )

    def _assign(self, head: teacher.Head, x: Tensor, weight: Tensor) -> Tensor:
        """(n, D), and the samples' weights → logarithms of the assignments (n, K)."""
        directions = head(x)
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round cosines to 1/256
            return (standardise(directions @ head.prototypes().T, weight) / self.config.temperature).log_softmax(1)


def standardise(x: Tensor, weight: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Columns of `x` (n, K) with mean 0 and variance 1 over the samples of all processes; weight as in `entropies`."""
    mean = gather((weight @ x)[None]).mean(0)
    x = x - mean
    variance = gather((weight @ x.square())[None]).mean(0)
    return x * (variance + epsilon).rsqrt()


def entropies(log: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of assignments, their logarithms (n, K): the mean over this process's samples, and that of the mean over all.

    weight (n,): of the samples; in sum 1, on average over processes.
    """
    p = log.exp()
    mean = gather((weight @ p)[None]).mean(0)
    tiny = torch.finfo(mean.dtype).tiny  # where an assignment is rounded to 0
    return -weight @ (p * log).sum(1), -(mean * mean.clamp(min=tiny).log()).sum()
