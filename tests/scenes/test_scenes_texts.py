"""Captions are true of their scenes, and alt texts follow their mix."""

import re
from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from cutline.scenes import MIXES, SceneConfig, Scenes
from cutline.scenes.alt import KINDS, USEFUL
from cutline.scenes.captions import NUMBERS
from cutline.scenes.objects import GROUNDS, OBJECTS

NAMES = {n: o for o in OBJECTS for n in (o.name, o.many, o.other, o.other + "s" if o.other else "") if n}
NAME = "|".join(sorted(map(re.escape, NAMES), key=len, reverse=True))
COLOURS = "|".join(sorted({c for o in OBJECTS for c in o.hues}))
PHRASE = re.compile(rf"\b(an?|the|{'|'.join(NUMBERS[1:])}) (?:({COLOURS}) )?({NAME})(?!\w)", re.IGNORECASE)
TWO_COLOURS = re.compile(rf"\bone ({COLOURS}) and one ({COLOURS}) ({NAME})(?!\w)", re.IGNORECASE)


def read(n: int, seed: int = 21, mix: str | dict[str, float] = "web", size: int = 48) -> list[dict[str, Any]]:
    scenes = Scenes(SceneConfig(n=n, size=size, seed=seed, mix=mix))
    return scenes.read(range(n), ["captions", "alt", "alt_kind", "objects"])


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return read(700)


def mentions(caption: str) -> list[tuple[str, int, list[str]]]:
    """(object, how many, colours) for each noun phrase."""
    found = []
    for one, two, name in TWO_COLOURS.findall(caption):
        found.append((_object(name), 2, [one.lower(), two.lower()]))
    for number, colour, name in PHRASE.findall(TWO_COLOURS.sub("", caption)):
        count = NUMBERS.index(number.lower()) if number.lower() in NUMBERS else 1
        found.append((_object(name), count, [colour.lower()] * count if colour else []))
    return found


def _object(name: str) -> str:
    return next(o.name for n, o in NAMES.items() if n.lower() == name.lower())


