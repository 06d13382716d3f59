"""Which row is at which place of an epoch: a pure function of (seed, epoch, position), without a stored permutation.

`Permutation` is a Feistel network over a rectangle a·b ≥ n that is a little larger than n, with cycle walking for the
few places that fall outside. It costs a fraction of a microsecond per place, no memory, and works for billions of
rows, so resuming at any step is a matter of evaluating it there. `Order` deals an epoch's permutation to steps and
ranks. `draws` gives each sample's own random numbers (augmentation, choice of caption), in the same spirit.

Left out on purpose: padding or wrapping an epoch. The remainder of n modulo the global batch is dropped, and it is a
different one in every epoch.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutline.errors import ConfigError

Rows = NDArray[np.int64]
_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


@lru_cache(maxsize=256)
def key(*parts: int | str) -> int:
    """A 64-bit key of the parts; different parts give unrelated keys."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def draws(seed: int, epoch: int, row: int, use: str) -> Callable[[], float]:
    """The random numbers of one sample for one use ("text", "image", …): the same on any rank and in any thread.

    Each call gives the next number, uniform in [0, 1), of SplitMix64 (Steele, Lea and Flood, 2014), which starts faster
    than NumPy's generators and stays the same in all versions.
    """
    state = _mix_one(key(seed, epoch, use) + row * _GOLDEN)

    def draw() -> float:
        nonlocal state
        state = (state + _GOLDEN) & _MASK
        return (_mix_one(state) >> 11) * 2.0**-53

    return draw


def _mix_one(x: int) -> int:
    """`_mix` of one integer modulo 2⁶⁴."""
    x &= _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A pseudo-random bijection of [0, n), evaluated at arrays of places; `key` chooses which."""

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        # a·b ≥ n with a·b − n < a: hardly any place has to be walked.
        self.a = np.uint64(max(1, int(np.ceil(np.sqrt(n)))))
        self.b = np.uint64(max(1, -(-n // int(self.a))))
        self.keys = _mix(np.uint64(key) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))

    def __call__(self, places: Any) -> Rows:
        """Rows at `places` (any array of integers in [0, n))."""
        return self._walk(places, self._forward)

    def inverse(self, rows: Any) -> Rows:
        """Places at which `rows` stand."""
        return self._walk(rows, self._backward)

    def _walk(self, x: Any, network: Any) -> Rows:
        x = np.asarray(x, np.uint64)
        out = network(x.reshape(-1))
        while (outside := np.flatnonzero(out >= self.n)).size:
            out[outside] = network(out[outside])
        rows: Rows = out.reshape(x.shape).astype(np.int64)
        return rows

    def _forward(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x // self.b, x % self.b
        for i in range(0, _ROUNDS, 2):
            left = (left + _mix(right + self.keys[i]) % self.a) % self.a
            right = (right + _mix(left + self.keys[i + 1]) % self.b) % self.b
        return left * self.b + right

    def _backward(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x // self.b, x % self.b
        for i in range(_ROUNDS - 2, -1, -2):
            right = (right + self.b - _mix(left + self.keys[i + 1]) % self.b) % self.b
            left = (left + self.a - _mix(right + self.keys[i]) % self.a) % self.a
        return left * self.b + right


class Blocks:
    """A bijection of [0, n) that keeps neighbours near: blocks of `block` rows are permuted, then rows in windows.

    A window is `window` blocks in their permuted order. Reading a window touches that many contiguous ranges, which is
    what an object store wants; shuffling is as good as a shuffle buffer of block·window rows over shuffled shards.
    """

    def __init__(self, n: int, key_: int, block: int, window: int) -> None:
        self.n, self.block, self.span, self.key = n, block, block * window, key_
        count = -(-n // block)
        self.blocks = Permutation(count, key(key_, "blocks"))
        # The last block may be short: places behind it are moved up by what it lacks.
        self.last = count - 1
        self.short = n - self.last * block
        self.at = int(self.blocks.inverse(self.last)) * block

    def __call__(self, places: Any) -> Rows:
        x = np.asarray(places, np.int64)
        y = np.empty_like(x)
        for window in np.unique(x // self.span):
            here = x // self.span == window
            size = min(self.span, self.n - int(window) * self.span)
            y[here] = Permutation(size, key(self.key, int(window)))(x[here] % self.span) + window * self.span
        y = np.where(y >= self.at + self.short, y + self.block - self.short, y)
        return self.blocks(y // self.block) * self.block + y % self.block


class Order:
    """The rows of every step of every epoch on one of `world` processes.

    n: rows of the source; batch: samples a step over all processes, of which each has the same share. Every rank has
    the same fixed number of steps, `steps_per_epoch = n // batch`, and which rows are in step s does not depend on how
    many ranks share them. block: None for a full shuffle (local disks), or the number of contiguous rows of a block, of
    which `window` are mixed together (object stores).
    """

    def __init__(
        self, n: int, batch: int, seed: int = 0, world: int = 1, rank: int = 0, block: int | None = None,
        window: int = 16,
    ) -> None:  # fmt: skip
        if batch > n:
            fix = f"Set train.batch to {n:,} or less, or add data." if n else "Does data.where leave no row?"
            raise ConfigError(
                f"a step needs {batch:,} samples and the data have {n:,}, so that an epoch would have no step. {fix}"
            )
        if batch % world:
            raise ConfigError(
                f"a batch of {batch:,} does not divide over {world} processes; take a multiple of {world}."
            )
        assert 0 <= rank < world
        self.n, self.batch, self.seed, self.rank = n, batch, seed, rank
        self.block, self.window = block, window
        self.share = batch // world
        self.steps_per_epoch = n // batch
        self._permutations: dict[int, Permutation | Blocks] = {}

    def at(self, epoch: int, places: Any) -> Rows:
        """Rows at `places` of `epoch`, an array of integers in [0, n)."""
        permutation = self._permutations.get(epoch)
        if permutation is None:
            k = key(self.seed, epoch, "order")
            if self.block is None:
                permutation = Permutation(self.n, k)
            else:
                permutation = Blocks(self.n, k, self.block, self.window)
            self._permutations = {epoch: permutation}
        return permutation(places)

    def rows(self, step: int) -> Rows:
        """This rank's rows of `step` (counted from the start of training), shape (share,)."""
        return self._rows(step, self.rank * self.share, self.share)

    def all_rows(self, step: int) -> Rows:
        """All ranks' rows of `step`, rank by rank, shape (batch,)."""
        return self._rows(step, 0, self.batch)

    def _rows(self, step: int, start: int, count: int) -> Rows:
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.at(epoch, within * self.batch + start + np.arange(count))

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch
