"""Training batches: a pure function of (seed, step); picture and target are cut alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutline.errors import DataError
from cutline.transfer.batches import Batches, Cut, cut
from cutline.transfer.data import Sample, Skip, Split
from cutline.transfer.metrics import IGNORE

FILL = (10, 20, 30)


def split_of(count: int, size: tuple[int, int] = (12, 16)) -> Split:
    def read(i: int) -> Sample:
        image = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        return Sample(str(i), image, np.full(size, i, np.int16))

    return Split("train", [str(i) for i in range(count)], read)


def how(
    crop: tuple[int, int] = (12, 16),
    scale: tuple[float, float] = (1.0, 1.0),
    flip: bool = True,
    short: int | None = None,
) -> Cut:
    return Cut(crop, scale, flip, short, FILL, IGNORE)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    split, c = split_of(10), how((8, 8), (0.5, 2.0))
    many = list(Batches(split, range(10), 4, 7, c, threads=3).iterate(0, 9))
    alone = Batches(split, range(10), 4, 7, c).make(6)
    resumed = next(iter(Batches(split, range(10), 4, 7, c, threads=1).iterate(6, 9)))
    for other in (alone, resumed):
        assert torch.equal(many[6].images, other.images)
        assert torch.equal(many[6].targets, other.targets)
        assert many[6].keys == other.keys
    assert not torch.equal(many[6].images, Batches(split, range(10), 4, 8, c).make(6).images)


def test_a_picture_that_cannot_be_used_is_replaced_by_seed_and_step_alone() -> None:
    """Whoever meets it first, and in whatever order; the other pictures of its batch stay as they were."""

    def broken(bad: set[int]) -> Split:
        good = split_of(20)

        def read(i: int) -> Sample:
            if i in bad:
                raise Skip("broken", f"{i} is broken")
            return good.read(i)

        return Split("train", good.keys, read)

    c = how((8, 8), (0.5, 2.0))
    many = list(Batches(broken({3, 11}), range(20), 4, 7, c, threads=3).iterate(0, 10))
    before = list(Batches(split_of(20), range(20), 4, 7, c).iterate(0, 10))
    for step in reversed(range(10)):
        alone = Batches(broken({3, 11}), range(20), 4, 7, c).make(step)
        assert torch.equal(many[step].images, alone.images)
        assert many[step].keys == alone.keys
        same = [i for i, key in enumerate(before[step].keys) if key not in ("3", "11")]
        assert torch.equal(many[step].images[same], before[step].images[same])
    assert not {"3", "11"} & {key for batch in many for key in batch.keys}
    assert sum(len({"3", "11"} & set(batch.keys)) for batch in before) == 4  # two epochs
    with pytest.raises(DataError, match=r"train: 3 of 20 pictures skipped \(3 × broken\)"):
        list(Batches(broken({3, 11, 12}), range(20), 4, 7, c).iterate(0, 5))


@given(st.integers(1, 30), st.integers(2, 12), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_an_epoch_shows_every_sample_once(count: int, size: int, seed: int) -> None:
    batches = Batches(split_of(1), [0], size, seed, how())
    batches.rows = list(range(count))
    shown = np.concatenate([batches.order(s) for s in range(-(-2 * count // size))])
    assert sorted(shown[:count].tolist()) == list(range(count))
    assert sorted(shown[count : 2 * count].tolist()) == list(range(count))


def test_whole_pictures_come_as_they_are_or_mirrored() -> None:
    split = split_of(6)
    batches = Batches(split, range(6), 6, 0, how())
    assert batches.whole
    batch = batches.make(0)
    assert 0 < batch.flips.sum() < 6
    for image, row, flip in zip(batch.images, batch.rows.tolist(), batch.flips.tolist(), strict=True):
        expected = split.read(row).image[:, ::-1] if flip else split.read(row).image
        assert (image.permute(1, 2, 0).numpy() == expected).all()
    for other in (how((8, 8)), how(scale=(1.0, 2.0)), how(short=12)):
        assert not Batches(split, range(6), 6, 0, other).whole


@given(
    st.tuples(st.integers(5, 60), st.integers(5, 60)), st.tuples(st.integers(4, 40), st.integers(4, 40)),
    st.sampled_from([(1.0, 1.0), (0.5, 2.0), (0.3, 0.4), (3.0, 4.0)]), st.booleans(), st.sampled_from([None, 17]),
    st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_picture_and_target_stay_together(
    size: tuple[int, int], crop: tuple[int, int], scale: tuple[float, float], flip: bool, short: int | None, seed: int
) -> None:
    """A smooth picture that is its own target must agree with it after any cut, up to what resizing blurs."""
    rows, columns = np.mgrid[0.0 : size[0], 0.0 : size[1]]
    ramp = (4 * columns + rows) % 256 if scale[1] <= 1 and short is None else 2 * columns + rows
    image = np.repeat(ramp[:, :, None], 3, 2).astype(np.uint8)
    sample = Sample("0", image, image[:, :, 0].astype(np.int16))
    picture, target = cut(sample, how(crop, scale, flip, short), flip, np.random.default_rng(seed))
    assert picture.shape == (3, *crop)
    assert target.shape == crop
    inside = target != IGNORE
    if scale == (1.0, 1.0) and short is None:
        assert (picture[0][inside] == target[inside]).all()
    else:
        wrap = (picture[0][inside].int() - target[inside].int()).abs()
        assert wrap.float().median() <= 6
    assert (picture[:, ~inside] == torch.tensor(FILL)[:, None]).all()


def test_small_pictures_are_surrounded_by_fill_that_does_not_count() -> None:
    sample = Sample("0", np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.int16))
    picture, target = cut(sample, how((8, 8), flip=False), False, np.random.default_rng(0))
    assert (target != IGNORE).sum() == 24
    assert picture[:, 7, 7].tolist() == list(FILL)


def test_random_crops_reach_every_place() -> None:
    sample = Sample("0", np.zeros((4, 20, 3), np.uint8), np.arange(80, dtype=np.int16).reshape(4, 20))
    rng = np.random.default_rng(0)
    corners = {int(cut(sample, how((4, 4), flip=False), False, rng)[1][0, 0]) for _ in range(300)}
    assert corners == set(range(17))


def test_scale_enlarges_by_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop of a picture enlarged s times shows crop / s of the source."""
    columns = np.tile(np.arange(64, dtype=np.int16), (64, 1))
    sample = Sample("0", np.zeros((64, 64, 3), np.uint8), columns)
    rng = np.random.default_rng(0)
    for scale, width in ((1.0, 16), (2.0, 8), (0.5, 32)):
        _, target = cut(sample, how((16, 16), (scale, scale + 1e-9), flip=False), False, rng)
        assert abs(int(target[0, -1] - target[0, 0] + 1) - width) <= 2