def test_named_objects_counts_and_colours_are_those_of_the_scene(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        there = Counter(o["name"] for o in row["objects"])
        colours = {n: sorted(o["colour"] for o in row["objects"] if o["name"] == n) for n in there}
        for caption in row["captions"]:
            said: Counter[str] = Counter()
            for name, count, painted in mentions(caption):
                said[name] += count
                assert not Counter(painted) - Counter(colours.get(name, [])), (caption, colours)
            assert said, caption
            assert all(there[name] == count for name, count in said.items()), (caption, there)


def test_captions_name_all_objects_when_there_are_few(rows: list[dict[str, Any]]) -> None:
    complete, few = 0, 0
    for row in rows:
        there = {o["name"] for o in row["objects"]}
        if len(there) <= 4:
            few += 5
            complete += sum({name for name, _, _ in mentions(c)} == there for c in row["captions"])
    assert complete > 0.97 * few


def test_stated_relations_hold_in_the_picture(rows: list[dict[str, Any]]) -> None:
    """Between single objects, judged by their boxes and depths."""
    words = {
        r"(?:to the left|left|on the left side) of": lambda a, b: centre(a) < centre(b),
        r"(?:to the right|right|on the right side) of": lambda a, b: centre(a) > centre(b),
        "in front of": lambda a, b: a["depth"] < b["depth"],
        "behind": lambda a, b: a["depth"] > b["depth"],
        r"(?:closer|nearer|closer to the camera) than": lambda a, b: a["depth"] < b["depth"],
        r"(?:farther away|farther back|more distant) than": lambda a, b: a["depth"] > b["depth"],
        r"(?:next to|beside|right by)": lambda a, b: 0.75 < a["depth"] / b["depth"] < 1.35,
    }
    noun = rf"(?:an?|the) (?:(?:{COLOURS}) )?({NAME})"
    checked: Counter[str] = Counter()
    for row in rows:
        single = {o["name"]: o for o in row["objects"]}
        count = Counter(o["name"] for o in row["objects"])
        for caption in row["captions"]:
            for relation, holds in words.items():
                if "with" in caption.split(relation)[0] and relation == "behind":
                    continue
                for a, b in re.findall(rf"^{noun} (?:is )?{relation} {noun}(?!\w)", caption, re.IGNORECASE):
                    first, second = _object(a), _object(b)
                    if count[first] == count[second] == 1:
                        assert holds(single[first], single[second]), caption
                        checked[relation] += 1
    assert all(checked[r] >= 3 for r in words), checked


def centre(o: dict[str, Any]) -> float:
    return float(o["box"][0] + o["box"][2]) / 2


def test_left_to_right_listings_are_in_order(rows: list[dict[str, Any]]) -> None:
    checked = 0
    for row in rows:
        for caption in row["captions"]:
            way = re.search(r"(left to right|right to left)", caption)
            if way:
                order = [o["name"] for o in sorted(row["objects"], key=centre)]
                said = [name for name, _, _ in mentions(caption)]
                checked += 1
                # The centre of what shows can move past a neighbour's when an object is cut off or half hidden.
                wanted = order if way.group() == "left to right" else order[::-1]
                agree = sum(a == b for a, b in zip(said, wanted, strict=True))
                assert agree >= len(said) - 2, (caption, wanted)
    assert checked > 30


def test_the_five_captions_differ_and_are_of_fit_length(rows: list[dict[str, Any]]) -> None:
    lengths = []
    for row in rows:
        assert len(set(row["captions"])) == 5
        for caption in row["captions"]:
            lengths.append(len(caption.split()))
            assert caption[0].isupper()
            assert caption.endswith(".")
            assert "  " not in caption
    lengths.sort()
    assert lengths[len(lengths) // 20] >= 5
    assert lengths[-len(lengths) // 20] <= 24


def test_few_captions_name_the_ground(rows: list[dict[str, Any]]) -> None:
    said = sum(any(g in c or "tiled" in c for g in GROUNDS) for r in rows for c in r["captions"])
    assert 1.0 <= said / len(rows) <= 1.5


@pytest.mark.parametrize("mix", list(MIXES))
def test_alt_texts_follow_their_mix(mix: str) -> None:
    rows = Scenes(SceneConfig(n=2000, size=64, seed=21, mix=mix)).read(range(2000), ["alt_kind"])
    counts = Counter(r["alt_kind"] for r in rows)
    for kind, share in MIXES[mix].items():
        assert counts[kind] / 2000 == pytest.approx(share, abs=0.035), kind
    useful = sum(MIXES[mix][k] for k in USEFUL)
    assert useful == pytest.approx({"web": 0.6, "mild": 0.9, "harsh": 0.25}[mix])
    assert sum(MIXES[mix].values()) == pytest.approx(1)


def test_alt_texts_are_what_their_kind_says() -> None:
    for row in read(800, mix=dict.fromkeys(KINDS, 1.0)):
        alt, here = row["alt"], {o["name"] for o in row["objects"]}
        named = {o.name for o in OBJECTS if re.search(rf"\b{re.escape(o.name)}\b", alt, re.IGNORECASE)}
        match row["alt_kind"]:
            case "good":
                assert alt in row["captions"]
            case "one" | "shop":
                assert named & here, (alt, here)
            case "foreign":
                words = [w for o in OBJECTS if o.name in here for w in (o.de, o.es, o.fr)]
                assert any(w in alt for w in words)
            case "wrong":
                assert named
                assert max(named, key=len) not in here
            case "empty":
                assert alt == ""
            case _:
                assert alt
                assert not named, alt


def test_own_mixes_are_shares() -> None:
    rows = read(300, mix={"one": 3, "empty": 1})
    counts = Counter(r["alt_kind"] for r in rows)
    assert set(counts) == {"one", "empty"}
    assert 0.65 < counts["one"] / 300 < 0.85
    for wrong in ({"best": 1.0}, {"one": -1.0, "good": 2.0}, {"one": 0.0}, {}, "nice"):
        with pytest.raises(ValidationError, match="mix"):
            SceneConfig(n=1, size=64, seed=0, mix=wrong)
