"""Pseudo-labels of experts beside contrastive training (CLIPTeX, Salehi et al., 2310.14108): L = L_CLIP + Σ_t λ_t L_t.

A light head for each task t reads the map of the image tower's last layer, after its norm, and learns what an expert
(`cutline label`) has said of the picture. The map is that of the pass which gives the embedding, so only the heads are
added. Heads work at the map's resolution, their output is enlarged bilinearly to that of the labels.

    segment   cross-entropy over the pixels that have a class
    depth     in metres:  L1 of the logarithm, mean |z − log d|   over the pixels with a reading, z the head's output
              relative:   MiDaS's scale- and shift-invariant L1 (Ranftl et al., 1907.01341, section 5): mean |ẑ − d̂| with
                          x̂ = (x − median x) / mean |x − median x|   over the readings of a picture; mean over pictures
    normals   1 − cos(z, n)   over the pixels that have a normal

The paper is known to us without its formulas: it has cross-entropy, a depth loss of scale-invariant or L1 kind, and an
angular one for normals. Which of these it has exactly, its heads, and its λ (its appendix A) we do not know; here L1 is
taken, since pseudo-labels have outliers, and λ = 1 each. Means run over the pixels (pictures) of all processes.

The paper goes on from a trained CLIP (`towers.model: ViT-B-16, towers.pretrained: datacomp_xl_s13b_b90k`) for 30 epochs of CC3M.

Shapes: B pictures, S pixels of a side of the labels, C channels, h × w cells of the map.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from cutline import config as checked
from cutline.objectives import base
from cutline.objectives.contrastive import widen
from cutline.objectives.gather import total, world
from cutline.towers import load_encoder

NAME = "objectives.experts"


class Expert(checked.Config):
    """column: with the labels; weight: λ of its loss."""

    column: str = Field(min_length=1)
    weight: float = Field(1.0, ge=0)


class Segment(Expert):
    """classes: how many there are, with the ids 0 … classes − 1."""

    classes: int = Field(ge=2, le=65535)


class Depth(Expert):
    """relative: whether the labels are (inverse) depth without a unit, as MiDaS, DPT and Depth Anything give it."""

    relative: bool = False


class Config(base.ObjectiveConfig):
    """segment, depth, normals: the experts that are there. head: a 1 × 1 convolution, or one of 3 × 3 to `hidden` channels, GELU
    and 1 × 1. size: pixels of a side of the labels; None: four a cell of the map, or the picture's own if it has fewer.
    """

    segment: Segment | None = None
    depth: Depth | None = None
    normals: Expert | None = None
    head: Literal["linear", "conv"] = "linear"
    hidden: int = Field(256, ge=1)
    size: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _some(self) -> "Config":
        experts = self.experts().values()
        if not any(expert.weight for expert in experts):
            raise ValueError(
                "name an expert and its column, with a weight above 0: segment, depth or normals, for example "
                "depth: {column: depth}"
            )
        if len({expert.column for expert in experts}) < len(experts):
            raise ValueError("every expert has a column of its own; two of these name the same")
        return self

    def experts(self) -> dict[str, Expert]:
        """Those that are there."""
        all_ = {"segment": self.segment, "depth": self.depth, "normals": self.normals}
        return {name: expert for name, expert in all_.items() if expert is not None}


class Objective(base.Objective):
    config: Config
    needs_text = False
    reads_pooled = False
    reads_map = True

    def __init__(self, config: Config, model: Any) -> None:
        super().__init__(config, model)
        encoder = load_encoder(model)
        self.cells = encoder.size / encoder.multiple  # of a side of the map; the last may be cut by the picture's edge
        self.size = config.size or min(round(4 * self.cells), encoder.size)
        outputs = {"segment": config.segment.classes if config.segment else 0, "depth": 1, "normals": 3}
        width = encoder.channels[-1] if encoder.patch else _width_of_last(encoder)
        self.heads = nn.ModuleDict({name: self._head(width, outputs[name]) for name in config.experts()})

    def _head(self, width: int, outputs: int) -> nn.Module:
        hidden = self.config.hidden
        if self.config.head == "linear":
            return nn.Conv2d(width, outputs, 1)
        return nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, outputs, 1))

    def maps(self) -> list[base.Map]:
        asked = {name: expert.model_dump(exclude={"weight"}) for name, expert in self.config.experts().items()}
        return [
            base.Map.model_validate({"by": f"{NAME}.{name}", "kind": name, "size": self.size} | own)
            for name, own in asked.items()
        ]

    def forward(self, batch: base.Batch, features: base.Features) -> dict[str, Tensor]:
        """A term for each expert, times its weight. Logged: the share of pixels whose class is right, the mean relative
        error of depth in metres, the mean angle of normals in degrees."""
        seen = features.dense()  # (B, C, h, w)
        terms = {}
        for name, expert in self.config.experts().items():
            said = self._enlarge(self.heads[name](seen))
            with torch.autocast(said.device.type, enabled=False):
                terms[name] = expert.weight * getattr(self, f"_{name}")(said, batch.columns[expert.column])
        return terms

    def _enlarge(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → (B, C, S, S), without what lies beyond the picture."""
        whole = round(self.size * x.shape[-1] / self.cells)
        x = widen(x).contiguous(memory_format=torch.channels_last)  # on a CPU ten times faster to enlarge
        return F.interpolate(x, (whole, whole), mode="bilinear")[..., : self.size, : self.size]

    def _segment(self, said: Tensor, ids: Tensor) -> Tensor:
        rows, ids = said.permute(0, 2, 3, 1).flatten(0, 2), ids.long().flatten()  # classes last, as they lie in memory
        there = ids >= 0
        loss = F.cross_entropy(rows, ids, ignore_index=-1, reduction="sum")
        own = rows.detach().gather(1, ids.clamp(min=0)[:, None])[:, 0]
        self.logged["accuracy"] = _share(own >= rows.detach().amax(1), there)  # a fifth of the time of argmax on a CPU
        return _mean(loss, there)

    def _depth(self, said: Tensor, depth: Tensor) -> Tensor:
        said, depth = said[:, 0], depth.to(said.dtype)
        there = depth > 0
        if self.config.depth is not None and self.config.depth.relative:
            return _invariant(said, depth, there)
        log = torch.where(there, depth, 1.0).log()
        self.logged["absrel"] = _share(torch.expm1(said.detach().clamp(max=10) - log).abs(), there)
        return _mean((said - log).abs().mul(there).sum(), there)

    def _normals(self, said: Tensor, normals: Tensor) -> Tensor:
        normals = normals.to(said.dtype)
        there = normals.square().sum(1) > 0.5
        cosine = F.cosine_similarity(said, normals, dim=1)
        self.logged["degrees"] = _share(cosine.detach().clamp(-1, 1).acos() * (180 / math.pi), there)
        return _mean((1 - cosine).mul(there).sum(), there)


