"""MaskFormer whose classes are words (ZSSeg, 2112.14757, section 3.2; MaskFormer, 2107.06278).

    class logits of a query = 100 · cos(MLP(query), [texts of the classes; a learned no-object vector])
    mask logits of a query  = MLP(query) · pixel embedding, at the finest level of the pyramid
    loss = CE (no object: 0.1) + 20 · focal + 1 · dice of masks matched one to one, summed over all decoder layers

Pixel decoder, transformer, matcher and losses are transformers' own; the backbone is any `Encoder`, of timm or of a run.
The transformer attends to the backbone's last map, which is of stride 32 in hierarchical towers as in the paper.

Shapes: B pictures, Q queries, L decoder layers, D joint width, K classes, h × w the size of the finest level.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MaskFormerConfig
from transformers.models.maskformer.configuration_maskformer import MaskFormerDetrConfig
from transformers.models.maskformer.modeling_maskformer import (
    MaskFormerHungarianMatcher,
    MaskFormerLoss,
    MaskformerMLPPredictionHead,
    MaskFormerPixelDecoder,
    MaskFormerPreTrainedModel,
    MaskFormerTransformerModule,
)

from cutline.errors import ConfigError
from cutline.transfer import pyramid
from cutline.transfer.metrics import IGNORE
from cutline.transfer.model import Pyramidal
from cutline.zeroshot.regions import SCALE, Regions

MULTIPLE = 64  # of channels: two in each of 32 group norms, since one value of a tiny picture has no variance
HEADS = 8


@dataclass
class Proposals:
    """queries (L, B, Q, D): unit vectors; masks (L, B, Q, h, w): logits. The last layer is the prediction."""

    queries: Tensor
    masks: Tensor


class MaskFormer(Pyramidal):
    """classes: K names; texts (K, D): their unit vectors; seen (K,): which of them training may use; vectors (tokens, W):
    of a learned prompt, none (0, 0) without one; regions: the CLIP, no part of the weights, set when training is done; notes:
    "clip", its name, and "truncated", texts that its context cut."""

    regions: Regions
    texts: Tensor
    seen: Tensor
    vectors: Tensor

    def __init__(
        self, encoder: Any, config: Any, classes: list[str], texts: Tensor, seen: Tensor, vectors: Tensor
    ) -> None:
        if config.channels % MULTIPLE:
            raise ConfigError(f"channels={config.channels} is no multiple of {MULTIPLE}, as MaskFormer's norms need.")
        widths = encoder.channels
        levels = pyramid.build(config.pyramid, encoder.patch, encoder.strides, widths, config.pyramid_channels)
        super().__init__(encoder, levels, config.frozen)
        self.config, self.classes, self.num_layers = config, classes, 0
        self.notes: dict[str, Any] = {}
        self.head = _Head(config, widths[-1], levels.channels, texts.shape[1])
        self.no_object = nn.Parameter(torch.empty(1, texts.shape[1]).normal_(std=0.02))
        self.register_buffer("texts", texts)
        self.register_buffer("seen", seen)
        self.register_buffer("vectors", vectors)
        self.train()

    def layer_of(self, name: str) -> int:
        """The backbone is one layer, and what follows it another: `layer_decay` is the backbone's share of the rate."""
        return 0 if name.startswith("encoder.") else 1

    def propose(self, images: Tensor) -> Proposals:
        """Proposals of normalised pictures (B, 3, H, W): of all decoder layers in training, else of the last alone."""
        maps = self.features(images)
        found: Proposals = self.head(maps[-1], self.pyramid(maps))
        return found

    def class_logits(self, queries: Tensor, texts: Tensor) -> Tensor:
        """Unit vectors (…, D) → (…, len(texts) + 1): the classes of `texts` and, last, no object."""
        words = torch.cat([texts, F.normalize(self.no_object, dim=-1)])
        return SCALE * queries.float() @ words.T

    def full_masks(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        """Mask logits (B, Q, h, w) at the resolution of the pictures: (B, Q, *size)."""
        full = F.interpolate(masks.float(), self._padded(*size), mode="bilinear", align_corners=False)
        return full[..., : size[0], : size[1]]

    def padded_targets(self, targets: Tensor) -> Tensor:
        """Class maps (B, H, W) as large as the padded pictures, with `IGNORE` there."""
        height, width = self._padded(targets.shape[1], targets.shape[2])
        return F.pad(targets, (0, width - targets.shape[2], 0, height - targets.shape[1]), value=IGNORE)


class _Head(MaskFormerPreTrainedModel):  # type: ignore[no-untyped-call]
    """Pixel decoder, transformer and the two MLPs of every query, of transformers."""

    def __init__(self, config: Any, last: int, levels: tuple[int, ...], joint: int) -> None:
        width = config.channels
        decoder = MaskFormerDetrConfig(
            d_model=width, num_queries=config.queries, decoder_layers=config.layers, decoder_ffn_dim=8 * width,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        )  # fmt: skip
        super().__init__(MaskFormerConfig(decoder_config=decoder, fpn_feature_size=width, mask_feature_size=width))
        self.layers = config.layers
        self.pixels = MaskFormerPixelDecoder(
            in_features=levels[-1], lateral_widths=list(levels[:-1]), feature_size=width, mask_feature_size=width
        )
        self.transformer = MaskFormerTransformerModule(last, self.config)
        self.to_mask = MaskformerMLPPredictionHead(width, width, width)
        self.to_words = MaskformerMLPPredictionHead(width, width, joint, num_layers=2)
        self.post_init()  # type: ignore[no-untyped-call]
        # MaskFormer's own initial weights. With transformers' (0.02 for all) attention is even and the queries are alike,
        # so that only dropout tells them apart, and they learn one mask between them.
        for weight in self.transformer.decoder.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)
        nn.init.normal_(self.transformer.queries_embedder.weight)

    def forward(self, last: Tensor, levels: list[Tensor]) -> Proposals:
        pixels = self.pixels([m.contiguous() for m in levels]).last_hidden_state  # (B, C, h, w)
        decoded = self.transformer(last.contiguous(), output_hidden_states=self.training)
        states = decoded.last_hidden_state[None]
        if self.training and self.layers > 1:  # layers give what comes before the norm, and the last state is after it
            inner = torch.stack(decoded.hidden_states[-self.layers : -1])
            states = torch.cat([self.transformer.decoder.layernorm(inner), states])
        masks = torch.einsum("lbqc,bchw->lbqhw", self.to_mask(states), pixels)
        return Proposals(F.normalize(self.to_words(states), dim=-1), masks)


