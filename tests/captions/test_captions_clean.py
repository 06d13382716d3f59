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
        f"<|channel|>analysis<|message|>We need to...<|end|><|start|>assistant<|channel|>final<|message|>{DOG}<|return|>",
        f"analysisWe need to...assistantfinal{DOG}", f'{{"caption": "{DOG}"}}', f'```json\n{{"caption": "{DOG}", "n": 1}}\n```',
        f"### Caption\n{DOG}", f"**Caption**\n\n{DOG}", f"Here is the sentence\n\n{DOG}", f"Based on the two sentences: {DOG}",
        f"Alright, here's the caption: {DOG}", f"Description of the image: {DOG}", f"Sure, here's one: {DOG}",
        f"I'd describe it as: {DOG}", f'I would rephrase it as follows: "{DOG}"', f"Rephrased as: {DOG}", f"Alt text: {DOG}",
        f"Based on the alt text and the caption, here is the sentence: {DOG}", f"Here's a shorter version: {DOG}",
        f"Here is the rewritten version of both: {DOG}", f"Okay, here you go: {DOG}", f"Improved version: {DOG}",
        f"{DOG}\n\nWord count: 12", f"{DOG} (12 words)", f'"{DOG}" (12 words)', f"{DOG}\n\nAlternatively: A cat.",
        f"{DOG}\n\nChanges made: none", f"{DOG}\n\nThis combines the facts of both.", f"{DOG}\n\nThis text is short.",
        f"{DOG}\nUser: more", f"{DOG}\n\nHuman: more", f"{DOG}\nCaption: A cat.", f"Caption: {DOG}\nRewritten: A cat.",
        f"1. {DOG}\n2. A brown dog.\n3. A cat.", f"Option 1: {DOG}\nOption 2: A brown dog.", f"1. {DOG} 2. A cat. 3. A cow.",
        f"Here are three options:\n\n1. {DOG}\n2. A brown dog.", f"**Option 1:** {DOG}\n\n**Option 2:** A brown dog.",
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
        "The image provided shows a brown dog on grass.", "The picture given depicts two children.", "A monitor of 27\"",
        "The photo attached shows a cat.", "A robot dressed as an AI assistant standing in an office", "The text reads: Happy Birthday",
        "I do not see any people, only a dog on grass.", "I could not see the dog behind the tree", "I see you, graffiti on a wall",
        "Unfortunately, the photo is blurred, but a dog can be seen.", "There is no text to read on this white wall with a window",
        "Please give blood, a poster at a station", "As an AI artist, she shows her picture", "I think you are beautiful, card",
        "You have not given up, poster", "It looks like there is no one in the room", "I'm afraid of dogs poster",
        "Unfortunately, no dogs allowed, says a sign", "A man watching a M*A*S*H rerun", 'A TV that measures 55"', "Version 2: the new car",
        "Here are two versions of the iPhone: black and white", "A sign on a wall. This text is written in red.",
        "A cup of tea. I hope this is warm.", "A note. Note: bring milk", "A 1000000000000 mark banknote", "{curly} braces}",
        "New York, New York, New York sign", "A black and white and black and white and black and white pattern",
        "A list: 1. milk 2. eggs", "Based on a true story: a poster of a film",
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
        ("I am an AI and cannot see images.", "refused"), ("As a helpful assistant, I cannot view images.", "refused"),
        ("Could you please provide the image?", "refused"), ("Can you provide the alt text?", "refused"),
        ("It's not possible to rephrase without a caption.", "refused"), ("No caption available.", "refused"),
        ("The image is not available to me.", "refused"), ("No image was provided", "refused"), ("(none)", "empty"),
        ("I don't have access to the picture.", "refused"), ("I see no image here.", "refused"), ("{}", "empty"),
        ("<|channel|>analysis<|message|>We need", "empty"), ('{"caption": "I\'m sorry"}', "refused"), ("0" * 40, "repeats itself"),
        ('{"a":' * 4000 + "}", "repeats itself"),
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
        ("New York, New York, New York sign", False), ("a dog " * 4, True), ("a red ball " * 3, True), ("7" + "0" * 12, False),
        ("black and white and black and white and black and white", False), ("black and white and " * 4, True),
        ("the man and the woman and the man and the woman and the man and the woman", True),
    ],
)  # fmt: skip
def test_loops_are_told_from_repetition_that_means_something(text: str, loops: bool) -> None:
    assert repeats_itself(text) == loops


PARTS = st.sampled_from(
    ["Sure, here is a caption: ", '"', "“", "”", "'", "**", "_", "`", "```", "\n", "\n\n", "<b>", "</b>", "<", ">", "&amp;", "&lt;",
     "&#60;", "&amp;lt;", "Caption: ", "a dog", "on grass", ". ", " ", "\t", "\x00", "\u202e", "\ud800", "1. ", "- ", "# ", "[", "](",
     ")", "<think>", "</think>", "<|im_end|>", "Let me know", "\ufeff", "\u0085", "\u2028", "狗", "é", "e\u0301", "👩‍🚀", "|", "!!!!!!", '{"caption": "', '"}', "\\", "2. ", "Option 1: ", "\nUser: ", "\n\nNote: ", "(12 words)",
     "Here is the sentence\n", "<|channel|>final<|message|>", "<|channel|>analysis<|message|>", '5"', "analysis", "assistantfinal"]
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
@settings(max_examples=10, deadline=None)
def test_long_rubbish_takes_no_long_time(text: str) -> None:
    got = clean(text)
    assert isinstance(got, Failed) or 0 < count_tokens(got) <= 77


@pytest.mark.parametrize(
    "part", ["\n", " ", "\n ", "1. a\n", ". ", "as an a-", "here is ", "the final ", "*a", "(1 ", '"a ', "{", "0"]
)
def test_what_patterns_repeat_takes_no_long_time_either(part: str) -> None:
    for text in ("a" + part * (19_990 // len(part)) + "a", part * (20_000 // len(part))):
        got = clean(text)
        assert isinstance(got, Failed) or 0 < count_tokens(got) <= 77


def test_a_run_of_words_for_the_picture_ends() -> None:
    text = "image " * 300 + "by"  # 2 ** 300 ways to part it, with a word that two alternatives cover
    assert is_boilerplate(text)
    assert without_boilerplate(text) == text
    assert not is_boilerplate("see the " + text + " dog")


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
        "cookies",
        "Chocolate cookies",
    ):
        assert not is_boilerplate(text)
    assert is_boilerplate("We use cookies")
    assert is_boilerplate("image posted by the author")
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
