"""Random numbers that are a pure function of (seed, index, stream), drawn in blocks because single draws are slow."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
LAYOUT, CAPTIONS, ALT = range(3)  # independent streams, so that the mix of alt texts does not move the scenes
_BLOCK = 96


class Dice:
    """Draws of one scene: a Philox generator keyed by (seed, index, stream)."""

    def __init__(self, seed: int, index: int, stream: int) -> None:
        key = np.array([seed, index * 4 + stream], np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=key))
        self._values: list[float] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._values:
            self._values = self._generator.random(_BLOCK).tolist()
        return low + (high - low) * self._values.pop()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def below(self, n: int) -> int:
        return int(self.uniform() * n)

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self.uniform() * len(items))]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, with probability proportional to its weight."""
        left = self.uniform() * sum(weights)
        for i, w in enumerate(weights):
            left -= w
            if left < 0:
                return i
        return len(weights) - 1

    def shuffled(self, items: Sequence[T]) -> list[T]:
        result = list(items)
        for i in range(len(result) - 1, 0, -1):
            j = self.below(i + 1)
            result[i], result[j] = result[j], result[i]
        return result