def _invariant(said: Tensor, depth: Tensor, there: Tensor) -> Tensor:
    """(B, S, S) each → the loss of relative depth. A picture that is all of one depth says nothing and is left out."""
    said, depth, there = (v.flatten(1) for v in (said, depth, there))
    readings = there.sum(1, keepdim=True).clamp(min=1)

    def normal(v: Tensor) -> tuple[Tensor, Tensor]:
        median = torch.where(there, v.detach(), math.nan).nanmedian(1, keepdim=True).indices
        v = (v - v.gather(1, median)) * there
        spread = v.abs().sum(1, keepdim=True) / readings
        return v / spread.clamp(min=1e-6), spread

    (x, _), (y, spread) = normal(said), normal(depth)
    tells = spread > 1e-6
    each = (x - y).abs().sum(1, keepdim=True) / readings
    return _mean((each * tells).sum(), tells)


def _mean(summed: Tensor, counted: Tensor) -> Tensor:
    """A sum over this process's part of what is counted → what averages over processes to the mean over all of it."""
    return summed * world()[1] / total(counted.sum())


def _share(values: Tensor, there: Tensor) -> Tensor:
    """Mean over this process's pixels, for the log."""
    return (values * there).sum() / there.sum().clamp(min=1)


def _width_of_last(encoder: Any) -> int:
    """Channels of `Encoder.last` of a tower with stages, some of which end with a convolution that the taps do not show."""
    training, some = encoder.visual.training, next(encoder.parameters())
    picture = torch.zeros(1, 3, encoder.size, encoder.size, device=some.device, dtype=some.dtype)
    with torch.no_grad():
        width = encoder.eval().last(picture).shape[1]
    encoder.visual.train(training)
    return int(width)
