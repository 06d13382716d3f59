"""Scores of a caption that need no picture: tokens, repetition, boilerplate, language and personal data.

tokens       of the tower's tokeniser, start and end included, before anything is cut; by default CLIP's own
truncated    whether they are more than the tower's context (77 in CLIP): the tower does not read the rest
repetition   rep-2: 1 − different bigrams / bigrams of words (Welleck et al., 1908.04319, seq-rep-n); 0 for one word
filename     the whole text is a file name
boilerplate  the text says nothing of the picture: "click to enlarge", "photo by Anna" (see `captions.patterns`)
email, phone personal data: there is an e-mail address, a telephone number
language     ISO 639-1 code by py3langid, among the languages below, null where it is not sure (probability under 0.5).
             On sentences it is rarely wrong (99 % of Flickr8k's captions are "en", none another); on one or two words it
             mostly says nothing.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cutline.captions import patterns
from cutline.captions.score.base import Asked, provenance, text_model
from cutline.captions.work import Made, Row, Worker
from cutline.pairs import Provenance

KINDS = {
    "tokens": pa.int32(), "truncated": pa.bool_(), "repetition": pa.float32(), "filename": pa.bool_(),
    "boilerplate": pa.bool_(), "email": pa.bool_(), "phone": pa.bool_(), "language": pa.string(),
}  # fmt: skip
NGRAM = 2
# The languages of most of the web; with all of its 140, py3langid takes captions for Nigerian Pidgin or Latin.
LANGUAGES = (
    "ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv th tl tr uk ur"
    " vi zh"
).split()
SURE = 0.5  # probability of a language from which it is named

_WORDS = re.compile(r"\w+").findall
_DIGIT = re.compile(r"\d").search


@dataclass(frozen=True)
class TextScores:
    """The scores above as one `Work`. model: whose tokeniser and context count (None: CLIP's own, 77)."""

    asked: Asked
    model: str | None = None
    revision: str = ""

    @property
    def reads(self) -> list[str]:
        return [self.asked.column]

    @property
    def writes(self) -> dict[str, pa.DataType]:
        return self.asked.writes(KINDS)

    def provenance(self) -> Provenance:
        model = self.model if self.model and {"tokens", "truncated"} & set(self.asked.names) else ""
        revision = {"weights": self.revision} if model and self.revision else {}
        return provenance(self.asked, self.reads, model or "", **revision)

    def load(self) -> Worker:
        return _TextWorker(self)


class _TextWorker(Worker):
    def __init__(self, work: TextScores) -> None:
        self.asked = work.asked
        self.scorers: dict[str, Callable[[str], Any]] = {
            "repetition": repetition, "filename": patterns.is_filename, "boilerplate": patterns.is_boilerplate,
            "email": has_email, "phone": has_phone,
        }  # fmt: skip
        if "language" in self.asked.names:
            self.scorers["language"] = language_of()
        self.length, self.context = token_counter(work.model)

    def prepare(self, rows: list[Row]) -> tuple[list[str], list[list[int]]]:
        return self.asked.texts(rows)

    def make(self, prepared: tuple[list[str], list[list[int]]]) -> Made:
        texts, places = prepared
        values: dict[str, Sequence[Any]] = {}
        if {"tokens", "truncated"} & set(self.asked.names):
            tokens = self.length(texts)
            values |= {"tokens": tokens, "truncated": [n > self.context for n in tokens]}
        for name in self.asked.names:
            if name not in values:
                values[name] = [*map(self.scorers[name], texts)]
        return self.asked.made(values, places)


def token_counter(model: str | None) -> tuple[Callable[[list[str]], list[int]], int]:
    """(how many tokens texts have before they are cut, start and end included; the context) of a model, or of CLIP."""
    from cutline import towers
    from cutline.towers.words import WordTokenizer

    if model is None:
        words = WordTokenizer()
        return (lambda texts: [len(words.encode(t)) + 2 for t in texts]), 77
    tokenizer = towers.Tokenizer(text_model(model))
    return tokenizer.lengths, tokenizer.context


def repetition(text: str) -> float:
    """rep-n of the text's words, in any case: 0 where no n-gram comes twice, near 1 for one word again and again."""
    words = _WORDS(text.lower())
    if len(words) <= NGRAM:
        return 0.0
    grams = set(zip(*(words[i:] for i in range(NGRAM)), strict=False))
    return 1 - len(grams) / (len(words) - NGRAM + 1)


def has_email(text: str) -> bool:
    return "@" in text and patterns.EMAIL.search(text) is not None


def has_phone(text: str) -> bool:
    return _DIGIT(text) is not None and patterns.PHONE.search(text) is not None


def language_of() -> Callable[[str], str | None]:
    """A function from a text to its language's code, or None where it is not sure."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)

    def language(text: str) -> str | None:
        code, probability = identifier.classify(text)
        return code if probability >= SURE else None

    return language
