"""The faster tokeniser gives open_clip's tokens for any text, and keeps a bounded number of words."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from cutline.towers import words
from cutline.towers.words import WordTokenizer

PEER, OURS = SimpleTokenizer(), WordTokenizer()
ascii_text = st.text(st.characters(min_codepoint=9, max_codepoint=127), max_size=120)


@settings(max_examples=400, deadline=None)
@given(st.one_of(ascii_text, st.text(max_size=60)))
@example("Fish &amp; chips &#39;here&#39;")
@example("  a\tDOG’s   life\n\nwas ‘here’ ")
@example("<start_of_text> inside <end_of_text> text <START_OF_TEXT>")
@example("Ærø ﬁn İstanbul 犬と猫 🐶🐱 e\u0301 sÃ³n")
@example("IMG_2034.JPG 100% cotton, size: XL (new!!) -- don't you'll we've")
@example("")
@example("\x1b[31mred\x1b[0m \x00 \x85")
def test_tokens_equal_open_clips(text: str) -> None:
    assert OURS.encode(text) == PEER.encode(text)
    assert torch.equal(OURS([text, text]), PEER([text, text]))


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace", "lower"])
def test_every_way_of_cleaning_is_kept(clean: str) -> None:
    text = "  Some_thing, Plain &amp; \u201cquoted\u201d! "
    assert WordTokenizer(clean=clean).encode(text) == SimpleTokenizer(clean=clean).encode(text)


def test_texts_are_cut_like_open_clips_at_any_context() -> None:
    texts = ["one two three four five six", "a", "x" * 300]
    for context in (3, 8, 16, 77):
        assert torch.equal(OURS(texts, context), PEER(texts, context))
    assert torch.equal(WordTokenizer(context_length=8)(texts), SimpleTokenizer(context_length=8)(texts))


def test_reducing_masks_still_work() -> None:
    ours = WordTokenizer(context_length=8, reduction_mask="simple")
    assert ours(["one two three four five six seven eight nine"]).shape == (1, 8)


def test_the_number_of_words_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MAX_WORDS", 50)
    tokenizer = WordTokenizer()
    texts = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200)]
    assert torch.equal(tokenizer(texts), PEER(texts))
    assert len(tokenizer.ids) == 50
    assert len(tokenizer.cache) == 2  # the special tokens
