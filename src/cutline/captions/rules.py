"""Fusing without a model: `--with rules`, the baseline that a language model has to beat.

A caption says what is seen, alt text may know what it is called. So the caption stays as it is, and what the alt text
names and the caption lacks is appended: "A dog on grass." and "Rex | Labrador, photo by Anna" give "A dog on grass, Rex
and Labrador." Names are runs of words that carry meaning; file names, boilerplate, shop talk, dates and numbers are none.
Of a text in German, Spanish or French only names of two or more capitalised words are taken, since its words are no help
in an English caption.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from cutline.captions.clean import CONTEXT, tidy
from cutline.captions.generator import demand_texts
from cutline.captions.patterns import (
    FOREIGN,
    MEDIA,
    SHOP,
    STOPWORDS,
    is_boilerplate,
    is_filename,
    without_boilerplate,
)
from cutline.captions.work import Failed, Row, Worker
from cutline.config import Config
from cutline.pairs import Provenance

MAX_TOKENS = 256  # of CLIP's tokeniser, of a text that is fused: alt text that is longer is a page of text
MAX_NAMES, MAX_WORDS = 3, 5  # names that are appended, and words of one: more is a sentence, or a list of search terms
# A full stop parts, but not after a title that a name begins with: St. Bernard.
_TITLE = r"\b(?i:St|Mr|Mrs|Ms|Dr)\.(?=\s)"
_PART = re.compile(r"[|,;:!?()\[\]{}\"“”«»/•–—\n]+|(?<!\b(?i:St|Mr|Ms|Dr))(?<!\b(?i:Mrs))\.(?=\s|$)|\s-+\s|\s\+\s")
_WORD = re.compile(rf"{_TITLE}|[^\W_]+(?:['’.&-][^\W_]+)*|&")
_JOINING = frozenset(
    ("the", "de", "da", "di", "du", "des", "del", "la", "le", "von", "van", "and", "&")
)  # within a capitalised name
# Content words that name nothing: praise, places in the picture, and how one speaks of looking at it.
_IDLE = frozenset(
    """new best top great nice beautiful amazing awesome cool perfect premium quality professional original official
    exclusive stylish unique lovely gorgeous stunning popular favorite favourite latest left right front bottom side
    middle center centre background foreground distance far farther nearest nearer close see seen show shows showing
    shown featuring plus besides well thing things lot lots""".split()
)
_FOREIGN_ANYWHERE = frozenset(("foto", "fotos", "imagen", "imágenes", "bild", "bilder", "kaufen"))


def texts_of(row: Row, inputs: Sequence[str]) -> dict[str, str]:
    """The inputs of a row that say something: column → its text (of a list the first), tidied."""
    texts = {}
    for name in inputs:
        value = row[name]
        if isinstance(value, list):
            value = next((v for v in value if v), None)
        if not isinstance(value, str):
            continue
        text = tidy(value, MAX_TOKENS)
        if isinstance(text, str) and not is_filename(text) and not is_boilerplate(text):
            texts[name] = text
    return texts


def names_of(text: str) -> list[str]:
    """The named things of an alt text, as it writes them, in order."""
    words = _WORD.findall(text)
    foreign = any(w in FOREIGN or w.lower() in _FOREIGN_ANYWHERE for w in words)
    text = " ".join("|" if is_filename(word.strip("()[]<>,;:\"'")) else word for word in text.split())
    text = SHOP.sub(" | ", without_boilerplate(text))
    names = [name for part in _PART.split(text) for name in _names_in(part)]
    if foreign:
        names = [name for name in names if sum(word[0].isupper() for word in name.split()) > 1]
    return list(dict.fromkeys(names))


def _names_in(part: str) -> list[str]:
    """Runs of words that carry meaning, with the small words and numbers that belong into a name."""
    runs: list[list[str]] = [[]]
    waiting = ""  # a word that belongs into the name only if another follows
    for word in _WORD.findall(part):
        run, low = runs[-1], word.lower()
        if _carries(word):
            named = bool(run) and word[0].isupper() and run[-1][0].isupper()
            if run and (waiting == "of" or (waiting.strip() and named)):
                run += [waiting, word]
            elif waiting:
                runs.append([word])
            else:
                run.append(word)
            waiting = ""
        elif run and not waiting and any(c.isdigit() for c in word) and run[-1].lower() != run[-1]:
            run.append(word)  # Boeing 747
        elif run and not waiting and (low == "of" or low in _JOINING or (low == "in" and len(run) <= 2)):
            waiting = word  # "in" within short names alone: Alice in Wonderland
        else:
            waiting = " "  # ends the run
    return [" ".join(run[:MAX_WORDS]) for run in runs if run]


def _carries(word: str) -> bool:
    low = word.lower()
    if len(word) < 2 or any(c.isdigit() for c in word) or low in STOPWORDS or low in MEDIA:
        return False
    if word[0].isupper():
        return low not in _IDLE or word == "New"  # York, Zealand, Delhi
    return word.isascii() and low not in _IDLE and low not in FOREIGN


def _stems(text: str) -> set[str]:
    """Words without endings of the plural, for comparing."""
    words = (w.lower().removesuffix("'s").removesuffix("’s").removesuffix(".") for w in _WORD.findall(text))
    return {re.sub(r"(?<=\w{2})(?:ies|y|es|e|s)$", "", w) for w in words}


def fuse_by_rules(alt: str, caption: str) -> str:
    """The caption, with the names of the alt text that it lacks: "CAPTION, NAME, NAME and NAME"."""
    have, lacking = _stems(caption), list[str]()
    for name in names_of(alt):
        if not _stems(name) - _JOINING - {"of", "in"} <= have:
            lacking.append(name)
            have |= _stems(name)
    if not lacking:
        return caption
    *first, last = lacking[:MAX_NAMES]
    stop = "." if caption.endswith(".") else ""
    return f"{caption.rstrip(' .')}, {', '.join(first) + ' and ' if first else ''}{last}{stop}"


class RulesFuse(Config):
    """A `Work` that fuses the two columns `inputs`, alt text and caption in this order, into `column` without a model.

    Columns are read as by `FuseWork`; limit: as of `VlmWriter`.
    """

    column: str = Field(min_length=1)
    inputs: list[str] = Field(min_length=2, max_length=2)
    limit: int = Field(CONTEXT, ge=3)

    @property
    def reads(self) -> list[str]:
        return self.inputs

    @property
    def writes(self) -> Mapping[str, str]:
        return {self.column: "string"}

    def provenance(self) -> Provenance:
        return Provenance(how="caption fuse", model="rules", inputs=self.inputs, settings={"limit": self.limit})

    def load(self) -> "RulesWorker":
        return RulesWorker(self)


class RulesWorker(Worker):
    def __init__(self, work: RulesFuse) -> None:
        self.work = work

    def make(self, prepared: list[Row]) -> list[Mapping[str, Any] | Failed]:
        return [self._one(row) for row in prepared]

    def _one(self, row: Row) -> Mapping[str, Any] | Failed:
        alt, caption = self.work.inputs
        demand_texts(row, self.work.inputs)
        texts = texts_of(row, self.work.inputs)
        if not texts:
            return Failed("no text")
        both = len(texts) == 2
        fused = tidy(fuse_by_rules(texts[alt], texts[caption]) if both else next(iter(texts.values())), self.work.limit)
        return fused if isinstance(fused, Failed) else {self.work.column: fused}
