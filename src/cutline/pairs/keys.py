"""Which keys were seen before, in 8 bytes a key.

Keys are known by Python's 64-bit hash, in a few sorted arrays that are merged when they grow alike. Two keys of one
hash would count as one: with 100 million keys the chance that this happens anywhere is about 1 in 3,000.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np


def prefixes(files: Sequence[str]) -> list[str]:
    """What to put before the keys of each file: its stem, or where two have the same, as much of the path as differs."""
    paths = {name: Path(name).resolve() for name in files}
    different = set(paths.values())
    for depth, whole in product(range(1, max((len(p.parts) for p in different), default=0) + 1), (False, True)):
        short = {p: "/".join((p if whole else p.with_suffix("")).parts[-depth:]) for p in different}
        if len(set(short.values())) == len(different):
            break
    return [f"{short[paths[name]]}/" for name in files]


class Keys:
    """A growing set of keys."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []

    def add(self, keys: list[str]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Add `keys`; True for each that was new, and for the first of several equal ones."""
        hashes = np.fromiter((hash(k) for k in keys), np.int64, len(keys))
        unique, first = np.unique(hashes, return_index=True)
        new = np.zeros(len(keys), np.bool_)
        for run in self.runs:
            at = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            fresh = run[at] != unique
            unique, first = unique[fresh], first[fresh]
        new[first] = True
        if len(unique):
            self.runs.append(unique)
        while len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1]):
            merged = np.concatenate([self.runs.pop(), self.runs.pop()])
            merged.sort(kind="stable")
            self.runs.append(merged)
        return new
