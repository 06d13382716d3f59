"""The order of samples is a bijection, a pure function, and fair to ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutline.errors import ConfigError
from cutline.train.stream.order import Blocks, Order, Permutation, draws


def test_permutation_is_a_bijection_of_every_small_size() -> None:
    for n in range(1, 3001):
        assert np.array_equal(np.sort(Permutation(n, n * 7 + 1)(np.arange(n))), np.arange(n)), n


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 2**61), key=st.integers(0, 2**64 - 1), data=st.data())
def test_inverse_undoes_the_permutation_at_any_size(n: int, key: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50)))
    permutation = Permutation(n, key)
    rows = permutation(places)
    assert rows.min() >= 0
    assert rows.max() < n
    assert np.array_equal(permutation.inverse(rows), places)


def test_a_million_places_of_a_billion_do_not_collide_and_fill_it_evenly() -> None:
    n, m = 10**9, 10**6
    rows = Permutation(n, 3)(np.arange(m))  # neighbouring places, where a weak network would show
    assert len(np.unique(rows)) == m
    counts = np.histogram(rows, bins=1000, range=(0, n))[0]
    chi2 = ((counts - m / 1000) ** 2 / (m / 1000)).sum()
    assert 850 < chi2 < 1150  # 999 degrees of freedom: mean 999, standard deviation 45


def test_rows_meet_every_place_equally_often() -> None:
    n, epochs = 10, 4000
    seen = np.zeros((n, n))
    for k in range(epochs):
        seen[np.arange(n), Permutation(n, k)(np.arange(n))] += 1
    chi2 = ((seen - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi2 < 81 + 5 * np.sqrt(2 * 81)


def test_neighbours_are_not_kept_together() -> None:
    rows = Permutation(100_000, 1)(np.arange(100_000))
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(rows, np.arange(100_000))[0, 1]) < 0.02


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), block=st.integers(1, 400), window=st.integers(1, 9), key=st.integers(0, 1000))
def test_block_shuffle_is_a_bijection(n: int, block: int, window: int, key: int) -> None:
    assert np.array_equal(np.sort(Blocks(n, key, block, window)(np.arange(n))), np.arange(n))


def test_block_shuffle_touches_few_blocks_at_a_time() -> None:
    n, block, window = 100_003, 100, 8
    rows = Blocks(n, 1, block, window)(np.arange(n))
    spans = [rows[i : i + block * window] for i in range(0, n, block * window)]
    # A window may cut into one more block, behind the short last block.
    assert max(len(np.unique(s // block)) for s in spans) <= window + 2
    assert np.abs(np.diff(rows)).mean() > block  # and yet mixes them


@pytest.mark.parametrize("block", [None, 16])
def test_an_epoch_has_no_row_twice_and_epochs_differ(block: int | None) -> None:
    order = Order(1000, 48, seed=1, block=block, window=4)
    epochs = [np.concatenate([order.rows(e * 20 + s) for s in range(20)]) for e in range(3)]
    assert order.steps_per_epoch == 20
    for rows in epochs:
        assert len(np.unique(rows)) == 960
    assert not np.array_equal(epochs[0], epochs[1])
    assert set(epochs[0]) != set(epochs[1])  # the remainder that is dropped differs
    assert not np.array_equal(Order(1000, 48, seed=2, block=block).rows(0), order.rows(0))


def test_any_step_can_be_asked_for_first() -> None:
    walked = Order(997, 32, seed=5)
    rows = [walked.rows(s) for s in range(100)]
    for s in (99, 31, 62, 0):
        assert np.array_equal(Order(997, 32, seed=5).rows(s), rows[s])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(world: int) -> None:
    ranks = [Order(1001, 24, seed=3, world=world, rank=r) for r in range(world)]
    for step in (0, 40, 41, 97):
        parts = [o.rows(step) for o in ranks]
        assert {len(p) for p in parts} == {24 // world}
        assert np.array_equal(np.concatenate(parts), Order(1001, 24, seed=3).rows(step))


def test_too_large_or_uneven_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs 64 samples and the data have 50.*50 or less"):
        Order(50, 64)
    with pytest.raises(ConfigError, match="multiple of 3"):
        Order(500, 64, world=3)


def test_each_sample_and_use_has_its_own_numbers() -> None:
    keys = [(seed, epoch, row, use) for seed in (0, 1) for epoch in (0, 1) for row in (0, 1) for use in ("a", "b")]
    assert len({draws(*k)() for k in keys}) == 16
    assert draws(1, 2, 3, "text")() == draws(1, 2, 3, "text")()


@pytest.mark.parametrize("along", ["rows", "draws"])
def test_a_samples_numbers_are_uniform_and_independent(along: str) -> None:
    one = draws(1, 2, 3, "image")
    x = np.array([draws(1, 2, row, "image")() if along == "rows" else one() for row in range(100_000)])
    counts = np.histogram(x, bins=100, range=(0, 1))[0]
    assert 40 < ((counts - 1000) ** 2 / 1000).sum() < 170  # 99 degrees of freedom
    pairs = np.histogram2d(x[::2], x[1::2], bins=10, range=((0, 1), (0, 1)))[0]
    assert 40 < ((pairs - 500) ** 2 / 500).sum() < 170


def test_the_order_is_the_same_in_every_version() -> None:
    """A checkpoint of today must resume tomorrow: these numbers may never change."""
    assert Order(1000, 5, seed=0).rows(0).tolist() == GOLDEN_ORDER
    assert draws(0, 0, 0, "image")() == GOLDEN_DRAW


GOLDEN_ORDER = [81, 557, 434, 42, 857]
GOLDEN_DRAW = 0.8170595109523551


def test_data_without_a_row_are_told_as_such() -> None:
    with pytest.raises(ConfigError, match=r"the data have 0.* Does data.where leave no row\?"):
        Order(0, 8)
