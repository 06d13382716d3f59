"""Fusing by rules: names are kept, and what is no name is not."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutline.captions.patterns import is_boilerplate, is_filename
from cutline.captions.rules import MAX_NAMES, RulesFuse, fuse_by_rules, names_of
from cutline.captions.work import Failed
from cutline.scenes.alt import USEFUL
from cutline.scenes.objects import OBJECTS
from cutline.scenes.source import SceneConfig, Scenes


@pytest.mark.parametrize(
    ("alt", "caption", "fused"),
    [
        ("Rex | Labrador, photo by Anna", "A dog on grass.", "A dog on grass, Rex and Labrador."),
        ("Statue of Liberty, New York, March 2015", "a statue near water", "a statue near water, Statue of Liberty and New York"),
        ("Buy Red Bucket online | free shipping | 20% off", "a cat on grass", "a cat on grass, Red Bucket"),
        ("Boeing 747 - high quality photo", "a plane", "a plane, Boeing 747"),
        ("iPhone 12 Pro - best price $999.00", "a phone", "a phone, iPhone 12 Pro"),
        ("Musée du Louvre, photo de famille", "people in a museum", "people in a museum, Musée du Louvre"),
        ("my rooster", "a rooster stands on sand", "a rooster stands on sand"),
        ("two roosters", "two roosters", "two roosters"), ("Cherries", "a cherry", "a cherry"),
        ("dog 45", "a cat", "a cat, dog"), ("bunch of grapes", "an apple", "an apple, bunch of grapes"),
        ("perro bonito", "a dog", "a dog"), ("Hund kaufen", "a dog", "a dog"), ("Foto: Auto", "a car", "a car"),
        ("DSC_0001 anna@b.org www.x.com 555-123-4567", "a dog", "a dog"), ("12345 6789", "a dog", "a dog"),
        ("St. Bernard", "a dog", "a dog, St. Bernard"), ("St. Bernard. Rex", "a St Bernard", "a St Bernard, Rex"),
        ("Dinner with Mrs. Brown", "a dog", "a dog, Dinner and Mrs. Brown"), ("Dog at the coast. Rex", "a dog", "a dog, coast and Rex"),
        ("Cookie Monster", "a puppet", "a puppet, Cookie Monster"), ("cookies", "a plate", "a plate, cookies"),
        ("March in Washington", "a crowd", "a crowd, March in Washington"), ("a dog in Rome", "a dog", "a dog, Rome"),
        ("John's dog Max in Central Park", "a cat", "a cat, John's dog Max and Central Park"),
        ("one, two boats, three cars, four birds, five trees", "a dog", "a dog, two boats, three cars and four birds"),
    ],
)  # fmt: skip
def test_names_that_the_caption_lacks_are_appended(alt: str, caption: str, fused: str) -> None:
    assert fuse_by_rules(alt, caption) == fused


@given(st.text(max_size=200), st.text(max_size=60))
def test_any_two_texts_give_the_caption_and_few_names(alt: str, caption: str) -> None:
    fused = fuse_by_rules(alt, caption)
    assert fused == caption or fused.startswith(caption.rstrip(" ."))
    assert len(set(names_of(alt))) == len(names_of(alt))
    assert fused.count(" and ") <= caption.count(" and ") + 1 + MAX_NAMES * 2


def test_on_scenes_the_object_of_a_useful_alt_text_is_kept_and_rubbish_is_not() -> None:
    kept: dict[str, list[bool]] = {}
    objects = [o.name for o in OBJECTS]
    for row in Scenes(SceneConfig(n=600, size=64)).read(range(600), ["alt", "alt_kind"]):
        alt = row["alt"] or ""
        names = [] if is_filename(alt) or is_boilerplate(alt) else names_of(alt)
        found = any(re.search(rf"\b{re.escape(o)}s?\b", name.lower()) for name in names for o in objects)
        kept.setdefault(row["alt_kind"], []).append(found if row["alt_kind"] in USEFUL else bool(names))
    share = {kind: sum(values) / len(values) for kind, values in kept.items()}
    assert share["one"] == share["shop"] == 1
    assert share["good"] > 0.95
    assert share["filename"] == share["boilerplate"] == 0
    assert share["foreign"] < 0.1, "a German word is no help, unless it is an English one too"


def test_the_work_fuses_columns_and_cuts_at_the_limit() -> None:
    rows: list[dict[str, Any]] = [
        {"key": "a", "alt": "Rex", "ours": ["a dog", "a puppy"]}, {"key": "b", "alt": None, "ours": "a cat"},
        {"key": "c", "alt": "IMG_1.JPG", "ours": None}, {"key": "d", "alt": "Rex", "ours": "a dog sits. " * 3},
    ]  # fmt: skip
    worker = RulesFuse(inputs=["alt", "ours"], column="fused", limit=10).load()
    made = worker.make(worker.prepare(rows))
    assert made == [
        {"fused": "a dog, Rex"},
        {"fused": "a cat"},
        Failed("no text"),
        {"fused": "a dog sits. a dog sits."},
    ]
