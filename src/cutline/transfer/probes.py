"""Heads that name a picture's class: linear, by cosines, attentive, nearest neighbours.

Shapes: B pictures, D width of the pooled feature, (C, h, w) the dense map, K classes.
"""

from collections.abc import Sequence

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 256  # pictures whose similarities to the whole bank are held at once
HEAD_WIDTH = 64  # channels of one attention head, as in ViTs


class LinearProbe(nn.Module):
    """Pooled feature (B, D) → logits (B, K).

    scaled: first a batch norm without weights of its own, as MAE's linear probe has it (2111.06377, A.1), so that one
    learning rate suits encoders whose features differ in scale.
    """

    def __init__(self, width: int, classes: int, scaled: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if scaled else nn.Identity()
        self.classifier = _classifier(width, classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.classifier(self.norm(features[0].float()))
        return out


class CosineProbe(nn.Module):
    """Pooled feature x (B, D) → logits s · x/|x| · w_c (B, K), as a CLIP tells classes by its words.

    scale: s, 100 as in a trained CLIP; it is not trained.
    """

    scale: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(classes, width), std=0.01))
        self.register_buffer("scale", torch.tensor(100.0))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = F.normalize(features[0].float(), dim=1)
        with torch.autocast(x.device.type, enabled=False):  # half precision would round s · cos to a half
            return self.scale * (x @ self.weight.T)


class AttentiveProbe(nn.Module):
    """Dense map (B, C, h, w) → logits (B, K): one learned query attends to all cells, MLP, linear.

    The pooling is timm's AttentionPoolLatent (SigLIP's), the same as V-JEPA's attentive probe (2404.08471, a
    cross-attention block with an MLP) but for the place of its norms; AIM's (2401.08541) has no MLP.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        heads = next(n for n in range(max(1, width // HEAD_WIDTH), 0, -1) if width % n == 0)
        self.pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        self.norm = nn.LayerNorm(width)
        self.classifier = _classifier(width, classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        cells = features[0].flatten(2).transpose(1, 2)
        out: Tensor = self.classifier(self.norm(self.pool(cells)))
        return out


class NeighbourProbe(nn.Module):
    """Pooled feature (B, D) → log of the weighted votes of its k nearest training pictures, (B, K).

    DINO's k-NN classifier (2104.14294, after Wu et al., 1805.01978): with s_i the cosine similarity to the i-th of the
    k most similar features and y_i its class, vote_c = Σ_i exp(s_i / temperature) · [y_i = c], here normalised to sum
    to 1. A class without a vote has log 0 = -inf. Nothing is trained: `fill` stores the features.
    """

    bank: Tensor
    labels: Tensor

    def __init__(self, width: int, classes: int, pictures: int, k: int, temperature: float) -> None:
        super().__init__()
        self.classes, self.k, self.temperature = classes, k, temperature
        self.register_buffer("bank", torch.zeros(pictures, width))
        self.register_buffer("labels", torch.zeros(pictures, dtype=torch.int64))

    def fill(self, features: Tensor, labels: Tensor) -> None:
        """features (N, D) of any length; labels (N,)."""
        self.bank = F.normalize(features.float(), dim=1)
        self.labels = labels.to(features.device)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        queries = F.normalize(features[0].float(), dim=1)
        with torch.autocast(queries.device.type, enabled=False):  # neighbours differ in the third digit and later
            # A program of any batch cannot have a number of parts that depends on it.
            parts = [queries] if torch.compiler.is_exporting() else torch.split(queries, CHUNK)
            return torch.cat([self._votes(part) for part in parts]).log()

    def _votes(self, queries: Tensor) -> Tensor:
        similarity, nearest = (queries @ self.bank.T).topk(min(self.k, len(self.bank)), dim=1)
        weights = (similarity / self.temperature).softmax(1)
        return weights.new_zeros(queries.shape[0], self.classes).scatter_add_(1, self.labels[nearest], weights)


def _classifier(width: int, classes: int) -> nn.Linear:
    """A linear layer that starts near zero, so that the first steps change the encoder little."""
    layer = nn.Linear(width, classes)
    nn.init.trunc_normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer
