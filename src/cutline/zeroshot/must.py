"""MUST, masked unsupervised self-training (Li et al., 2206.02967; salesforce/MUST, engine_self_training.py, clip/model.py).

An image tower of CLIP and a classifier that begins as its words learn from pictures without labels. The student sees a
strong view (RandAugment) with some patches replaced by a token, its EMA teacher a weak view and all of it:

    L = CE + w_f · fair + w_p · pixels + w_a · align
    CE      mean over sure pictures of −log p_ŷ,  ŷ = argmax q, sure where max q > τ,  q of the teacher, p of the student
    fair    −mean_c log p̄_c,  p̄ the mean of p over the batch; with 512 classes or more p̄ ← ½ (p̄ before + p̄ of the
            batch), through the second of which alone the gradient goes, and the term is divided by ½
    pixels  mean of |decoder(h) − x| over masked pixels and channels of the normalised strong view x
    align   mean over masked patches i of |v_i/|v_i| − v/|v||²,  v_i = W h_i,  v the picture's embedding
    after a step:  teacher ← m · teacher + (1 − m) · student,  m linear from m_0 to m_1 in the first steps

h are a patch's features after a norm of their own, W the tower's projection to the joint space, p and q = softmax(s · cos)
with the temperature of the CLIP (s = 100 in OpenAI's; SigLIP's bias is the same for all classes, and changes no softmax). The
decoder is a 1 × 1 convolution and a pixel shuffle. The paper's towers pool a class token; of those that pool by attention
(SigLIP, CoCa) W is what becomes of a patch that is pooled alone, see `Encoder.project`.

Where no picture of a batch is sure the reference's CE is NaN and its training ends; here it is 0, and such batches are counted
and logged. All means run over the batch of all processes (the reference's CE is a mean of the processes' own), p̄ over time
goes on from epoch to epoch, and logs of p are never taken of a p that underflowed.

Shapes: B pictures, K classes, N patches, C width of the tower, D joint width, S side of a picture.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from cutline.errors import ConfigError, CutlineError
from cutline.objectives.gather import gather, gather_plain, total, world
from cutline.objectives.teacher import move
from cutline.towers.encoder import Encoder
from cutline.towers.vit import NativeViT, TimmViT, sees_patches_alone
from cutline.transfer.model import Transferred
from cutline.transfer.options import TransferConfig, autocast, idle
from cutline.transfer.probes import CosineProbe

MANY = 512  # classes, from which on p̄ is a mean over batches


class AdaptConfig(TransferConfig):
    """Options of `adapt`, beside those of all tasks; the defaults suit a data set of thousands of pictures on few cores.

    prompts, names: as `zeroshot.prompts` takes them; names are by default the data's own. unlabelled: a folder of
    pictures to learn from, in place of the data's train split. tau: τ. mask: share of a picture that is masked, in squares of
    `mask_patch` pixels (default: two patches), 0 for none. fair, pixels, align: weights of the terms. momentum_start, momentum,
    momentum_steps: m_0, m_1 and when it is reached. scale, operations, magnitude: of the strong view. steps: default `epochs`
    passes over the pictures.

    The paper's settings for six data sets are recipes/adapt/*.yaml.
    """

    prompts: str | list[str] = "openai"
    names: str | list[str] | None = None
    unlabelled: str | None = None
    epochs: int = Field(20, ge=1)
    batch: int = Field(64, ge=2)
    lr: float = Field(5e-5, gt=0)
    warmup: int = Field(0, ge=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    schedule: Literal["poly", "cosine", "constant", "drops"] = "cosine"
    tau: float = Field(0.5, ge=0, lt=1)
    mask: float = Field(0.1, ge=0, lt=1)
    mask_patch: int | None = Field(None, ge=1)
    fair: float = Field(1.0, ge=0)
    pixels: float = Field(1.0, ge=0)
    align: float = Field(0.5, ge=0)
    momentum_start: float = Field(0.99, ge=0, le=1)
    momentum: float = Field(0.9998, ge=0, le=1)
    momentum_steps: int = Field(500, ge=1)
    scale: tuple[float, float] = (0.3, 1.0)
    operations: int = Field(2, ge=0)
    magnitude: int = Field(9, ge=0, le=30)

    @field_validator("scale")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("a range of shares of the area, from small to large, at most 1")
        return value

    @model_validator(mode="after")
    def _used(self) -> "AdaptConfig":
        idle(self, "MUST trains the whole tower, reads no label and has a teacher", "frozen", "labels", "ema")
        if not self.mask:
            idle(self, "mask=0 masks nothing", "mask_patch", "pixels", "align")
        return self


@dataclass
class Pictures:
    """strong, weak: views (B, 3, S, S) uint8; masked (B, N): patches that the student does not see; keys."""

    strong: Tensor
    weak: Tensor
    masked: Tensor
    keys: list[str]


class Must(Transferred):
    """Student and teacher. words (K, D): unit vectors of the classes, with which both begin; scale: s."""

    average: Tensor  # (K,) log p̄ of the step before, -inf at the first
    taken: Tensor  # steps
    sure: Tensor  # pictures, of all steps
    seen: Tensor
    unsure: Tensor  # steps without a sure picture

    def __init__(self, encoder: Encoder, words: Tensor, scale: float, config: AdaptConfig) -> None:
        super().__init__(encoder, frozen=False)
        self.config, width = config, encoder.channels[-1]
        self.head = CosineProbe(encoder.width, len(words))
        with torch.no_grad():
            self.head.weight.copy_(words)
            self.head.scale.fill_(scale)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        if config.mask:
            self.token = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
            self.norm = nn.LayerNorm(width)
            self.decoder = nn.Sequential(
                nn.Conv2d(width, 3 * encoder.multiple**2, 1), nn.PixelShuffle(encoder.multiple)
            )
        self.register_buffer("average", torch.full((len(words),), -math.inf))
        for name in ("taken", "sure", "seen", "unsure"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        self._last = (0, 0)  # sure pictures and pictures of the last batch of all processes
        self.train()

    @property
    def student(self) -> nn.ModuleList:
        return nn.ModuleList([self.encoder, self.head])

    def train(self, mode: bool = True) -> "Must":
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()
        return self

    def layer_of(self, name: str) -> int:
        """As in the reference: the token is of the stem, what follows the tower's last block has the full rate."""
        if name == "token":
            return 0
        layer = super().layer_of(name)
        return layer if layer < self.num_layers or "blocks." in name else self.num_layers + 1

    def loss(self, batch: Pictures) -> Tensor:
        """L of this process's share of a batch; averaged over processes it is that of all of it."""
        config, device = self.config, self.head.weight.device
        strong, weak = (self.normalise(x.to(device, non_blocking=True)) for x in (batch.strong, batch.weak))
        masked = batch.masked.to(device)
        with autocast(config)():
            labels, sure = self.pseudo(weak)
            pooled, patches = self.look(strong, masked)
            logits = self.head([pooled])
            said = self.decoder(self._map(patches)) if config.mask and config.pixels else None
            cells = self.encoder.project(self._map(patches)) if config.mask and config.align else None
        fair, average = fairness(logits, self.average.clone())
        terms = {"pseudo": (1.0, self_training(logits, labels, sure)), "fair": (config.fair, fair)}
        if said is not None:
            terms["pixels"] = (config.pixels, masked_pixels(said.float(), strong, masked))
        if cells is not None:
            terms["align"] = (config.align, alignment(cells.float().flatten(2).mT, pooled.float(), masked))
        self.average.copy_(average)
        everyone = gather_plain(sure.long())
        self._last = (int(everyone.sum()), len(everyone))
        self.logged = {name: value.detach() for name, (_, value) in terms.items()}
        self.logged |= {
            "sure": self._last[0] / self._last[1],
            "unsure": int(self.unsure) + (not self._last[0]),
            "momentum": self.momentum(),
        }
        return torch.stack([weight * value for weight, value in terms.values()]).sum()

    @torch.no_grad()
    def pseudo(self, weak: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher says of normalised views: the class of each (B,), and whether it is sure of it."""
        encoder, head = self.teacher
        share, label = head([encoder.pooled(weak)]).softmax(1).max(1)  # type: ignore[operator]
        return label, share > self.config.tau

    def look(self, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """The student's embedding (B, D) of normalised views with patches masked (B, N), and h of all patches (B, N, C)."""
        if not self.config.mask:
            return self.encoder.pooled(images), images

        def replace(x: Tensor) -> Tensor:
            return torch.where(masked[..., None], self.token.to(x.dtype), x)

        assert isinstance(self.encoder, NativeViT | TimmViT)  # `masked_side`
        pooled, patches = self.encoder.replaced(images, replace)
        return pooled, self.norm(patches)

    def _map(self, patches: Tensor) -> Tensor:
        side = math.isqrt(patches.shape[1])
        return patches.transpose(1, 2).reshape(len(patches), -1, side, side)

    def momentum(self) -> float:
        """m after the step that is being taken."""
        c = self.config
        return momentum(int(self.taken), c.momentum_start, c.momentum, c.momentum_steps)

    def after_step(self) -> None:
        move(self.teacher, self.student, self.momentum())
        sure, seen = self._last
        self.taken += 1
        self.sure += sure
        self.seen += seen
        self.unsure += not sure


def masked_side(encoder: Encoder, config: AdaptConfig) -> int:
    """The side of the masked squares in patches. Raises `ConfigError` for a tower whose patches cannot be masked or aligned."""
    if not config.mask:
        return 1
    if not isinstance(encoder, NativeViT | TimmViT) or not sees_patches_alone(encoder):
        raise ConfigError(
            "adapt puts a token in place of patches, which vision transformers of open_clip and timm with a patch embedding can "
            f"take, and {encoder.name} is another: say mask=0 to learn from its own labels alone, or give ViT-B-16:openai, "
            "ViT-B-16-SigLIP:webli, or a run of a preset such as vit-tiny-64."
        )
    patch = encoder.multiple
    grid = encoder.size // patch
    square = config.mask_patch or (patch if grid % 2 else 2 * patch)
    if square % patch or grid % (square // patch):
        raise ConfigError(
            f"mask_patch={square} must be a multiple of the tower's patches of {patch} pixels that divides its {grid * patch}."
        )
    if config.align:
        try:
            encoder.project(next(encoder.parameters()).new_zeros(1, encoder.channels[-1], 1, 1))
        except CutlineError as e:
            raise ConfigError(f"{e} So they cannot be aligned with the picture: say align=0.") from e
    return square // patch


def self_training(logits: Tensor, labels: Tensor, sure: Tensor) -> Tensor:
    """CE of (B, K) to the labels (B,) of sure pictures; a process's part of the mean over all, 0 where none is sure."""
    each = F.cross_entropy(logits, labels, reduction="none")
    return torch.where(sure, each, 0).sum() * world()[1] / total(sure.sum())


def fairness(logits: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The term from (B, K) of this process and log p̄ of the step before (K,), -inf at the first; and log p̄ now."""
    everyone = gather(logits.log_softmax(1))
    mean = everyone.logsumexp(0) - math.log(len(everyone))
    if len(mean) < MANY:
        return -mean.mean(), mean.detach()
    if not before.isneginf().all():
        mean = torch.logaddexp(before, mean) - math.log(2)
    return -mean.mean() / 0.5, mean.detach()


def masked_pixels(said: Tensor, images: Tensor, masked: Tensor) -> Tensor:
    """Mean absolute error of (B, 3, S, S) over the pixels of patches masked (B, N). What no whole patch covers of the images
    is left out."""
    side, (height, width) = math.isqrt(masked.shape[1]), said.shape[2:]
    wanted = F.interpolate(masked.view(-1, 1, side, side).float(), (height, width), mode="nearest")
    return ((said - images[..., :height, :width]).abs() * wanted).sum() / wanted.sum() / 3


def alignment(patches: Tensor, pooled: Tensor, masked: Tensor) -> Tensor:
    """Mean squared distance of the directions of masked patches (B, N, D), (B, N) from those of their pictures (B, D)."""
    apart = (F.normalize(patches, dim=-1) - F.normalize(pooled, dim=-1)[:, None]).square().sum(-1)
    return apart[masked].mean()


def momentum(step: int, start: float, end: float, steps: int) -> float:
    """Linear from `start` at step 0 to `end` from step `steps` on."""
    return start + (end - start) * min(1.0, step / steps)
