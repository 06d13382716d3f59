"""CIDEr-D, BLEU-4 and word overlap against COCO's own scorer, the formula, and hand-counted cases."""

import math

import pytest

from cutline.errors import DataError
from cutline.metrics.captions import bleu_4, cider_d, word_overlap, words_of

WRITTEN = [
    "a red car beside two dogs",
    "the cat sleeps on a mat",
    "three apples and a pear on the grass",
    "a boy rides a horse",
]
REFERENCES = [
    ["a red car next to two dogs", "two dogs by a car"],
    ["a cat sleeping on the mat", "the cat is on a mat", "a cat sleeps on a mat today"],
    ["two apples on the grass"],
    ["a girl rides a white horse on the beach", "a boy riding a horse"],
]


def test_cider_d_equals_cocos_scorer():
    """Values of pycocoevalcap 1.2 (cider_scorer.py, n = 4, sigma = 6)."""
    assert cider_d(WRITTEN, REFERENCES) == pytest.approx(2.8986343525674556, abs=1e-12)
    mean = cider_d([WRITTEN[0], "x"], [REFERENCES[0], ["y"]])  # "x" shares nothing with "y"
    assert cider_d([WRITTEN[0], "y"], [REFERENCES[0], ["y"]]) - mean == pytest.approx(
        10 / 4 / 2
    )  # one 1-gram of four n


def test_copies_of_the_reference_score_ten_and_case_and_punctuation_do_not_count():
    texts = ["a small dog runs fast", "one cat sleeps right there"]
    assert cider_d([t.title() + " !" for t in texts], [[t] for t in texts]) == pytest.approx(10)
    assert words_of("It's a DOG's life, isn’t it?") == ["it's", "a", "dog's", "life", "isn’t", "it"]


def test_bleu_4_by_hand():
    """Brevity 1; 5/6, 3/5, 2/4 and 1/3 of the n-grams are in a reference."""
    by_hand = math.exp((math.log(5 / 6) + math.log(3 / 5) + math.log(2 / 4) + math.log(1 / 3)) / 4)
    assert bleu_4(["The bird is on the mat."], [["the cat is on the mat"]]) == pytest.approx(by_hand, abs=1e-6)


def test_word_overlap_is_over_the_whole_set():
    precision, recall, f1 = word_overlap([{"a", "b"}, set()], [{"a"}, {"c", "d"}])
    assert (precision, recall, f1) == (1 / 2, 1 / 3, 2 / 5)
    assert word_overlap([set()], [set()]) == (0, 0, 0)


def test_pictures_without_references_are_refused():
    for written, references in (([], []), (["a"], [[]]), (["a"], [["b"], ["c"]])):
        with pytest.raises(DataError, match="at least one reference"):
            cider_d(written, references)
