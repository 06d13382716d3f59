"""How pictures are looked at: whole, in windows, mirrored, resized; batches of equal shapes."""

import numpy as np
import pytest
import torch
from torch import nn

from cutline.transfer.model import Look, by_shape, starts


class Same(nn.Module):
    """A model that returns its picture's first channel, and notes what it was shown."""

    def __init__(self, tilt: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.tilt, self.seen = tilt, []

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape[2:]))
        return x[:, :1] + (torch.arange(x.shape[3]) if self.tilt else 0)


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


def test_batches_keep_the_order_and_hold_equal_shapes() -> None:
    shapes = [(4, 4)] * 3 + [(4, 5)] + [(4, 4)]
    items = [(np.full((*s, 3), i, np.uint8), i) for i, s in enumerate(shapes)]
    batches = list(by_shape(items, 2))
    assert [ids for _, ids in batches] == [[0, 1], [2], [3], [4]]
    assert [tuple(x.shape) for x, _ in batches] == [(2, 3, 4, 4), (1, 3, 4, 4), (1, 3, 4, 5), (1, 3, 4, 4)]
