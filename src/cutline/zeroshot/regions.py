"""What CLIP says of regions, and what it and a proposer say together (ZSSeg, 2112.14757, sections 3.3 and 3.4).

A region is where a mask's probability is above a threshold. Its bounding box is cut out, what is outside the mask gets
the mean colour, and the crop is resized to the CLIP's own size, whatever its aspect:

    p_clip = softmax(100 · cos(image tower(crop), texts));  1 for every class where a mask is nowhere above the threshold
    seen classes:    p = p_mf^w · p_clip^(1 − w)
    unseen classes:  p = p_mf^(1 − w) · p_clip^w
    score of class c at a pixel = Σ_q p(q, c) · sigmoid(mask q)

Shapes: Q masks, V of them valid, K classes, D joint width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

from cutline import towers
from cutline.towers.store import preprocess_of

SCALE = 100.0  # of every cosine
CROPS = 256  # a forward pass of the image tower


class Regions:
    """The image tower of a CLIP, over regions of pictures. It is never trained."""

    def __init__(self, clip: towers.Model) -> None:
        self.clip = clip.eval().requires_grad_(False)
        cfg = preprocess_of(clip)
        size: Any = cfg["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.mean, self.std = (torch.tensor(cfg[k]).view(3, 1, 1) for k in ("mean", "std"))

    @torch.no_grad()
    def embed(self, image: Tensor, masks: Tensor) -> Tensor:
        """Unit vectors (V, D) of the regions masks (V, H, W), bool, of one uint8 picture (3, H, W); none may be empty."""
        device = next(self.clip.parameters()).device
        x = (image.to(device).float() / 255 - self.mean.to(device)) / self.std.to(device)
        parts = crops(x, masks.to(device), self.size).split(CROPS)  # type: ignore[no-untyped-call]
        return torch.cat([self.clip.encode_image(part, normalize=True).float() for part in parts])

    def probabilities(self, image: Tensor, masks: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """p_clip (Q, K) of regions (Q, H, W), bool, and which of them are valid, (Q,). texts: (K, D) unit vectors."""
        valid = masks.flatten(1).any(1)
        p = texts.new_ones(len(masks), len(texts))
        if valid.any():
            p[valid] = (SCALE * self.embed(image, masks[valid]).to(texts.device) @ texts.T).softmax(-1)
        return p, valid


def crops(image: Tensor, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """The bounding box of each mask (V, H, W), bool, of a normalised picture (3, H, W), with nothing else in it, at `size`:
    (V, 3, *size), bicubic. Zero is the mean colour."""
    found = []
    for mask, (left, top, right, bottom) in zip(masks, masks_to_boxes(masks).int().tolist(), strict=True):
        box = (slice(top, bottom + 1), slice(left, right + 1))
        region = image[:, *box] * mask[box]
        found.append(F.interpolate(region[None], size, mode="bicubic", align_corners=False))
    return torch.cat(found)


def ensemble(p_mf: Tensor, p_clip: Tensor, seen: Tensor, weight: float) -> Tensor:
    """Both probabilities (Q, K) together; seen: (K,) bool; weight: of the proposer for seen classes, of CLIP for unseen."""
    share = torch.where(seen, weight, 1 - weight)
    return p_mf**share * p_clip ** (1 - share)


def class_map(p: Tensor, masks: Tensor) -> Tensor:
    """Scores (K, H, W) from class probabilities (Q, K) and mask probabilities (Q, H, W)."""
    return torch.einsum("qc,qhw->chw", p, masks)
