"""Cleaning of generated text: tables of what models say, and properties that hold for any text."""

import re
import unicodedata

import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutline.captions.clean import clean, count_tokens, repeats_itself, tidy
from cutline.captions.patterns import (
    EMAIL,
    MEDIA,
    PHONE,
    URL,
    content_words,
    is_boilerplate,
    is_filename,
    without_boilerplate,
)
from cutline.captions.work import Failed
from cutline.scenes.alt import _boilerplate, _filename, _one, _shop
from cutline.scenes.dice import ALT, Dice

DOG = "A dog runs on grass."


@pytest.mark.parametrize(
    "answer",
    [
        f"  {DOG}\n", f"Sure, here is a caption: {DOG}", f"Certainly! Here's a concise caption for the image:\n\n{DOG}",
        f'"{DOG}"', f"“{DOG}”", f"**Caption:** {DOG}", f"### {DOG}", f"```text\n{DOG}\n```",
        f"<think>A dog. Or a cat?\n</think>\n\n{DOG}", f"<p>{DOG}</p>", f"Output: {DOG}<|im_end|>", f"assistant\n{DOG}",
        f"The fused sentence is: {DOG}", f"{DOG}\n\nLet me know if you would like another one!", "A *dog* runs on **grass**.",
        f"{DOG} I hope this helps!", f"1. {DOG}", f"- {DOG}", "A\x00 dog\x07 runs\u200b on\tgrass.",
        "A dog runs on&nbsp;grass.", f'Here is the rewritten caption: "{DOG}"', f"{DOG}\n\nNote: I left out the price.",
        "A <b>dog</b> runs on [grass](http://x.y).", f"> {DOG}", f"Caption 1: {DOG}", f"[INST] {DOG} [/INST]",
        f"Rewritten: {DOG}", f"Merged description: {DOG}",
    ],
)  # fmt: skip
def test_what_chat_models_put_round_a_caption_is_taken_away(answer: str) -> None:
    assert clean(answer) == DOG


@pytest.mark.parametrize(
    "caption",
    [
        "A sign that reads: STOP", "Here is a dog: a brown one", "a man's hat & a woman's", "I can't believe it's a cake",
        "2 * 3 = 6 on a blackboard", "snake_case_names on a screen", "a < b and b > c", "I love New York shirt",
        "sorry, we're closed, says a sign on a door", "No parking sign", "ein Hund läuft über die Wiese", "一只狗在草地上奔跑",
        "a 👩‍🚀 sticker", "It is 5 o'clock", '"Stop" and "Go" on signs', '"Stop" beside "Go"', "There are no people in this wide valley", "The caption of a book says hello",
    ],
)  # fmt: skip
def test_captions_stay_as_they_are(caption: str) -> None:
    assert clean(caption) == caption


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"), ("  \n", "empty"), ("...", "empty"), ("<br>", "empty"), ("None", "empty"), ("N/A.", "empty"),
        ("<think>hm, a dog, or is it", "empty"), ("```\n```", "empty"),
        ("I'm sorry, I can't help with that.", "refused"), ("I’m sorry, but I cannot assist.", "refused"),
        ("As an AI language model, I do not see pictures.", "refused"), ("I cannot see the image you mean.", "refused"),
        ("Sure! As an AI assistant I have no eyes.", "refused"), ("Please provide the image.", "refused"),
        ("It seems you haven't attached an image.", "refused"), ("There is no image provided.", "refused"),
        ("dog " * 70, "repeats itself"), ("a dog and " * 12, "repeats itself"), ("a" * 10_000, "repeats itself"),
        ("A dog on grass. " * 40, "repeats itself"), ("hahahahahahahahahahahaha", "repeats itself"),
        ("<b" * 5000, "repeats itself"), (" ".join(f"<b{i}" for i in range(80)) + " >" * 80, "markup"),
    ],
)  # fmt: skip
def test_answers_that_are_no_captions_fail_with_their_reason(answer: str, reason: str) -> None:
    assert clean(answer) == Failed(reason)


def test_quotes_round_the_whole_go_and_those_inside_stay() -> None:
    assert clean('"A sign says "STOP" on a pole."') == 'A sign says "STOP" on a pole.'
    assert clean("'A dog'.") == "A dog."
    assert clean('"A dog') == "A dog"


