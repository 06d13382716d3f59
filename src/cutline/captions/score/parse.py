"""What a caption says of a scene: the objects it names, with colours and numbers, and how they stand to each other.

The lexicon is that of the embedded world (`scenes.objects`) and the grammar that of its captions (`scenes.captions`),
which are understood exactly; captions by others are understood as far as they speak alike. The longest known phrase
counts ("hot dog" is no dog), and words that are not known, foreign ones among them, say nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

from cutline.scenes.captions import NUMBERS
from cutline.scenes.objects import OBJECTS

V = TypeVar("V")
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[.,;:!?|]")
_STOPS = frozenset(".;!?|")
_BREAKS = _STOPS | {",", ":", "and", "with", "plus", "or", "on", "in", "of", "at", "by", "to", "from", "than"}
_BE = {"is", "are", "there"}
_DETERMINERS = {"a", "an", "the", "this", "that", "some", "another", "my", "your", "its"}
_COLOURS = {c: c for o in OBJECTS for c in (o.colour, *o.hues)} | {"gray": "grey", "golden": "gold"}
_NUMBERS = {word: n for n, word in enumerate(NUMBERS)} | {str(n): n for n in range(100)}
_ADJECTIVES = 2  # unknown words that may stand before a noun

# What phrases say of the thing before them and the thing behind: relations as in `scenes.captions.relations`, …
_RELATIONS = {
    "left": "to the left of, left of, on the left side of, on the left of",
    "right": "to the right of, right of, on the right side of, on the right of",
    "front": "in front of",
    "nearer": "closer than, nearer than, closer to the camera than, nearer to the camera than",
    "behind": "behind",
    "farther": "farther away than, farther back than, more distant than, farther than, further away than, further than",
    "beside": "next to, beside, close to, right by, alongside, near",
}
# … and of one thing alone: near or far, at a side; or of the order of all.
_MARKS = {
    "near mark": "in the foreground, close to the camera, closest to the camera, nearest, in front",
    "far mark": "in the background, farther back, further back, farther off, further off, behind at a distance",
    "left mark": "on the left",
    "right mark": "on the right",
    "rightwards": "from left to right, left to right",
    "leftwards": "from right to left, right to left",
}


@dataclass(frozen=True)
class Mention:
    """A thing as a caption names it. kind: its place in `OBJECTS`; number: None where it is not told."""

    kind: int
    number: int | None = None
    colours: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """`a` stands in `relation` to `b` (see `scenes.captions.relations`)."""

    relation: str
    a: Mention
    b: Mention


@dataclass
class Said:
    """mentions: in the order of the caption; claims: relations of two; rows: orders, from left to right."""

    mentions: list[Mention] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    rows: list[list[Mention]] = field(default_factory=list)


Part = Mention | str  # a thing; or a relation, a mark, "be", "," or ".", and nothing of all other words


def parse(text: str) -> Said:
    """What a caption says."""
    said = Said()
    for sentence in _sentences(text):
        said.mentions += [p for p in sentence if isinstance(p, Mention)]
        said.claims += _related(sentence) + _by_depth(sentence)
        said.rows += _ordered(sentence)
    return said


def _sentences(text: str) -> list[list[Part]]:
    tokens, at = _TOKEN.findall(text.lower()), 0
    sentences: list[list[Part]] = [[]]
    while at < len(tokens):
        part: Part
        part, length = _phrase_at(tokens, at)
        if length == 0:
            part, length = _thing_at(tokens, at)
        if length == 0:
            word, length = tokens[at], 1
            part = "be" if word in _BE else "," if word == "," else ""
            if word in _STOPS:
                sentences.append([])
        if part:
            sentences[-1].append(part)
        at += length
    return sentences


def _phrase_at(tokens: Sequence[str], at: int) -> tuple[str, int]:
    """The longest phrase that begins here and how many words it has; ("", 0) if there is none."""
    phrase, length = _longest(_phrases(), tokens, at)
    return phrase or "", length


def _thing_at(tokens: Sequence[str], at: int) -> tuple[Part, int]:
    """The thing named here: determiner or number, adjectives and colours, noun; "" for things that are denied."""
    if pair := _two_colours(tokens, at):
        return pair
    number: int | None = None
    colours: list[str] = []
    strange = 0
    for i in range(at, len(tokens)):
        word = tokens[i]
        kind, length = _longest(_names(), tokens, i)
        coloured = word in _COLOURS and (kind is None or _longest(_names(), tokens, i + 1)[0] is not None)
        if kind is not None and not coloured:
            countable = tokens[i : i + length] != _stuff(kind)  # "two cherries" are no two pairs of cherries
            thing = Mention(kind, number if countable else None, tuple(colours))
            return ("" if number == 0 else thing), i + length - at
        if coloured:
            colours.append(_COLOURS[word])
        elif word in _NUMBERS and number is None:
            number = _NUMBERS[word]
        elif not (word in _DETERMINERS and i == at):
            strange += 1
            if i == at or strange > _ADJECTIVES or word in _BREAKS or word in _BE or _phrase_at(tokens, i)[1]:
                break
    return "", 0


def _two_colours(tokens: Sequence[str], at: int) -> tuple[Part, int] | None:
    """ "one red and one blue car", which is two cars."""
    one, first, and_, other, second = ([*tokens[at : at + 5], *[""] * 5])[:5]
    kind, length = _longest(_names(), tokens, at + 5)
    if kind is None or (one, and_, other) != ("one", "and", "one") or not {first, second} <= _COLOURS.keys():
        return None
    return Mention(kind, 2, (_COLOURS[first], _COLOURS[second])), 5 + length


def _related(sentence: Sequence[Part]) -> list[Claim]:
    """ "A is left of B", and "left of B there is A"."""
    claims = []
    for i, relation in enumerate(sentence):
        b = sentence[i + 1] if i + 1 < len(sentence) else None
        if not isinstance(relation, str) or relation not in _RELATIONS or not isinstance(b, Mention):
            continue
        a = _before(sentence, i)
        if a is None and sentence[i + 2 : i + 3] == ["be"]:
            a = _after(sentence, i + 2)
        if a is not None:
            claims.append(Claim(relation, a, b))
    return claims


def _by_depth(sentence: Sequence[Part]) -> list[Claim]:
    """ "A in the foreground and B in the background"; what is only called far is so against the thing named before."""
    near, far = _marked(sentence, "near mark"), _marked(sentence, "far mark")
    if far and not near:
        things = [p for p in sentence if isinstance(p, Mention)]
        near = things[: things.index(far[0])][-1:]
    return [Claim("nearer", a, b) for a in near for b in far]


def _ordered(sentence: Sequence[Part]) -> list[list[Mention]]:
    """ "from left to right: A, B and C", and "A on the left and B on the right"."""
    rows = []
    for way in ("rightwards", "leftwards"):
        if way in sentence:
            i = sentence.index(way)
            row = [p for p in sentence[i:] if isinstance(p, Mention)]
            row = row if len(row) > 1 else [p for p in sentence[:i] if isinstance(p, Mention)]
            rows.append(row[::-1] if way == "leftwards" else row)
    left, right = _marked(sentence, "left mark"), _marked(sentence, "right mark")
    if left and right:
        rows.append(left + right)
    return [row for row in rows if len(row) > 1]


def _marked(sentence: Sequence[Part], mark: str) -> list[Mention]:
    """The things that a mark is said of: those before it, or behind it where the sentence begins with a mark."""
    marks = [i for i, p in enumerate(sentence) if isinstance(p, str) and p in _MARKS]
    forwards = bool(marks) and _before(sentence, marks[0]) is None
    found = [(_after if forwards else _before)(sentence, i) for i in marks if sentence[i] == mark]
    return [thing for thing in found if thing is not None]


def _before(sentence: Sequence[Part], i: int) -> Mention | None:
    """The thing before place i, with at most "is" and commas between."""
    return next((p if isinstance(p, Mention) else None for p in sentence[:i][::-1] if p not in ("be", ",")), None)


def _after(sentence: Sequence[Part], i: int) -> Mention | None:
    return next((p if isinstance(p, Mention) else None for p in sentence[i + 1 :] if p not in ("be", ",")), None)


def _longest(table: Mapping[tuple[str, ...], V], tokens: Sequence[str], at: int) -> tuple[V | None, int]:
    """The entry of the longest run of words that begins here and is in the table, and how many words that is."""
    for length in range(min(6, len(tokens) - at), 0, -1):
        found = table.get(tuple(tokens[at : at + length]))
        if found is not None:
            return found, length
    return None, 0


@cache
def _phrases() -> dict[tuple[str, ...], str]:
    both = _RELATIONS | _MARKS
    return {tuple(words.split()): meaning for meaning, phrases in both.items() for words in phrases.split(", ")}


@cache
def _names() -> dict[tuple[str, ...], int]:
    """Words → kind: the name, its plural, a synonym and its plural, and the stuff alone ("pizza")."""
    table: dict[tuple[str, ...], int] = {}
    for kind, o in enumerate(OBJECTS):
        for name in filter(None, (o.name, o.many, o.other, o.other and o.other + "s")):
            table[tuple(name.lower().split())] = kind
    return {tuple(_stuff(k)): k for k in range(len(OBJECTS)) if _stuff(k)} | table


@cache
def _stuff(kind: int) -> list[str]:
    """What a kind is made of: slice of *pizza*."""
    return OBJECTS[kind].name.partition(" of ")[2].split()
