"""Captions against the scenes they are of: the renderer's are understood whole and found true, changed ones are not."""

import random
import re

import pytest
from pairs_made import picture

from cutline.captions.score.base import Asked
from cutline.captions.score.parse import Mention, parse
from cutline.captions.score.truth import COUNTS, TruthScores, judge, scores, world_of
from cutline.captions.work import Failed
from cutline.errors import DataError
from cutline.pairs import Pairs, create_from_rows
from cutline.scenes import SceneConfig
from cutline.scenes.captions import captions
from cutline.scenes.layout import layout
from cutline.scenes.objects import OBJECTS
from cutline.scenes.write import write_pairs

SCENES = [(seed, i) for seed in (0, 5) for i in range(150)]
KIND = {o.name: k for k, o in enumerate(OBJECTS)}


def told():
    """(caption, scene) of all captions of 300 scenes."""
    return [(text, layout(*at)) for at in SCENES for text in captions(layout(*at), *at)]


def test_all_that_the_renderer_says_is_true():
    for text, scene in told():
        found = scores(judge(parse(text), scene))
        for name in ("object_precision", "attribute_precision", "relation_precision"):
            assert found[name] in (None, 1.0), (name, text)
        assert found["object_precision"] == 1.0, text


def test_all_that_the_renderer_says_is_understood():
    """No object of up to four kinds is missed, and whoever tells a relation is heard."""
    words = re.compile(r"\bleft\b|\bright (?:of|side|to)\b|on the right|behind|in front|ground and|farther|nearest|next to|"
                       r"\bbeside\b|close to|nearer|distant than|right by|closer", re.IGNORECASE)  # fmt: skip
    heard = 0
    for text, scene in told():
        said = parse(text)
        counts = judge(said, scene)
        if counts["objects_there"] <= 4:
            assert counts["objects_named"] == counts["objects_there"], text
        assert bool(said.claims or said.rows) == bool(words.search(text)), text
        heard += counts["relations_told"] > 0
        assert counts["relations_found"] <= counts["relations_there"]
    assert heard > 300


def test_another_object_lowers_object_precision():
    draw = random.Random(0)
    for text, scene in told():
        kinds = sorted({m.kind for m in parse(text).mentions})
        old = OBJECTS[draw.choice(kinds)]
        new = OBJECTS[draw.choice([k for k in range(len(OBJECTS)) if k not in {i.kind for i in scene.items}])]
        names = ((old.many, new.many), (f"{old.other}s", new.many), (old.name, new.name), (old.other, new.name))
        for a, b in names:
            text = re.sub(rf"\b{a}\b", b, text, flags=re.IGNORECASE) if a.strip("s") else text
        found = scores(judge(parse(text), scene))
        assert found["object_precision"] < 1, text
        assert found["object_recall"] < 1


def test_the_other_way_round_a_relation_is_wrong():
    swaps = {"to the left of": "to the right of", "in front of": "behind", "from left to right": "from right to left",
             "closer to the camera than": "farther away than", "in the foreground": "in the background"}  # fmt: skip
    changed = 0
    for text, scene in told():
        counts = judge(parse(text), scene)
        for a, b in [*swaps.items(), *((b, a) for a, b in swaps.items())]:
            if a in text.lower() and counts["relations_told"] == 1:
                placed = re.sub(b, "@", text, flags=re.IGNORECASE)
                other = re.sub(a, b, placed, flags=re.IGNORECASE).replace("@", a)
                assert judge(parse(other), scene)["relations_right"] == 0, other
                changed += 1
    assert changed > 50


def test_a_wrong_number_or_colour_lowers_attribute_precision():
    scenes = (layout(0, i) for i in range(500))
    scene = next(
        s for s in scenes if len(s.items) == 1 and s.items[0].colour == "red" and not OBJECTS[s.items[0].kind].plural
    )
    item = scene.items[0]
    for text, precision in (("one red {}", 1.0), ("a {}", None), ("one blue {}", 0.5), ("five red {}s", 0.5)):
        found = scores(judge(parse(text.format(item.name)), scene))
        assert (found["object_precision"], found["attribute_precision"]) == (1.0, precision)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("A hot dog and a dog", ["hot dog", "dog"]),
        ("two slices of pizza, some pizza", ["slice of pizza", "slice of pizza"]),
        ("an orange next to an orange helicopter", ["orange", "helicopter"]),
        ("my Bike | Gallery", ["bicycle"]),
        ("imagen de manzana", []),
        ("IMG_2034.JPG", []),
        ("no cars, just one small brown dog", ["dog"]),
        ("", []),
    ],
)
def test_objects_by_name_plural_synonym_and_longest_match(text, names):
    assert [OBJECTS[m.kind].name for m in parse(text).mentions] == names