def test_long_answers_are_cut_at_a_sentence_or_else_at_a_word() -> None:
    first = "A dog runs over the grass near Mr. Brown. Behind it stands a red barn."
    long = first + " Then " + " ".join(f"tree{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200))
    assert clean(long) == first
    words = " ".join(
        f"{a}{b}" for a in ("red", "blue", "old", "tall") for b in ("house", "tree", "car", "boat", "cat", "hat")
    )
    for limit in (10, 20):
        got = tidy(words, limit)
        assert isinstance(got, str)
        assert words.startswith(got + " ")
        following = words[: words.find(" ", len(got) + 1)]
        assert count_tokens(got) <= limit < count_tokens(following)
    word = "incomprehensibilities" * 9
    got = tidy(word, 10)
    assert isinstance(got, str)
    assert word.startswith(got)
    assert count_tokens(got) == 10


def test_tokens_are_counted_as_open_clip_counts_them() -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    for text in ("a dog", "Ein Hund läuft über die Wiese.", "A photo of 12 cats & 1 dog — it's raining!"):
        assert count_tokens(text) == int(tokenizer([text]).ne(0).sum())


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("very very big dog", False), ("very very very very big", True), ("a dog, a cat, a dog, a cat, a dog, a cat", True),
        ("a red ball on the left and a red ball on the right", False), ("knock knock", False), ("一二" * 12, True),
        ("the man and the woman and the man and the woman and the man and the woman", True),
    ],
)  # fmt: skip
def test_loops_are_told_from_repetition_that_means_something(text: str, loops: bool) -> None:
    assert repeats_itself(text) == loops


PARTS = st.sampled_from(
    ["Sure, here is a caption: ", '"', "“", "”", "'", "**", "_", "`", "```", "\n", "\n\n", "<b>", "</b>", "<", ">", "&amp;", "&lt;",
     "&#60;", "&amp;lt;", "Caption: ", "a dog", "on grass", ". ", " ", "\t", "\x00", "\u202e", "\ud800", "1. ", "- ", "# ", "[", "](",
     ")", "<think>", "</think>", "<|im_end|>", "Let me know", "\ufeff", "\u0085", "\u2028", "狗", "é", "e\u0301", "👩‍🚀", "|", "!!!!!!"]
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(PARTS, max_size=30).map("".join))
FORBIDDEN = ("Cc", "Cs", "Zl", "Zp")


@given(TEXTS, st.sampled_from([3, 5, 8, 20, 77]))
@settings(max_examples=400, deadline=None)
def test_any_text_becomes_one_clean_line_within_the_limit_or_fails(text: str, limit: int) -> None:
    for function in (clean, tidy):
        got = function(text, limit)
        if isinstance(got, Failed):
            continue
        assert function(got, limit) == got
        assert got == " ".join(got.split()) != ""
        assert not any(unicodedata.category(c) in FORBIDDEN or c in "\u202e\ufeff\u200b" for c in got)
        assert count_tokens(got) <= limit
        assert not re.search(r"<[a-z]+>", got)


@given(st.text(alphabet=list("ab<>&;*_`\"' \n.()[]!"), min_size=3000, max_size=12_000))
@settings(max_examples=10, deadline=2000)
def test_long_rubbish_takes_no_long_time(text: str) -> None:
    clean(text)


def test_file_names_and_boilerplate_of_the_web_are_known_and_nothing_else_is_taken_for_them() -> None:
    for i in range(1000):
        dice = Dice(0, i, ALT)
        assert is_filename(_filename(dice))
        assert is_boilerplate(_boilerplate(dice))
        for text in (_one(dice, "fire engine"), _shop(dice, "teapot")):
            assert not is_filename(text)
            assert not is_boilerplate(text)
    for text in (
        "",
        "a dog",
        "photo by the lake at dawn",
        "A photo of Anna",
        "Page One records sign",
        "Cookie on a plate",
    ):
        assert not is_boilerplate(text)
    assert not is_filename("a dog on the beach")


WEB = st.lists(
    st.sampled_from(
        "click here to view larger image photo by Anna credit: posted on March 3 page 3 of 40 read more dog's cat - | © 2019 "
        "alt log-in via flickr.com a@b.org (c) no caption cover sign-up may contain: indoor figure 2 all rights reserved".split()
    ),
    max_size=8,
).map(" ".join)


@given(st.one_of(WEB, st.text(max_size=30)))
@settings(max_examples=400, deadline=None)
def test_the_quick_look_for_boilerplate_equals_the_thorough_one(text: str) -> None:
    thorough = bool(text.strip()) and not any(w not in MEDIA for w in content_words(without_boilerplate(text)))
    assert is_boilerplate(text) == thorough


def test_addresses_are_found_and_dates_and_prices_are_not() -> None:
    for text in ("call +49 151 12345678", "(555) 123-4567", "555-123-4567", "1-800-555-1234", "020 7946 0958"):
        assert PHONE.search(text)
    for text in ("2015-03-12", "12 299 000", "1999.99", "2048 1536", "IMG 20150312", "192.168.100.1000"):
        assert not PHONE.search(text)
    assert EMAIL.findall("mail x.y+z@mail.example.org or user@host") == ["x.y+z@mail.example.org"]
    assert [bool(URL.search(t)) for t in ("see www.a.de", "http://x/y", "foo.com/bar", "a@b.com", "e.g. this", "Dr. No")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_content_words_are_those_that_mean_something() -> None:
    words = content_words("The dog's bowl is on a Table, 3 m from it; naïve café 猫")
    assert words == ["dog's", "bowl", "table", "naïve", "café", "猫"]
