"""How many different words, bigrams, trigrams and captions a set has, in one pass and bounded memory.

distinct-n (Li et al., 1510.03055) is the number of different n-grams over that of all. Words are runs of letters and
digits, in lower case. What is counted are 64-bit hashes; the arithmetic is Arrow's and numpy's, on whole batches.
"""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
LIMIT = 2**20  # hashes kept of a set: 8 MiB
NGRAMS = (1, 2, 3)


class Distinct:
    """Counts different hashes: exactly up to `limit`, then by the `limit` smallest of them.

    If the k-th smallest of n hashes that lie evenly in 0 … 2^64 is at x, n is about (k − 1) · 2^64 / x, with a standard
    error of n / √k: 0.1 % (k minimum values; Bar-Yossef et al., RANDOM 2002).
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.total, self.full = limit, 0, False
        self._smallest: Hashes = np.empty(0, np.uint64)

    def add(self, hashes: Hashes) -> None:
        self.total += len(hashes)
        if self.full:
            hashes = hashes[hashes < self._smallest[-1]]
        if len(hashes):
            found = np.unique(np.concatenate([self._smallest, hashes]))
            self.full = self.full or len(found) > self.limit
            self._smallest = found[: self.limit]

    @property
    def count(self) -> int:
        if not self.full:
            return len(self._smallest)
        return round((self.limit - 1) * 2.0**64 / float(self._smallest[-1]))

    @property
    def share(self) -> float | None:
        """Different ones of all; None where there are none."""
        return self.count / self.total if self.total else None


class Vocabulary:
    """n-grams and captions of a set. `add` takes its captions in batches."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.ngrams = {n: Distinct(limit) for n in NGRAMS}
        self.captions = Distinct(limit)

    def add(self, captions: "pa.Array") -> None:
        """captions: an Arrow array of strings; null and blank ones do not count."""
        captions = captions.drop_null()
        captions = captions.filter(pc.not_equal(pc.utf8_trim_whitespace(captions), ""))
        self.captions.add(_hash_strings(captions))
        clean = pc.replace_substring_regex(pc.utf8_lower(captions), r"[^\pL\pM\pN_]+", " ")
        split = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(clean))
        words = split.flatten()
        owners = np.repeat(np.arange(len(split)), pc.list_value_length(split).to_numpy(zero_copy_only=False))
        keep = pc.not_equal(words, "").to_numpy(zero_copy_only=False)  # a caption of signs alone has one empty word
        words, owners = words.filter(pa.array(keep)).dictionary_encode(), owners[keep]
        hashes = _hash_strings(words.dictionary)[words.indices.to_numpy(zero_copy_only=False)]
        grams = hashes
        for n, distinct in self.ngrams.items():
            if n > 1:  # of the n − 1 words before, and the next one
                grams = grams[:-1] * np.uint64(0x9E3779B97F4A7C15) + hashes[n - 1 :]
            whole = owners[: len(grams)] == owners[n - 1 :]
            distinct.add(_mixed(grams[whole]))


def _hash_strings(strings: "pa.Array") -> Hashes:
    digests = [hashlib.blake2b(s.encode(), digest_size=8).digest() for s in strings.to_pylist()]
    return np.frombuffer(b"".join(digests), np.uint64)


def _mixed(x: Any) -> Hashes:
    """The finaliser of SplitMix64: sums of hashes are spread evenly again."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = x ^ (x >> np.uint64(31))
    return mixed
