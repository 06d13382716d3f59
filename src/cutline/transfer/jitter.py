"""Training batches of pictures with objects: large-scale jitter and flips, the same for picture, boxes and masks.

Large-scale jitter (2012.07177; detectron2's ResizeScale and FixedSizeCrop): a picture is scaled so that it would fit
the canvas, times a random factor; of a larger one a random window is cut, a smaller one lies in the upper left corner.
The geometry is torchvision's transforms.v2 on its tv_tensors, with random numbers of ours, since batch k must be a pure
function of (seed, k) in whichever thread it is made.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as tv

from cutline.transfer.batches import Batches, Cut
from cutline.transfer.data import Sample

LEAST = 1.0  # pixels; objects of which less is left on the canvas are left out


@dataclass
class ObjectBatch:
    """images (B, 3, S, S) uint8; targets: boxes (N, 4), labels (N,) from 1 on (0 is background) and masks, as
    torchvision's detectors take them; keys."""

    images: Tensor
    targets: list[dict[str, Tensor]]
    keys: list[str]


class ObjectBatches(Batches):
    """`Batches` of pictures with objects."""

    def make(self, step: int) -> ObjectBatch:  # type: ignore[override]
        drawn = [(self.shown(place, rng, self.split.read)[1], rng) for place, rng in self.drawn(step)]
        samples = [sample for sample, _ in drawn]
        images, targets = zip(*(jitter(sample, self.how, rng) for sample, rng in drawn))
        return ObjectBatch(torch.stack(images), list(targets), [s.key for s in samples])


def jitter(sample: Sample, how: Cut, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """One picture (3, *how.crop) uint8 and its target; crowds are left out.

    With masks, boxes are drawn around what is seen of them (detectron2's recompute_boxes).
    """
    objects, (height, width) = sample.target, sample.image.shape[:2]
    keep = torch.from_numpy(~objects.crowd)
    image = tv_tensors.Image(torch.from_numpy(sample.image).permute(2, 0, 1))
    boxes = tv_tensors.BoundingBoxes(torch.from_numpy(objects.boxes)[keep], format="XYXY", canvas_size=(height, width))
    parts = [image, boxes]
    if objects.masks is not None:
        parts.append(tv_tensors.Mask(torch.from_numpy(objects.masks)[keep].to(torch.uint8)))
    factor = min(how.crop[0] / height, how.crop[1] / width) * rng.uniform(*how.scale)
    full = (max(1, round(height * factor)), max(1, round(width * factor)))
    out = [min(how.crop[0], full[0]), min(how.crop[1], full[1])]
    # The window of the source that becomes the crop; resizing it alone is much cheaper than resizing the picture.
    corner = [int(rng.integers(0, f - o + 1)) if f > o else 0 for f, o in zip(full, out)]
    (top, bottom), (left, right) = (
        (int(c / factor), min(n, max(int(c / factor) + 1, round((c + o) / factor))))
        for c, o, n in zip(corner, out, (height, width))
    )
    parts = [tv.resized_crop(p, top, left, bottom - top, right - left, out, antialias=True) for p in parts]
    if how.flip and rng.random() < 0.5:
        parts = [tv.horizontal_flip(p) for p in parts]
    picture = torch.tensor(how.fill, dtype=torch.uint8)[:, None, None].repeat(1, *how.crop)
    picture[:, : out[0], : out[1]] = parts[0]
    return picture, _target(parts[1:], torch.from_numpy(objects.labels)[keep] + 1, how.crop)


def _target(parts: list[Tensor], labels: Tensor, canvas: tuple[int, int]) -> dict[str, Tensor]:
    boxes = tv.clamp_bounding_boxes(parts[0]).as_subclass(Tensor)
    masks = parts[1].as_subclass(Tensor) if len(parts) > 1 else None
    if masks is not None:
        seen = masks.flatten(1).any(1).bool()
        boxes, labels, masks = boxes[seen], labels[seen], masks[seen]
        if len(masks):
            boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0, 1, 1])
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= LEAST).all(1)
    target = {"boxes": boxes[keep], "labels": labels[keep]}
    if masks is not None:
        whole = masks.new_zeros((len(masks), *canvas))
        whole[:, : masks.shape[1], : masks.shape[2]] = masks
        target["masks"] = whole[keep]
    return target
