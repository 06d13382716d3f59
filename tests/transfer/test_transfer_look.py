"""How pictures are looked at: whole, in windows, mirrored, resized; batches of equal shapes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cutline.transfer.batches import resize_image
from cutline.transfer.model import Look, by_shape, starts
from cutline.transfer.segment import SegmentConfig, Segmenter


class Same(nn.Module):
    """A model that returns its picture's first channel, and notes what it was shown."""

    def __init__(self, tilt: bool = False, classes: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.tilt, self.classes, self.seen = tilt, classes, []

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape[2:]))
        return x[:, : self.classes] + (torch.arange(x.shape[3]) if self.tilt else 0)


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(100, 32, 16), (97, 32, 32), (32, 32, 7), (10, 32, 16), (33, 32, 99)]
)
def test_windows_cover_everything_and_stay_inside(length: int, window: int, stride: int) -> None:
    places = starts(length, window, stride)
    covered = {i for s in places for i in range(s, min(s + window, length))}
    assert covered == set(range(length))
    assert all(s == 0 or s + window <= length for s in places)


def test_sliding_windows_average_to_the_whole_for_a_local_model() -> None:
    x = pictures(2, 3, 50, 41)
    whole, slide = Look()(Same(), x), Look("slide", (16, 24), (8, 10))(Same(), x)
    assert torch.allclose(whole, slide)
    model = Same()
    Look("slide", (16, 24), (8, 10))(model, x)
    assert set(model.seen) == {(16, 24)}


def test_overlaps_are_means_of_the_windows() -> None:
    x = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
    out = Look("slide", (4, 4), (4, 2))(Same(tilt=True), x)  # windows at columns 0 and 2 see their own columns
    assert out[0, 0, 0].tolist() == [0, 1, 1, 2, 2, 3]


def test_flip_averages_with_the_mirror_image() -> None:
    out = Look(flip=True)(Same(tilt=True), torch.zeros(1, 3, 2, 5, dtype=torch.uint8))
    assert torch.allclose(out, torch.full((1, 1, 2, 5), 2.0))  # (x + 4 - x) / 2


def test_short_resizes_what_the_model_sees_and_not_what_it_returns() -> None:
    model = Same()
    out = Look(short=20)(model, pictures(1, 3, 60, 90))
    assert model.seen == [(20, 30)]
    assert out.shape == (1, 1, 60, 90)


SCALES = (0.5, 1.0, 1.75)


@pytest.mark.parametrize("probabilities", [True, False])
@pytest.mark.parametrize("test", ["whole", "slide"])
def test_several_scales_and_flip_by_a_plain_loop(test: str, probabilities: bool) -> None:
    """Resize, look, resize back, softmax, mean: as mmsegmentation averages its looks."""
    x = pictures(1, 3, 40, 30)
    model = Same(tilt=True, classes=3)
    one = Look(test, (16, 24), (8, 10))
    found = []
    for scale in SCALES:
        size = (round(40 * scale), round(30 * scale))
        small = x if scale == 1 else resize_image(x[0], size)[None]
        for out in (one(model, small), one(model, small.flip(3)).flip(3)):
            back = nn.functional.interpolate(out, (40, 30), mode="bilinear", align_corners=False)
            found.append(back.softmax(1) if probabilities else back)
    look = Look(test, (16, 24), (8, 10), flip=True, scales=SCALES, probabilities=probabilities)
    assert torch.allclose(look(model, x), torch.stack(found).mean(0), atol=1e-4)
    model.seen.clear()
    look(model, x)
    assert test == "slide" or model.seen[::2] == model.seen[1::2] == [(20, 15), (40, 30), (70, 52)]


def test_one_look_gives_the_logits_as_they_are() -> None:
    x = pictures(1, 3, 8, 8)
    assert torch.equal(Look(probabilities=True)(Same(classes=3), x), x.float())


def test_scales_multiply_the_short_side() -> None:
    model = Same()
    assert Look(short=20, scales=(0.5, 2.0))(model, pictures(1, 3, 60, 90)).shape == (1, 1, 60, 90)
    assert model.seen == [(10, 15), (40, 60)]


def test_a_segmenter_averages_probabilities_and_not_logits(encoder: Any) -> None:
    config = SegmentConfig(head="linear", test_scales=[0.5, 1.5], test_flip=True)
    look = Segmenter(encoder, config, ["a", "b"]).look()
    assert (look.scales, look.flip, look.probabilities) == ((0.5, 1.5), True, True)
    with pytest.raises(ValueError, match="factors above 0"):
        SegmentConfig(test_scales=[0.0, 1.0])


def test_batches_keep_the_order_and_hold_equal_shapes() -> None:
    shapes = [(4, 4)] * 3 + [(4, 5)] + [(4, 4)]
    items = [(np.full((*s, 3), i, np.uint8), i) for i, s in enumerate(shapes)]
    batches = list(by_shape(items, 2))
    assert [ids for _, ids in batches] == [[0, 1], [2], [3], [4]]
    assert [tuple(x.shape) for x, _ in batches] == [(2, 3, 4, 4), (1, 3, 4, 4), (1, 3, 4, 5), (1, 3, 4, 4)]