class SeenLoss(nn.Module):
    """MaskFormer's loss over the seen classes alone, from class maps of all classes.

    Every seen class in a picture is one mask. Pixels of unseen classes and unlabelled ones are in none of them, whatever
    their label. A query without a mask learns that it is no object.
    """

    place: Tensor

    def __init__(self, seen: Tensor, no_object: float, mask: float, dice: float) -> None:
        super().__init__()
        self.weights = {"loss_cross_entropy": 1.0, "loss_mask": mask, "loss_dice": dice}
        matcher = MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=mask, cost_dice=dice)
        self.criterion = MaskFormerLoss(int(seen.sum()), matcher, self.weights, no_object)
        # From a class to its place among the seen; the last entry is that of IGNORE, -1.
        place = torch.where(seen, seen.long().cumsum(0) - 1, IGNORE)
        self.register_buffer("place", torch.cat([place, place.new_tensor([IGNORE])]))

    def forward(self, model: MaskFormer, found: Proposals, targets: Tensor) -> Tensor:
        """The loss of what was proposed for pictures with these class maps (B, H, W), scalar."""
        labels, masks = zip(*(self._masks(t) for t in self.place[model.padded_targets(targets).long()]))
        total = found.masks.new_zeros((), dtype=torch.float32)
        for queries, logits in zip(found.queries, found.masks, strict=True):
            classes = model.class_logits(queries, model.texts[model.seen])
            losses = self.criterion(logits.float(), classes, list(masks), list(labels))
            total = total + torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        return total

    @staticmethod
    def _masks(target: Tensor) -> tuple[Tensor, Tensor]:
        """The classes (n,) of a map (H, W), and the pixels of each (n, H, W)."""
        found = target.unique()  # type: ignore[no-untyped-call]
        found = found[found != IGNORE]
        return found, (target == found[:, None, None]).float()
