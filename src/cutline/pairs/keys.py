"""Which keys were seen before, in 8 bytes a key.

Keys are known by Python's 64-bit hash, in a few sorted arrays that are merged when they grow alike. Two keys of one
hash would count as one: with 100 million keys the chance that this happens anywhere is about 1 in 3,000.
"""

import numpy as np


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