def test_colours_and_numbers_belong_to_their_object():
    assert parse("three small red cars and a grey elephant").mentions == [
        Mention(KIND["car"], 3, ("red",)),
        Mention(KIND["elephant"], None, ("grey",)),
    ]
    assert parse("one orange and one green helicopter").mentions == [
        Mention(KIND["helicopter"], 2, ("orange", "green"))
    ]


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("A dog is to the left of the cat.", [("left", "dog", "cat")]),
        ("Behind a car there are two cows.", [("behind", "cow", "car")]),
        ("On the left side of the bus is a dog", [("left", "dog", "bus")]),
        ("In the foreground a dog, in the background a bus", [("nearer", "dog", "bus")]),
        ("A dog near a cat behind a car", [("beside", "dog", "cat"), ("behind", "cat", "car")]),
        ("A dog near, and a cat", []),
        ("Left of nothing. A dog", []),
    ],
)
def test_relations_of_captions_by_others(text, claims):
    found = [(c.relation, OBJECTS[c.a.kind].name, OBJECTS[c.b.kind].name) for c in parse(text).claims]
    assert found == claims


def test_rows_are_read_from_left_to_right_either_way():
    for text in ("from left to right: a dog, a cat and a cow", "a cow, a cat then a dog, right to left",
                 "a row from right to left of a cow, a cat and a dog"):  # fmt: skip
        assert [OBJECTS[m.kind].name for m in parse(text).rows[0]] == ["dog", "cat", "cow"]
    assert len(parse("On the right is a dog and on the left is a cat").rows[0]) == 2
    assert parse("On the right is a dog and on the left is a cat").rows[0][0].kind == KIND["cat"]


def test_a_row_with_two_exchanged_is_right_in_part():
    scenes = (layout(1, i) for i in range(500))
    scene = next(s for s in scenes if len(s.items) == len({item.kind for item in s.items}) == 4)
    names = [i.name for i in sorted(scene.items, key=lambda i: i.x)]
    right = judge(parse("From left to right: " + ", ".join(f"a {n}" for n in names)), scene)
    assert (right["relations_told"], right["relations_right"]) == (3, 3)
    names[0], names[1] = names[1], names[0]
    wrong = judge(parse("From left to right: " + ", ".join(f"a {n}" for n in names)), scene)
    assert 0 < wrong["relations_right"] < wrong["relations_told"] == 3


def test_sums_over_a_set_are_micro_averages():
    a = dict.fromkeys(COUNTS, 0) | {"objects_named": 1, "objects_right": 1, "objects_there": 4}
    b = dict.fromkeys(COUNTS, 0) | {"objects_named": 3, "objects_right": 0, "objects_there": 4}
    both = scores({c: a[c] + b[c] for c in COUNTS})
    assert (both["object_precision"], both["object_recall"]) == (1 / 4, 1 / 8)
    assert both["object_f1"] == pytest.approx(2 * 1 / 4 * 1 / 8 / (1 / 4 + 1 / 8))
    assert both["relation_precision"] is None


def test_rows_of_a_table_are_scored_against_their_own_scene(tmp_path):
    write_pairs(SceneConfig(n=12, size=48, seed=4, objects=32), tmp_path / "t.lance")
    pairs = Pairs.open(tmp_path / "t.lance")
    world = world_of(pairs)
    assert (world.seed, world.objects) == (4, 32)
    worker = TruthScores(Asked("captions", "s", ("object_precision", "counts"), True), world).load()
    rows = pairs.read(range(12), ["key", "captions"])
    assert all(set(m["s_object_precision"]) == {1.0} for m in worker.make(rows))
    moved = [{"key": rows[(i + 1) % 12]["key"], "captions": r["captions"]} for i, r in enumerate(rows)]
    assert sum(min(m["s_object_precision"]) for m in worker.make(moved)) < 6
    odd = worker.make([{"key": "000001.jpg", "captions": ["a dog"]}, {"key": "s4-00000001", "captions": None}])
    assert odd[0] == Failed("no scene of the world has this key")
    assert odd[1] == {"s_object_precision": None, "s_counts": None}


def test_other_tables_have_no_truth(tmp_path):
    create_from_rows(tmp_path / "o.lance", [{"key": "a", "image": picture(1), "alt": "a dog"}])
    with pytest.raises(DataError, match="only for scenes"):
        world_of(Pairs.open(tmp_path / "o.lance"))
