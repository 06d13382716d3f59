"""Pixel-adaptive mask refinement, PAMR (Araslanov & Roth, 2005.08104, section 3.2): scores follow the picture's edges."""

import torch
from torch import Tensor
from torch.nn import functional as F

DILATIONS, STEPS = (8, 16), 10  # as SCLIP and NACLIP use it


def pamr(image: Tensor, scores: Tensor, dilations: tuple[int, ...] = DILATIONS, steps: int = STEPS) -> Tensor:
    """Average scores `steps` times over the 8 neighbours of each pixel at each of the distances `dilations`.

    A neighbour j of pixel i weighs softmax_j(mean over channels of −|x_i − x_j| / (0.1 σ_i + 1e-8)), σ_i the standard deviation
    of a channel over i and its neighbours (i once for each distance). Outside the picture is its edge. image (B, 3, H, W), of
    any scale; scores (B, K, H, W).
    """
    with_self = torch.stack(_around(image, dilations, centre=True))
    spread = 0.1 * with_self.std(0) + 1e-8
    near = [-((image - x).abs() / spread).mean(1, keepdim=True) for x in _around(image, dilations)]
    weights = torch.stack(near).softmax(0)
    for _ in range(steps):
        total = torch.zeros_like(scores)
        for weight, shifted in zip(weights, _around(scores, dilations), strict=True):
            total.addcmul_(weight, shifted)
        scores = total
    return scores


def _around(x: Tensor, dilations: tuple[int, ...], centre: bool = False) -> list[Tensor]:
    """The maps (B, C, H, W) of each neighbour: views of `x` padded with its edge."""
    h, w = x.shape[-2:]
    out = []
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate")
        out += [
            padded[..., i * d : i * d + h, j * d : j * d + w]
            for i in range(3) for j in range(3) if centre or (i, j) != (1, 1)
        ]  # fmt: skip
    return out
