"""DepthCLIP (2207.01077): depth by the words for distance that a patch is nearest to. Nothing is trained.

    depth = Σ_k softmax_k(100 · cos(patch, text_k) / temperature) · bin_k,     averaged with the mirror image's

The patches are in the joint space: for OpenAI's ResNets every token of the attention pooling, as the paper has it (the
released code takes the last stage's map with half of its channels, which is no joint space); for other towers
`Encoder.project` of the last map, and of a timm tower that pools by attention each cell pooled alone. Depth is enlarged
bilinearly to the picture's resolution.

The paper's bins are rooms': for another range give `bins` in metres, or "data" for quantiles of the training depth, which
is a use of labels and is said in the protocol.

Shapes: B pictures, h × w patches, D joint width, K bins.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from cutline import towers
from cutline.errors import ConfigError, DataError
from cutline.towers.encoder import Encoder
from cutline.towers.hierarchical import ResNetEncoder
from cutline.transfer.data import DenseData
from cutline.transfer.depth import DepthModel, MetresConfig, check_readings
from cutline.transfer.options import idle
from cutline.transfer.prepared import PreparedDense
from cutline.transfer.pyramid import LastMap
from cutline.zeroshot.dense import DenseTower
from cutline.zeroshot.prompts import class_names, described, prompts
from cutline.zeroshot.texts import text_classifier

NAMES = ("giant", "extremely close", "close", "not in distance", "a little remote", "far", "unseen")
METRES = (1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0)
TRAINING = (
    "steps", "lr", "weight_decay", "layer_decay", "drop_path", "warmup", "schedule", "power", "clip", "ema", "flip", "scale",
    "colour", "variance", "gradient", "cutdepth", "grad_checkpointing", "save_every",
)  # fmt: skip
READ = 500  # training pictures whose readings bins=data takes at most


class DepthClipConfig(MetresConfig):
    """Options of DepthCLIP, beside those of depth that are not about training.

    prompts, names: as `zeroshot.prompts` takes them; names are of the bins, from near to far; of several of one bin the nearest
    counts. bins: metres of each, rising, or "data", quantiles of the readings of `labels` training pictures; temperature: of
    100 · cosine, so that the logits are a thousand times it. precision: single, since the logits magnify what half precision
    rounds.
    """

    method: Literal["depthclip"] = "depthclip"
    frozen: Literal[True] = True
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    test_flip: bool = True
    prompts: str | list[str] = "This object is {}"
    names: str | list[str] = Field(default=list(NAMES))
    bins: list[float] | Literal["data"] = Field(default=list(METRES))
    temperature: float = Field(0.1, gt=0)

    @field_validator("bins")
    @classmethod
    def _rising(cls, value: Any) -> Any:
        return value if isinstance(value, str) else rising(value)

    @model_validator(mode="after")
    def _fits(self) -> "DepthClipConfig":
        count = len(class_names(self.names))
        if isinstance(self.bins, list) and len(self.bins) != count:
            raise ValueError(f"{count} names and {len(self.bins)} bins: give a bin for each")
        if count < 2:
            raise ValueError("one name gives one depth everywhere: give two or more")
        if self.test == "whole":
            idle(self, "test=whole has no windows", "crop")
        if self.labels is not None and self.bins != "data":
            raise ValueError("only bins=data looks at labels: leave labels out")
        idle(self, "method=depthclip trains nothing", *TRAINING)
        return self


def rising(bins: list[float]) -> list[float]:
    """The bins as they are; raises `ValueError` for fewer than two, and where they are no depths that rise."""
    if len(bins) < 2:
        raise ValueError("one bin gives one depth everywhere: give two or more")
    if bins[0] <= 0 or any(a >= b for a, b in pairwise(bins)):
        raise ValueError(f"bins must be positive and rise, and are {bins}")
    return bins


def expected(joint: Tensor, texts: Tensor, bins: Tensor, temperature: float, owners: Tensor | None = None) -> Tensor:
    """DepthCLIP's sum: a joint map (B, D, h, w), unit vectors of texts (M, D) and bins (K,) to metres (B, 1, h, w).

    owners (M,): the bin of each text, of which the nearest counts; without them text k is of bin k.
    """
    with torch.autocast(joint.device.type, enabled=False):
        joint = joint.float() if joint.dtype in (torch.bfloat16, torch.float16) else joint
        cosine = torch.einsum("bdhw,kd->bkhw", F.normalize(joint, dim=1), texts.to(joint.dtype))
        if owners is not None:
            best = cosine.new_full((len(cosine), len(bins), *cosine.shape[2:]), -torch.inf)
            cosine = best.scatter_reduce(1, owners.view(1, -1, 1, 1).expand_as(cosine), cosine, "amax")
        shares = (100 * cosine / temperature).softmax(1)
        return torch.einsum("bkhw,k->bhw", shares, bins.to(joint.dtype))[:, None]


class WordBins(nn.Module):
    """`expected` of the last level and texts that are given, (M, D), of the bins `owners` (M,)."""

    texts: Tensor
    owners: Tensor
    bins: Tensor

    def __init__(self, texts: Tensor, owners: Tensor, bins: Sequence[float], temperature: float) -> None:
        super().__init__()
        self.register_buffer("texts", texts)
        self.register_buffer("owners", owners)
        self.register_buffer("bins", torch.tensor(bins))
        self.temperature = temperature

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        return expected(levels[-1], self.texts, self.bins, self.temperature, self.owners)


class JointDepth(DepthModel):
    """A model of depth whose head reads the joint embeddings of the patches."""

    def __init__(self, encoder: Encoder, head: nn.Module, config: MetresConfig) -> None:
        levels = LastMap((encoder.multiple,), (encoder.width,))
        super().__init__(encoder, levels, head, config)

    def read(self, padded: Tensor) -> list[Tensor]:
        return [joint_map(self.encoder, padded)]


class DepthClip(JointDepth):
    """DepthCLIP on a model with a text tower; the config's bins are in metres. truncated: texts that the context cut."""

    def __init__(self, model: towers.Model, config: DepthClipConfig) -> None:
        names, templates = class_names(config.names), prompts(config.prompts)
        texts = text_classifier(model, names, templates)
        assert isinstance(config.bins, list)
        head = WordBins(texts.weights, texts.owners, config.bins, config.temperature)
        super().__init__(towers.load_encoder(model), head, config)
        self.notes = {**described(names, templates), "names": names}
        self.truncated = texts.truncated


