"""Written captions against references: CIDEr-D, BLEU-4 and the F1 of words.

Texts are compared in lower case and without punctuation, as COCO's evaluation does (it cuts with a Java program, whose
treatment of hyphens and contractions differs in a few words of a thousand). n-grams are of 1 to 4 words.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence, Set
from typing import NamedTuple

from torchmetrics.functional.text import bleu_score

from cutline.errors import DataError

N, SIGMA = 4, 6.0
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
Ngrams = Counter[tuple[str, ...]]


def words_of(text: str) -> list[str]:
    """Lower-case words; punctuation is dropped."""
    return WORD.findall(text.lower())


def cider_d(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al., 1411.5726, section 4 and its "gaming" variant; COCO's cider_scorer), 0 to 10.

    written: one text for each picture; references: one or more for each. Rare n-grams weigh more: the document
    frequencies are those of these references, so scores of other sets do not compare. Raises `DataError` for no pictures
    or a picture without a reference.
    """
    _check(written, references)
    counts = [[_ngrams(r) for r in refs] for refs in references]
    frequency: Counter[tuple[str, ...]] = Counter(g for refs in counts for g in set().union(*refs))
    scores = []
    for text, refs in zip(written, counts):
        hypothesis = _Weighted(_ngrams(text), frequency, len(written))
        each = [hypothesis.similarity(_Weighted(ref, frequency, len(written))) for ref in refs]
        scores.append(10 * sum(each) / len(each))
    return sum(scores) / len(scores)


def bleu_4(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of the whole set (Papineni et al., 2002), 0 to 1, without smoothing; by torchmetrics."""
    _check(written, references)
    return float(bleu_score([_spaced(t) for t in written], [[_spaced(r) for r in refs] for refs in references], N))


def _spaced(text: str) -> str:
    """What torchmetrics, which cuts at white space, takes for the words that we do."""
    return " ".join(words_of(text))


class Overlap(NamedTuple):
    precision: float
    recall: float
    f1: float


def word_overlap(written: Sequence[Set[str]], true: Sequence[Set[str]]) -> Overlap:
    """How many of the words written are true and how many of the true ones are written, over the whole set."""
    both = sum(len(a & b) for a, b in zip(written, true, strict=True))
    given, wanted = sum(map(len, written)), sum(map(len, true))
    return Overlap(both / max(given, 1), both / max(wanted, 1), 2 * both / max(given + wanted, 1))


def _check(written: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not written or len(written) != len(references) or not all(references):
        raise DataError(
            f"{len(written):,} captions are to be compared with the references of {len(references):,} pictures: each "
            "picture needs one caption and at least one reference."
        )


def _ngrams(text: str) -> Ngrams:
    words = words_of(text)
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


class _Weighted:
    """Counts of n-grams by their rareness among `pictures` pictures."""

    def __init__(self, counts: Ngrams, frequency: Counter[tuple[str, ...]], pictures: int) -> None:
        self.by_n: list[dict[tuple[str, ...], float]] = [{} for _ in range(N)]
        for gram, count in counts.items():
            self.by_n[len(gram) - 1][gram] = count * (math.log(pictures) - math.log(max(frequency[gram], 1)))
        self.norms = [math.sqrt(sum(v * v for v in weights.values())) for weights in self.by_n]
        # The reference implementation takes the number of pairs of words for the length, and so do all published scores.
        self.length = sum(count for gram, count in counts.items() if len(gram) == 2)

    def similarity(self, reference: "_Weighted") -> float:
        """Mean over n of the clipped cosine, with a penalty for another length."""
        total = 0.0
        for mine, theirs, a, b in zip(self.by_n, reference.by_n, self.norms, reference.norms):
            if a and b:
                total += sum(min(v, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, v in mine.items()) / (a * b)
        return total / N * math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))
