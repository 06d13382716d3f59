"""Scores of the text alone: each against what it says it is, on single captions, lists, blanks, and real photos'."""

import json
import tarfile

import open_clip
import pytest
from hf_made import tokenizer
from hypothesis import given
from hypothesis import strategies as st

from cutline import towers
from cutline.captions import patterns
from cutline.captions.score import text
from cutline.captions.score.base import Asked
from cutline.captions.score.text import KINDS, TextScores
from cutline.scenes import SceneConfig, Scenes


def score(captions, names=tuple(KINDS), batch=100, **options):
    """Scores of a column of captions, by score; `batch` rows a step."""
    many = any(isinstance(c, list) for c in captions)
    worker = TextScores(Asked("c", "s", tuple(names), many), **options).load()
    rows = [{"key": str(i), "c": c} for i, c in enumerate(captions)]
    made = [m for i in range(0, len(rows), batch) for m in worker.make(worker.prepare(rows[i : i + batch]))]
    return {name: [m[f"s_{name}"] for m in made] for name in names}


def test_tokens_are_those_of_open_clip_before_it_cuts():
    captions = ["a dog", "A very, VERY long dog &amp; cat's 3 " * 9, "Ein Hündchen läuft", "dog " * 75, "dog " * 76]
    encode = open_clip.tokenizer.SimpleTokenizer().encode
    got = score(captions, ["tokens", "truncated"])
    assert got["tokens"] == [len(encode(c)) + 2 for c in captions]
    assert got["truncated"] == [n > 77 for n in got["tokens"]] == [False, True, False, False, True]


def small_clip(folder, **text_cfg):
    """A CLIP of next to no size with a context of 12, as a run directory."""
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text_cfg = {"context_length": 12, "vocab_size": 49408, "width": 8, "layers": 1, "heads": 1} | text_cfg
    custom = {
        "embed_dim": 8,
        "vision_cfg": vision,
        "text_cfg": text_cfg,
        "custom_text": "hf_tokenizer_name" in text_cfg,
    }
    towers.save(towers.build(towers.TowerConfig(custom=custom)), folder / "model")
    return str(folder)


def test_a_model_brings_its_own_context(tmp_path):
    got = score(["dog " * 10, "dog " * 11], ["tokens", "truncated"], model=small_clip(tmp_path))
    assert got == {"tokens": [12, 13], "truncated": [False, True]}


def test_a_tokeniser_of_transformers_counts_as_it_would_without_cutting(tmp_path):
    theirs = tokenizer()
    theirs.save_pretrained(tmp_path / "hub")
    model = small_clip(tmp_path, hf_tokenizer_name=str(tmp_path / "hub"), vocab_size=len(theirs))
    captions = ["a red dog runs", "dog, " * 9]
    got = score(captions, ["tokens", "truncated"], model=model)
    assert got == {"tokens": [len(theirs(c).input_ids) for c in captions], "truncated": [False, True]}


def plain_repetition(caption):
    words = "".join(c if c.isalnum() or c == "_" else " " for c in caption.lower()).split()
    pairs = [(words[i], words[i + 1]) for i in range(len(words) - 1)]
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


@given(st.lists(st.sampled_from(["a", "dog", "Dog", "and", "cat", ",", "two"]), max_size=30).map(" ".join))
def test_repetition_is_the_share_of_repeated_bigrams(caption):
    assert text.repetition(caption) == pytest.approx(plain_repetition(caption))


def test_one_word_seventy_times_is_nearly_all_repetition():
    assert text.repetition("dog " * 70) == pytest.approx(1 - 1 / 69)
    assert text.repetition("A red car next to a blue one") == 0


def test_the_quick_way_out_of_boilerplate_gives_what_the_patterns_say(real_data):
    config = SceneConfig(n=1500, mix="harsh")
    texts = [row["alt"] for row in Scenes(config).read(range(1500), ["alt"])]
    texts += [
        "Photo by Anna - a dog",
        "a dog, photo by Anna",
        "dog@example.com",
        "© 2014",
        "image of a dog",
        "mail a@b.de",
    ]
    with tarfile.open(real_data / "flickr8k" / "00000.tar") as tar:
        for member in [m for m in tar if m.name.endswith(".json")][:300]:
            texts += json.load(tar.extractfile(member))["captions"]
    found = [patterns.is_boilerplate(t) for t in texts]
    words = [patterns.content_words(patterns.without_boilerplate(t)) for t in texts]
    assert found == [
        bool(t.strip()) and all(w in patterns.MEDIA for w in ws) for t, ws in zip(texts, words, strict=True)
    ]
    assert 300 < sum(found) < 1500


def test_flags_mark_file_names_and_personal_data():
    got = score(["IMG_1234.JPG", "write to me@example.com", "call +49 30 1234567", "a dog in 2014", "click to enlarge"])
    assert got["filename"] == [True, False, False, False, False]
    assert got["email"] == [False, True, False, False, False]
    assert got["phone"] == [False, False, True, False, False]
    assert got["boilerplate"][3:] == [False, True]


def test_language_is_named_where_it_is_sure_and_null_elsewhere():
    captions = ["A brown dog runs over the wet grass", "Ein brauner Hund läuft über das nasse Gras", "Un chien brun court "
                "dans l'herbe mouillée", "Un perro marrón corre por la hierba mojada", "IMG_3", "x"]  # fmt: skip
    assert score(captions, ["language"])["language"] == ["en", "de", "fr", "es", None, None]


def test_lists_are_scored_caption_by_caption_and_blanks_stay_null():
    got = score([["a dog", " ", "dog dog dog"], None, [], [""]], ["tokens", "repetition", "language"])
    assert got["tokens"] == [[4, None, 5], None, None, [None]]
    assert got["repetition"] == [[0.0, None, 0.5], None, None, [None]]
    alone = score(["a dog", "", None, "dog dog dog"], ["tokens", "repetition"])
    assert alone == {"tokens": [4, None, None, 5], "repetition": [0.0, None, None, 0.5]}


def test_batches_do_not_change_a_score():
    captions = [row["alt"] for row in Scenes(SceneConfig(n=100)).read(range(100), ["alt"])]
    assert score(captions, batch=7) == score(captions, batch=100)
