"""Changes of colour and content in training, by the published recipes. Pictures are (3, H, W) uint8.

`photometric` is mmsegmentation's PhotoMetricDistortion, `jitter` and `CutDepth` are those of GLPDepth (2201.07436),
which the MIM depth protocol (2205.13543) uses as they are. Every draw is from the generator given, so that a batch is a
pure function of its seed. Arithmetic is in float32 with one rounding at the end; the originals round at every step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from cutline.transfer.data import Sample


def photometric(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Each with a chance of one half: brightness ± 32 levels, contrast × 0.5-1.5, saturation × 0.5-1.5, hue ± 36°.

    Contrast comes second or last, saturation and hue are those of HSV, and hue is ± 18 in OpenCV's units of 2°, as
    mmsegmentation has it.
    """
    chance, contrast_last = rng.random(4) < 0.5, rng.random() < 0.5
    delta, contrast, saturation, hue = rng.uniform((-32, 0.5, 0.5, -0.1), (32, 1.5, 1.5, 0.1))
    x = image.float() / 255
    if chance[0]:
        x = (x + delta / 255).clamp(0, 1)
    if chance[1] and not contrast_last:
        x = (x * contrast).clamp(0, 1)
    if chance[2]:
        x = saturate(x, saturation, 0.0)
    if chance[3]:
        x = F.adjust_hue(x, float(hue))
    if chance[1] and contrast_last:
        x = (x * contrast).clamp(0, 1)
    return (x * 255).round().to(torch.uint8)


def jitter(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Each with a chance of one half: contrast × 0.8-1.2 with brightness ± 0.2; gamma 0.8-1.2; HSV shifts.

    The defaults of albumentations' RandomBrightnessContrast, RandomGamma and HueSaturationValue: hue ± 40°, saturation
    ± 30 / 255, value ± 20 / 255. Grey stays grey, where the original's shift of saturation turns it reddish.
    """
    chance = rng.random(3) < 0.5
    contrast, brightness, gamma = rng.uniform((0.8, -0.2, 0.8), (1.2, 0.2, 1.2))
    hue, saturation, value = rng.uniform((-1 / 9, -30 / 255, -20 / 255), (1 / 9, 30 / 255, 20 / 255))
    x = image.float() / 255
    if chance[0]:
        x = (x * contrast + brightness).clamp(0, 1)
    if chance[1]:
        x = F.adjust_gamma(x, float(gamma))
    if chance[2]:
        x = saturate(F.adjust_hue(x, float(hue)), 1.0, saturation)
        brightest = x.amax(0, keepdim=True)
        x = x * ((brightest + value).clamp(0, 1) / brightest.clamp_min(1e-6))
    return (x * 255).round().to(torch.uint8)


COLOURS = {"photometric": photometric, "jitter": jitter}


def saturate(x: Tensor, factor: float, shift: float) -> Tensor:
    """HSV saturation s of a float picture in [0, 1] to min(1, factor · s + shift), hue and value as they are.

    torchvision's adjust_saturation blends with grey instead, which changes the value. A pixel is v · (1 - s · u) with v
    its largest channel and u in [0, 1] of the hue alone, so only the distance from v changes.
    """
    value = x.amax(0, keepdim=True)
    span = value - x.amin(0, keepdim=True)
    old = span / value.clamp_min(1e-6)
    new = (old * factor + shift).clamp(0, 1)
    return value - (value - x) * (new / old.clamp_min(1e-6))


@dataclass(frozen=True)
class CutDepth:
    """Vertical CutDepth (2107.07684, 2201.07436): a vertical strip of the picture becomes its depth, as a grey picture.

    share: of the pictures; far: metres that are white. The strip starts at α W and is max(1, (1 - α) β p W) wide,
    α and β uniform in [0, 1], p = 0.75. GLPDepth has share 0.25 (every fourth picture) and writes millimetres into
    bytes, which wrap around at 256; depth is spread over the range instead.
    """

    share: float
    far: float
    p: float = 0.75

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a strip of depth, or as it is; target (H, W) in metres. The one given is not changed."""
        chance, alpha, beta = rng.random(3)
        if chance >= self.share:
            return sample
        width = sample.image.shape[1]
        left = int(alpha * width)
        strip = slice(left, left + max(1, int((width - alpha * width) * beta * self.p)))
        image: NDArray[np.uint8] = sample.image.copy()
        grey = (sample.target[:, strip] / self.far * 255).round().clip(0, 255).astype(np.uint8)
        image[:, strip] = grey[:, :, None]
        return Sample(sample.key, image, sample.target)