def joint_map(encoder: Encoder, images: Tensor) -> Tensor:
    """The patches of normalised pictures in the joint space, not normalised: (B, 3, H, W) → (B, D, h, w).

    Raises `CutlineError` for a tower whose patches have no place there.
    """
    if isinstance(encoder, ResNetEncoder):
        return attended(encoder.visual.attnpool, encoder.last(images))
    return DenseTower(encoder, "plain")(images)


def attended(pool: Any, last: Tensor) -> Tensor:
    """What each patch attends to in CLIP's attention pooling, (B, C, h, w) → (B, D, h, w): the pooling with every patch, and not
    the mean alone, as the query. Its positions are interpolated to the map."""
    side = round((pool.positional_embedding.shape[0] - 1) ** 0.5)
    grid = [last.shape[2], last.shape[3]]
    x = last.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], 1)
    x = x + resample_abs_pos_embed(pool.positional_embedding[None], grid, [side, side], num_prefix_tokens=1)
    query, key, value = (
        proj(x).unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for proj in (pool.q_proj, pool.k_proj, pool.v_proj)
    )  # (B, heads, 1 + h·w, C / heads)
    out = F.scaled_dot_product_attention(query[:, :, 1:], key, value).transpose(1, 2).flatten(2)
    projected: Tensor = pool.c_proj(out)
    return projected.transpose(1, 2).reshape(len(last), -1, *grid)


def quantile_bins(data: DenseData, config: DepthClipConfig) -> tuple[list[float], int, int]:
    """A bin for each name: the middles of parts of equally many readings, of training pictures evenly spread over those that
    `labels` names; how many were read, and how many could not be."""
    prepared = PreparedDense(config, data, 1)
    check_readings(prepared, data.spec)
    part = prepared.split.part(prepared.rows[:: -(-len(prepared.rows) // READ)])
    low, high = config.min_depth, config.top
    targets = [torch.from_numpy(sample.target).flatten() for sample in part.samples()]
    readings = torch.cat([t[(t > low) & (t <= high)] for t in targets]).sort().values
    count = len(class_names(config.names))
    places = ((torch.arange(count) + 0.5) / count * len(readings)).long()
    bins = [float(f"{m:.4g}") for m in readings[places].tolist()]
    try:
        return rising(bins), *part.counts()
    except ValueError as e:
        raise DataError(
            f"{data.spec}: {len(bins)} quantiles of its depth are no {len(bins)} depths ({e}). Give bins."
        ) from e


def resolved(config: DepthClipConfig, data: DenseData | None) -> tuple[DepthClipConfig, int, int]:
    """The config with its range and its bins in metres, and how many training pictures' labels that took and skipped.

    Raises `ConfigError` for bins=data without data.
    """
    top = config.max_depth or (data.max_depth if data else None) or config.top
    config = config.model_copy(update={"max_depth": top})
    if config.bins != "data":
        return config, 0, 0
    if data is None:
        raise ConfigError("bins=data needs --data to take them from. Give the bins in metres: bins=[1,2,4].")
    bins, used, skipped = quantile_bins(data, config)
    return config.model_copy(update={"bins": bins}), used, skipped
