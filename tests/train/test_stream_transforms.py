"""Crops and flips against torchvision, in distribution and in pixels."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tf

from cutline.train.stream.order import draws
from cutline.train.stream.randaugment import BINS, OPERATIONS, carry_out, draw_operations
from cutline.train.stream.transforms import Augment, Augmentation, Normalize, box, decode_size


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour noise: what a photo's pixels are like to a resize."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 255
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)
    return fine[0].permute(1, 2, 0).byte().numpy().copy()


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(100, 150, (0.1, 0.6)), (333, 50, (0.5, 1.0)), (64, 64, (0.9, 1))]
)
def test_crops_are_distributed_like_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    augment = Augment(scale=scale, flip=0.5)
    ours = [augment.draw(height, width, draws(0, 0, i, "image")) for i in range(4000)]
    torch.manual_seed(0)
    get = v2.RandomResizedCrop(32, scale=scale).make_params
    picture = torch.zeros(3, height, width)
    theirs = [get([picture]) for _ in range(4000)]
    for name in ("top", "left", "height", "width"):
        a, b = np.array([getattr(x, name) for x in ours]), np.array([x[name] for x in theirs])
        # Two-sample Kolmogorov–Smirnov; 0.0436 is its 0.1 % point for 4000 + 4000.
        grid = np.unique(np.concatenate([a, b]))
        distance = (
            np.abs(np.searchsorted(np.sort(a), grid, "right") - np.searchsorted(np.sort(b), grid, "right")).max() / 4000
        )
        assert distance < 0.0436, name
    assert np.mean([x.flip for x in ours]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [40, 96, 200])
def test_pixels_equal_torchvisions_crop_and_resize(interpolation: str, size: int) -> None:
    picture = photo(150, 210)
    how = Augmentation(11, 23, 120, 133, (150, 210), flip=True)
    view = Augment(interpolation=interpolation).apply(picture, how, size)
    mode = v2.InterpolationMode(interpolation)
    theirs = tf.resized_crop(
        torch.from_numpy(picture).permute(2, 0, 1), 11, 23, 120, 133, [size, size], mode, antialias=True
    )
    assert np.abs(view.astype(int) - theirs.flip(-1).numpy().astype(int)).max() <= 1


def test_an_augmentation_replays_to_the_bit() -> None:
    picture, augment = photo(90, 120), Augment(scale=(0.3, 1.0), flip=0.5, operations=2)
    for i in range(20):
        how = augment.draw(90, 120, draws(0, 1, i, "image"))
        stored = Augmentation(*how)
        assert np.array_equal(augment.apply(picture, how, 48), augment.apply(picture, stored, 48))


@pytest.mark.parametrize("factor", [2, 4])
def test_a_picture_decoded_at_a_fraction_gives_nearly_the_same_view(factor: int) -> None:
    picture = photo(480, 640)
    pixels = torch.from_numpy(picture).permute(2, 0, 1).float()
    small = torch.nn.functional.avg_pool2d(pixels, factor).permute(1, 2, 0).round().byte().numpy()
    augment = Augment(scale=(0.3, 1.0))
    for i in range(10):
        how = augment.draw(480, 640, draws(0, 0, i, "image"))
        a, b = augment.apply(picture, how, 64).astype(int), augment.apply(small, how, 64).astype(int)
        shifted = np.abs(a[:, 1:] - a[:, :-1]).mean()
        assert np.abs(a - b).mean() < shifted  # less than one pixel of the view away


def test_a_jpeg_is_decoded_at_the_smallest_power_of_two_that_is_enough_for_all_views() -> None:
    met = set()
    for i in range(400):
        h, w = 50 + 7 * i, 900 - 2 * i
        views = [(Augment(scale=(0.05, 1.0)).draw(h, w, draws(0, 0, i, u)), s) for u, s in (("a", 64), ("b", 24))]
        chosen = decode_size(views)
        enough = [f for f in (1, 2, 4, 8) if all(min(v.height, v.width) / f >= s for v, s in views)] or [1]
        assert chosen == (None if enough[-1] == 1 else math.ceil(min(h, w) / enough[-1]))
        met.add(enough[-1])
    assert met == {1, 2, 4, 8}


def test_crops_stay_inside_also_of_tiny_and_extreme_pictures() -> None:
    augment = Augment(scale=(0.01, 1.0), flip=0.5)
    for h, w in [(1, 1), (1, 500), (500, 1), (2, 3), (3000, 7)]:
        for i in range(30):
            how = augment.draw(h, w, draws(0, 0, i, "image"))
            assert 0 <= how.top <= how.top + how.height <= h
            assert 0 <= how.left <= how.left + how.width <= w
            for dh, dw in [(h, w), (math.ceil(h / 8), math.ceil(w / 8))]:
                top, left, bottom, right = box(how, dh, dw)
                assert 0 <= top < bottom <= dh
                assert 0 <= left < right <= dw
            assert augment.apply(photo(h, w), how, 8).shape == (3, 8, 8)


def test_normalisation_equals_torchvisions() -> None:
    view = photo(32, 32).transpose(2, 0, 1)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    out = np.empty((3, 32, 32), np.float32)
    Normalize(mean, std)(view, out)
    expected = tf.normalize(torch.from_numpy(view.copy()).float() / 255, mean, std)
    assert torch.allclose(torch.from_numpy(out), expected, atol=1e-5)


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("magnitude", [0, 9, 17, 30])
def test_operations_equal_torchvisions_to_the_bit(name: str, magnitude: int) -> None:
    peer = v2.RandAugment(magnitude=magnitude)
    assert list(peer._AUGMENTATION_SPACE) == list(OPERATIONS)
    picture = Image.fromarray(photo(64, 64))
    make, signed = peer._AUGMENTATION_SPACE[name]
    amounts = make(BINS + 1, 64, 64)
    theirs = 0.0 if amounts is None else float(amounts[magnitude])
    for sign in (1, -1) if signed else (1,):
        expected = peer._apply_image_or_video_transform(
            picture, name, sign * theirs, v2.InterpolationMode.NEAREST, peer._fill
        )
        ours = carry_out(picture, ((name, sign * (OPERATIONS[name][0] or 0.0) * magnitude / BINS),))
        assert np.array_equal(np.asarray(ours), np.asarray(expected)), sign


def test_operations_are_drawn_evenly_with_both_signs() -> None:
    drawn = [o for i in range(7000) for o in draw_operations(2, 9, draws(0, 0, i, "image"))]
    names = [name for name, _ in drawn]
    for name, (largest, signed, _) in OPERATIONS.items():
        assert names.count(name) == pytest.approx(1000, abs=120)
        amounts = {a for n, a in drawn if n == name}
        value = (largest or 0.0) * 9 / BINS
        assert amounts == ({-value, value} if signed else {value})


def test_randaugment_changes_the_view_and_only_then() -> None:
    picture = photo(90, 120)
    plain, strong = Augment(), Augment(operations=2, magnitude=20)
    changed = 0
    for i in range(30):
        a, b = (x.draw(90, 120, draws(0, 0, i, "image")) for x in (plain, strong))
        assert a[:6] == b[:6]  # the crop is the same one
        changed += not np.array_equal(plain.apply(picture, a, 48), strong.apply(picture, b, 48))
    assert changed > 24


@pytest.mark.parametrize("ratio", [(0, 1), (-1, 1), (1, math.inf)])
def test_ratios_of_a_crop_are_positive(ratio: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        Augment(ratio=ratio)
